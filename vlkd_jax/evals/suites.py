"""The kinds of suite there are, by the `kind` that a suite's config gives."""

from __future__ import annotations

from vlkd_jax.evals import official
from vlkd_jax.shapes import suite as shapes

SUITES = {"shapes": shapes.SUITE, "vqa": official.VQA, "caption": official.CAPTION}
