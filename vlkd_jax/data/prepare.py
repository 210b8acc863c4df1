"""Pairs as users have them into record files that training reads: `vlkd prepare SOURCE --output=DIR`.

Each part of the input becomes one ArrayRecord file, written under another name and renamed when it is whole, with a
small file of what was counted beside it: a run that was killed goes on where it was, without a pair twice or lost. DIR
is then a tensorflow-datasets directory (no TensorFlow is needed) with a manifest.json.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import ctypes
import dataclasses
import fcntl
import hashlib
import io
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from PIL import Image

from vlkd_jax.commands import COMMANDS
from vlkd_jax.data.images import MAX_ASPECT, check_header, open_image
from vlkd_jax.data.inputs import Columns, Part, Sample, parts, read
from vlkd_jax.errors import RecordError, UserError

MANIFEST, PLAN, PARTS, HASHES = "manifest.json", "prepare.json", "parts", "hashes.jsonl"
PART = ".part-"
"""Behind the name of a file that is not whole, before the process that writes it."""
EXAMPLES = 3
"""So many skipped pairs of each reason stand in the manifest."""
MAX_CAPTION = 4096
"""Characters of a caption that is kept; the longest of CC3M has some 200."""
VERSION = 1
ORIENTATION = 0x0112
"""EXIF's tag."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What decides what the records are.

    Attributes:
      name, split: of the data set.
      short: pixels of a picture's shorter side at most; a smaller picture stays as it is.
      quality: of JPEG.
      rows: pairs of a table in one record file; a tar shard is one file.
    """

    name: str = "pairs"
    split: str = "train"
    short: int = 288
    quality: int = 90
    rows: int = 10_000


def features():
    """The fields of a record, in tensorflow-datasets' terms."""
    import tensorflow_datasets as tfds

    return tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(encoding_format="jpeg"),
            "caption": tfds.features.Text(),
            "key": tfds.features.Text(),
        }
    )


def shrink(image: bytes, short: int, quality: int) -> bytes:
    """A picture as JPEG, RGB, upright, its shorter side `short` pixels at most.

    A JPEG that is all this already keeps its bytes. Of longer strips than `MAX_ASPECT` to one the middle is kept.

    Raises:
      RecordError: as `images.open_image`.
    """
    header, picture = check_header(image), open_image(image)
    width, height = picture.size
    is_plain = header.format == "JPEG" and header.mode == "RGB" and header.getexif().get(ORIENTATION, 1) == 1
    if is_plain and min(width, height) <= short and max(width, height) <= MAX_ASPECT * min(width, height):
        return image
    longest = MAX_ASPECT * min(width, height)
    if max(width, height) > longest:
        left, top = max(0, width - longest) // 2, max(0, height - longest) // 2
        picture = picture.crop((left, top, left + min(width, longest), top + min(height, longest)))
        width, height = picture.size
    if min(width, height) > short:
        scale = short / min(width, height)
        size = max(short, round(width * scale)), max(short, round(height * scale))
        picture = picture.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality, subsampling=0 if quality >= 90 else -1)
    return buffer.getvalue()


def caption_of(sample: Sample) -> str:
    """The caption on one line, without control characters.

    Raises:
      RecordError: nothing is left, or more than `MAX_CAPTION` characters.
    """
    text = sample.caption.encode("utf-8", "replace").decode()  # half an emoji is no UTF-8
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    if not text:
        raise RecordError("caption empty", f"{sample.key}: its caption is empty")
    if len(text) > MAX_CAPTION:
        raise RecordError("caption too long", f"{sample.key}: {len(text)} characters, more than {MAX_CAPTION}")
    return text


