"""Scores of short answers: exact match for the built-in world, and VQA accuracy for human answers.

Source of the rule: Antol et al. 2015 and Goyal et al. 2017 with their public evaluation script, reimplemented. What
other programs publish under the same name is not the same figure: `RULES` holds theirs, written from reading them.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence

HUMANS = 10
"""Answers to a question that VQA accuracy takes."""
HUMANS_AT_LEAST = 4
"""Of fewer not even the answer of all would score 1: three others have to have given it."""
_ARTICLES = frozenset(("a", "an", "the"))
_DIGITS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6"}
_DIGITS |= {"seven": "7", "eight": "8", "nine": "9", "ten": "10"}
_CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're
there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've
when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't
wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
# A word that lacks one of its apostrophes gets it back; the official table takes it from "somebody'd". That table's
# entries with a capital I are left out: it is looked up after lower-casing, so they never match.
_CONTRACTIONS = {
    word[:k] + word[k + 1 :]: word for word in _CONTRACTED.split() for k, letter in enumerate(word) if letter == "'"
} | {"somebody'd": "somebodyd"}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_PERIOD = re.compile(r"(?!<=\d)(\.)(?!\d)")
_COMMA = re.compile(r"(\d)(\,)(\d)")
_COMMAS = re.compile(r"(?<=\d)(\,)+(?=\d)")
_PERIODS_AT_MOST = int(re.UNICODE)  # the official script passes this flag where re.sub takes a count


def plain(text: str) -> str:
    """Lower case, punctuation and articles dropped, spaces single: for exact match on the built-in world."""
    words = re.sub(r"[^\w\s]", " ", text.lower()).split()
    return " ".join(w for w in words if w not in _ARTICLES)


def exact_match(answer: str, truth: str) -> bool:
    """Whether two answers are the same after `plain`."""
    return plain(answer) == plain(truth)


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _without_marks(text: str, joined: bool) -> str:
    """Punctuation dropped or, where none of it stands beside a space and `joined` is false, made a space."""
    out = text
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if beside_space or joined else " ")
    return _PERIOD.sub("", out, count=_PERIODS_AT_MOST)


def _words(text: str) -> str:
    words = (_DIGITS.get(word, word) for word in text.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


@functools.lru_cache(1 << 16)  # the answers of a set are few
def normalize_answer(answer: str) -> str:
    """The official script's processing: punctuation, number words, articles, contractions."""
    text = _one_line(answer)
    return _words(_without_marks(text, _COMMA.search(text) is not None))


def _agree(answer: str, answers: Sequence[str]) -> float:
    """The mean over each human left out of min(matches among the others / 3, 1)."""
    total = answers.count(answer)
    return sum(min((total - (human == answer)) / 3, 1) for human in answers) / len(answers)


def _official_texts(answer: str, human_answers: Sequence[str]) -> tuple[str, list[str]]:
    """Both sides as the official script compares them: normalised only when the humans differ."""
    answers, answer = [_one_line(human) for human in human_answers], _one_line(answer)
    if len(set(answers)) > 1:
        return normalize_answer(answer), [normalize_answer(human) for human in answers]
    return answer, answers


def accuracy(answer: str, human_answers: Sequence[str]) -> float:
    """VQA accuracy in [0, 1]: the mean over each human left out of min(matches among the others / 3, 1).

    Answers are normalised only when the humans differ, as the official script does.
    """
    return _agree(*_official_texts(answer, human_answers))


def _without_leaving_out(answer: str, human_answers: Sequence[str]) -> float:
    """min(matches / 3, 1), as papers describe the rule in short, and some evaluators compute it."""
    answer, answers = _official_texts(answer, human_answers)
    return min(answers.count(answer) / 3, 1)


def _lavis(answer: str, human_answers: Sequence[str]) -> float:
    """LAVIS: the answer is always normalised; of the humans', where they differ, the punctuation alone."""
    answers = list(human_answers)
    if len(set(answers)) > 1:
        answers = [_without_marks(human, _COMMA.search(human) is not None) for human in answers]
    return _agree(normalize_answer(answer), answers)


@functools.lru_cache(1 << 16)
def _lmms_normalised(answer: str) -> str:
    text = _one_line(answer)
    return _words(_without_marks(text, _COMMAS.search(text) is not None))


def _lmms_vqav2(answer: str, human_answers: Sequence[str]) -> float:
    """lmms-eval's task vqav2: both sides are always normalised."""
    return _agree(_lmms_normalised(answer), [_lmms_normalised(human) for human in human_answers])


def _lmms_okvqa(answer: str, human_answers: Sequence[str]) -> float:
    """lmms-eval's task ok_vqa: as its vqav2, after commas and question marks are dropped and 's is split off."""
    answer, *answers = (
        _lmms_normalised(text.lower().replace(",", "").replace("?", "").replace("'s", " 's"))
        for text in (answer, *human_answers)
    )
    return _agree(answer, answers)


RULES = {
    "official": accuracy,
    "lavis": _lavis,
    "lmms_eval_vqav2": _lmms_vqav2,
    "lmms_eval_ok_vqa": _lmms_okvqa,
    "no_leave_one_out": _without_leaving_out,
}
"""(answer, human answers) -> accuracy in [0, 1] by the rule of that name; the first one is the benchmarks' own."""
