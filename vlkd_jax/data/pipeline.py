"""From records to batches with Grain: a pure function of (seed, step), bad records replaced by others and counted."""

from __future__ import annotations

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, Protocol, runtime_checkable

import numpy as np
from absl import flags
from PIL import Image

from vlkd_jax.console import say
from vlkd_jax.data.images import open_image, random_resized_crop, resize_and_crop
from vlkd_jax.data.sources import Record, counted
from vlkd_jax.data.text import BartText, ClipText, infill, pad
from vlkd_jax.errors import RecordError, UserError
from vlkd_jax.models.preprocessing import Preprocessing
from vlkd_jax.types import Batch

TRIES = 100
"""So many records in a row that cannot be used end a run: its disk is gone, or all of them are bad."""


@dataclasses.dataclass(frozen=True)
class Corruption:
    """BART's text infilling: share of tokens, mean span length, chance that the whole text becomes one mask."""

    ratio: float = 0.3
    poisson: float = 3.0
    mask_all: float = 0.15


@runtime_checkable
class Encode(Protocol):
    """Turns a record into one row of a `Batch`: `Encoder`, or that of a task of its own.

    Attributes:
      preprocessing: how pictures become pixels; None: there are none. With them there are `smallest_crop` and `flip`.
    """

    preprocessing: Preprocessing | None

    def __call__(self, record: Record, rng: np.random.Generator) -> dict[str, Any]:
        """The fields of the row. Raises RecordError, which names the record, for one that cannot be used."""

    def limits(self) -> dict[str, int]:
        """Room for texts in tokens, by the name of what is counted."""

    def lengths(self, record: Record) -> dict[str, int]:
        """Tokens of the texts before any cut, by the same names."""


@dataclasses.dataclass(frozen=True)
class Encoder:
    """Turns a record into one row of a `Batch`. What is None is left out of the batch.

    Attributes:
      clip_text, clip_length: the teacher's tokenizer and its positions.
      bart_text: the student's tokenizer.
      text_length, source_length, context_length: tokens a row has room for (L, S, C); context 0: none.
      preprocessing: how pictures become pixels.
      truncate: cut texts that are too long instead of raising.
      smallest_crop: share of a picture's area that a random part of it holds at least; 1: no random part is taken.
      flip: mirror every second picture, drawn at random.

    Raises (on a call):
      RecordError: a text is too long, or an image does not decode; it names the record.
    """

    clip_text: ClipText | None = None
    clip_length: int = 77
    bart_text: BartText | None = None
    text_length: int = 64
    source_length: int = 64
    context_length: int = 0
    preprocessing: Preprocessing | None = None
    corruption: Corruption = Corruption()
    truncate: bool = False
    smallest_crop: float = 1.0
    flip: bool = False

    def __call__(self, record: Record, rng: np.random.Generator) -> dict[str, Any]:
        row: dict[str, Any] = {}
        if record.teacher is not None:
            row["teacher"] = record.teacher
        elif self.preprocessing:
            row["pixels"] = pixels_of(record, rng, self.preprocessing, self.smallest_crop, self.flip)
        if self.clip_text and record.teacher is None:
            ids = self._fit(self.clip_text.encode(record.text), self.clip_length, record, "CLIP's")
            self._put(row, "clip", ids, self.clip_length, self.clip_text.pad)
        if self.bart_text:
            self._put_texts(row, record, rng)
        return row

    def limits(self) -> dict[str, int]:
        """Room for a caption in each vocabulary, in tokens, the two ends included."""
        limits = {"BART": self.text_length} if self.bart_text else {}
        return limits | ({"CLIP": self.clip_length} if self.clip_text else {})

    def lengths(self, record: Record) -> dict[str, int]:
        """Tokens of the whole caption in each vocabulary, before any cut."""
        lengths = {"BART": 2 + len(self.bart_text.encode(record.text))} if self.bart_text else {}
        return lengths | ({"CLIP": len(self.clip_text.encode(record.text))} if self.clip_text else {})

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
        raise too_long(record, "caption", len(ids), whose, length, field)

    def _put(self, row: dict[str, Any], name: str, ids: list[int], length: int, pad_id: int) -> None:
        padded, mask = pad([ids], length, pad_id)
        row[f"{name}_ids"], row[f"{name}_mask"] = padded[0], mask[0]


def pixels_of(
    record: Record, rng: np.random.Generator, preprocessing: Preprocessing, smallest_crop: float, flip: bool
) -> np.ndarray:
    """A record's picture as uint8 [height, width, 3]; `smallest_crop`, `flip`: see `Encoder`.

    Raises:
      RecordError: it does not decode.
    """
    image = record.image if isinstance(record.image, np.ndarray) else _opened(record)
    if smallest_crop < 1:
        pixels = random_resized_crop(image, preprocessing, rng, smallest_crop)
    else:
        pixels = resize_and_crop(image, preprocessing)
    return np.ascontiguousarray(pixels[:, ::-1]) if flip and rng.random() < 0.5 else pixels


def _opened(record: Record) -> Image.Image:
    try:
        return open_image(record.image)
    except RecordError as e:
        raise RecordError(e.reason, f"{record.name}: field image: {e}") from e


def too_long(record: Record, what: str, tokens: int, whose: str, limit: int, field: str) -> RecordError:
    """The error for a text without room; `field`: the config field that sets the limit, where one does."""
    more = f"raise {field} if the model has the positions, " if field else ""
    return RecordError(
        f"{what} too long",
        f"{record.name}: field {what} has {tokens} of {whose} tokens, the limit is {limit}; "
        f"shorten it, {more}or set data.truncate=True",
    )


