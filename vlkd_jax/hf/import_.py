"""Gives the Flax side of an export back: a run's directory, which `vlkd evaluate --checkpoint` reads.

`python -m vlkd_jax.hf.import_ HF --output=DIR`: DIR holds a checkpoint with the student's parameters, bit for bit those
of the export, and in parents/ the CLIP and the student's BART.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from vlkd_jax import entry, sharding
from vlkd_jax.checkpoint import Checkpoints
from vlkd_jax.commands import COMMANDS
from vlkd_jax.config import with_defaults
from vlkd_jax.console import say
from vlkd_jax.data.files import read_json
from vlkd_jax.errors import UserError
from vlkd_jax.hf.export import RUN
from vlkd_jax.hf.files import CLIP_TOKENIZER
from vlkd_jax.hf.save import copy_tokenizer, save_bart, save_clip
from vlkd_jax.hf.student import load_student, read_student_config
from vlkd_jax.identity import MODELS, PARENTS, hash_inputs, record_inputs
from vlkd_jax.manifest import CHECKPOINTS
from vlkd_jax.models.vlkd import StudentConfig
from vlkd_jax.storage import locate, write_atomic
from vlkd_jax.workdir import CONFIG_FILE, new_directory


def import_export(directory: Path, output: Path) -> None:
    """Writes a run's directory from an export.

    Raises:
      UserError: a file of the export cannot be used, or something lies in `output` already.
    """
    config = read_student_config(directory)
    record = _record(directory)
    new_directory(output)
    mesh = sharding.one_device()
    layout = sharding.replicated(mesh)
    params = load_student(directory, layout)[1]
    whole, places = jax.device_get(params), {name: output / PARENTS / name for name in ("clip", "bart")}
    save_clip(places["clip"], config.clip, whole["clip"])
    save_bart(places["bart"], config.bart, whole["student"]["bart"])
    copy_tokenizer(directory / CLIP_TOKENIZER, places["clip"])
    copy_tokenizer(directory, places["bart"])
    run = _run_config(record["config"], config, places)
    write_atomic(output / CONFIG_FILE, (run.to_json_best_effort() + "\n").encode())
    record_inputs(output, hash_inputs(run, MODELS))
    step = record["identity"].get("step", 0)
    parts = {"params": params["student"], "step": jax.device_put(jnp.int32(step), layout)}
    with Checkpoints(locate(output) / CHECKPOINTS) as checkpoints:
        checkpoints.save(step, parts, {"imported": os.fspath(directory.absolute())})


def _record(directory: Path) -> dict[str, dict[str, Any]]:
    """What the export tells of its run, "config" and "identity"; both empty where it tells nothing."""
    path, empty = directory / RUN, {"config": {}, "identity": {}}
    if not path.is_file():
        return empty
    record = read_json(path)
    if not isinstance(record, dict) or not all(isinstance(record.get(name), dict) for name in empty):
        raise UserError(f"{path}: config and identity must be JSON objects; restore the file, or delete it")
    return record


def _run_config(given: dict[str, Any], config: StudentConfig, places: dict[str, Path]) -> ConfigDict:
    """The run's configuration with the models' new places, as far as the export tells."""
    run = ConfigDict(with_defaults(given) | {"objective": "vlkd", "start": ""})
    for name, place in places.items():
        run[name] = os.fspath(place.absolute())
    run.student.image_tokens, run.student.sentence_position = config.image_tokens, config.sentence_position
    run.student.whiten = run.student.whiten or 1 if config.whiten else 0
    run.student.logit_scale, run.student.ttdm = config.contrastive_scale, config.ttdm
    return run


def main(values: SimpleNamespace) -> None:
    """Entry point."""
    directory, output = Path(values.hf), Path(values.output)
    import_export(directory, output)
    say(f"wrote {output}: a run for vlkd evaluate --checkpoint={output}; its models are in {output / PARENTS}")


if __name__ == "__main__":
    entry.run(main, COMMANDS["import"])
