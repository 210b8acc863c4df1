"""What a run was started with: the hashes of the files it reads, kept in its workdir, and a stop when one has changed.

Paths say where a file lay, not what it held: weights or tokenizers of equal shape would else be exchanged unnoticed.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from etils import epath
from ml_collections import ConfigDict

from vlkd_jax import processes
from vlkd_jax.config import BUILTIN, HUB, model_directory, record_directories
from vlkd_jax.console import say
from vlkd_jax.errors import UserError
from vlkd_jax.hf.files import CONFIG, files_read
from vlkd_jax.hf.hub import pinned
from vlkd_jax.manifest import file_sha256
from vlkd_jax.storage import is_remote, locate, unusable, write_atomic

INPUTS_FILE = "inputs.json"
TEXTS_OF_THE_RUN = ("", "captions", "shapes_texts")
"""Values of `config.data.replay` that are not a file."""

MODELS = ("clip", "bart", "start")
"""Fields that name a model's directory: what a trained student needs."""
FILES = ("captions", "questions", "annotations", "replay")
"""Fields of `config.data` that name a file."""
FIELDS = (*MODELS, *(f"data.{name}" for name in FILES), "data.directory", "data.teacher_cache")
"""The fields whose files are hashed; of a directory of records what describes them."""
DESCRIPTIONS = ("manifest.json", "dataset_info.json")
"""One of them is hashed, the first that is there; the manifest holds the hashes of the record files."""
TEXT_FILES = ("train", "dev", "validation")
"""What the names of the files in a directory without a description begin with that are hashed."""

PARENTS = "parents"
"""The folder of a run's own copies of the models it started from, clip/, bart/, start/."""
KEEP = ("auto", "yes", "no")
KEPT_BYTES = 2 * 2**30
"""What `config.keep_teacher=auto` copies at most, both models together."""

Hashes = dict[str, dict[str, str]]
"""{field of the config: {file name: sha256}}."""


def with_absolute_paths(config: ConfigDict) -> ConfigDict:
    """A copy whose paths mean the same from any directory, each in one spelling: no `..`, no slash at the end, no link.

    Models of the hub get the commit that they are now. Raises UserError when that cannot be told.

    Only the last name may be a link: its ending, such as `.tsv`, says how a file is read.
    """
    config = config.copy_and_resolve_references()
    with config.unlocked():
        for field in MODELS:
            if config[field].startswith(HUB):
                config[field] = processes.on_first(lambda name=config[field]: pinned(name))
            elif not config[field].startswith(BUILTIN):
                config[field] = _absolute(config[field])
        for field in ("captions", "images", "questions", "annotations", "teacher_cache"):
            config.data[field] = _absolute(config.data[field])
        config.data.directory = ",".join(map(_absolute, record_directories(config.data)))
        if config.data.replay not in TEXTS_OF_THE_RUN:
            config.data.replay = _absolute(config.data.replay)
    return config


def _absolute(path: str) -> str:
    if not path:
        return path
    parent, name = os.path.split(path.rstrip("/") or "/")
    if name in ("", ".", ".."):
        return os.path.realpath(path)
    return os.path.join(os.path.realpath(parent), name)


def hash_inputs(config: ConfigDict, fields: Sequence[str] = FIELDS) -> Hashes:
    """The sha256 of every file of the teacher, the student's start, the captions and replayed texts.

    Tokenizers and preprocessing are among a model's files. Files that are not there are left out: what reads them tells
    more about it. Pictures are not hashed. Every process calls this; process 0 reads the files and tells the others.

    Args:
      fields: those of `FIELDS` to look at.
    """
    return processes.on_first(lambda: _hash_inputs(config, fields))


def hash_directory(directory: Path) -> dict[str, str]:
    """The sha256 of each file that a model in this directory is read from. Every process calls this."""
    return processes.on_first(lambda: {name: file_sha256(directory / name) for name in files_read(directory)})


