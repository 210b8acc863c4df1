"""Caption metrics: the figures and the tokens of the standard Java tools, and their formulas written out plainly."""

import gzip
import hashlib
import itertools
import json
import math

import pytest
from tiny import SHARED_DATA

from vlkd_jax.evals.caption_metrics import DocumentFrequencies, cider, ngrams, rouge_l, scores
from vlkd_jax.evals.ptb import tokenize

JAVA_TOKENS = "5579d9782f1a1269bc773948f1c3515262ba3c57e00b4e4ad1cda6f2613b4bc1"
"""sha256 of what PTBTokenizer 3.4.1 makes of the 54,612 captions, punctuation dropped as pycocoevalcap 1.2 does."""


@pytest.fixture(scope="module")
def coco():
    """(annotations, results, expected figures)."""
    folder = SHARED_DATA / "coco_captions"
    annotations = json.loads(gzip.decompress((folder / "captions_val2014_partial.json.gz").read_bytes()))["annotations"]
    results = json.loads((folder / "captions_val2014_fakecap_results.json").read_text())
    return annotations, results, json.loads((folder / "fakecap_expected.json").read_text())


@pytest.mark.shared_data
def test_every_caption_has_the_java_tokens(coco):
    lines = [" ".join(tokenize(annotation["caption"])) for annotation in coco[0]]
    assert len(lines) == 54612
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == JAVA_TOKENS


@pytest.mark.shared_data
def test_known_figures(coco):
    annotations, results, expected = coco
    references = {}
    for annotation in annotations:
        references.setdefault(annotation["image_id"], []).append(tokenize(annotation["caption"]))
    said = [tokenize(result["caption"]) for result in results]
    figures = scores(said, [references[result["image_id"]] for result in results])
    assert figures["Bleu"] == pytest.approx(expected["Bleu"], abs=1e-9)
    for name in ("ROUGE_L", "CIDEr"):
        assert figures[name].mean() == pytest.approx(expected[name], abs=1e-9)


@pytest.mark.parametrize(
    ("caption", "tokens"),
    [
        ("A man's dog doesn't bark.", "a man 's dog does n't bark"),
        ("They cannot; we're gonna!", "they can not we 're gon na"),
        ("a close-up of St. Mary's (left), and/or 3.5", "a close-up of st. mary 's -lrb- left -rrb- and/or 3.5"),
        ("The U.S. T.V. at 10:30 p.m. costs $5, 50%", "the u.s. t.v. at 10:30 p.m. costs $ 5 50 %"),
        ('a "red" sign... wait!! "', "a red sign wait !!"),
        ("café o'clock 70's t-shirt", "café o'clock 70 's t-shirt"),
        ("1½ cups at £5… a 😀bus\u200b it\xads ❤\ufe0f", "1 1/2 cups at # 5 a bus its ❤"),
        ("a\x00b 🚌", "a b"),
        ("", ""),
    ],
)
def test_tokens(caption, tokens):
    """As the Java program gives them."""
    assert tokenize(caption) == tokens.split()


def test_line_breaks_of_any_kind_are_spaces():
    for mark in ("\r", "\n", "\r\n", "\u2028", "\u2029", "\v", "\f", "\x85", "\t"):
        assert tokenize(f"a red{mark}bus") == ["a", "red", "bus"]


@pytest.fixture
def corpus(rng):
    """(candidates, references): words of a small vocabulary, lengths that differ."""
    words = [f"w{k}" for k in range(4)]

    def text():
        return rng.choice(words, rng.integers(1, 12)).tolist()

    return [text() for _ in range(40)], [[text() for _ in range(rng.integers(1, 6))] for _ in range(40)]


def grams(tokens, n):
    return [tuple(tokens[k : k + n]) for k in range(len(tokens) - n + 1)]


def test_bleu_by_its_formula(corpus):
    candidates, references = corpus
    precisions = []
    for n in range(1, 5):
        right = said = 0
        for candidate, given in zip(*corpus, strict=True):
            for gram in set(grams(candidate, n)):
                most = max(grams(reference, n).count(gram) for reference in given)
                right += min(grams(candidate, n).count(gram), most)
            said += max(len(candidate) - n + 1, 0)
        precisions.append(right / said)
    length = sum(map(len, candidates))
    nearest = sum(
        min(map(len, given), key=lambda size: (abs(size - len(candidate)), size))
        for candidate, given in zip(*corpus, strict=True)
    )
    brevity = min(1, math.exp(1 - nearest / length))
    expected = [brevity * math.prod(precisions[:n]) ** (1 / n) for n in range(1, 5)]
    assert scores(candidates, references)["Bleu"] == pytest.approx(expected, rel=1e-6)


def test_rouge_by_all_subsequences(corpus):
    def longest(a, b):
        sizes = range(min(len(a), len(b)), 0, -1)
        subsequences = {tuple(s) for size in sizes for s in itertools.combinations(b, size)}
        return next((k for k in sizes if any(tuple(s) in subsequences for s in itertools.combinations(a, k))), 0)

    for candidate, given in list(zip(*corpus, strict=True))[:12]:
        candidate, given = candidate[:7], [reference[:7] for reference in given]
        precision = max(longest(candidate, reference) / len(candidate) for reference in given)
        recall = max(longest(candidate, reference) / len(reference) for reference in given)
        expected = 2.44 * precision * recall / (recall + 1.44 * precision) if precision else 0
        assert rouge_l(candidate, given) == pytest.approx(expected)


def test_cider_by_its_formula(corpus):
    candidates, references = corpus
    frequencies = DocumentFrequencies(references)

    def vector(tokens, n):
        weights = {}
        for gram in set(grams(tokens, n)):
            pictures = sum(any(gram in grams(reference, n) for reference in given) for given in references)
            weights[gram] = grams(tokens, n).count(gram) * (math.log(40) - math.log(max(pictures, 1)))
        return weights

    def norm(weights):
        return math.sqrt(sum(value**2 for value in weights.values()))

    values = []
    for candidate, given in zip(candidates, references, strict=True):
        total = 0.0
        for n, reference in itertools.product(range(1, 5), given):
            a, b = vector(candidate, n), vector(reference, n)
            if norm(a) and norm(b):
                product = sum(min(a[gram], b[gram]) * b[gram] for gram in a.keys() & b.keys()) / norm(a) / norm(b)
                total += product * math.exp(-((len(candidate) - len(reference)) ** 2) / 72)
        values.append(10 * total / 4 / len(given))
    assert [cider(*pair, frequencies) for pair in zip(*corpus, strict=True)] == pytest.approx(values, abs=1e-9)
    assert max(values) > 0.5


def test_nothing_said_scores_nothing():
    references = [[["a", "red", "bus"]], [["two", "dogs"]]]
    frequencies = DocumentFrequencies(references)
    assert rouge_l([], references[0]) == 0 and cider([], references[0], frequencies) == 0
    assert max(scores([[], []], references)["Bleu"]) < 1e-3 and ngrams([])[0] == {}
    assert cider(["a", "red", "bus"], references[0], frequencies) == pytest.approx(7.5)  # there are no 4-grams
