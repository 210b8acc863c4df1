"""What users have, in parts that workers read by themselves: tar shards, TSV, JSONL, CSV, Parquet, COCO captions.

A part is a place in a file, so that memory does not grow with the number of pairs (of a COCO file, which is one JSON
value, it does). Nothing here imports jax: workers start quickly and touch no device.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import posixpath
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlkd_jax.data import tar
from vlkd_jax.errors import RecordError, UserError

IMAGE_ENDINGS = {"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "img", "image"}
MALFORMED, NO_IMAGE, NO_CAPTION, DAMAGED = "malformed entry", "image not found", "caption missing", "shard damaged"


@dataclasses.dataclass(frozen=True)
class Columns:
    """Where a table says what.

    Attributes:
      image, caption: names of columns; of a TSV without a head: numbers, from 0.
      images: the folder of the pictures; None: paths are taken as they stand.
      name: a picture's file in it, by the fields row (from 0), name (the last part of the image's column), md5 and
        sha256 (of that column, such as an URL); "{path}" is the column as it stands.
    """

    image: str = "image"
    caption: str = "caption"
    images: str | None = None
    name: str = "{path}"

    def check(self) -> None:
        """Raises UserError for a `name` with fields that there are not."""
        try:
            self.picture("a/b.jpg", 0)
        except (KeyError, IndexError, ValueError, AttributeError) as error:
            told = f"--names={self.name}: {type(error).__name__} {error}"
            raise UserError(f"{told}; its fields are {{path}}, {{name}}, {{row}}, {{md5}}, {{sha256}}") from error

    def picture(self, value: str, row: int) -> Path:
        """Where the picture of a row lies."""
        data = value.encode("utf-8", "surrogatepass")
        digest = {kind: hashlib.new(kind, data).hexdigest() for kind in ("md5", "sha256")}
        last = posixpath.basename(value.partition("?")[0])
        return Path(self.images or ".") / self.name.format(path=value, name=last, row=row, **digest)


@dataclasses.dataclass(frozen=True)
class Part:
    """What one record file is made of.

    Attributes:
      kind: of `READERS`.
      path: the file.
      first: number of its first row; offset: the byte at which that stands, of Parquet the row group.
      count: rows; 0: of a shard, whose rows nobody has counted.
      rows: of a COCO file, the rows themselves.
    """

    kind: str
    path: str
    first: int = 0
    offset: int = 0
    count: int = 0
    rows: tuple[tuple[str, Any, Any], ...] = ()


@dataclasses.dataclass(frozen=True)
class Sample:
    """One pair: `key` names it in messages, `image` is a picture's bytes or its file."""

    key: str
    image: bytes | Path
    caption: str


def parts(source: Path, columns: Columns, rows: int) -> list[Part]:
    """The parts of a file, or of a folder of shards or tables, with so many rows in each at most.

    Raises:
      UserError: nothing there, an unknown kind of file, a table without these columns.
    """
    files = sorted(path for path in source.iterdir() if path.is_file()) if source.is_dir() else [source]
    found: list[Part] = []
    for path in files:
        kind = _kind(path)
        if kind:
            found += SPLITTERS[kind](path, columns, rows)
        elif not source.is_dir():
            raise UserError(f"{path}: a source ends in {', '.join(f'.{ending}' for ending in ENDINGS)}")
    if not found:
        raise UserError(f"{source}: nothing to read; a source ends in {', '.join(f'.{ending}' for ending in ENDINGS)}")
    return found


def read(part: Part, columns: Columns) -> Iterator[Sample | RecordError]:
    """The pairs of a part in order, and in the place of what is none, why."""
    return READERS[part.kind](part, columns)


def _kind(path: Path) -> str | None:
    return next((kind for ending, kind in ENDINGS.items() if path.name.endswith(f".{ending}")), None)


# tar shards, as img2dataset and webdataset write them


def _shards(path: Path, columns: Columns, rows: int) -> list[Part]:
    return [Part("tar", str(path))]


