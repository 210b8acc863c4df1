"""What became of the student's text abilities: denoising of held-out texts, and questions answered from a description.

No image is involved. The same functions run during training, before and after distillation.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence

import jax

from vlkd_jax import sharding
from vlkd_jax.data.sources import TextQuestion
from vlkd_jax.decoding import Decoding
from vlkd_jax.losses import finish
from vlkd_jax.predict import Request, generate
from vlkd_jax.types import Batch, Params
from vlkd_jax.vlkd import VLKD

PROMPT = "question: {question} answer:"
"""Forced on the decoder; the encoder reads it followed by `<mask>`."""


def mean_terms(terms: Callable, params: Params, frozen, batches: Iterable[Batch]) -> dict[str, float]:
    """Means of loss terms over batches, without dropout: sums and counts are added up before they are divided."""
    totals: dict[str, list[float]] = {}
    for batch in batches:
        for name, (value, count) in terms(params, frozen, batch).items():
            total = totals.setdefault(name, [0.0, 0.0])
            total[0] += float(value)
            total[1] += float(count)
    return {name: value / count for name, (value, count) in totals.items()}


def without_dropout(terms: Callable) -> Callable:
    """A jitted (params, frozen, batch) -> the finished terms of a task's `terms`, dropout off."""
    return jax.jit(functools.partial(_deterministic, terms))


def _deterministic(terms: Callable, params: Params, frozen, batch: Batch):
    finished = finish(terms(params, frozen, batch, None))
    return jax.tree.map(sharding.constrain, finished)  # whole on every process


def answer_texts(model: VLKD, questions: Sequence[TextQuestion], max_new_tokens: int = 10) -> list[str]:
    """The answers of the text-only student: a description stands in the decoder's memory where an image would."""
    text, requests = model.bart_text, []
    for question in questions:
        prompt = text.encode(PROMPT.format(question=question.question))
        requests.append(Request([*prompt, text.mask], prompt, context=text.encode(question.context)))
    return [text for (text,) in generate(model, requests, Decoding(max_new_tokens=max_new_tokens))]
