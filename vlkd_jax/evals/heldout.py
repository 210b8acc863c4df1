"""Figures during training, on held-out pairs and texts only: losses, and what became of the text abilities.

No question about an image is asked here, so nothing that stops or steers a run can look at one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import jax
from ml_collections import ConfigDict

from vlkd_jax import sharding
from vlkd_jax.data.streams import held_out, source_kind
from vlkd_jax.errors import UserError
from vlkd_jax.evals.retention import answer_texts, mean_terms, without_dropout
from vlkd_jax.evals.vqa import exact_match
from vlkd_jax.tasks.task import Frozen, Task
from vlkd_jax.types import Batch, Params
from vlkd_jax.vlkd import VLKD


class HeldOut:
    """Evaluates parameters on the same held-out data each time.

    Keys of a result: `held_out/<term>` for each loss term on held-out pairs; for a student or a BART also
    `retention/denoise_loss`, `retention/token_accuracy` on held-out texts and, on the built-in world,
    `retention/text_qa`, the share of text-only questions answered right.

    Args:
      frozen: what the task holds fixed, on the devices.
      mesh: the devices over which a batch is spread.
    """

    def __init__(self, config: ConfigDict, task: Task, frozen: Frozen, mesh: jax.sharding.Mesh):
        self.task, self.frozen, self.mesh = task, frozen, mesh
        self.pairs = held_out(config, task)
        self.terms = without_dropout(task.terms)
        if task.denoise_terms is None:
            return
        self.denoise_terms = without_dropout(task.denoise_terms)
        self.texts = held_out(config, task, texts=True)
        ask = source_kind(config).text_questions
        self.questions = ask(config.eval.questions) if ask else []

    def __call__(self, params: Params) -> dict[str, float]:
        """Every figure for these parameters."""
        pairs = mean_terms(self.terms, params, self.frozen, self._spread(self.pairs))
        figures = {f"held_out/{name}": value for name, value in pairs.items()}
        if self.task.denoise_terms is None:
            return figures
        texts = mean_terms(self.denoise_terms, params, self.frozen, self._spread(self.texts))
        figures["retention/denoise_loss"] = texts["denoise"]
        figures["retention/token_accuracy"] = texts["token_accuracy"]
        if self.questions:
            answers = answer_texts(VLKD.of(self.task, params, self.frozen, self.mesh), self.questions)
            right = [exact_match(a, question.answer) for a, question in zip(answers, self.questions, strict=True)]
            figures["retention/text_qa"] = sum(right) / len(right)
        return figures

    def _spread(self, batches: list[Batch]) -> Iterator[Batch]:
        return (sharding.put_rows(self.mesh, batch) for batch in batches)


@dataclasses.dataclass
class EarlyStop:
    """Says stop when a retention figure has fallen too far below its value at the start.

    Attributes:
      metric: key of `HeldOut`'s result; empty: never stops.
      max_drop: by how much it may fall.
      start: its value at step 0.
    """

    metric: str
    max_drop: float
    start: float | None = None

    def __call__(self, figures: dict[str, float]) -> bool:
        if not self.metric:
            return False
        if self.metric not in figures:
            known = ", ".join(figures)
            raise UserError(f"config.early_stop.metric is {self.metric!r}; this run measures {known}")
        value = figures[self.metric]
        self.start = value if self.start is None else self.start
        return value < self.start - self.max_drop
