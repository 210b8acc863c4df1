"""What an evaluation suite is: items to generate texts for or to match, and scores from the rows that come of them."""

from __future__ import annotations

import dataclasses
import itertools
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from vlkd_jax import predict
from vlkd_jax.console import say
from vlkd_jax.decoding import Decoding
from vlkd_jax.errors import RecordError, UserError
from vlkd_jax.vlkd import VLKD

LEFT_OUT, MISS = "left_out", "miss"
"""What becomes of an item whose picture cannot be used: it has no score, or the score of one that says nothing."""

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
      decoding: how the text is chosen; the same for all of a task.
      open_image: gives the picture, or None where the question is asked without.
      fields: what the templates' `{name}` become, as plain text.
      context: a text that stands where a picture would.
      candidates: texts of which the likeliest is taken instead of a generated one; the same for all of a task.
      cut: the field that is cut at its end where the source would not fit the model; "": none.
    """

    row: Row
    source: str
    prefix: str
    decoding: Decoding
    open_image: Callable[[], Picture] | None = None
    fields: dict[str, str] = dataclasses.field(default_factory=dict)
    context: str = ""
    candidates: tuple[str, ...] = ()
    cut: str = ""


@dataclasses.dataclass(frozen=True)
class Match:
    """A picture and the texts that belong to it, to be found among those of all items of the task."""

    row: Row
    texts: tuple[str, ...]
    open_image: Callable[[], Picture]


Item = Any
"""A `Prompt`, a `Match`, or what a suite's own `predict` takes: each has a `row`."""


def check_item(name: str, model: VLKD, item: Item) -> None:
    """Raises UserError for a picture that the model does not read, and a prompt that is longer than it has room for."""
    try:
        if getattr(item, "open_image", None) is not None:  # a suite's own items need a row alone
            model.needs_pictures()
        if isinstance(item, Prompt):
            new_tokens = 0 if item.candidates else item.decoding.max_new_tokens
            predict.check_request(model, _request(model, item)[0], new_tokens)
    except UserError as e:
        raise UserError(f"{name}: {item.row['task']} {item.row['id']}: {e}") from e


@dataclasses.dataclass(frozen=True)
class Suite:
    """A kind of suite.

    Attributes:
      items: its config -> what is asked. Raises UserError for files that cannot be used.
      predict: (model, items of a task, batch size, "student" or "clip") -> rows, of faulty pictures with `fault` as its
        last ones; None: `Prompt`s are answered.
      judge: a row with `raw` -> what is added to it: `normalised`, `score`, ...
      score: judged rows that have a `score`, one at least, nothing else -> metrics.
      results: all rows -> what the benchmark's server takes; None: it has none.
      picture: (its config, a row) -> the row's picture, for a page; None: that of the name `row["image"]` in the folder
        `images`.
      check: (name of the suite, model, item) raises UserError where the model cannot take the item.
    """

    items: Callable[[ConfigDict], Iterable[Item]]
    judge: Callable[[Row], Row]
    score: Callable[[list[Row]], dict[str, Any]]
    results: Callable[[list[Row]], list[dict[str, Any]]] | None = None
    predict: Callable[[VLKD, list[Item], int, str], Iterator[Row]] | None = None
    picture: Callable[[ConfigDict, Row], Picture] | None = None
    check: Callable[[str, VLKD, Item], None] = check_item


def decoding_of(suite: ConfigDict, max_new_tokens: int) -> Decoding:
    """The suite's `decoding` group. Raises UserError for a field that has no meaning."""
    decoding = Decoding(max_new_tokens=max_new_tokens, **suite.decoding)
    decoding.check(f"config.{suite.name}.decoding")
    return decoding


def predict_rows(
    suite: Suite, items: Iterable[Item], model: VLKD, batch_size: int, tower: str = "student"
) -> Iterator[Row]:
    """Judged rows, as batches are done; pictures are opened as they are needed.

    They come in the items' order, but those of a task whose picture could not be used at its end.
    """
    for _, group in itertools.groupby(items, lambda item: item.row["task"]):
        of_task = list(group)
        run = _answered if isinstance(of_task[0], Prompt) else suite.predict
        for row in run(model, of_task, batch_size, tower):
            if "fault" not in row:
                yield row | suite.judge(row)
            elif row.get("unusable") == MISS:
                yield row | suite.judge(row | {"raw": ""})
            else:
                yield row


def with_pictures(items: Iterable[Item], faulty: list[Row]) -> Iterator[tuple[Item, Picture | None]]:
    """The items with their pictures, if they have one; those in a row that share an image get the same object.

    Pictures are opened one by one; `faulty` receives the rows of those that cannot be used.
    """
    for _, group in itertools.groupby(items, lambda item: item.row["image"]):
        of_image = list(group)
        try:
            picture = of_image[0].open_image() if of_image[0].open_image else None
        except RecordError as e:
            say(f"not usable, {e.reason}: {e}")
            faulty += [item.row | {"fault": e.reason} for item in of_image]
            continue
        for item in of_image:
            yield item, picture


def _answered(model: VLKD, prompts: list[Prompt], batch_size: int, _: str) -> Iterator[Row]:
    asked, faulty = deque(), []
    requests = _requests(model, prompts, asked, faulty)
    decoding, candidates = prompts[0].decoding, prompts[0].candidates
    if candidates:
        for text, log_likelihood in predict.rank(model, requests, candidates, batch_size):
            yield asked.popleft() | {"raw": text, "log_likelihood": log_likelihood}
    else:
        for text, *others in predict.generate(model, requests, decoding, batch_size):
            yield asked.popleft() | {"raw": text} | ({"others": others} if others else {})
    yield from faulty


def _requests(model: VLKD, prompts: list[Prompt], asked: deque[Row], faulty: list[Row]) -> Iterator[predict.Request]:
    """The requests, while `asked` receives their rows, and `faulty` those of pictures that cannot be used."""
    for prompt, image in with_pictures(prompts, faulty):
        request, is_cut = _request(model, prompt)
        asked.append(prompt.row | ({"cut": True} if is_cut else {}))
        yield dataclasses.replace(request, image=image)


def _request(model: VLKD, prompt: Prompt) -> tuple[predict.Request, bool]:
    """A prompt without its picture, and whether it had to be cut."""
    text, fields = model.bart_text, prompt.fields
    room = model.bart.config.max_position_embeddings - 2 if prompt.cut else 0
    source, is_cut = text.encode_prompt(prompt.source, fields, prompt.cut, room)
    prefix = text.encode_template(prompt.prefix, **fields)
    context = text.encode(prompt.context) if prompt.context else []
    draw = zlib.crc32(f"{prompt.row['task']} {prompt.row['id']}".encode()) >> 1  # drawn texts depend on their item
    return predict.Request(source, prefix, None, context, draw), is_cut
