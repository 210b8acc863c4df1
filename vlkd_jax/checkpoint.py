"""Checkpoints of the train state: asynchronous Orbax saves, our own sha256 manifest, fallback past damaged steps.

    directory/step_00000500/PART/     what Orbax wrote of one part (arrays, tree, shardings) and, last of all,
    directory/step_00000500/vlkd_manifest.jsonl    the hashes of those files: without it a step is not complete

Orbax loads flipped bits without a word and takes an empty step directory for the latest one, hence the manifest.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from vlkd_jax.errors import UserError
from vlkd_jax.workdir import write_atomic

MANIFEST = "vlkd_manifest.jsonl"
FORMAT = 2  # 1: the whole state in one piece
HEADROOM = 1.3  # free space asked for before a save, in sizes of the state

_STEP = re.compile(r"step_(\d{8,})")
_LEFTOVER = re.compile(r"step_\d{8,}\.(orbax-checkpoint-tmp.*|deleted)")
_SET_ASIDE = re.compile(r"step_(\d{8,})\.damaged-\d+")
_UNDECODED = {chr(0xDC00 + byte) for byte in range(0x80, 0x100)}  # how Python holds bytes of a path that are no UTF-8


class _Damaged(Exception):
    """Why a step directory is not a complete checkpoint, or why a part of it cannot be read."""


class Checkpoints:
    """The checkpoints of one run, newest last, in `directory` (a POSIX path; every process must see the same one).

    A state is saved in parts, {name: pytree of global jax.Arrays}, so that one can be read without the others. All
    processes make the same calls in the same order; process 0 writes the manifests and deletes. One run writes to a
    directory at a time (`vlkd_jax.workdir.claim`); reading is free. Checkpoints of another format are never written
    over nor deleted. Use it in a `with` block: leaving the block waits for the save under way.

        with Checkpoints(workdir / "checkpoints", keep=2) as checkpoints:
            checkpoints.save(500, {"params": params, "opt_state": opt_state}, {"examples": 32000})
    """

    def __init__(self, directory: str | os.PathLike[str], keep: int = 2) -> None:
        """Raises UserError for `keep` < 1 and as `check_directory`. Makes no directory before the first save."""
        check_directory(directory)
        if keep < 1:
            raise UserError(f"number of checkpoints to keep must be at least 1, got {keep}")
        self.directory = Path(directory).absolute()
        self.keep = keep
        self._good: set[int] = set()  # steps of which this process has written, or verified, every byte of every part
        self._pending: Future[None] | None = None
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._warned: set[tuple[str, str]] = set()
        _quieten_orbax()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def save(self, step: int, parts: Mapping[str, Any], meta: Mapping[str, Any], wait: bool = False) -> None:
        """Starts saving `parts` as `step`; `meta` is JSON. The arrays may be donated as soon as this returns.

        First waits for the save before and raises what went wrong there. A step that is complete on disk is not written
        again; what a cut-off save or a damaged checkpoint left under this step's name is set aside.

        Raises UserError when the file system has no room (before or during the write; the checkpoints on disk stay as
        they are) and when the step is there in another format, TypeError when `meta` is not JSON, ValueError for the
        name of a part that is no identifier.
        """
        self.wait()
        if wrong := [name for name in parts if not name.isidentifier()]:  # Orbax hangs at a slash
            raise ValueError(f"save: the name of a part must be an identifier, got {wrong[0]!r}")
        body = {"format": FORMAT, "step": int(step), "meta": dict(meta), "tree": _signatures(parts)}
        json.dumps(body)
        needed = int(HEADROOM * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(dict(parts))))
        if not _on_first_process(lambda: self._make_room(int(step), needed)):
            return
        response = ocp.save_checkpointables_async(self._path(step), dict(parts))
        self._pending = self._writer.submit(self._finish, int(step), response, body, needed)
        if wait:
            self.wait()

    def latest(self) -> int | None:
        """The newest step whose manifest is intact and whose files have the right sizes; None when there is none.

        A quick look that reads no array data: `restore` may still find damage and fall back. Prints a warning for
        every step it passes over.

        Raises UserError when it comes upon a step of another format.
        """
        return _on_first_process(lambda: self._newest(lambda path: _verify(path, hashes=False)))

    def restore(self, abstract_parts: Mapping[str, Any]) -> tuple[int, dict[str, Any], dict[str, Any]]:
        """Loads parts of the newest checkpoint in which every byte of them is as it was written: (step, parts, meta).

        `abstract_parts`: {name: part} for the parts to load, each as jax.ShapeDtypeStruct leaves with the sharding to
        load it with (any mesh). Steps that are incomplete, or damaged in these parts, are passed over with a warning.
        A file of another part that is missing or has another size is told in a warning; its bytes are not read.

        Raises UserError when there is no usable checkpoint, and, without trying older ones, when the checkpoint is of
        another format or holds other arrays, shapes or dtypes than `abstract_parts`. ValueError for a leaf without a
        sharding, and for no part at all.
        """
        self.wait()
        if not abstract_parts:
            raise ValueError("restore: name at least one part")
        if any(getattr(leaf, "sharding", None) is None for leaf in jax.tree.leaves(dict(abstract_parts))):
            raise ValueError("restore: every leaf of abstract_parts needs a sharding")
        step = _on_first_process(lambda: self._newest(lambda path: self._verify_parts(path, set(abstract_parts))))
        if step is None:
            raise UserError(f"{self.directory}: no usable checkpoint there; name the directory of another run")
        path = self._path(step)
        body = _read_manifest(path)
        saved = {name: arrays for name, arrays in body["tree"].items() if name in abstract_parts}
        _require_same_trees(path, saved, _signatures(abstract_parts))
        parts = ocp.load_checkpointables(path, dict(abstract_parts))
        if saved == body["tree"]:
            self._good.add(step)
        return step, parts, body["meta"]

    def wait(self) -> None:
        """Waits for the save under way, if any, and raises what went wrong in it, on every process."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        error = pending.exception()
        reports = _share(_report(error))
        if error is not None:
            raise error
        _raise_reported(reports)

    def close(self) -> None:
        """Waits for the save under way and ends the writing thread; raises as `wait`."""
        try:
            self.wait()
        finally:
            self._writer.shutdown()

    def _path(self, step: int) -> Path:
        return self.directory / f"step_{step:08d}"

    def _steps(self) -> list[int]:
        """The numbers of all step directories, good or not, newest first."""
        if not self.directory.is_dir():
            return []
        matches = (_STEP.fullmatch(path.name) for path in self.directory.iterdir() if path.is_dir())
        return sorted((int(match[1]) for match in matches if match), reverse=True)

    def _newest(self, verify: Callable[[Path], None]) -> int | None:
        for step in self._steps():
            try:
                verify(self._path(step))
                return step
            except _Damaged as damage:
                self._good.discard(step)
                self._warn(self._path(step), f"passed over: {damage}")
        return None

    def _verify_parts(self, path: Path, parts: set[str]) -> None:
        """Raises _Damaged unless these parts, and what belongs to no part, are there byte for byte."""
        body = _read_manifest(path)
        others = body["tree"].keys() - parts
        wanted = {name: entry for name, entry in body["files"].items() if name.partition("/")[0] not in others}
        _compare(path, wanted, hashes=True)
        try:
            _compare(path, {name: entry for name, entry in body["files"].items() if name not in wanted}, hashes=False)
        except _Damaged as damage:
            self._warn(path, f"is read without its damaged part: {damage}")

    def _warn(self, path: Path, message: str) -> None:
        if (path.name, message) not in self._warned:
            self._warned.add((path.name, message))
            print(f"warning: checkpoint {path} {message}", file=sys.stderr, flush=True)

    def _make_room(self, step: int, needed: int) -> bool:
        """Readies the directory for a save; False when the step is complete already. On process 0."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.directory}: cannot be made ({error.strerror}); choose another --workdir") from error
        for path in self.directory.iterdir():
            if _LEFTOVER.fullmatch(path.name):
                self._delete(path)
        path = self._path(step)
        if path.exists():
            if step in self._good:
                return False
            try:
                _verify(path, hashes=True)
                self._good.add(step)
                return False
            except _Damaged:
                path.rename(next(aside for n in itertools.count(1) if not (aside := _aside(path, n)).exists()))
        if _free_bytes(self.directory) < needed:
            raise self._no_space(step, needed)
        return True

    def _no_space(self, step: int, needed: int) -> UserError:
        last = max(self._good, default=None)
        kept = f"the checkpoint of step {last} is untouched" if last is not None else "nothing was changed"
        free = _free_bytes(self.directory)
        return UserError(
            f"{self.directory}: no space for the checkpoint of step {step} (needs {needed} bytes, {free} bytes free); "
            f"{kept}; free some space and start again with the same --workdir"
        )

    def _finish(self, step: int, response: Any, body: dict[str, Any], needed: int) -> None:
        """Seals the step once Orbax has committed it and it opens again, then prunes. In the writing thread."""
        path = self._path(step)
        try:
            response.result()
            if jax.process_index() == 0:
                _open_again(path, body["tree"])
                _write_manifest(path, body | {"files": _hash_files(path)})
                _verify(path, hashes=False)
        except _Damaged as damage:
            raise UserError(f"{path}: damaged right after it was written ({damage}); check the disk") from damage
        except Exception as error:
            if not _is_no_space(error):
                raise
            if jax.process_index() == 0:
                for unfinished in self.directory.glob(f"{path.name}*"):
                    if unfinished == path or _LEFTOVER.fullmatch(unfinished.name):
                        self._delete(unfinished)
            raise self._no_space(step, needed) from error
        self._good.add(step)
        if jax.process_index() == 0:
            self._prune()

    def _prune(self) -> None:
        """Deletes what is older than the `keep` newest steps known to be good; nothing before there are that many."""
        good = sorted(self._good)
        if len(good) < self.keep:
            return
        oldest_kept = good[-self.keep]
        for path in self.directory.iterdir():
            match = _STEP.fullmatch(path.name) or _SET_ASIDE.fullmatch(path.name)
            if match and int(match[1]) < oldest_kept and not _is_of_another_format(path):
                self._delete(path)

    def _delete(self, path: Path) -> None:
        doomed = path if path.suffix == ".deleted" else path.with_name(f"{path.name}.deleted")
        try:
            path.rename(doomed)  # first, so that a kill half-way leaves no step directory with files missing
            shutil.rmtree(doomed)
        except OSError as error:
            self._warn(path, f"could not be deleted: {error}")


def check_directory(directory: str | os.PathLike[str]) -> None:
    """Raises UserError for a path in or below which checkpoints cannot be kept.

    Orbax takes the whole path for a glob pattern when it looks for what it has written, and tensorstore takes UTF-8.
    """
    if "://" in os.fspath(directory):
        raise UserError(f"{directory}: checkpoints need a directory; mount the bucket and name the mounted path")
    path = str(Path(directory).absolute())
    unusable = [repr(character) for character in path if character in "[*?\\"]
    if any(character in _UNDECODED for character in path):
        is_utf8 = sys.getfilesystemencoding() == "utf-8"
        unusable.append("a byte that is not UTF-8" if is_utf8 else "a letter that this locale lacks (set PYTHONUTF8=1)")
    if unusable:
        raise UserError(
            f"{path}: holds {unusable[0]}, and checkpoints cannot be read from such a path; rename the folder, name "
            "another place, or reach it through a link without it"
        )


def _aside(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name}.damaged-{number}")


def _free_bytes(directory: Path) -> int:
    status = os.statvfs(directory)
    return status.f_bavail * status.f_frsize


def _is_no_space(error: BaseException | None) -> bool:
    """Whether the disk, or a quota, was full. Orbax's writer reports that as a ValueError with the system's text."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "No space left on device" in str(error) or "Disk quota exceeded" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _quieten_orbax() -> None:
    """Drops the traceback that Orbax's writing threads log for an error which they also hand to us."""
    logger = logging.getLogger("absl")
    if _not_a_handed_on_error not in logger.filters:
        logger.addFilter(_not_a_handed_on_error)


