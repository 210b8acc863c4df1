"""From records to batches with Grain: shuffled, corrupted and padded as a pure function of (seed, step)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np

from vlkd_jax.data.images import normalise, open_image, resize_and_crop
from vlkd_jax.data.sources import Record
from vlkd_jax.data.text import BartText, ClipText, infill, pad
from vlkd_jax.errors import UserError
from vlkd_jax.types import Batch


@dataclasses.dataclass(frozen=True)
class Corruption:
    """BART's text infilling: share of tokens, mean span length, chance that the whole text becomes one mask."""

    ratio: float = 0.3
    poisson: float = 3.0
    mask_all: float = 0.15


@dataclasses.dataclass(frozen=True)
class Encoder:
    """Turns a record into one row of a `Batch`. What is None is left out of the batch.

    Attributes:
      clip_text, clip_length: the teacher's tokenizer and its positions.
      bart_text: the student's tokenizer.
      text_length, source_length, context_length: tokens a row has room for (L, S, C); context 0: none.
      image_size: pixels a side.
      truncate: cut texts that are too long instead of raising.

    Raises (on a call):
      UserError: a text is too long, or an image does not decode; it names the record.
    """

    clip_text: ClipText | None = None
    clip_length: int = 77
    bart_text: BartText | None = None
    text_length: int = 64
    source_length: int = 64
    context_length: int = 0
    image_size: int | None = None
    corruption: Corruption = Corruption()
    truncate: bool = False

    def __call__(self, record: Record, rng: np.random.Generator) -> dict[str, Any]:
        row: dict[str, Any] = {}
        if self.image_size:
            row["pixels"] = normalise(resize_and_crop(self._open(record), self.image_size))
        if self.clip_text:
            ids = self._fit(self.clip_text.encode(record.text), self.clip_length, record, "CLIP's")
            self._put(row, "clip", ids, self.clip_length, self.clip_text.pad)
        if self.bart_text:
            self._put_texts(row, record, rng)
        return row

    def _open(self, record: Record):
        if isinstance(record.image, np.ndarray):
            return record.image
        try:
            return open_image(record.image)
        except UserError as e:
            raise UserError(f"{record.name}: field image: {e}") from e

    def _put_texts(self, row: dict[str, Any], record: Record, rng: np.random.Generator) -> None:
        bart = self.bart_text
        text = bart.encode(record.text)
        if self.truncate:  # before the corruption is drawn, which would else hold text that the target lacks
            text = text[: self.text_length - 2]
        if record.prompt is not None:
            source = [*bart.encode(record.prompt), bart.mask]
        else:
            source = infill(text, rng, bart.mask, **dataclasses.asdict(self.corruption))
        context = bart.encode(record.context) if record.context else []
        for name, ids, length in (
            ("text", text, self.text_length),
            ("source", source, self.source_length),
            ("context", context, self.context_length),
        ):
            if length:
                whole = bart.wrap(ids) if ids or name != "context" else []
                whole = self._fit(whole, length, record, "BART's", f"data.{name}_length")
                self._put(row, name, whole, length, bart.pad)
        given = 1 + len(bart.encode(record.prompt)) if record.prompt else 0
        row["target_mask"] = row["text_mask"] & (np.arange(self.text_length) >= given)

    def _fit(self, ids: list[int], length: int, record: Record, whose: str, field: str = "") -> list[int]:
        """`ids`, cut if that is allowed; `field`: the config field that sets `length`, where one does."""
        if len(ids) <= length:
            return ids
        if self.truncate:
            return [*ids[: length - 1], ids[-1]]
        more = f"raise {field} if the model has the positions, " if field else ""
        raise UserError(
            f"{record.name}: field caption has {len(ids)} of {whose} tokens, the limit is {length}; "
            f"shorten it, {more}or set data.truncate=True"
        )

    def _put(self, row: dict[str, Any], name: str, ids: list[int], length: int, pad_id: int) -> None:
        padded, mask = pad([ids], length, pad_id)
        row[f"{name}_ids"], row[f"{name}_mask"] = padded[0], mask[0]


class _Indexed:
    """A source whose items carry their index."""

    def __init__(self, source):
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[int, Record]:
        return index, self.source[index]


def batches(
    source,
    encode: Encoder,
    *,
    batch_size: int,
    seed: int,
    start: int = 0,
    shuffle: bool = True,
    process: tuple[int, int] = (0, 1),
    threads: int = 2,
) -> Iterator[Batch]:
    """Endless batches from step `start` on, read ahead by `threads` threads; starting late costs nothing.

    Args:
      source: see `vlkd_jax.data.sources`.
      batch_size: global; each process gets its share `batch_size // n`, rows p, p + n, ... of the global batch.
      seed: of the order and of every random choice in `encode`.
      process: (this process p, number of processes n).
    """

    def row(item: tuple[int, Record], rng: np.random.Generator) -> dict[str, Any]:
        index, record = item
        return {"index": np.int64(index), **encode(record, rng)}

    data = grain.MapDataset.source(_Indexed(source)).seed(seed)
    if shuffle:
        data = data.shuffle()
    data = data.repeat().random_map(row)[process[0] :: process[1]].batch(batch_size // process[1])
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    iterator = iter(data.to_iter_dataset(options))
    iterator.set_state({"next_index": start})
    return (Batch(**rows) for rows in iterator)
