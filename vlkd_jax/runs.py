"""Training runs as they lie in their workdirs: their configuration, and the trained parameters."""

from __future__ import annotations

from pathlib import Path

from jax.sharding import Mesh
from ml_collections import ConfigDict

from vlkd_jax import sharding
from vlkd_jax.checkpoint import Checkpoints
from vlkd_jax.config import with_defaults
from vlkd_jax.data.files import read_json
from vlkd_jax.errors import UserError
from vlkd_jax.identity import MODELS, check_inputs, hash_inputs, kept_model
from vlkd_jax.manifest import CHECKPOINTS
from vlkd_jax.sharding import one_device
from vlkd_jax.storage import locate
from vlkd_jax.tasks import make_task
from vlkd_jax.tasks.task import Task
from vlkd_jax.types import Params
from vlkd_jax.workdir import CONFIG_FILE


def run_config(directory: str | Path) -> ConfigDict:
    """The configuration of a training run. Raises UserError when there is none, or one that somebody has changed."""
    path = locate(directory) / CONFIG_FILE
    if not path.is_file():
        raise UserError(f"{directory}: no {CONFIG_FILE} there; it is no --workdir of a training run")
    try:
        return ConfigDict(with_defaults(read_json(path)))
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: not the configuration of a run ({error}); restore it") from error


def load_run(
    directory: str | Path,
    clip: str | Path | None = None,
    bart: str | Path | None = None,
    mesh: Mesh | None = None,
) -> tuple[Task, Params, int]:
    """(task, trained parameters, step) of a training run's newest checkpoint; its optimizer is not read.

    Args:
      clip, bart: where the models of the run's start lie now, if not where it found them.
      mesh: as for `VLKD.from_run`.

    Raises:
      UserError: no run there, no checkpoint yet, or the models it names have moved or changed.
    """
    config = run_config(directory)
    given = {"clip": clip, "bart": bart}
    for name in MODELS:
        config[name] = str(given.get(name) or kept_model(directory, name) or config[name])
    check_inputs(directory, config, hash_inputs(config, MODELS), MODELS)
    task = make_task(config)
    params = sharding.laid_out(task.abstract()[0], one_device() if mesh is None else mesh)
    with Checkpoints(locate(directory) / CHECKPOINTS) as checkpoints:
        step, parts, _ = checkpoints.restore({"params": params})
    return task, parts["params"], step