def write_part(part: Part, number: int, columns: Columns, options: Options, directory: Path) -> dict[str, Any]:
    """Makes the record file of a part, and returns what was counted. A worker calls it."""
    import imagehash
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.proto import tf_example_pb2

    made = features()
    file, own = directory / f"{number:05d}.records", f"{PART}{os.getpid()}"
    counts = {"in": 0, "out": 0, "bytes": 0}
    skipped: Counter[str] = Counter()
    examples: dict[str, list[str]] = {}
    hash_file = file.with_suffix(".hashes")
    writer = ArrayRecordWriter(f"{file}{own}", "group_size:1")
    with open(f"{hash_file}{own}", "w", encoding="utf-8") as hashes:
        for sample in read(part, columns):
            counts["in"] += 1
            try:
                if isinstance(sample, RecordError):
                    raise sample
                caption, image = caption_of(sample), _bytes(sample)
                small = shrink(image, options.short, options.quality)
            except RecordError as error:
                skipped[error.reason] += 1
                if len(texts := examples.setdefault(error.reason, [])) < EXAMPLES:
                    texts.append(str(error) if str(error).startswith(part.path) else f"{sample.key}: {error}")
                continue
            record = {"image": io.BytesIO(small), "caption": caption, "key": sample.key}
            example = made.serialize_example(made.encode_example(record))
            data = tf_example_pb2.Example.FromString(example).SerializeToString(
                deterministic=True
            )  # fields in one order
            writer.write(data)
            counts["out"] += 1
            counts["bytes"] += len(data)
            digests = [hashlib.sha256(value).hexdigest() for value in (image, caption.encode())]
            seen = str(imagehash.phash(Image.open(io.BytesIO(small))))
            told = {"key": sample.key, "image": digests[0], "caption": digests[1], "phash": seen}
            hashes.write(json.dumps(told) + "\n")
    writer.close()
    for path in (file, hash_file):
        os.replace(f"{path}{own}", path)
    result = counts | {"skipped": dict(skipped), "examples": examples, "sha256": _sha256(file)}
    _write_json(file.with_suffix(".json"), result)
    return result