def _not_a_handed_on_error(record: logging.LogRecord) -> bool:
    return "_SignalingThread.run() raised" not in str(record.msg)


def _signatures(parts: Mapping[str, Any]) -> dict[str, dict[str, list[Any]]]:
    """{"params": {"params/shared/embedding": ["float32", [50265, 1024]], ...}, ...}: what both must agree in."""

    def signature(tree: dict[str, Any]) -> dict[str, list[Any]]:
        return {
            jax.tree_util.keystr(path, simple=True, separator="/"): [str(leaf.dtype), list(leaf.shape)]
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }

    return {name: signature({name: part}) for name, part in parts.items()}


def _open_again(path: Path, tree: dict[str, dict[str, list[Any]]]) -> None:
    """Raises _Damaged unless Orbax finds the step as it will when it is restored, every array with its dtype and shape.

    Each array is opened, which reads its header; its numbers are not read: for these the manifest has hashes.
    """
    try:
        opened = ocp.checkpointables_metadata(path).metadata
    except Exception as error:
        raise _Damaged(f"it cannot be opened again: {' '.join(str(error).split())[:300]}") from error
    for name, arrays in tree.items():
        if opened.get(name) is None:  # Orbax tells of a part it cannot open by leaving it out
            raise _Damaged(f"its part {name} cannot be opened again")
        leaves = sorted([str(leaf.dtype), list(leaf.shape)] for leaf in jax.tree.leaves(opened[name]))
        if leaves != sorted(arrays.values()):
            raise _Damaged(f"its part {name} holds other arrays than were written")