def _read_shard(part: Part, columns: Columns) -> Iterator[Sample | RecordError]:
    """Members of one name up to its first dot are one sample: a picture, and a .txt or a .json with `caption`."""
    key, fields = "", {}
    try:
        for name, content in tar.members(part.path):
            folder, base = posixpath.split(name)
            stem, _, ending = base.partition(".")
            if posixpath.join(folder, stem) != key:
                if fields:
                    yield _sample(part, key, fields)
                key, fields = posixpath.join(folder, stem), {}
            if stem:
                fields[ending.lower()] = content
        if fields:
            yield _sample(part, key, fields)
    except (tar.TarDamage, OSError) as error:
        yield RecordError(DAMAGED, f"{part.path} behind {key or 'its start'}: {error}; fetch the shard again")


def _sample(part: Part, key: str, fields: dict[str, bytes | None]) -> Sample | RecordError:
    where = f"{part.path} {key}"
    image = next((content for ending, content in fields.items() if ending.rpartition(".")[2] in IMAGE_ENDINGS), None)
    if not image:
        return RecordError(NO_IMAGE, f"{where}: no picture of at most {tar.MAX_MEMBER >> 20} MiB")
    text, meta = fields.get("txt"), fields.get("json")
    try:
        caption = json.loads(meta).get("caption") if text is None and meta else (text or b"").decode()
    except (ValueError, AttributeError, RecursionError) as error:
        return RecordError(MALFORMED, f"{where}: its caption cannot be read ({error})")
    if not isinstance(caption, str):
        return RecordError(NO_CAPTION, f"{where}: no .txt, and no text as caption in a .json")
    return Sample(where, image, caption)


# lines: TSV, JSONL, CSV


def _split_lines(path: Path, columns: Columns, rows: int) -> list[Part]:
    kind, starts, count = _kind(path), [], 0
    for start, _ in _data_rows(kind, path):
        if count % rows == 0:
            starts.append(start)
        count += 1
    if not starts:
        raise UserError(f"{path}: no rows in it")
    if kind == "csv":
        _csv_places(path, columns)
    return [Part(kind, str(path), k * rows, start, min(rows, count - k * rows)) for k, start in enumerate(starts)]


def _data_rows(kind: str, path: Path) -> Iterator[tuple[int, Any]]:
    """All rows of a table, without its head."""
    rows = _rows(kind, path, 0)
    if kind == "csv":
        next(rows, None)
    return rows


def _rows(kind: str, path: Path, offset: int) -> Iterator[tuple[int, Any]]:
    """(byte at which it starts, row) of what stands behind an offset; blank lines are passed over."""
    with open(path, "rb") as file:
        file.seek(offset)
        position = offset

        def lines() -> Iterator[str]:
            nonlocal position
            for line in file:
                position += len(line)
                yield line.decode("utf-8-sig" if position == len(line) else "utf-8", "surrogateescape")

        if kind == "csv":
            start = offset
            try:
                for row in csv.reader(lines()):
                    if row:
                        yield start, row
                    start = position
            except csv.Error as error:
                told = f"{path} behind byte {start}: {error}; is a quotation mark never closed?"
                raise UserError(told) from error
            return
        start = offset
        for line in lines():
            if line.strip():
                yield start, line.rstrip("\r\n")
            start = position


