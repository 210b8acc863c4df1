"""How a data set of record files comes about, part by part: in processes of this machine, or by Apache Beam.

Each part of the input becomes one ArrayRecord file, written under another name and renamed when it is whole, with a
small file of what was counted beside it: a run that was killed goes on where it was, without a record twice or lost.
The result is a tensorflow-datasets directory (no TensorFlow is needed) with a manifest.json.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import ctypes
import fcntl
import hashlib
import io
import json
import multiprocessing
import os
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from PIL import Image

from vlkd_jax import runtime
from vlkd_jax.console import progress
from vlkd_jax.data.inputs import Part
from vlkd_jax.errors import RecordError, UserError
from vlkd_jax.manifest import file_sha256

MANIFEST, PLAN, PARTS, HASHES = "manifest.json", "prepare.json", "parts", "hashes.jsonl"
LOOK = 0.2
"""Seconds until the command looks again whether it was asked to end."""
PART = ".part-"
"""Behind the name of a file that is not whole, before the process that writes it."""
EXAMPLES = 3
"""So many skipped records of each reason stand in the manifest."""


class Written(NamedTuple):
    """A record: its fields, and the bytes of the picture and the text that its hashes are of."""

    fields: dict[str, Any]
    picture: bytes
    shown: bytes
    text: str


class Kind(Protocol):
    """What the records of a data set are: workers are sent it."""

    @property
    def name(self) -> str:
        """Of the data set."""

    @property
    def split(self) -> str:
        """Of the data set."""

    def features(self) -> Any:
        """The fields of a record, in tensorflow-datasets' terms."""

    def samples(self, part: Part) -> Iterator[Any]:
        """What a part holds in order, each with a `key`, and in the place of what is none a RecordError."""

    def record(self, sample: Any) -> Written:
        """Raises RecordError for a sample that cannot be used."""

    def described(self) -> dict[str, Any]:
        """JSON values that have to be the same when the work goes on."""