class UnusableRecords:
    """Counts the records that training passed over, by reason, and ends a run that passes over too many.

    Each is named on standard output the first time it is met.

    Args:
      limit: the largest share of the records read that may be unusable.
    """

    GRACE = 1000
    """Records the share is taken of at least, so that an early bad one does not end a run."""

    def __init__(self, limit: float):
        self.limit = limit
        self.reasons: Counter[str] = Counter()
        self._read = self._unusable = 0
        self._named: set[str] = set()
        self._last = ""

    def check(self, faults: np.ndarray) -> None:
        """After each batch: of each row as one text what was passed over for it, as `_Row` writes it.

        Raises:
          UserError: more than `limit` of what was read.
        """
        errors = [json.loads(line) for text in faults for line in str(text).splitlines()]
        for reason, message in errors:
            self._add(reason, message)
        self._unusable += len(errors)
        self._read += len(faults) + len(errors)
        if self._unusable > self.limit * max(self._read, self.GRACE):
            raise UserError(
                f"{self._unusable} of the {self._read} records read so far cannot be used ({self}), more than "
                f"config.data.max_unusable={self.limit:g} allows; mend them or raise it; the last one: {self._last}"
            )

    def _add(self, reason: str, message: str) -> None:
        """Takes note of one; the same record may come again in a later epoch."""
        self._last = message
        if message not in self._named:
            self._named.add(message)
            self.reasons[reason] += 1
            say(f"record passed over, {reason}: {message}", everywhere=True)

    def __str__(self) -> str:
        return counted(self.reasons)


@dataclasses.dataclass(frozen=True)
class _Row:
    """Makes the row at a place of the order: what a worker process is sent.

    Attributes:
      strict: raise what is unusable instead of taking another record for it.
    """

    source: Any
    encode: Encoder
    strict: bool

    def __call__(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        faults: list[str] = []
        for _ in range(TRIES):
            try:
                row = self.encode(self.source[int(index)], rng)
                return {"index": np.int64(index), "faults": np.str_("\n".join(faults)), **row}
            except RecordError as e:
                if self.strict:
                    raise
                faults.append(json.dumps([e.reason, str(e)]))
                index = rng.integers(len(self.source))
        reasons = counted(Counter(json.loads(fault)[0] for fault in faults))
        raise UserError(f"{TRIES} records in a row cannot be used ({reasons}); is the data still in its place?")


def _leave_devices_alone(worker: int, workers: int) -> None:
    """In a worker process: whatever it imports must not take the accelerator from the run."""
    os.environ["JAX_PLATFORMS"] = "cpu"


def batches(
    source,
    encode: Encoder,
    *,
    batch_size: int,
    seed: int,
    start: int = 0,
    shuffle: bool = True,
    share: tuple[int, int] = (0, 1),
    threads: int = 2,
    workers: int = 0,
    unusable: UnusableRecords | None = None,
) -> Iterator[Batch]:
    """Endless batches from step `start` on, read ahead; starting late costs nothing.

    A record that cannot be used is replaced by one drawn from the random numbers of its place in the order: the others
    stay where they are, for any number of processes, workers and threads.

    Args:
      source: see `vlkd_jax.data.sources`.
      batch_size: global; a share of it has `batch_size // n` rows, the global batch's p-th block of so many.
      seed: of the order and of every random choice in `encode`.
      share: (index p of the share, number of shares n).
      threads: that read, decode and tokenise in this process, or in each worker.
      workers: processes that do so; 0: none but this one. They are started anew, not forked, and touch no device.
      unusable: counts the records passed over; default: the first one is raised.

    Raises (from the iterator):
      UserError: too many records that cannot be used, or `TRIES` in a row.
    """
    unusable = UnusableRecords(0.0) if unusable is None else unusable
    row = _Row(source, encode, strict=not unusable.limit)
    rows = _order(source, seed, shuffle).random_map(row)
    index, count = share
    blocks = rows.batch(batch_size // count, drop_remainder=True)[start * count + index :: count]

    def deliver() -> Iterator[Batch]:
        for block in read_ahead(blocks, threads, workers):
            unusable.check(block.pop("faults"))
            yield Batch(**block)

    return deliver()


def _order(source: Any, seed: int, shuffle: bool) -> Any:
    """Endless indices, epoch by epoch; of a mixture each part has epochs of its own, as its weight has it."""
    import grain  # not at the top: what a task is made of is read where there are no records, and no grain

    def epochs(first: int, length: int) -> Any:
        data = grain.MapDataset.range(first, first + length).seed(seed)
        return (data.shuffle() if shuffle else data).repeat()

    spans = getattr(source, "spans", None)
    if not spans:
        return epochs(0, len(source))
    starts = np.cumsum([0, *(length for length, _ in spans)])
    parts = [epochs(int(first), length) for first, (length, _) in zip(starts, spans, strict=False)]
    return grain.MapDataset.mix(parts, [weight for _, weight in spans]).seed(seed)


def read_ahead(data: Any, threads: int, workers: int) -> Iterable[Any]:
    """The items of a Grain map dataset in order, made by so many threads of this process or of each worker process."""
    import grain

    ahead = data.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads))
    if not workers:
        return ahead
    if not flags.FLAGS.is_parsed():  # grain asks a flag of its own, also where a program has none
        flags.FLAGS.mark_as_parsed()
    return ahead.mp_prefetch(
        grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2), _leave_devices_alone
    )
