"""What an evaluation suite is: items to generate texts for or to match, and scores from the rows that come of them."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from vlkd_jax import predict
from vlkd_jax.evals.retrieval import text_to_image_hits
from vlkd_jax.vlkd import VLKD

Row = dict[str, Any]
"""A line of predictions.jsonl: `task`, `id`, `image`, then what was given, what was said and how it scored."""
Picture = Image.Image | np.ndarray


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One text to generate. Items of one `task` that share an image follow one another.

    Attributes:
      row: what is known before: `task`, `id`, `image`, `prompt`, `answers` and what else the scores need.
      source, prefix: templates of what the encoder reads, with `<mask>`, and of what the decoder is forced through.
      new_tokens: at most, `</s>` included; the same for all of a task.
      open_image: gives the picture, or None where the question is asked without.
      fields: what the templates' `{name}` become, as plain text.
      context: a text that stands where a picture would.
    """

    row: Row
    source: str
    prefix: str
    new_tokens: int
    open_image: Callable[[], Picture] | None = None
    fields: dict[str, str] = dataclasses.field(default_factory=dict)
    context: str = ""


@dataclasses.dataclass(frozen=True)
class Match:
    """A text to find its own image by, among the images of the task."""

    row: Row
    text: str
    open_image: Callable[[], Picture]


@dataclasses.dataclass(frozen=True)
class Suite:
    """A kind of suite.

    Attributes:
      items: its config -> what is asked. Raises UserError for files that cannot be used.
      judge: a row with `raw` -> what is added to it: `normalised`, `score`, ...
      score: judged rows, nothing else -> metrics.
    """

    items: Callable[[ConfigDict], Iterable[Prompt | Match]]
    judge: Callable[[Row], Row]
    score: Callable[[list[Row]], dict[str, Any]]


def predict_rows(suite: Suite, config: ConfigDict, model: VLKD, batch_size: int) -> Iterator[Row]:
    """Judged rows, in the items' order, as batches are done; pictures are opened as they are needed."""
    for _, group in itertools.groupby(suite.items(config), lambda item: item.row["task"]):
        items = list(group)
        run = _generated if isinstance(items[0], Prompt) else _matched
        for row in run(model, items, batch_size):
            yield row | suite.judge(row)


def _generated(model: VLKD, prompts: list[Prompt], batch_size: int) -> Iterator[Row]:
    texts = predict.generate(model, _requests(model, prompts), prompts[0].new_tokens, batch_size)
    for prompt, text in zip(prompts, texts, strict=True):
        yield prompt.row | {"raw": text}


def _requests(model: VLKD, prompts: list[Prompt]) -> Iterator[predict.Request]:
    text = model.bart_text
    for _, group in itertools.groupby(prompts, lambda prompt: prompt.row["image"]):
        image = None
        for prompt in group:
            image = prompt.open_image() if image is None and prompt.open_image else image
            source = text.encode_template(prompt.source, **prompt.fields)
            prefix = text.encode_template(prompt.prefix, **prompt.fields)
            yield predict.Request(source, prefix, image, text.encode(prompt.context) if prompt.context else [])


def _matched(model: VLKD, matches: list[Match], batch_size: int) -> Iterator[Row]:
    images = predict.embed_images(model, (match.open_image() for match in matches), batch_size)
    texts = [match.text for match in matches]
    student = text_to_image_hits(predict.embed_texts(model, texts, batch_size), images)
    teacher = text_to_image_hits(predict.embed_texts_clip(model, texts, batch_size), images)
    for match, hit, clip_hit in zip(matches, student, teacher, strict=True):
        yield match.row | {"text": match.text, "hit": bool(hit), "clip_hit": bool(clip_hit)}
