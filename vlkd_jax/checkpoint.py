"""Checkpoints of the train state: asynchronous Orbax saves, our own sha256 manifest, fallback past damaged steps.

    directory/step_00000500/PART/     what Orbax wrote of one part (arrays, tree, shardings) and, last of all,
    directory/step_00000500/vlkd_manifest.jsonl    the hashes of those files: without it a step is not complete

Orbax loads flipped bits without a word and takes an empty step directory for the latest one, hence the manifest.
"""

from __future__ import annotations

import errno
import itertools
import json
import logging
import math
import os
import re
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
from etils import epath
from orbax.checkpoint import v1 as ocp

from vlkd_jax import processes
from vlkd_jax.errors import UserError
from vlkd_jax.manifest import (
    FORMAT,
    MANIFEST,
    STEP,
    Damaged,
    compare,
    hash_files,
    is_of_another_format,
    manifest_sha256,
    read_manifest,
    step_path,
    steps_in,
    verify_all,
    write_manifest,
)
from vlkd_jax.storage import check_reachable, is_remote, locate

HEADROOM = 1.3  # free space asked for before a save, in sizes of the state

_LEFTOVER = re.compile(r"step_\d{8,}\.(orbax-checkpoint-tmp.*|deleted)")
_SET_ASIDE = re.compile(r"step_(\d{8,})\.damaged-\d+")
_UNDECODED = {chr(0xDC00 + byte) for byte in range(0x80, 0x100)}  # how Python holds bytes of a path that are no UTF-8


class Checkpoints:
    """The checkpoints of one run, newest last, in `directory` (every process must see the same one).

    `directory` is a local path or the URL of a place in an object store. What is written there beside Orbax's files is
    tested on a made-up store, Orbax itself only on local paths.

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
        self.directory = locate(directory)
        self.keep = keep
        self._good: set[int] = set()  # steps of which this process has written, or verified, every byte of every part
        self._written = 0  # saves that were begun here: numbers 1, 2, 4, 8, ... are opened again
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
        if not processes.on_first(lambda: self._make_room(int(step), needed)):
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
        return processes.on_first(lambda: self._newest(lambda path: verify_all(path, hashes=False)))

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
        step = processes.on_first(lambda: self._newest(lambda path: self._verify_parts(path, set(abstract_parts))))
        if step is None:
            raise UserError(f"{self.directory}: no usable checkpoint there; name the directory of another run")
        path = self._path(step)
        body = read_manifest(path)
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
        reports = processes.share(processes.report(error))
        if error is not None:
            raise error
        processes.raise_reported(reports)

    def sha256(self, step: int) -> str:
        """The hash that stands for every byte of a step: that of the list of its files' hashes."""
        return manifest_sha256(self._path(step))

    def close(self) -> None:
        """Waits for the save under way and ends the writing thread; raises as `wait`."""
        try:
            self.wait()
        finally:
            self._writer.shutdown()

    def _path(self, step: int) -> epath.Path:
        return step_path(self.directory, step)

    def _entries(self) -> list[epath.Path]:
        """What lies in the directory, if it is there: an object store has none before the first save."""
        return list(self.directory.iterdir()) if self.directory.is_dir() else []

    def _newest(self, verify: Callable[[epath.Path], None]) -> int | None:
        for step in steps_in(self.directory):
            try:
                verify(self._path(step))
                return step
            except Damaged as damage:
                self._good.discard(step)
                self._warn(self._path(step), f"passed over: {damage}")
        return None

    def _verify_parts(self, path: epath.Path, parts: set[str]) -> None:
        """Raises Damaged unless these parts, and what belongs to no part, are there byte for byte."""
        body = read_manifest(path)
        others = body["tree"].keys() - parts
        wanted = {name: entry for name, entry in body["files"].items() if name.partition("/")[0] not in others}
        compare(path, wanted, hashes=True)
        try:
            compare(path, {name: entry for name, entry in body["files"].items() if name not in wanted}, hashes=False)
        except Damaged as damage:
            self._warn(path, f"is read without its damaged part: {damage}")

    def _warn(self, path: epath.Path, message: str) -> None:
        if (path.name, message) not in self._warned:
            self._warned.add((path.name, message))
            print(f"warning: checkpoint {path} {message}", file=sys.stderr, flush=True)

    def _make_room(self, step: int, needed: int) -> bool:
        """Readies the directory for a save; False when the step is complete already. On process 0."""
        try:
            if not is_remote(self.directory):
                self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.directory}: cannot be made ({error.strerror}); choose another --workdir") from error
        for path in self._entries():
            if _LEFTOVER.fullmatch(path.name):
                self._delete(path)
        path = self._path(step)
        if path.exists():
            if step in self._good:
                return False
            try:
                verify_all(path, hashes=True)
                self._good.add(step)
                return False
            except Damaged:
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
        """Seals the step once Orbax has committed it, and some of them once they open again, then prunes.

        In the writing thread.
        """
        path = self._path(step)
        try:
            response.result()
            if processes.is_first():
                self._written += 1
                if self._written & (self._written - 1) == 0:  # tensorstore 0.1.86 never frees what this takes
                    _open_again(path, body["tree"])
                write_manifest(path, body | {"files": hash_files(path)})
                verify_all(path, hashes=False)
        except Damaged as damage:
            raise UserError(f"{path}: damaged right after it was written ({damage}); check the disk") from damage
        except Exception as error:
            if not _is_no_space(error):
                raise
            if processes.is_first():
                for unfinished in self._entries():
                    leftover = _LEFTOVER.fullmatch(unfinished.name) and unfinished.name.startswith(f"{path.name}.")
                    if unfinished == path or leftover:
                        self._delete(unfinished)
            raise self._no_space(step, needed) from error
        self._good.add(step)
        if processes.is_first():
            self._prune()

    def _prune(self) -> None:
        """Deletes what is older than the `keep` newest steps known to be good; nothing before there are that many."""
        good = sorted(self._good)
        if len(good) < self.keep:
            return
        oldest_kept = good[-self.keep]
        for path in self._entries():
            match = STEP.fullmatch(path.name) or _SET_ASIDE.fullmatch(path.name)
            if match and int(match[1]) < oldest_kept and not is_of_another_format(path):
                self._delete(path)

    def _delete(self, path: epath.Path) -> None:
        """A kill half-way leaves no step directory that looks complete and has files missing."""
        doomed = path
        try:
            if is_remote(path):  # where to rename is to copy
                (path / MANIFEST).unlink(missing_ok=True)
            elif path.suffix != ".deleted":
                doomed = path.rename(path.with_name(f"{path.name}.deleted"))
            doomed.rmtree()
        except OSError as error:
            self._warn(path, f"could not be deleted: {error}")


