"""Where records come from: a user's folder, a file of texts. Random access, so that order is arithmetic.

A source has `__len__` and `__getitem__(index) -> Record`; a record is a function of its index alone. One that mixes
several has `spans` as well, see `Mixture`.
"""

from __future__ import annotations

import array
import dataclasses
import functools
import hashlib
import os
import posixpath
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from vlkd_jax.console import say
from vlkd_jax.data.files import coco_pairs, jsonl_pairs, read_text, tsv_pairs
from vlkd_jax.data.images import check_picture
from vlkd_jax.errors import RecordError, UserError

FAULTS_TOLD = 5
"""So many records that cannot be used are named in one message, beside the counts of all."""
FINGERPRINT_BYTES = 4096
"""Of each end of a picture's file."""


@dataclasses.dataclass(frozen=True)
class Record:
    """One item before tokenisation.

    Attributes:
      text: the clean caption or text.
      image: uint8 [height, width, 3], a picture's file or its bytes, or None for a text alone.
      context: a text that the decoder reads beside the corrupted one, where an image would stand (text-only records).
      prompt: a start of `text` that is given: the corrupted text is it and one `<mask>`, and it carries no loss.
      fields: what is filled into the prompts by which `text` is asked for, such as a question or a document.
      second: of a pair of texts to classify the other one.
      label: what a text is classified as, the number of a class, or a score; None: unknown.
      name: what an error message calls this record.
      teacher: `TeacherOutputs` of a cache, which stand in for the picture and for CLIP's tokens.
    """

    text: str
    image: np.ndarray | Path | bytes | None = None
    context: str = ""
    prompt: str | None = None
    fields: dict[str, str] = dataclasses.field(default_factory=dict)
    second: str = ""
    label: float | None = None
    name: str = ""
    teacher: Any = None


@dataclasses.dataclass(frozen=True)
class TextQuestion:
    """A question that its `context` answers, without a picture; `kind` of question, `scene`: which one it is about."""

    context: str
    question: str
    answer: str
    kind: str
    scene: int


