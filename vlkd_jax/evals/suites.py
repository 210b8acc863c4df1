"""The kinds of suite there are, by the `kind` that a suite's config gives."""

from __future__ import annotations

from vlkd_jax.evals import caption_suite, classification_suite, glue_suite, retrieval_suite, summary_suite, vqa_suite
from vlkd_jax.shapes import suite as shapes

SUITES = {
    "shapes": shapes.SUITE,
    "vqa": vqa_suite.SUITE,
    "caption": caption_suite.SUITE,
    "retrieval": retrieval_suite.SUITE,
    "classification": classification_suite.SUITE,
    "summary": summary_suite.SUITE,
    "glue": glue_suite.SUITE,
}