def _bytes(sample: Sample) -> bytes:
    if isinstance(sample.image, bytes):
        return sample.image
    try:
        return sample.image.read_bytes()
    except OSError as error:
        message = f"{sample.key}: {sample.image} cannot be read ({error.strerror})"
        raise RecordError("image not found", message) from error


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_json(path: Path, value: Any) -> None:
    """Whole or not at all."""
    part = path.with_name(f"{path.name}{PART}{os.getpid()}")
    with open(part, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def _die_with(parent: int) -> None:
    """A worker ends with the command that started it, however that ends; Ctrl-C is the command's to answer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() != parent:  # it has ended before this was asked for
        os._exit(1)


def prepare(
    source: Path, output: Path, columns: Columns, options: Options, workers: int = 2, max_unusable: float = 0.5
) -> dict[str, Any]:
    """Makes DIR, or what is missing of it; returns its manifest.

    Args:
      max_unusable: share of the pairs read so far that may be skipped, looked at when 1,000 have been read.

    Raises:
      UserError: a source or an output that cannot be used, an output of other options, too many skipped pairs.
    """
    columns.check()
    if (output / MANIFEST).exists():
        _check_same(output / MANIFEST, _describe(source, columns, options))
        return json.loads((output / MANIFEST).read_text())
    work = output / PARTS
    work.mkdir(parents=True, exist_ok=True)
    with _locked(output):
        described = _describe(source, columns, options)
        if (output / PLAN).exists():
            _check_same(output / PLAN, described)
        todo = parts(source, columns, options.rows)
        _write_json(output / PLAN, described)
        results = _run(todo, columns, options, work, workers, max_unusable)
        return _finish(output, todo, results, described, options)


def _describe(source: Path, columns: Columns, options: Options) -> dict[str, Any]:
    """What has to be the same when the command goes on."""
    files = sorted(p for p in source.iterdir() if p.is_file()) if source.is_dir() else [source]
    try:
        sizes = {path.name: path.stat().st_size for path in files}
    except OSError as error:
        raise UserError(f"{source}: cannot be read ({error.strerror}); correct the path") from error
    return {
        "version": VERSION,
        "source": {"path": str(source.absolute()), "files": sizes},
        "columns": dataclasses.asdict(columns),
        "options": dataclasses.asdict(options),
    }


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
def _locked(output: Path) -> Iterator[None]:
    with open(output / "prepare.lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"{output}: another vlkd prepare is at work there; wait for it") from error
        yield


def _run(
    todo: Sequence[Part], columns: Columns, options: Options, work: Path, workers: int, max_unusable: float
) -> list[dict[str, Any]]:
    """What was counted of every part, those of an earlier run among them."""
    results: dict[int, dict[str, Any]] = {}
    for number in range(len(todo)):
        with contextlib.suppress(OSError, ValueError):
            results[number] = json.loads((work / f"{number:05d}.json").read_text())
    missing = [number for number in range(len(todo)) if number not in results]
    for left in work.glob(f"*{PART}*"):
        left.unlink()
    if results:
        print(f"{len(results)} of {len(todo)} parts are there already", flush=True)
    since, before = time.monotonic(), sum(result["in"] for result in results.values())
    # not forked: a worker that is started anew holds none of this process's locks and threads
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, context, _die_with, (os.getpid(),)) as pool:
        running = {pool.submit(write_part, todo[k], k, columns, options, work): k for k in missing}
        try:
            for done in concurrent.futures.as_completed(running):
                results[running[done]] = done.result()
                print(_progress(results, len(todo), len(missing), before, time.monotonic() - since), flush=True)
                _check_share(results, max_unusable)
        except concurrent.futures.process.BrokenProcessPool as error:
            raise UserError(
                "a worker was killed (out of memory?); the same command goes on, --workers=N takes fewer"
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    return [results[number] for number in range(len(todo))]


def _progress(results: dict[int, dict[str, Any]], count: int, missing: int, before: int, seconds: float) -> str:
    read_now = sum(result["in"] for result in results.values())
    done = len(results) - (count - missing)
    eta = seconds / max(done, 1) * (missing - done)
    skipped: Counter[str] = Counter()
    for result in results.values():
        skipped.update(result["skipped"])
    told = f"  skipped: {', '.join(f'{reason} {n:,}' for reason, n in skipped.most_common())}" if skipped else ""
    speed = (read_now - before) / max(seconds, 1e-9)
    eta_told = f"eta {int(eta // 60)}:{int(eta % 60):02d}"
    return f"part {len(results)}/{count}  {eta_told}  {speed:,.0f} pairs/s  {read_now:,} read{told}"


def _check_share(results: dict[int, dict[str, Any]], max_unusable: float) -> None:
    total = sum(result["in"] for result in results.values())
    lost = total - sum(result["out"] for result in results.values())
    if lost > max_unusable * max(total, 1000):
        examples = [text for result in results.values() for texts in result["examples"].values() for text in texts]
        raise UserError(
            f"{lost:,} of the {total:,} pairs read so far are skipped, more than --max_unusable={max_unusable:g}; "
            f"for example {examples[0]}"
        )


def _finish(
    output: Path, todo: Sequence[Part], results: Sequence[dict[str, Any]], described: dict[str, Any], options: Options
) -> dict[str, Any]:
    """Gives the record files their names and writes what describes them; the manifest comes last."""
    import tensorflow_datasets as tfds

    work, count = output / PARTS, len(todo)
    names = [f"{options.name}-{options.split}.array_record-{k:05d}-of-{count:05d}" for k in range(count)]
    if not sum(result["out"] for result in results):
        raise UserError(f"{described['source']['path']}: no pair in it can be used; see {work}")
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
        dataset_name=options.name,
        data_dir=str(output),
        split=options.split,
        filetype_suffix="array_record",
        template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
    )
    split = tfds.core.SplitInfo(
        name=options.split,
        shard_lengths=[result["out"] for result in results],
        num_bytes=sum(result["bytes"] for result in results),
        filename_template=template,
    )
    tfds.folder_dataset.write_metadata(
        data_dir=str(output), features=features(), split_infos=[split], check_data=False, description="by vlkd prepare"
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
        "hashes": {"file": HASHES, "sha256": _sha256(output / HASHES)},
    }
    _write_json(output / MANIFEST, manifest)
    shutil.rmtree(work)
    return manifest


def main() -> None:
    """Entry point."""
    values = flags.FLAGS
    columns = Columns(values.image, values.caption, values.images, values.names)
    names = [field.name for field in dataclasses.fields(Options)]
    options = Options(**{name: values[name].value for name in names})
    output = Path(values.output)
    manifest = prepare(Path(values.source), output, columns, options, values.workers, values.max_unusable)
    if values.json:
        print(json.dumps(manifest))
        return
    skipped = ", ".join(f"{reason} {count:,}" for reason, count in manifest["skipped"].items()) or "none"
    print(f"{output}: {manifest['out']:,} of {manifest['in']:,} pairs ({manifest['coverage']:.1%}); skipped: {skipped}")


if __name__ == "__main__":
    from vlkd_jax import entry

    entry.run(main, COMMANDS["prepare"])