def build(
    kind: Kind,
    parts: Callable[[], Sequence[Part]],
    output: Path,
    workers: int = 2,
    max_unusable: float = 0.5,
    beam: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Makes DIR, or what is missing of it; returns its manifest.

    Args:
      parts: what the record files are made of, one each.
      max_unusable: share of the samples read so far that may be skipped, looked at when 1,000 have been read.
      beam: options of a Beam pipeline that does the work, such as its runner; None: `workers` processes do.

    Raises:
      UserError: a source or an output that cannot be used, an output of other options, too many skipped samples.
    """
    described = kind.described()
    if (output / MANIFEST).exists():
        _check_same(output / MANIFEST, described)
        return json.loads((output / MANIFEST).read_text())
    work = output / PARTS
    work.mkdir(parents=True, exist_ok=True)
    with locked(output, "prepare.lock"):
        if (output / PLAN).exists():
            _check_same(output / PLAN, described)
        todo = parts()
        write_json(output / PLAN, described)
        results = _run(todo, kind, work, workers, max_unusable, beam)
        return _finish(output, results, described, kind)


def write_part(part: Part, number: int, kind: Kind, directory: Path) -> dict[str, Any]:
    """Makes the record file of a part, and returns what was counted. A worker calls it."""
    import imagehash
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.proto import tf_example_pb2

    features = kind.features()
    file, own = directory / f"{number:05d}.records", f"{PART}{os.getpid()}"
    counts = {"in": 0, "out": 0, "bytes": 0}
    skipped: Counter[str] = Counter()
    examples: dict[str, list[str]] = {}
    hash_file = file.with_suffix(".hashes")
    writer = ArrayRecordWriter(f"{file}{own}", "group_size:1")
    with open(f"{hash_file}{own}", "w", encoding="utf-8") as hashes:
        for sample in kind.samples(part):
            counts["in"] += 1
            try:
                if isinstance(sample, RecordError):
                    raise sample
                record = kind.record(sample)
            except RecordError as error:
                skipped[error.reason] += 1
                if len(texts := examples.setdefault(error.reason, [])) < EXAMPLES:
                    texts.append(str(error) if str(error).startswith(part.path) else f"{sample.key}: {error}")
                continue
            example = features.serialize_example(features.encode_example(record.fields))
            # fields in one order
            data = tf_example_pb2.Example.FromString(example).SerializeToString(deterministic=True)
            writer.write(data)
            counts["out"] += 1
            counts["bytes"] += len(data)
            digests = [hashlib.sha256(value).hexdigest() for value in (record.picture, record.text.encode())]
            seen = str(imagehash.phash(Image.open(io.BytesIO(record.shown))))
            told = {"key": sample.key, "image": digests[0], "caption": digests[1], "phash": seen}
            hashes.write(json.dumps(told) + "\n")
    writer.close()
    for path in (file, hash_file):
        os.replace(f"{path}{own}", path)
    result = counts | {"skipped": dict(skipped), "examples": examples, "sha256": file_sha256(file)}
    write_json(file.with_suffix(".json"), result)
    return result


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all."""
    part = path.with_name(f"{path.name}{PART}{os.getpid()}")
    with open(part, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def _check_same(path: Path, described: dict[str, Any]) -> None:
    before = json.loads(path.read_text())
    for group, values in described.items():
        old = before.get(group)
        pairs = values.items() if isinstance(values, dict) else [("", values)]
        for name, value in pairs:
            was = old.get(name) if isinstance(old, dict) else old
            if was != value:
                field = f"{group}.{name}" if name else group
                told = "changed" if name == "files" else f"was {was!r} and is {value!r}"
                raise UserError(f"{path}: {field} {told}; name another --output, or give what it was made with")


@contextlib.contextmanager
def locked(output: Path, name: str) -> Iterator[None]:
    """While the block runs, no other command writes this directory. Raises UserError where one does.

    Args:
      name: of the file that is locked.
    """
    with open(output / name, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"{output}: another command is at work there; wait for it") from error
        yield


def _run(
    todo: Sequence[Part], kind: Kind, work: Path, workers: int, max_unusable: float, beam: Sequence[str] | None
) -> list[dict[str, Any]]:
    """What was counted of every part, those of an earlier run among them."""
    results = _results(work, len(todo))
    missing = [number for number in range(len(todo)) if number not in results]
    for left in work.glob(f"*{PART}*"):
        left.unlink()
    if results:
        print(f"{len(results)} of {len(todo)} parts are there already", flush=True)
    parts = (_by_beam if beam is not None else _by_processes)(todo, missing, kind, work, beam or workers)
    with contextlib.closing(parts), progress("prepare", len(todo), "parts", len(results)) as tell:
        for number, result in parts:
            results[number] = result
            tell(len(results), _read_and_skipped(results))
            _check_share(results, max_unusable)
    return [results[number] for number in range(len(todo))]


def _results(work: Path, count: int) -> dict[int, dict[str, Any]]:
    """What was counted of the parts that are there."""
    results: dict[int, dict[str, Any]] = {}
    for number in range(count):
        with contextlib.suppress(OSError, ValueError):
            results[number] = json.loads((work / f"{number:05d}.json").read_text())
    return results


def _by_processes(
    todo: Sequence[Part], missing: Sequence[int], kind: Kind, work: Path, workers: int
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, what was counted) of each missing part as it is done."""
    # not forked: a worker that is started anew holds none of this process's locks and threads
    context = multiprocessing.get_context("spawn")
    with (
        runtime.deferred() as signal_number,  # a pool that is not closed leaves semaphores, and a warning of Python's
        concurrent.futures.ProcessPoolExecutor(workers, context, _die_with, (os.getpid(),)) as pool,
    ):
        running = {pool.submit(write_part, todo[k], k, kind, work): k for k in missing}
        try:
            while running:
                done = concurrent.futures.wait(running, LOOK, concurrent.futures.FIRST_COMPLETED).done
                if number := signal_number():
                    raise runtime.Interrupted(number)
                for part in done:
                    yield running.pop(part), part.result()
        except concurrent.futures.process.BrokenProcessPool as error:
            raise UserError(
                "a worker was killed (out of memory?); the same command goes on, --workers=N takes fewer"
            ) from error
        except BaseException:  # also when nobody wants more of them: a part may take long, and begins anew
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in multiprocessing.active_children():
                worker.kill()
            raise


def _die_with(parent: int) -> None:
    """A worker ends with the command that started it, however that ends; Ctrl-C is the command's to answer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() != parent:  # it has ended before this was asked for
        os._exit(1)


def _by_beam(
    todo: Sequence[Part], missing: Sequence[int], kind: Kind, work: Path, options: Sequence[str]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """`_by_processes` by a Beam pipeline, whose workers see the input and the output under the same paths.

    A part that two workers make, as runners may have it, is the same twice.
    """
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise UserError(
            f"--beam needs apache-beam ({error}); see README.md, it has an environment of its own"
        ) from error
    with beam.Pipeline(options=PipelineOptions(list(options))) as pipeline:
        numbered = pipeline | beam.Create([(number, todo[number]) for number in missing]) | beam.Reshuffle()
        _ = numbered | beam.MapTuple(lambda number, part: write_part(part, number, kind, work) and None)
    results = _results(work, len(todo))
    for number in missing:
        if number not in results:
            raise UserError(f"{work}: part {number} has not come; do all of Beam's workers see this directory?")
        yield number, results[number]


def _read_and_skipped(results: dict[int, dict[str, Any]]) -> str:
    skipped: Counter[str] = Counter()
    for result in results.values():
        skipped.update(result["skipped"])
    told = f"  skipped: {', '.join(f'{reason} {n:,}' for reason, n in skipped.most_common())}" if skipped else ""
    return f"{sum(result['in'] for result in results.values()):,} read{told}"


def _check_share(results: dict[int, dict[str, Any]], max_unusable: float) -> None:
    total = sum(result["in"] for result in results.values())
    lost = total - sum(result["out"] for result in results.values())
    if lost > max_unusable * max(total, 1000):
        examples = [text for result in results.values() for texts in result["examples"].values() for text in texts]
        raise UserError(
            f"{lost:,} of the {total:,} records read so far are skipped, more than --max_unusable={max_unusable:g}; "
            f"for example {examples[0]}"
        )


def _finish(output: Path, results: Sequence[dict[str, Any]], described: dict[str, Any], kind: Kind) -> dict[str, Any]:
    """Gives the record files their names and writes what describes them; the manifest comes last."""
    import tensorflow_datasets as tfds

    work, count = output / PARTS, len(results)
    names = [f"{kind.name}-{kind.split}.array_record-{k:05d}-of-{count:05d}" for k in range(count)]
    if not sum(result["out"] for result in results):
        raise UserError(f"{described['source']['path']}: no record in it can be used; see {work}")
    for number, name in enumerate(names):
        with contextlib.suppress(FileNotFoundError):  # an earlier try has renamed it
            os.replace(work / f"{number:05d}.records", output / name)
    lost = [name for name in names if not (output / name).exists()]
    if lost:
        raise UserError(f"{output}: {lost[0]} is gone; delete {output} and start again")
    with open(output / f"{HASHES}{PART}", "wb") as file:
        for number in range(count):
            with open(work / f"{number:05d}.hashes", "rb") as part:
                shutil.copyfileobj(part, file)
    os.replace(output / f"{HASHES}{PART}", output / HASHES)
    template = tfds.core.ShardedFileTemplate(
        dataset_name=kind.name,
        data_dir=str(output),
        split=kind.split,
        filetype_suffix="array_record",
        template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
    )
    split = tfds.core.SplitInfo(
        name=kind.split,
        shard_lengths=[result["out"] for result in results],
        num_bytes=sum(result["bytes"] for result in results),
        filename_template=template,
    )
    tfds.folder_dataset.write_metadata(
        data_dir=str(output),
        features=kind.features(),
        split_infos=[split],
        check_data=False,
        description="by vlkd prepare",
    )
    skipped: Counter[str] = Counter()
    examples: dict[str, list[str]] = {}
    for result in results:
        skipped.update(result["skipped"])
        for reason, texts in result["examples"].items():
            examples[reason] = (examples.get(reason, []) + texts)[:EXAMPLES]
    total, kept = (sum(result[name] for result in results) for name in ("in", "out"))
    manifest = described | {
        "in": total,
        "out": kept,
        "coverage": kept / total,
        "skipped": dict(skipped.most_common()),
        "examples": examples,
        "records": {name: {"sha256": r["sha256"], "pairs": r["out"]} for name, r in zip(names, results, strict=True)},
        "hashes": {"file": HASHES, "sha256": file_sha256(output / HASHES)},
    }
    write_json(output / MANIFEST, manifest)
    shutil.rmtree(work)
    return manifest