def _require_same_trees(path: Path, saved_parts: dict[str, Any], wanted_parts: dict[str, Any]) -> None:
    """Compares what `_signatures` gave of the same choice of parts; raises one UserError that names arrays."""
    if saved_parts == wanted_parts:
        return
    saved, wanted = (
        {name: entry for arrays in parts.values() for name, entry in arrays.items()}
        for parts in (saved_parts, wanted_parts)
    )

    def show(entry: list[Any]) -> str:
        return f"{entry[0]}{entry[1]}"

    differences = [f"it has no part {name}" for name in wanted_parts if name not in saved_parts]
    differences += [
        f"{name} is {show(saved[name])} there, {show(wanted[name])} here"
        for name in wanted
        if name in saved and saved[name] != wanted[name]
    ]
    differences += [f"{name} is not in it" for name in wanted if name not in saved]
    differences += [f"{name} is only in it" for name in saved if name not in wanted]
    more = f"; and {len(differences) - 5} more" if len(differences) > 5 else ""
    raise UserError(
        f"checkpoint {path} does not fit this configuration: {'; '.join(differences[:5])}{more}; "
        "use the configuration it was trained with, or another --workdir"
    )


def _hash_files(path: Path) -> dict[str, list[Any]]:
    """{relative path: [size, sha256]} of every file below `path` but the manifest."""
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.name != MANIFEST)
    with ThreadPoolExecutor(4) as pool:
        digests = list(pool.map(_sha256, files))
    return {
        file.relative_to(path).as_posix(): [file.stat().st_size, digest]
        for file, digest in zip(files, digests, strict=True)
    }


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _seal(line: bytes) -> bytes:
    return json.dumps({"sha256": hashlib.sha256(line).hexdigest()}).encode()


