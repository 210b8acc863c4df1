"""What a run was started with: the hashes of the files it reads, kept in its workdir, and a stop when one has changed.

Paths say where a file lay, not what it held: weights or tokenizers of equal shape would else be exchanged unnoticed.
"""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ml_collections import ConfigDict

from vlkd_jax.config import BUILTIN, model_directory
from vlkd_jax.errors import UserError
from vlkd_jax.hf.load import files_read
from vlkd_jax.workdir import write_atomic

INPUTS_FILE = "inputs.json"
TEXTS_OF_THE_RUN = ("", "captions", "shapes_texts")
"""Values of `config.data.replay` that are not a file."""

Hashes = dict[str, dict[str, str]]
"""{field of the config: {file name: sha256}}."""


def with_absolute_paths(config: ConfigDict) -> ConfigDict:
    """A copy whose paths mean the same from any directory: relative ones are taken from the current one."""
    config = config.copy_and_resolve_references()
    with config.unlocked():
        for field in ("clip", "bart"):
            if not config[field].startswith(BUILTIN):
                config[field] = _absolute(config[field])
        for field in ("captions", "images"):
            config.data[field] = _absolute(config.data[field])
        if config.data.replay not in TEXTS_OF_THE_RUN:
            config.data.replay = _absolute(config.data.replay)
    return config


def _absolute(path: str) -> str:
    return os.path.abspath(path) if path else path


def hash_inputs(config: ConfigDict) -> Hashes:
    """The sha256 of every file of the teacher, the student's start, their tokenizers, the captions and replayed texts.

    Files that are not there are left out: what reads them tells more about it. Pictures are not hashed.
    """
    files: dict[str, list[Path]] = {}
    for field in ("clip", "bart"):
        if config[field] and (directory := model_directory(config[field])).is_dir():
            files[field] = [directory / name for name in files_read(directory)]
    for field, value in (("data.captions", config.data.captions), ("data.replay", config.data.replay)):
        if value not in TEXTS_OF_THE_RUN and Path(value).is_file():
            files[field] = [Path(value)]
    with ThreadPoolExecutor(4) as pool:
        return {
            field: dict(zip((path.name for path in paths), pool.map(_sha256, paths), strict=True))
            for field, paths in files.items()
        }


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def record_inputs(workdir: Path, inputs: Hashes) -> None:
    """Keeps the hashes of what a run starts with in its workdir."""
    write_atomic(workdir / INPUTS_FILE, (json.dumps(inputs, indent=1) + "\n").encode())


def check_inputs(workdir: Path, config: ConfigDict, now: Hashes) -> None:
    """Compares `now`, the hashes of what `config` names, with those that the run in `workdir` started with.

    A workdir without such a record is let pass: nothing was started there, or by a version that kept none.

    Raises:
      UserError: naming every file that is another one, is gone, or was not there at the start.
    """
    path = workdir / INPUTS_FILE
    if not path.is_file():
        return
    try:
        start: Hashes = json.loads(path.read_bytes())
        wrong = [line for field in sorted(start | now) for line in _changes(config, field, start, now)]
    except (ValueError, AttributeError, TypeError) as e:
        raise UserError(f"{path}: not readable as the hashes of this run's files ({e}); restore it") from e
    if wrong:
        raise UserError(
            f"{workdir}: not what this run started with: {'; '.join(wrong)}; put the files of its start back, or use "
            "another --workdir"
        )


def _changes(config: ConfigDict, field: str, start: Hashes, now: Hashes) -> list[str]:
    before, after = start.get(field, {}), now.get(field, {})
    is_model = field in ("clip", "bart")
    place = model_directory(config[field]) if is_model else Path(config.data[field.removeprefix("data.")])
    if before and not place.exists():
        return [f"{place} ({field}) is gone; where it has moved, `vlkd train --config.{field}=PLACE` tells the run"]
    lines = []
    for name in sorted(before | after):
        path = place / name if is_model else place
        if name not in after:
            lines.append(f"{path} ({field}) is gone")
        elif name not in before:
            lines.append(f"{path} ({field}) is new")
        elif before[name] != after[name]:
            lines.append(f"{path} ({field}) has changed, sha256 {before[name][:12]}... -> {after[name][:12]}...")
    return lines