class TextLines:
    """A file with one text a line (blank lines are passed over), for text-only replay.

    Where each begins is known, eight bytes a text; they stay in the file. A .gz, which has no places, is read whole.

    Raises:
      UserError: the file is missing, is not UTF-8 or holds no text.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._whole = self.path.suffix == ".gz"
        self._texts = _whole_lines(self.path) if self._whole else _line_starts(self.path)
        if not len(self._texts):
            raise UserError(f"{self.path}: no text in it; give a file with one text a line")

    def __len__(self) -> int:
        return len(self._texts)

    def key(self, index: int) -> str:
        """What must not lie on both sides of a split: the text."""
        if self._whole:
            return self._texts[index]
        with open(self.path, "rb") as file:  # a handle of its own for every thread and process
            file.seek(self._texts[index])
            return _plain_line(file.readline(), self._texts[index])

    def __getitem__(self, index: int) -> Record:
        return Record(self.key(index), name=f"{self.path} text {index + 1}")


def _plain_line(line: bytes, start: int) -> str:
    """The text of a line that begins at this byte of its file."""
    return line.decode("utf-8" if start else "utf-8-sig").removesuffix("\n").removesuffix("\r")


def _whole_lines(path: Path) -> list[str]:
    lines = [line.removesuffix("\r") for line in read_text(path).split("\n")]
    return [line for line in lines if line.strip()]


def _line_starts(path: Path) -> Sequence[int]:
    """The bytes at which the lines begin that are not blank."""
    starts, position = array.array("q"), 0
    try:
        with open(path, "rb") as file:
            for line in file:
                if _plain_line(line, position).strip():
                    starts.append(position)
                position += len(line)
    except (OSError, UnicodeDecodeError):
        read_text(path)  # which says what is wrong
        raise
    return starts


class FolderPairs:
    """Pictures of a folder and their captions: COCO captions JSON, JSONL (`image`, `caption`) or TSV.

    TSV lines are `image<TAB>caption`. Image paths are relative to `images`. Every line is checked at the start: its
    caption is not empty, its image is there, is a picture and has its end (`images.check_picture`). A line that is not
    good keeps its place, and raises when it is read.

    Args:
      captions: the file; images: the folder.
      max_unusable: the largest share of lines that may be bad.

    Raises:
      UserError: naming the file, the line or entry, the field and the mend; more lines than that are bad.
      RecordError (on reading an item): a line that is not good.
    """

    def __init__(self, captions: str | Path, images: str | Path, max_unusable: float = 0.0):
        self.path, self.images = Path(captions), Path(images)
        readers = {".json": coco_pairs, ".jsonl": jsonl_pairs, ".tsv": tsv_pairs}
        if self.path.suffix not in readers:
            raise UserError(f"{self.path}: data.captions must end in .json (COCO), .jsonl or .tsv")
        self.pairs = readers[self.path.suffix](self.path)
        if not self.pairs:
            raise UserError(f"{self.path}: no captions in it")
        self._tell_lone_surrogates()
        self.faults = self._find_faults()
        raise_if_too_many(list(self.faults.values()), len(self.pairs), max_unusable)

    def _find_faults(self) -> dict[int, RecordError]:
        faults: dict[int, RecordError] = {}
        images: dict[str, RecordError | None] = {}  # each is looked at once, however many captions it has
        for index, pair in enumerate(self.pairs):
            fault = pair if isinstance(pair, RecordError) else self._text_fault(*pair)
            if not fault:
                where, image, _ = pair
                if image not in images:
                    images[image] = self._image_fault(where, image)
                fault = images[image]
            if fault:
                faults[index] = fault
        return faults

    def _tell_lone_surrogates(self) -> None:
        captions = [pair[2] for pair in self.pairs if not isinstance(pair, RecordError)]
        count = sum(isinstance(caption, str) and has_lone_surrogate(caption) for caption in captions)
        if count:
            _say_once(f"{self.path}: {count} caption(s) hold half an emoji (a lone surrogate); it is read as ?")

    def _text_fault(self, where: str, image: Any, text: Any) -> RecordError | None:
        for name, value in (("image", image), ("caption", text)):
            if not isinstance(value, str):
                message = f"{self.path} {where}: field {name} is not a text; correct the entry"
                return RecordError("malformed entry", message)
        if not text.strip():
            message = f"{self.path} {where}: field caption is empty; write a caption or drop the line"
            return RecordError("caption empty", message)
        return None

    def _image_fault(self, where: str, image: str) -> RecordError | None:
        path = self.images / image
        if not path.is_file():
            message = f"{self.path} {where}: image {path} not found; correct data.images or the line"
            return RecordError("image not found", message)
        try:
            check_picture(path)
        except RecordError as e:
            return RecordError(e.reason, f"{self.path} {where}: field image: {e}")
        return None

    def key(self, index: int) -> str:
        """What must not lie on both sides of a split: the image."""
        pair = self.pairs[index]
        return str(pair) if isinstance(pair, RecordError) else posixpath.normpath(str(pair[1]))

    def fingerprint(self) -> str:
        """A sha256 of every picture's name, size, first and last bytes: another one is noticed without reading all."""
        names = sorted(
            {pair[1] for pair in self.pairs if not isinstance(pair, RecordError) and isinstance(pair[1], str)}
        )
        digest = hashlib.sha256()
        with ThreadPoolExecutor(8) as pool:
            for name, ends in zip(names, pool.map(self._ends, names), strict=True):
                digest.update(hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest() + ends)
        return digest.hexdigest()

    def _ends(self, name: str) -> bytes:
        try:
            with open(self.images / name, "rb") as file:
                size, start = file.seek(0, os.SEEK_END), file.seek(0)
                first = file.read(FINGERPRINT_BYTES)
                file.seek(max(start, size - FINGERPRINT_BYTES))
                return hashlib.sha256(size.to_bytes(8) + first + file.read()).digest()
        except (OSError, ValueError):  # a record that names it cannot be used, which is told elsewhere
            return bytes(32)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Record:
        if index in self.faults:
            raise self.faults[index]
        where, image, text = self.pairs[index]
        return Record(" ".join(text.split()), self.images / image, name=f"{self.path} {where}")


