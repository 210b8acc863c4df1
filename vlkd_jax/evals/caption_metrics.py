"""BLEU, ROUGE-L and CIDEr-D of captions as the standard caption tools compute them, from tokens.

Sources: Papineni et al. 2002, Lin 2004, Vedantam et al. 2015, with the constants of the public evaluation code for COCO
(Chen et al. 2015), reimplemented. METEOR and SPICE need Java programs and are not here: see `standard_captions`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np

from vlkd_jax.evals.ptb import tokenize

Tokens = Sequence[str]
ORDERS = 4
"""n-grams of one token to four."""
SIGMA = 6.0
"""Of CIDEr-D's penalty for another length."""
BETA = 1.2
"""How much more ROUGE-L's recall weighs than its precision."""


def ngrams(tokens: Tokens) -> list[Counter[tuple[str, ...]]]:
    """How often each n-gram occurs, for n from 1 to 4."""
    return [Counter(zip(*(tokens[k:] for k in range(n)), strict=False)) for n in range(1, ORDERS + 1)]


def bleu_counts(candidate: Tokens, references: Sequence[Tokens]) -> np.ndarray:
    """What one picture adds to BLEU, float [10]: n-grams right and said for n from 1 to 4, length, nearest length."""
    limits = [Counter() for _ in range(ORDERS)]
    for reference in references:
        limits = [a | b for a, b in zip(limits, ngrams(reference), strict=True)]
    counts = ngrams(candidate)
    right = [(a & b).total() for a, b in zip(counts, limits, strict=True)]
    nearest = min((abs(len(reference) - len(candidate)), len(reference)) for reference in references)[1]
    return np.array([*right, *(count.total() for count in counts), len(candidate), nearest], float)


def bleu(total: np.ndarray) -> list[float]:
    """Corpus BLEU-1 to BLEU-4 in [0, 1] of summed `bleu_counts`; the shorter of two nearest references counts."""
    right, said, (length, nearest) = total[:ORDERS], total[ORDERS : 2 * ORDERS], total[2 * ORDERS : 2 * ORDERS + 2]
    precisions = (right + 1e-15) / (said + 1e-9)
    values = np.cumprod(precisions) ** (1 / np.arange(1, ORDERS + 1))
    ratio = (length + 1e-15) / (nearest + 1e-9)
    return [float(value) * (math.exp(1 - 1 / ratio) if ratio < 1 else 1.0) for value in values]


def rouge_l(candidate: Tokens, references: Sequence[Tokens]) -> float:
    """ROUGE-L in [0, 1]: of precision and recall, by the longest common subsequence, each the best over references."""
    common = [_longest_common(candidate, reference) for reference in references]
    precision = max(common) / max(len(candidate), 1)
    recall = max(c / max(len(reference), 1) for c, reference in zip(common, references, strict=True))
    if not precision or not recall:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def _longest_common(a: Tokens, b: Tokens) -> int:
    row = [0] * (len(b) + 1)
    for token in a:
        before = 0
        for k, other in enumerate(b, 1):
            before, row[k] = row[k], before + 1 if token == other else max(row[k], row[k - 1])
    return row[-1]


class DocumentFrequencies:
    """In how many pictures' references each n-gram occurs, of `count` pictures."""

    def __init__(self, references: Iterable[Sequence[Tokens]]):
        self.of: Counter[tuple[str, ...]] = Counter()
        self.count = 0
        for given in references:
            self.of.update({ngram for reference in given for counts in ngrams(reference) for ngram in counts})
            self.count += 1

    def vectors(self, tokens: Tokens) -> list[dict[tuple[str, ...], float]]:
        """tf-idf of the n-grams, a vector for each n."""
        total = math.log(self.count)
        return [{g: c * (total - math.log(max(self.of[g], 1))) for g, c in counts.items()} for counts in ngrams(tokens)]


def cider(candidate: Tokens, references: Sequence[Tokens], frequencies: DocumentFrequencies) -> float:
    """CIDEr-D of one picture, in [0, 10]; the figure of a set is the mean over its pictures."""
    said, total = frequencies.vectors(candidate), 0.0
    norms = [_norm(vector) for vector in said]
    for reference in references:
        penalty = math.exp(-((len(candidate) - len(reference)) ** 2) / (2 * SIGMA**2))
        for vector, norm, other in zip(said, norms, frequencies.vectors(reference), strict=True):
            both = norm * _norm(other)
            if both:
                product = sum(min(value, other[g]) * other[g] for g, value in vector.items() if g in other)
                total += penalty * product / both
    return 10 * total / (ORDERS * len(references))


def name() -> str:
    """What a result says that it was scored by."""
    return f"vlkd_jax {version('vlkd_jax')}, without Java"


def tokenize_all(captions: Sequence[str]) -> list[list[str]]:
    """Tokens of each caption."""
    return [tokenize(caption) for caption in captions]


def scores(candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> dict[str, Any]:
    """`Bleu`, four of the whole; `ROUGE_L` and `CIDEr`, arrays [pictures].

    The document frequencies are those of the references given.
    """
    frequencies = DocumentFrequencies(references)
    pairs = list(zip(candidates, references, strict=True))
    return {
        "Bleu": bleu(np.sum([bleu_counts(*pair) for pair in pairs], 0)),
        "ROUGE_L": np.array([rouge_l(*pair) for pair in pairs]),
        "CIDEr": np.array([cider(*pair, frequencies) for pair in pairs]),
    }


def _norm(vector: dict[tuple[str, ...], float]) -> float:
    return math.sqrt(sum(value**2 for value in vector.values()))
