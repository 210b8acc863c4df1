"""The frozen teacher's outputs, computed once: `vlkd cache-teacher --config=NAME --output=DIR`.

Then `vlkd train` with the same config and --config.data.teacher_cache=DIR neither decodes pictures nor runs CLIP.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from vlkd_jax import compression, processes, sharding
from vlkd_jax.commands import COMMANDS
from vlkd_jax.console import aside, progress, say
from vlkd_jax.data.builder import locked
from vlkd_jax.data.files import read_json
from vlkd_jax.data.pipeline import Encoder, read_ahead
from vlkd_jax.data.streams import cache_key, make_source
from vlkd_jax.data.teacher_cache import AGAIN, FAULTS, MANIFEST, PLAN, differences, pack, row_type
from vlkd_jax.errors import RecordError, UserError
from vlkd_jax.identity import hash_inputs, with_absolute_paths
from vlkd_jax.manifest import file_sha256
from vlkd_jax.storage import unusable, write_atomic
from vlkd_jax.tasks import make_task
from vlkd_jax.tasks.distill import teacher_projections
from vlkd_jax.tasks.task import Task
from vlkd_jax.types import Array, Batch, Params, TeacherOutputs

SHARD_BYTES = 2**28
"""So large is a file at most, in whole batches."""
PART = ".part"
"""Behind the name of a file that is not whole."""


@dataclasses.dataclass(frozen=True)
class _Inputs:
    """What the teacher reads of the k-th record that is missing, or `empty` and why it cannot be used.

    Attributes:
      shards: the shards to make, in order, of `rows` records each.
    """

    source: Any
    encode: Encoder
    empty: dict[str, Any]
    shards: tuple[int, ...]
    rows: int

    def __call__(self, k: int) -> dict[str, Any]:
        index = self.shards[int(k) // self.rows] * self.rows + int(k) % self.rows
        try:
            row = self.encode(self.source[index], np.random.default_rng(0))
            return {"fault": np.str_(""), **row}
        except RecordError as e:
            return {"fault": np.str_(json.dumps([index, e.reason, str(e)])), **self.empty}


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the rows of a cache lie: `shard_rows` in a file, computed `batch_rows` at once, `count` in all."""

    directory: Path
    row: np.dtype
    count: int
    batch_rows: int

    @property
    def shard_rows(self) -> int:
        return max(1, SHARD_BYTES // self.row.itemsize // self.batch_rows) * self.batch_rows

    @property
    def shards(self) -> range:
        return range(-(-self.count // self.shard_rows))

    def length(self, shard: int) -> int:
        """Rows of a shard; the last may have fewer than the others."""
        return min(self.shard_rows, self.count - shard * self.shard_rows)

    def path(self, shard: int) -> Path:
        return self.directory / f"{shard:05d}.npy"

    def result(self, shard: int) -> dict[str, Any]:
        """What was told of a shard that is there."""
        return json.loads(self.path(shard).with_suffix(".json").read_text(encoding="utf-8"))

    def is_missing(self, shard: int) -> bool:
        """Whether a shard is not there, or not as it was written."""
        try:
            return file_sha256(self.path(shard)) != self.result(shard)["sha256"]
        except (OSError, ValueError, KeyError):
            return True

    def write(self, shard: int, blocks: Iterator[Computed]) -> Iterator[int]:
        """Makes a shard of the next blocks; yields how many rows each had.

        Raises:
          UserError: the disk is full, or the directory cannot be written.
        """
        path, left = self.path(shard), self.length(shard)
        part = path.with_name(path.name + PART)
        faults: list[list[Any]] = []
        errors: TeacherOutputs | None = None
        try:
            with open(part, "wb") as file:
                descr = np.lib.format.dtype_to_descr(self.row)
                header = {"descr": descr, "fortran_order": False, "shape": (left,)}
                np.lib.format.write_array_header_2_0(file, header)
                while left:
                    block = next(blocks)
                    file.write(block.rows.tobytes())
                    faults += block.faults
                    errors = block.errors if errors is None else jax.tree.map(np.add, errors, block.errors)
                    left -= len(block.rows)
                    yield len(block.rows)
                file.flush()
                os.fsync(file.fileno())
            result = {
                "rows": self.length(shard),
                "faults": faults,
                "squared_errors": {name: x.tolist() for name, x in errors._asdict().items() if x is not None},
                "bytes": part.stat().st_size,
                "sha256": file_sha256(part),
            }
            os.replace(part, path)
            write_atomic(path.with_suffix(".json"), json.dumps(result).encode())
        except OSError as error:
            raise unusable(path, "--output", error) from error


class Computed(NamedTuple):
    """A batch's rows as they are stored, [index, reason, message] of those that cannot be used, and the errors."""

    rows: np.ndarray
    faults: list[list[Any]]
    errors: TeacherOutputs


def _filled(batch: Batch, good: np.ndarray, rows: int) -> tuple[Batch, np.ndarray]:
    """A batch and which of its rows count, with as many rows as every other: one program computes all."""
    missing = rows - len(good)
    batch = jax.tree.map(lambda x: np.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1)), batch)
    return batch, np.pad(good, (0, missing))


def cache_teacher(config: ConfigDict, output: Path, dtype: str = "float32") -> dict[str, Any]:
    """Computes the cache, or what is missing of it; returns its manifest. Several processes share the work.

    Args:
      output: the directory; with several processes one that all of them see.
      dtype: of `compression.DTYPES`.

    Raises:
      UserError: a config without a frozen teacher, a source or an output that cannot be used, an output of something
        else.
    """
    config = with_absolute_paths(config)
    task = make_task(config)
    source = make_source(config, "train")
    key = cache_key(config, task, hash_inputs(config, ("clip", "data.captions", "data.directory")), source)
    # one process spreads its work as training does, to the same bits; of several each has rows of its own
    mesh = sharding.make_mesh(config.mesh) if jax.process_count() == 1 else sharding.local_mesh()
    batch_rows = -(-config.batch_size // jax.process_count())
    compute, row = _program(config, task, dtype, mesh)
    layout = Layout(output, row, len(source), batch_rows + -batch_rows % sharding.row_shards(mesh))
    plan = {"key": key, "dtype": dtype, "batch_rows": layout.batch_rows, "rows": layout.shard_rows}
    with contextlib.ExitStack() as held:  # by process 0, for all
        missing = processes.on_first(lambda: _start(layout, plan, held))
        _tell(layout, missing)
        mine = tuple(missing[jax.process_index() :: jax.process_count()])
        if mine:
            params = task.load_frozen(sharding.shardings(task.abstract()[1], mesh))["clip"]
            encode = dataclasses.replace(task.encoder, bart_text=None)
            records = _Inputs(source, encode, _empty(task), mine, layout.shard_rows)
            with jax.set_mesh(mesh):
                blocks = _blocks(config, layout, records, functools.partial(compute, params), sharding.over_batch(mesh))
                _write(layout, mine, blocks)
        processes.share(None)  # everybody has written
        return processes.on_first(lambda: _finish(layout, plan))


def _tell(layout: Layout, missing: Sequence[int]) -> None:
    shards, size = len(layout.shards), layout.row.itemsize
    there = f"; {shards - len(missing)} there already" if len(missing) < shards else ""
    gigabytes = layout.count * size / 1e9
    say(f"{layout.count:,} records, {size:,} bytes each, {gigabytes:.3g} GB in {shards} file(s){there}")


def _empty(task: Task) -> dict[str, Any]:
    """What the teacher is given for a record that cannot be used."""
    size, positions = task.teacher.config.preprocessing.size, task.encoder.clip_length
    pixels = np.zeros((size, size, 3), np.uint8)
    return {"pixels": pixels, "clip_ids": np.zeros(positions, np.int32), "clip_mask": np.ones(positions, bool)}


def _program(config: ConfigDict, task: Task, dtype: str, mesh: jax.sharding.Mesh) -> tuple[Any, np.dtype]:
    """(params, batch, mask) -> outputs, compressed, and their `compression.squared_errors`; the dtype of a row."""

    def project(params: Params, batch: Batch) -> TeacherOutputs:
        return teacher_projections(task.teacher, params, batch, config.student.image_tokens)

    def compute(params: Params, batch: Batch, mask: Array) -> tuple[TeacherOutputs, TeacherOutputs]:
        exact = project(params, batch)
        stored = TeacherOutputs(*(None if x is None else compression.compress(x, dtype) for x in exact))
        return stored, compression.squared_errors(exact, stored, mask)

    one = Batch(**{name: jax.ShapeDtypeStruct((1, *x.shape), x.dtype) for name, x in _empty(task).items()})
    shapes = jax.eval_shape(project, task.abstract()[1]["clip"], one)
    row = row_type(TeacherOutputs(*(None if x is None else x.shape[1:] for x in shapes)), dtype)
    whole, split = sharding.replicated(mesh), sharding.over_batch(mesh)
    return jax.jit(compute, out_shardings=(split, whole)), row


def _blocks(
    config: ConfigDict, layout: Layout, records: _Inputs, compute: Any, split: jax.sharding.Sharding
) -> Iterator[Computed]:
    """Batch by batch, computed; shards hold whole batches, but for the end of the last."""
    import grain

    count = sum(map(layout.length, records.shards))
    data = grain.MapDataset.range(count).map(records).batch(layout.batch_rows)
    for batch in read_ahead(data, config.data.threads, config.data.workers):
        told = [str(text) for text in batch.pop("fault")]
        good = np.array([not text for text in told])
        inputs = jax.device_put(_filled(Batch(**batch), good, layout.batch_rows), split)
        outputs, errors = jax.device_get(compute(*inputs))
        rows = np.zeros(layout.batch_rows, layout.row)
        pack(rows, outputs)
        yield Computed(rows[: len(told)], [json.loads(text) for text in told if text], errors)


def _write(layout: Layout, shards: Sequence[int], blocks: Iterator[Computed]) -> None:
    done = 0
    with progress("teacher", sum(map(layout.length, shards)), "records", everywhere=True) as tell:
        for shard in shards:
            for rows in layout.write(shard, blocks):
                done += rows
                tell(done)


def _start(layout: Layout, plan: dict[str, Any], held: contextlib.ExitStack) -> list[int]:
    """The shards that are missing of a cache that is begun or gone on with; `held` then holds its lock."""
    path = layout.directory / PLAN
    try:
        layout.directory.mkdir(parents=True, exist_ok=True)
        held.enter_context(locked(layout.directory, "cache.lock"))
        if path.exists():
            told = differences(read_json(path), plan)
            if told:
                raise UserError(
                    f"{layout.directory}: begun as something else: {told}; name another --output, or {AGAIN}"
                )
        for left in layout.directory.glob(f"*{PART}"):
            left.unlink()
        write_atomic(path, json.dumps(plan, indent=1).encode())
    except OSError as error:
        raise unusable(layout.directory, "--output", error) from error
    with ThreadPoolExecutor(8) as pool:
        are_missing = list(pool.map(layout.is_missing, layout.shards))
    return [shard for shard, is_missing in zip(layout.shards, are_missing, strict=True) if is_missing]


def _finish(layout: Layout, plan: dict[str, Any]) -> dict[str, Any]:
    results = {layout.path(shard).name: layout.result(shard) for shard in layout.shards}
    faults = [fault for result in results.values() for fault in result["faults"]]
    lines = "".join(json.dumps(fault) + "\n" for fault in faults)
    write_atomic(layout.directory / FAULTS, lines.encode())
    errors = {}
    for name in next(iter(results.values()))["squared_errors"]:
        gap, size = np.sum([result["squared_errors"][name] for result in results.values()], 0)
        errors[name] = float(np.sqrt(gap / size)) if size else 0.0
    manifest = plan | {
        "records": layout.count,
        "unusable": len(faults),
        "bytes_per_record": layout.row.itemsize,
        "relative_error": errors,
        "shards": {name: {k: result[k] for k in ("rows", "bytes", "sha256")} for name, result in results.items()},
    }
    write_atomic(layout.directory / MANIFEST, json.dumps(manifest, indent=1).encode())
    return manifest


def main(values: SimpleNamespace) -> None:
    """Entry point."""
    output = Path(values.output)
    with aside(values.json):
        manifest = cache_teacher(values.config, output, values.dtype)
    if values.json:
        print(json.dumps(manifest))
        return
    size = sum(shard["bytes"] for shard in manifest["shards"].values())
    errors = ", ".join(f"{name} {error:.2g}" for name, error in manifest["relative_error"].items())
    say(
        f"{output}: {manifest['records']:,} records ({manifest['unusable']:,} cannot be used), "
        f"{manifest['bytes_per_record']:,} bytes each, {size / 1e9:.3g} GB; {manifest['dtype']}, relative error "
        f"(root mean square): {errors}"
    )
    say(f"train with --config.data.teacher_cache={output}")


if __name__ == "__main__":
    from vlkd_jax import entry

    entry.run(main, COMMANDS["cache-teacher"])
