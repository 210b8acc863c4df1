"""Words of captions as the standard caption tools see them: Penn Treebank tokens, lower case, without punctuation.

The published figures come from a Java program, Stanford's PTBTokenizer 3.4.1. This is a rewrite of what of its rules
captions meet: clitics, abbreviations, numbers, hyphens, brackets. It reads text as one line, whatever stands in it.
"""

from __future__ import annotations

import re

ABBREVIATIONS = """mr mrs ms dr prof st ave blvd rd ft etc jr sr vs gen col sgt capt lt sen rep gov rev hon messrs inc
co corp ltd mt jan feb mar apr jun jul aug sep sept oct nov dec dept univ assn bros est"""
"""These keep their period wherever they stand, and so do single letters but at the end."""
STATES = """Ala Ariz Ark Calif Colo Conn Del Fla Ga Ill Ind Kan Ky KY La Md Mass Mich Minn Miss Mo Mont Neb Nev Okla Ore
Pa Penn Tenn Tex Vt Va Wash Wis Wyo"""
"""Likewise, with the capital."""
SPLIT = {"cannot": 3, "gonna": 3, "gotta": 3, "gimme": 3, "lemme": 3, "wanna": 3}
"""Words that are two, and where the second begins."""
BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
PUNCTUATION = frozenset(["''", "'", "``", "`", '"', "“", "”", "–", "—", ".", "?", "!", ",", ":", "-", "--", "...", ";"])
"""Tokens that the standard tools drop; brackets, which they mean to drop, stay there, being in lower case by then."""

WRITTEN_OUT = str.maketrans(
    {"½": "\t1/2", "¼": "\t1/4", "¾": "\t3/4", "…": "\t...", "€": "$", "£": "#", "\xad": "", "’": "'"}
)
"""Characters that the Java program reads as others."""
_UNREAD = re.compile(
    r"[\x00-\x08\x0e-\x1b\x7f\u200b-\u200f\u2060-\u206f\ufe00-\ufe0f\ufeff\ud800-\uf8ff\U00010000-\U0010ffff]"
)
"""Characters that it passes over, as if a space stood there: controls, marks without a width, all emoji."""

_CLITIC = r"(?:n't|'(?:s|d|m|ll|re|ve))(?!\w)"
_INSIDE = rf"[-/.](?=[^\W_])|_|(?<=[aeiouy])'(?=[aeiou])(?!{_CLITIC})"  # what may stand between letters: pe'e
_TOKEN = re.compile(
    rf"""
    (?:https?://|www\.)\S+ | [\w.+-]+@\w+(?:\.\w+)+ | </?[a-z][^<>]*>
  | \d+\ \d/\d(?![\d/])                                            # 22 3/4
  | \d{{1,2}}[-/]\d{{1,2}}[-/]\d{{2,4}}                            # 10-29-2011
  | (?<!\w)ph\.d\.
  | (?:[a-z]\.)+[a-z](?![a-z])\.?                                  # U.S.A, T.V.
  | (?<!\w)(?!i\.)[a-z]\.(?!\s*$)                                 # Michael L. Baird
  | (?<!\w)(?:{"|".join(ABBREVIATIONS.split())})\.
  | (?-i:(?<!\w)(?:{"|".join(STATES.split())})\.) | (?<!\w)no\.(?=\s*\d)
  | \w+\.(?=[,;:])                                                # truck.,
  | (?<!\w)[-+]\d+(?:[:.,]\d+)* | (?<!\w)'\d\ds(?!\w)
  | \d+(?:[:.,]\d+)+                                               # 10:30, 1,000
  | 't(?=is(?!\w)|was(?!\w)) | 'em(?!\w) | 'n' | 'n(?!\w) | y'(?=[a-z]) | c'mon(?!\w) | c\+\+
  | [a-z]*?[a-mo-z](?=n't(?!\w)) | \#[a-z]\w*                       # do|n't
  | {_CLITIC}
  | (?<!\w)[dol]'[a-z]\w*
  | [^\W_]+(?:(?:{_INSIDE})\w+)*                                  # and/or, close-up
  | \.{{3}} | -{{2,}} | [!?]+
  | \S
    """,
    re.VERBOSE | re.IGNORECASE,
)


def tokenize(caption: str) -> list[str]:
    """Lower-case tokens of a caption, punctuation dropped."""
    tokens: list[str] = []
    for match in _TOKEN.finditer(_UNREAD.sub(" ", caption.translate(WRITTEN_OUT))):
        token = match.group().lower()
        at = SPLIT.get(token, 0)
        token = BRACKETS.get(token, token.replace(" ", "\xa0"))
        tokens += [token[:at], token[at:]] if at else [token]
    return [token for token in tokens if token not in PUNCTUATION]