@functools.cache
def _say_once(text: str) -> None:  # a file is read for training and for each held-out set
    say(text)


def has_lone_surrogate(text: str) -> bool:
    """Whether a text holds what UTF-8 cannot encode; JSON can hold it, as an escape."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def raise_if_too_many(
    faults: Sequence[RecordError], count: int, max_unusable: float, field: str = "config.data.max_unusable"
) -> None:
    """Raises UserError telling of `faults` when they are more than that share, set by `field`, of `count` records."""
    if len(faults) > max_unusable * count:
        raise UserError(
            f"{tell_faults(faults)} ({len(faults)} of {count} records cannot be used, {field} is {max_unusable:g})"
        )


def tell_faults(faults: Sequence[RecordError]) -> str:
    """How many there are of each reason, where there is more than one, and the first of them in full."""
    if len(faults) == 1:
        return str(faults[0])
    told = "; ".join(str(fault) for fault in faults[:FAULTS_TOLD])
    rest = f"; and {len(faults) - FAULTS_TOLD} more" if len(faults) > FAULTS_TOLD else ""
    return f"{counted(Counter(fault.reason for fault in faults))}: {told}{rest}"


def counted(reasons: Counter[str]) -> str:
    """Reasons with their counts, the most frequent first: "image not found 9, caption empty 2"."""
    return ", ".join(f"{reason} {count}" for reason, count in reasons.most_common())


class Subset:
    """The items of a source that are held out for validation, or the others for training.

    Items with the same `source.key` (captions of one image) stay on one side: about one key in `every`, chosen by its
    hash alone, so that lines may be added or put into another order without moving a key to the other side.

    Raises:
      UserError: there is none.
    """

    def __init__(self, source, held_out: bool, every: int = 20):
        hashes = np.fromiter((_key_hash(source.key(i)) for i in range(len(source))), np.uint64, len(source))
        apart = hashes % np.uint64(every) == 0
        if apart.all() or not apart.any():  # at least one key, and of two or more not all
            apart = hashes == hashes.min()
        self.source, self.indices = source, np.flatnonzero(apart == held_out)
        if not len(self.indices):
            raise UserError(
                f"{source.path}: {len(np.unique(hashes))} different item(s) leave none to train on beside the held-out "
                "ones; add some"
            )

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Record:
        return self.source[int(self.indices[index])]


def _key_hash(key: str) -> int:
    return int.from_bytes(hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()[:8], "big")


class Mixture:
    """Several sources one behind the other, of which records are drawn with given weights.

    Attributes:
      spans: of each source its length and its weight, in any unit; `pipeline.batches` draws by them.
    """

    def __init__(self, sources: Sequence[Any], weights: Sequence[float]):
        self.sources, self.spans = sources, [(len(s), weight) for s, weight in zip(sources, weights, strict=True)]
        self._ends = np.cumsum([length for length, _ in self.spans])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Record:
        number = int(np.searchsorted(self._ends, index, side="right"))
        return self.sources[number][int(index - self._ends[number]) + self.spans[number][0]]


class CaptionTexts:
    """The captions of pairs, without their pictures: a text-only source."""

    def __init__(self, pairs):
        self.pairs, self.spans = pairs, getattr(pairs, "spans", None)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Record:
        return dataclasses.replace(self.pairs[index], image=None)


class QuestionTexts:
    """The questions that are asked about pictures, as texts without them."""

    def __init__(self, asked):
        self.asked = asked

    def __len__(self) -> int:
        return len(self.asked)

    def __getitem__(self, index: int) -> Record:
        record = self.asked[index]
        return Record(record.fields["question"], name=record.name)