def check_directory(directory: str | os.PathLike[str]) -> None:
    """Raises UserError for a path in or below which checkpoints cannot be kept.

    Orbax takes the whole path for a glob pattern when it looks for what it has written, and tensorstore takes UTF-8.
    An object store is asked whether it answers.
    """
    place = locate(directory)
    path = os.fspath(place)
    unusable = [repr(character) for character in path if character in "[*?\\"]
    if any(character in _UNDECODED for character in path):
        is_utf8 = sys.getfilesystemencoding() == "utf-8"
        unusable.append("a byte that is not UTF-8" if is_utf8 else "a letter that this locale lacks (set PYTHONUTF8=1)")
    if unusable:
        raise UserError(
            f"{path}: holds {unusable[0]}, and checkpoints cannot be read from such a path; rename the folder, name "
            "another place, or reach it through a link without it"
        )
    check_reachable(place)


def _aside(path: epath.Path, number: int) -> epath.Path:
    return path.with_name(f"{path.name}.damaged-{number}")


def _free_bytes(directory: epath.Path) -> float:
    if is_remote(directory):
        return math.inf
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


def _open_again(path: epath.Path, tree: dict[str, dict[str, list[Any]]]) -> None:
    """Raises Damaged unless Orbax finds the step as it will when it is restored, every array with its dtype and shape.

    Each array is opened, which reads its header; its numbers are not read: for these the manifest has hashes.
    """
    try:
        opened = ocp.checkpointables_metadata(path).metadata
    except Exception as error:
        raise Damaged(f"it cannot be opened again: {' '.join(str(error).split())[:300]}") from error
    for name, arrays in tree.items():
        if opened.get(name) is None:  # Orbax tells of a part it cannot open by leaving it out
            raise Damaged(f"its part {name} cannot be opened again")
        leaves = sorted([str(leaf.dtype), list(leaf.shape)] for leaf in jax.tree.leaves(opened[name]))
        if leaves != sorted(arrays.values()):
            raise Damaged(f"its part {name} holds other arrays than were written")


def _require_same_trees(path: epath.Path, saved_parts: dict[str, Any], wanted_parts: dict[str, Any]) -> None:
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
