"""The manifest of a checkpoint: every file's size and sha256, sealed by a hash of its own.

It is written last: a step that has one is complete.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from etils import epath

from vlkd_jax.errors import UserError
from vlkd_jax.storage import is_remote, write_atomic

MANIFEST = "vlkd_manifest.jsonl"
FORMAT = 2  # 1: the whole state in one piece
BLOCK = 1 << 22  # bytes read at once
CHECKPOINTS = "checkpoints"
"""The folder of a run's workdir in which its steps lie."""
STEP = re.compile(r"step_(\d{8,})")
"""The name of a step's directory."""


class Damaged(Exception):
    """Why a step directory is not a complete checkpoint, or why a part of it cannot be read."""


def steps_in(directory: epath.Path) -> list[int]:
    """The numbers of all step directories, good or not, newest first; an object store has none before the first."""
    names = [path.name for path in directory.iterdir() if path.is_dir()] if directory.is_dir() else []
    return sorted((int(match[1]) for match in map(STEP.fullmatch, names) if match), reverse=True)


def step_path(directory: epath.Path, step: int) -> epath.Path:
    """Where a step lies, or is to lie."""
    return directory / f"step_{step:08d}"


def hash_files(path: epath.Path) -> dict[str, list[Any]]:
    """{relative path: [size, sha256]} of every file below `path` but the manifest."""
    files = sorted(file for file in _files_below(path) if file.name != MANIFEST)
    with ThreadPoolExecutor(4) as pool:
        digests = list(pool.map(file_sha256, files))
    return {
        file.relative_to(path).as_posix(): [_size(file), digest] for file, digest in zip(files, digests, strict=True)
    }


def _files_below(path: epath.Path) -> Iterator[epath.Path]:
    for child in path.iterdir():
        if child.is_dir():
            if child != path:  # the object by which some tools mark an empty directory
                yield from _files_below(child)
        else:
            yield child


def _size(file: epath.Path) -> int:
    """Bytes. Of a local file epath would also look up its owner's name, who need not have one."""
    return file.stat().length if is_remote(file) else os.stat(file).st_size


def file_sha256(file: str | os.PathLike[str]) -> str:
    """The sha256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with epath.Path(file).open("rb") as stream:
        while block := stream.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _seal(line: bytes) -> bytes:
    return json.dumps({"sha256": hashlib.sha256(line).hexdigest()}).encode()


def write_manifest(path: epath.Path, body: dict[str, Any]) -> None:
    """Seals a step. Two lines: the hash of the second, and the second: {"format", "step", "meta", "tree", "files"}."""
    line = json.dumps(body).encode() + b"\n"
    write_atomic(path / MANIFEST, _seal(line) + b"\n" + line)


def read_manifest(path: epath.Path) -> dict[str, Any]:
    """The body of the manifest.

    Raises Damaged when it is missing or a single bit of it has changed, UserError when it is of another format.
    """
    try:
        seal, _, line = (path / MANIFEST).read_bytes().partition(b"\n")
    except FileNotFoundError:
        raise Damaged(f"incomplete, it has no {MANIFEST}") from None
    if seal != _seal(line):
        raise Damaged(f"{MANIFEST} is damaged")
    body = json.loads(line)
    if body["format"] != FORMAT:
        age = "an older" if body["format"] < FORMAT else "a newer"
        raise UserError(
            f"checkpoint {path} was written in format {body['format']} by {age} version of vlkd_jax; this one reads "
            f"format {FORMAT}: finish that run with the version that started it, or train again into another --workdir"
        )
    return body


def check_format(directory: epath.Path) -> None:
    """Raises UserError where the newest step whose manifest is intact is of another format."""
    for step in steps_in(directory):
        with contextlib.suppress(Damaged):
            read_manifest(step_path(directory, step))
            return


def manifest_sha256(path: epath.Path) -> str:
    """The hash of a manifest, and through it of every file of the step."""
    return json.loads((path / MANIFEST).read_bytes().partition(b"\n")[0])["sha256"]


def is_of_another_format(path: epath.Path) -> bool:
    """Whether the manifest is intact and of a format that this version does not read."""
    try:
        read_manifest(path)
    except Damaged:
        return False
    except UserError:
        return True
    return False


def verify_all(path: epath.Path, hashes: bool) -> None:
    """Raises Damaged unless every file is there in its size and, with `hashes`, byte for byte."""
    compare(path, read_manifest(path)["files"], hashes)


def compare(path: epath.Path, files: dict[str, list[Any]], hashes: bool) -> None:
    """`verify_all` for some of the files of a manifest, {path below `path`: [size in bytes, sha256]}."""
    for name, (size, _) in files.items():
        file = path / name
        if not file.is_file():
            raise Damaged(f"{name} is missing")
        if (size_now := _size(file)) != size:
            raise Damaged(f"{name} has {size_now} bytes instead of {size}")
    if hashes:
        with ThreadPoolExecutor(4) as pool:
            for name, digest in zip(files, pool.map(lambda name: file_sha256(path / name), files), strict=True):
                if digest != files[name][1]:
                    raise Damaged(f"the content of {name} has changed since it was written")
