"""What an evaluation suite is: items to generate texts for or to match, and scores from the rows that come of them."""

from __future__ import annotations

import dataclasses
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from vlkd_jax import predict
from vlkd_jax.errors import RecordError
from vlkd_jax.evals.retrieval import text_to_image_hits
from vlkd_jax.metrics import say
from vlkd_jax.vlkd import VLKD

Row = dict[str, Any]
"""A line of predictions.jsonl: `task`, `id`, `image`, then what was given, what was said and how it scored; or in place
of the last two `fault`, the reason why its picture could not be used."""
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
      score: judged rows that have a `score`, one at least, nothing else -> metrics.
      results: all rows -> what the benchmark's server takes; None: it has none.
    """

    items: Callable[[ConfigDict], Iterable[Prompt | Match]]
    judge: Callable[[Row], Row]
    score: Callable[[list[Row]], dict[str, Any]]
    results: Callable[[list[Row]], list[dict[str, Any]]] | None = None


def predict_rows(suite: Suite, items: Iterable[Prompt | Match], model: VLKD, batch_size: int) -> Iterator[Row]:
    """Judged rows, as batches are done; pictures are opened as they are needed.

    They come in the items' order, but those of a task whose picture could not be used at its end.
    """
    for _, group in itertools.groupby(items, lambda item: item.row["task"]):
        of_task = list(group)
        run = _generated if isinstance(of_task[0], Prompt) else _matched
        for row in run(model, of_task, batch_size):
            yield row if "fault" in row else row | suite.judge(row)


def _generated(model: VLKD, prompts: list[Prompt], batch_size: int) -> Iterator[Row]:
    asked, faulty = deque(), []
    requests = _requests(model, prompts, asked, faulty)
    for text in predict.generate(model, requests, prompts[0].new_tokens, batch_size):
        yield asked.popleft() | {"raw": text}
    yield from faulty


def _requests(model: VLKD, prompts: list[Prompt], asked: deque[Row], faulty: list[Row]) -> Iterator[predict.Request]:
    """The requests, while `asked` receives their rows, and `faulty` those of pictures that cannot be used."""
    text = model.bart_text
    for _, group in itertools.groupby(prompts, lambda prompt: prompt.row["image"]):
        of_image = list(group)
        try:
            image = of_image[0].open_image() if of_image[0].open_image else None
        except RecordError as e:
            say(f"left out, {e.reason}: {e}")
            faulty += [prompt.row | {"fault": e.reason} for prompt in of_image]
            continue
        for prompt in of_image:
            source = text.encode_template(prompt.source, **prompt.fields)
            prefix = text.encode_template(prompt.prefix, **prompt.fields)
            asked.append(prompt.row)
            yield predict.Request(source, prefix, image, text.encode(prompt.context) if prompt.context else [])


def _matched(model: VLKD, matches: list[Match], batch_size: int) -> Iterator[Row]:
    images = predict.embed_images(model, (match.open_image() for match in matches), batch_size)
    texts = [match.text for match in matches]
    student = text_to_image_hits(predict.embed_texts(model, texts, batch_size), images)
    teacher = text_to_image_hits(predict.embed_texts_clip(model, texts, batch_size), images)
    for match, hit, clip_hit in zip(matches, student, teacher, strict=True):
        yield match.row | {"text": match.text, "hit": bool(hit), "clip_hit": bool(clip_hit)}
