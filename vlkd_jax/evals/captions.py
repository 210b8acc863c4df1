"""Scores of captions: word overlap with human references."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from vlkd_jax.evals.vqa import plain


def f1(right: int, said: int, true: int) -> float:
    """Harmonic mean of right / said and right / true; 0 when nothing is right."""
    return 2 * right / (said + true) if right else 0.0


def word_f1(caption: str, references: Sequence[str]) -> float:
    """Best F1 over the references of the caption's words as multisets. A rough figure, not a published metric."""
    words = Counter(plain(caption).split())
    best = 0.0
    for reference in references:
        other = Counter(plain(reference).split())
        best = max(best, f1((words & other).total(), words.total(), other.total()))
    return best