def _hash_inputs(config: ConfigDict, fields: Sequence[str]) -> Hashes:
    files: dict[str, list[Path]] = {}
    for field in MODELS:
        if config[field] and (directory := model_directory(config[field])).is_dir():
            files[field] = [directory / name for name in files_read(directory)]
    for name in FILES:
        if (value := config.data[name]) not in TEXTS_OF_THE_RUN and Path(value).is_file():
            files[f"data.{name}"] = [Path(value)]
    for field, places in (
        ("data.directory", record_directories(config.data)),
        ("data.teacher_cache", [config.data.teacher_cache]),
    ):
        files[field] = [path for place in places if place for path in _descriptions(Path(place))]
    files = {field: paths for field, paths in files.items() if field in fields}
    with ThreadPoolExecutor(4) as pool:
        return {
            field: dict(zip(_names(paths), pool.map(file_sha256, paths), strict=True))
            for field, paths in files.items()
            if paths
        }


def _descriptions(directory: Path) -> list[Path]:
    """What tells of the records in a directory; of one without a description the files themselves."""
    described = [path for name in DESCRIPTIONS if (path := directory / name).is_file()][:1]
    texts = (path for path in directory.glob("*") if path.name.startswith(TEXT_FILES) and path.is_file())
    return described or sorted(texts)


def _names(paths: list[Path]) -> list[str]:
    """The files' names; of files in several directories, which may have one name, with their number in front."""
    several = len({path.parent for path in paths}) > 1
    return [f"{number}/{path.name}" if several else path.name for number, path in enumerate(paths)]


def record_inputs(workdir: str | os.PathLike[str], inputs: Hashes) -> None:
    """Keeps the hashes of what a run starts with in its workdir. Every process calls this, process 0 writes."""
    path, text = locate(workdir) / INPUTS_FILE, json.dumps(inputs, indent=1) + "\n"
    processes.on_first(lambda: write_atomic(path, text.encode()))


def keep_models(workdir: str | os.PathLike[str], config: ConfigDict, anew: bool) -> None:
    """Copies the models a run starts from into its workdir, as `config.keep_teacher` says, but those of the package.

    Every process calls this, process 0 copies.

    Args:
      anew: the run begins, maybe again and with other models: copies of an earlier begin are deleted. Otherwise what is
        there is left.

    Raises:
      UserError: `yes` for a workdir in an object store, from which no model is read; the copy cannot be written.
    """
    if is_remote(workdir):
        if config.keep_teacher == "yes":
            raise UserError(f"config.keep_teacher is yes: models are not read from {workdir}; set it to no")
        return
    named = [name for name in MODELS if config[name] and not config[name].startswith(BUILTIN)]
    given = {name: model_directory(config[name]) for name in named}
    parents = Path(os.fspath(locate(workdir))) / PARENTS
    processes.on_first(lambda: _keep_models(parents, given, config.keep_teacher, anew))


def _keep_models(parents: Path, given: dict[str, Path], keep: str, anew: bool) -> None:
    if anew:
        shutil.rmtree(parents, ignore_errors=True)
    if keep == "no":
        return
    size = sum((path / name).stat().st_size for path in given.values() for name in files_read(path))
    if keep == "auto" and size > KEPT_BYTES:
        say(
            f"the models are {size / 2**30:.1f} GiB: not copied into the workdir, which needs them for evaluation and "
            "export; --config.keep_teacher=yes copies them"
        )
        return
    for name, source in given.items():
        place = parents / name
        if (place / CONFIG).is_file():
            continue
        aside = place.with_name(f"{name}.tmp-{os.getpid()}")
        try:
            aside.mkdir(parents=True)
            for file in (*files_read(source), *(("README.md",) if (source / "README.md").is_file() else ())):
                (aside / file).parent.mkdir(exist_ok=True)
                shutil.copyfile(source / file, aside / file)
            aside.rename(place)
        except OSError as error:
            raise unusable(place, "--workdir", error) from error
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def kept_model(workdir: str | os.PathLike[str], name: str) -> str:
    """Where the run's own copy of a model lies, "clip" or "bart"; "": it has none."""
    place = locate(workdir) / PARENTS / name
    return os.fspath(place) if (place / CONFIG).is_file() else ""