def _read_lines(part: Part, columns: Columns) -> Iterator[Sample | RecordError]:
    places = _csv_places(Path(part.path), columns) if part.kind == "csv" else ()
    for number, (_, row) in enumerate(_rows(part.kind, Path(part.path), part.offset), part.first):
        if number == part.first + part.count:
            return
        where = f"{part.path} row {number}"
        try:
            image, caption = _fields(part.kind, row, columns, places)
        except (ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
            yield RecordError(MALFORMED, f"{where}: {type(error).__name__}: {error}")
            continue
        yield _pair(where, image, caption, columns, number)


def _fields(kind: str, row: Any, columns: Columns, places: tuple[int, ...]) -> tuple[Any, Any]:
    """What stands in a row for the image and for the caption."""
    if kind == "jsonl":
        value = json.loads(row)
        return value[columns.image], value[columns.caption]
    if kind == "csv":
        return row[places[0]], row[places[1]]
    cells = row.split("\t")
    if len(cells) != 2:
        raise ValueError(f"{len(cells)} fields, not 2")
    named = [int(name) if name.isdecimal() else place for place, name in enumerate((columns.image, columns.caption))]
    return cells[named[0]], cells[named[1]]


def _csv_places(path: Path, columns: Columns) -> tuple[int, int]:
    _, head = next(_rows("csv", path, 0))
    _check_columns(path, columns, head)
    return head.index(columns.image), head.index(columns.caption)


def _check_columns(path: Path, columns: Columns, head: list[str]) -> None:
    missing = [name for name in (columns.image, columns.caption) if name not in head]
    if missing:
        told = f"{path}: no column {', '.join(missing)}; it has {', '.join(head)}"
        raise UserError(f"{told}; name them by --image and --caption")


def _pair(where: str, image: Any, caption: Any, columns: Columns, number: int) -> Sample | RecordError:
    if isinstance(image, dict):  # as Hugging Face's datasets keep pictures
        image = image.get("bytes") or image.get("path")
    if not isinstance(caption, str):
        return RecordError(NO_CAPTION, f"{where}: field {columns.caption} is no text")
    if any("\udc80" <= character <= "\udcff" for character in caption):
        return RecordError(MALFORMED, f"{where}: not UTF-8")
    if isinstance(image, bytes):
        return Sample(where, image, caption)
    if not isinstance(image, str) or not image:
        return RecordError(NO_IMAGE, f"{where}: field {columns.image} names no picture")
    return Sample(where, columns.picture(image, number), caption)


# Parquet


def _row_groups(path: Path, columns: Columns, rows: int) -> list[Part]:
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: no Parquet that can be read ({error})") from error
    _check_columns(path, columns, file.schema_arrow.names)
    found, first = [], 0
    for group in range(file.num_row_groups):
        count = file.metadata.row_group(group).num_rows
        found.append(Part("parquet", str(path), first, group, count))
        first += count
    return found


def _read_row_group(part: Part, columns: Columns) -> Iterator[Sample | RecordError]:
    import pyarrow.parquet

    try:
        file, number = pyarrow.parquet.ParquetFile(part.path), part.first
        names = [columns.image, columns.caption]
        for batch in file.iter_batches(256, row_groups=[part.offset], columns=names):
            for row in batch.to_pylist():
                yield _pair(f"{part.path} row {number}", row[columns.image], row[columns.caption], columns, number)
                number += 1
    except (OSError, ValueError) as error:
        yield RecordError(DAMAGED, f"{part.path} row group {part.offset}: {error}; fetch the file again")


# COCO captions


def _split_coco(path: Path, columns: Columns, rows: int) -> list[Part]:
    from vlkd_jax.data.files import coco_pairs

    pairs = coco_pairs(path)
    plain = [(pair.reason, str(pair), None) if isinstance(pair, RecordError) else pair for pair in pairs]
    blocks = [(at, tuple(plain[at : at + rows])) for at in range(0, len(plain), rows)]
    return [Part("coco", str(path), first, 0, len(block), block) for first, block in blocks]


def _read_coco(part: Part, columns: Columns) -> Iterator[Sample | RecordError]:
    for number, (where, image, caption) in enumerate(part.rows, part.first):
        if caption is None and where == MALFORMED:
            yield RecordError(where, image)
        else:
            yield _pair(f"{part.path} {where}", image, caption, columns, number)


ENDINGS = {
    **{"tar": "tar", "tar.gz": "tar", "tgz": "tar", "tsv": "tsv", "jsonl": "jsonl", "csv": "csv"},
    **{"parquet": "parquet", "json": "coco"},
}
SPLITTERS = {"tar": _shards, "parquet": _row_groups, "coco": _split_coco}
SPLITTERS |= dict.fromkeys(("tsv", "jsonl", "csv"), _split_lines)
READERS = {"tar": _read_shard, "parquet": _read_row_group, "coco": _read_coco}
READERS |= dict.fromkeys(("tsv", "jsonl", "csv"), _read_lines)
