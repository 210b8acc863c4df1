"""What the frozen teacher makes of every record, on disk: read by row in training, instead of running the teacher.

A cache is a directory of .npy files, each with the rows of a run of records, and a manifest.json that says what they
were computed from. `vlkd cache-teacher` (vlkd_jax/cache_teacher.py) writes it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import zlib
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from vlkd_jax.data.files import read_json
from vlkd_jax.data.sources import Record
from vlkd_jax.errors import RecordError, UserError
from vlkd_jax.types import Quantized, TeacherOutputs

MANIFEST, PLAN, FAULTS = "manifest.json", "cache.json", "faults.jsonl"
CHECKSUM = "crc32"
"""The field of a row that holds the checksum of the others' bytes."""
SCALE = "_scale"
"""Behind the name of a field of int8 vectors, the field of their scales."""
AGAIN = "delete it and run vlkd cache-teacher again"


def row_type(shapes: TeacherOutputs, dtype: str) -> np.dtype:
    """The structured dtype of a row: each of `shapes` (without the batch) as float32, bfloat16 (its bits) or int8."""
    fields: list[tuple] = []
    for name, shape in zip(TeacherOutputs._fields, shapes, strict=True):
        if shape is None:
            continue
        fields.append((name, {"float32": "<f4", "bfloat16": "<u2", "int8": "i1"}[dtype], shape))
        if dtype == "int8":
            fields.append((name + SCALE, "<f4", (*shape[:-1], 1)))
    return np.dtype([*fields, (CHECKSUM, "<u4")])


def pack(rows: np.ndarray, outputs: TeacherOutputs) -> None:
    """Fills rows of `row_type` with outputs [B, ...] as `compression.compress` gives them, and their checksums."""
    for name, values in zip(TeacherOutputs._fields, outputs, strict=True):
        if isinstance(values, Quantized):
            rows[name], rows[name + SCALE] = values
        elif values is not None:
            rows[name] = values.view(np.uint16) if values.dtype == ml_dtypes.bfloat16 else values
    rows[CHECKSUM] = [_checksum(row) for row in rows]


def _checksum(row: np.void) -> int:
    return zlib.crc32(memoryview(row.tobytes())[: -row.dtype[CHECKSUM].itemsize])


def unpack(row: np.void) -> TeacherOutputs:
    """One row as `pack` was given it."""

    def of_field(name: str) -> Any:
        if name not in row.dtype.names:
            return None
        values = np.array(row[name])
        if values.dtype == np.int8:
            return Quantized(values, np.array(row[name + SCALE]))
        return values.view(ml_dtypes.bfloat16) if values.dtype == np.uint16 else values

    return TeacherOutputs(*map(of_field, TeacherOutputs._fields))


