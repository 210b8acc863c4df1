"""Scores of captions: against the scenes of the built-in world, and word overlap with human references."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment

from vlkd_jax.evals.vqa import plain
from vlkd_jax.shapes.world import Scene, parse_caption


def scene_match(caption: str, scene: Scene) -> tuple[bool, int, int, int]:
    """(exact, right, said, true): a caption against the scene it describes.

    Objects of the caption are paired with objects of the scene so that most attributes agree; `right` counts the
    attributes (size, colour, shape, position) that agree in that pairing, `said` and `true` those of either side.
    `exact`: every object with every attribute, and nothing more.
    """
    said, true = parse_caption(caption), [t.attributes for t in scene.things]
    agree = np.zeros((len(said), len(true)), int)
    for row, column in np.ndindex(agree.shape):
        agree[row, column] = sum(a == b != "" for a, b in zip(said[row], true[column], strict=True))
    right = int(agree[linear_sum_assignment(agree, maximize=True)].sum())
    return Counter(said) == Counter(true), right, sum(a != "" for one in said for a in one), 4 * len(true)


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