def _write_manifest(path: Path, body: dict[str, Any]) -> None:
    """Two lines: the hash of the second, and the second: {"format", "step", "meta", "tree", "files"}."""
    line = json.dumps(body).encode() + b"\n"
    write_atomic(path / MANIFEST, _seal(line) + b"\n" + line)


def _read_manifest(path: Path) -> dict[str, Any]:
    """The body of the manifest.

    Raises _Damaged when it is missing or a single bit of it has changed, UserError when it is of another format.
    """
    try:
        seal, _, line = (path / MANIFEST).read_bytes().partition(b"\n")
    except FileNotFoundError:
        raise _Damaged(f"incomplete, it has no {MANIFEST}") from None
    if seal != _seal(line):
        raise _Damaged(f"{MANIFEST} is damaged")
    body = json.loads(line)
    if body["format"] != FORMAT:
        age = "an older" if body["format"] < FORMAT else "a newer"
        raise UserError(
            f"checkpoint {path} was written in format {body['format']} by {age} version of vlkd_jax; this one reads "
            f"format {FORMAT}: finish that run with the version that started it, or train again into another --workdir"
        )
    return body


def _is_of_another_format(path: Path) -> bool:
    try:
        _read_manifest(path)
    except _Damaged:
        return False
    except UserError:
        return True
    return False


def _verify(path: Path, hashes: bool) -> None:
    """Raises _Damaged unless every file is there in its size and, with `hashes`, byte for byte."""
    _compare(path, _read_manifest(path)["files"], hashes)


def _compare(path: Path, files: dict[str, list[Any]], hashes: bool) -> None:
    """`_verify` for some of the files of a manifest."""
    for name, (size, _) in files.items():
        file = path / name
        if not file.is_file():
            raise _Damaged(f"{name} is missing")
        if file.stat().st_size != size:
            raise _Damaged(f"{name} has {file.stat().st_size} bytes instead of {size}")
    if hashes:
        with ThreadPoolExecutor(4) as pool:
            for name, digest in zip(files, pool.map(lambda name: _sha256(path / name), files), strict=True):
                if digest != files[name][1]:
                    raise _Damaged(f"the content of {name} has changed since it was written")


def _report(error: BaseException | None, value: Any = None) -> dict[str, Any]:
    """What a process tells the others; the text is cut to what fits into the buffer of `_share`."""
    text = None if error is None else str(error)[:1000]
    return {"error": text, "user": isinstance(error, UserError), "value": value}


def _share(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The reports of all processes, in order."""
    if jax.process_count() == 1:
        return [report]
    buffer = np.zeros(8192, np.uint8)
    data = np.frombuffer(json.dumps(report).encode(), np.uint8)
    buffer[: data.size] = data
    return [json.loads(bytes(row).rstrip(b"\0")) for row in multihost_utils.process_allgather(buffer)]


def _raise_reported(reports: list[dict[str, Any]]) -> None:
    for index, report in enumerate(reports):
        if report["error"] is not None:
            raise (UserError if report["user"] else RuntimeError)(f"process {index}: {report['error']}")


def _on_first_process(work: Callable[[], Any]) -> Any:
    """The JSON value of `work()`, done by process 0 alone; what it raises is raised on every process."""
    value: Any = None
    failure: Exception | None = None
    if jax.process_index() == 0:
        try:
            value = work()
        except Exception as error:
            failure = error
    reports = _share(_report(failure, value))
    if failure is not None:
        raise failure
    _raise_reported(reports[:1])
    return reports[0]["value"]