@dataclasses.dataclass(frozen=True)
class CachedPairs:
    """The records of a source with the teacher's outputs in the place of their pictures.

    A record that could not be used when the cache was made cannot be used now, for the same reason.

    Args:
      source: what the cache was made of.
      directory: of the cache.
      key: what `cache_key` says of this run; the cache's has to be the same.

    Raises:
      UserError: no cache, one that is not whole, or one of other weights, preprocessing or data, naming what differs;
        on reading an item: a damaged row.
      RecordError (on reading an item): one that cannot be used.
    """

    source: Any
    directory: str
    key: dataclasses.InitVar[dict[str, Any]]

    def __post_init__(self, key: dict[str, Any]):
        manifest = read_manifest(Path(self.directory))
        told = differences(manifest["key"], key)
        if told:
            raise UserError(
                f"{self.directory}: a cache of something else: {told}; give what it was made of, or {AGAIN}"
            )
        for name, shard in manifest["shards"].items():
            path = Path(self.directory) / name
            size = path.stat().st_size if path.is_file() else -1
            if size != shard["bytes"]:
                what = "is not there" if size < 0 else f"has {size} bytes, not {shard['bytes']}"
                raise UserError(f"{path}: {what}; run vlkd cache-teacher again, which computes what is missing")

    @property
    def spans(self) -> Any:
        """Those of the source, see `sources.Mixture`."""
        return getattr(self.source, "spans", None)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Record:
        cache = _opened(self.directory)
        if index in cache.faults:
            raise RecordError(*cache.faults[index])
        row = cache.row(index)
        if row.dtype.names is None or CHECKSUM not in row.dtype.names or row[CHECKSUM] != _checksum(row):
            path = cache.directory / cache.shards[index // cache.rows]
            raise UserError(f"{path}: row {index % cache.rows} is damaged; {AGAIN}")
        return dataclasses.replace(self.source[index], image=None, teacher=unpack(row))


class _Opened:
    """What a process keeps of a cache: its shards, which the system maps into memory, and what cannot be used."""

    def __init__(self, directory: Path):
        manifest = read_manifest(directory)
        self.directory, self.shards, self.rows = directory, list(manifest["shards"]), manifest["rows"]
        self.faults = _read_faults(directory / FAULTS)
        self._arrays: dict[int, np.ndarray] = {}

    def row(self, index: int) -> np.void:
        """Raises UserError for a file that is none, or that has no such row."""
        number, place = divmod(index, self.rows)
        if number >= len(self.shards):
            raise UserError(f"{self.directory}: no row {index} in it; {AGAIN}")
        if number not in self._arrays:  # without pickle: nothing in a file is ever run
            path = self.directory / self.shards[number]
            try:
                self._arrays[number] = np.load(path, mmap_mode="r", allow_pickle=False)
            except Exception as error:  # numpy raises nearly anything for a damaged header
                raise UserError(f"{path}: not readable ({error}); {AGAIN}") from error
        if self._arrays[number].ndim != 1 or place >= len(self._arrays[number]):
            raise UserError(f"{self.directory / self.shards[number]}: no row {place} in it; {AGAIN}")
        return self._arrays[number][place]


def _read_faults(path: Path) -> dict[int, tuple[str, str]]:
    """{index of a record: (reason, message)} of those that could not be used."""
    try:
        lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        faults = {index: (str(reason), str(message)) for index, reason, message in lines}
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: not readable ({error}); {AGAIN}") from error
    if not all(isinstance(index, int) for index in faults):
        raise UserError(f"{path}: a record without a number; {AGAIN}")
    return faults


@functools.lru_cache(maxsize=8)
def _opened(directory: str) -> _Opened:
    return _Opened(Path(directory))


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a whole cache. Raises UserError for what is none."""
    if not (directory / MANIFEST).is_file():
        if (directory / PLAN).is_file():
            raise UserError(f"{directory}: not whole yet; the same vlkd cache-teacher goes on where it was")
        raise UserError(f"{directory}: no {MANIFEST} in it; name the --output of vlkd cache-teacher")
    manifest = read_json(directory / MANIFEST)
    key, shards, rows = (
        (manifest.get(n) for n in ("key", "shards", "rows")) if isinstance(manifest, dict) else [None] * 3
    )
    is_whole = isinstance(key, dict) and isinstance(shards, dict) and isinstance(rows, int) and rows > 0
    if not is_whole or not all(isinstance(shard, dict) and "bytes" in shard for shard in shards.values()):
        raise UserError(f"{directory / MANIFEST}: not the manifest of a teacher cache; {AGAIN}")
    if any(Path(name).name != name for name in shards):
        raise UserError(f"{directory / MANIFEST}: a file of rows that lies elsewhere; {AGAIN}")
    return manifest


def differences(was: dict[str, Any], now: dict[str, Any], within: str = "") -> str:
    """Which fields of two keys are not the same, with both values; "": none."""
    told = []
    for name in sorted(was | now):
        old, new = was.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            told += [inner] if (inner := differences(old, new, f"{within}{name}.")) else []
        elif old != new:
            told.append(f"{within}{name} was {_short(old)} and is {_short(new)}")
    return "; ".join(told)


def _short(value: Any) -> str:
    text = "missing" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."
