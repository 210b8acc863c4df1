"""The checkpoints of a run, looked at, verified and copied: `vlkd ckpt ls RUN`, `verify RUN`, `cp RUN NEW`."""

from __future__ import annotations

import datetime
import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from etils import epath

from vlkd_jax import console, entry
from vlkd_jax.commands import COMMANDS
from vlkd_jax.console import say
from vlkd_jax.errors import UserError, few
from vlkd_jax.identity import INPUTS_FILE, PARENTS
from vlkd_jax.manifest import CHECKPOINTS, MANIFEST, Damaged, read_manifest, step_path, steps_in, verify_all
from vlkd_jax.storage import locate
from vlkd_jax.workdir import CONFIG_FILE, new_directory


def look(run: str | os.PathLike[str], step: int | None = None, hashes: bool = False) -> Iterator[dict[str, Any]]:
    """What there is of each checkpoint of a run, oldest first.

    Args:
      step: that one alone.
      hashes: whether every byte is read and compared.

    Yields:
      {"step", "fault": None where it is whole, else a line}, and of what has a manifest "bytes", "parameters" (numbers
      of the student), "written" (UTC) and "of_steps", the length of the run.

    Raises:
      UserError: no run there, no checkpoint in it, not that one.
    """
    directory = locate(run) / CHECKPOINTS
    steps = sorted(steps_in(directory))
    if not steps:
        raise UserError(f"{directory}: no checkpoints there; give the --workdir of a training run")
    if step is not None and step not in steps:
        raise UserError(f"{directory}: no checkpoint of step {step}; there are {few([str(s) for s in steps])}")
    for number in steps if step is None else [step]:
        yield {"step": number, **_look(step_path(directory, number), hashes)}


def _look(path: epath.Path, hashes: bool) -> dict[str, Any]:
    try:
        body = read_manifest(path)
    except (Damaged, UserError) as error:
        return {"fault": str(error)}
    shapes = [shape for _, shape in body["tree"].get("params", {}).values()]
    told = {
        "bytes": sum(size for size, _ in body["files"].values()),
        "parameters": sum(map(math.prod, shapes)),
        "written": datetime.datetime.fromtimestamp((path / MANIFEST).stat().mtime, datetime.UTC).isoformat(
            " ", "seconds"
        ),
        "of_steps": body["meta"].get("steps"),
    }
    try:
        verify_all(path, hashes)
    except Damaged as damage:
        return {"fault": str(damage), **told}
    return {"fault": None, **told}


def copy(run: str | os.PathLike[str], new: Path, step: int | None = None) -> Path:
    """Copies a checkpoint, the newest that is whole unless `step` says which, with all that a run needs to go on.

    The copy is verified before it takes its name. What the run has told (metrics.jsonl) stays where it is.

    Returns:
      The directory of the copied step.

    Raises:
      UserError: see `look`; the checkpoint is damaged; `new` is not empty or cannot be written.
    """
    run = locate(run)
    looks = [told for told in look(run, step, hashes=True) if told["fault"] is None or step is not None]
    if not looks or looks[-1]["fault"]:
        raise UserError(
            f"{run / CHECKPOINTS}: {looks[-1]['fault'] if looks else 'no checkpoint is whole'}; nothing is copied"
        )
    new_directory(new)
    source, target = (step_path(place / CHECKPOINTS, looks[-1]["step"]) for place in (run, locate(new)))
    aside = target.with_name(f"{target.name}.tmp-{os.getpid()}")
    try:
        for name in [*read_manifest(source)["files"], MANIFEST]:
            (aside / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).copy(aside / name)
        verify_all(aside, hashes=True)
        for name in (CONFIG_FILE, INPUTS_FILE):
            if (run / name).is_file():
                (run / name).copy(locate(new) / name)
        if (run / PARENTS).is_dir():
            shutil.copytree(run / PARENTS, new / PARENTS)
        aside.rename(target)
    except OSError as error:
        raise UserError(
            f"{new}: cannot be written ({error.strerror or error}); free space or name another place"
        ) from error
    except Damaged as damage:
        raise UserError(f"{aside}: damaged while it was copied ({damage}); check the disk") from damage
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return Path(target)


def _table(looks: list[dict[str, Any]], whole: str) -> str:
    rows = [
        (
            str(told["step"]),
            f"{told['parameters']:,}" if "parameters" in told else "",
            f"{told['bytes'] / 1e6:,.1f} MB" if "bytes" in told else "",
            told.get("written", ""),
            told["fault"] or whole,
        )
        for told in looks
    ]
    return console.table(rows, ("step", "parameters", "size", "written", "state"))


def main(values: SimpleNamespace) -> None:
    """Entry point."""
    if (values.action == "cp") != bool(values.new):
        raise UserError("vlkd ckpt cp RUN NEW copies; ls and verify take RUN alone")
    if values.action == "cp":
        path = copy(values.run, Path(values.new), values.step)
        say(json.dumps({"copied": str(path)}) if values.json else f"wrote {path}, every byte verified")
        return
    hashes = values.action == "verify"
    looks = list(look(values.run, values.step, hashes))
    if values.json:
        say(json.dumps(looks, indent=1))
    else:
        say(_table(looks, "every byte as written" if hashes else "complete (vlkd ckpt verify reads every byte)"))
    if faulty := [str(told["step"]) for told in looks if told["fault"]] if hashes else []:
        raise UserError(
            f"{locate(values.run) / CHECKPOINTS}: step {few(faulty)} cannot be used; vlkd train goes on "
            "from the newest that is whole"
        )


if __name__ == "__main__":
    entry.run(main, COMMANDS["ckpt"])