def read_inputs(workdir: str | os.PathLike[str]) -> Hashes:
    """What the run in `workdir` started with; {} when nothing was started there, or by a version that kept no record.

    Every process calls this; process 0 reads and tells the others.

    Raises:
      UserError: the record is damaged.
    """
    return processes.on_first(lambda: _read_inputs(locate(workdir) / INPUTS_FILE))


def _read_inputs(path: epath.Path) -> Hashes:
    if not path.is_file():
        return {}
    try:
        inputs = json.loads(path.read_bytes())
        return {field: {name: str(digest) for name, digest in hashes.items()} for field, hashes in inputs.items()}
    except (ValueError, AttributeError, TypeError) as e:
        raise UserError(f"{path}: not readable as the hashes of this run's files ({e}); restore it") from e


def check_inputs(
    workdir: str | os.PathLike[str], config: ConfigDict, now: Hashes, fields: Sequence[str] = FIELDS
) -> None:
    """Compares `now`, the hashes of what `config` names, with those that the run in `workdir` started with.

    What the files hold counts, not where they lie, nor how a single file is called. A workdir without a record is let
    pass. Every process calls this; process 0 compares, and what is wrong is an error on each.

    Raises:
      UserError: naming every file of `fields` that is another one, is gone, or was not there at the start.
    """
    processes.on_first(lambda: _check_inputs(locate(workdir), config, now, fields))


def _check_inputs(workdir: epath.Path, config: ConfigDict, now: Hashes, fields: Sequence[str]) -> None:
    start = _read_inputs(workdir / INPUTS_FILE)
    wrong = [line for field in sorted(fields) for line in _changes(config, field, start, now)] if start else []
    if wrong:
        raise UserError(
            f"{workdir}: not what this run started with: {'; '.join(wrong)}; put the files of its start back, or use "
            "another --workdir"
        )


def _changes(config: ConfigDict, field: str, start: Hashes, now: Hashes) -> list[str]:
    before, after = start.get(field, {}), now.get(field, {})
    if field not in MODELS:
        return _change_of_file(config, field, before, after)
    place = model_directory(config[field])
    if before and not place.exists():
        moved = f"--config.{field}=DIR (vlkd train) or --{field}=DIR (vlkd evaluate)"
        return [f"{place} ({field}) is gone; where it has moved, {moved} tells the run"]
    lines = []
    for name in sorted(before | after):
        path = place / name
        if name not in after:
            lines.append(f"{path} ({field}) is gone")
        elif name not in before:
            lines.append(f"{path} ({field}) is new")
        elif before[name] != after[name]:
            lines.append(_changed(path, field, before[name], after[name]))
    return lines


def _change_of_file(config: ConfigDict, field: str, before: dict[str, str], after: dict[str, str]) -> list[str]:
    """`_changes` of a field that names one file, under whatever name."""
    value = config.data[field.removeprefix("data.")]
    if list(before.values()) == list(after.values()):
        return []
    if not before:
        return [f"{value} ({field}) is new"]
    if after:
        pairs = itertools.zip_longest(before.values(), after.values(), fillvalue="none")
        return [_changed(value, field, *next(pair for pair in pairs if pair[0] != pair[1]))]
    moved = f"where it has moved, --config.{field}=FILE tells the run"
    return [f"{value} ({field}) is not the file of the start, {', '.join(before)}; {moved}"]


def _changed(path: str | Path, field: str, before: str, after: str) -> str:
    return f"{path} ({field}) has changed, sha256 {before[:12]}... -> {after[:12]}..."
