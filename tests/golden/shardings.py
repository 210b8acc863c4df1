"""Writes the tables of tests/golden: how the CC3M configs lay out every array of the run on eight devices.

`python tests/golden/shardings.py` regenerates them; look at the difference before it is committed.
"""

import importlib
import math
from pathlib import Path

import jax

from vlkd_jax import sharding
from vlkd_jax.optim import make_optimizer
from vlkd_jax.plan import planned_task
from vlkd_jax.train import abstract_state

DIRECTORY = Path(__file__).parent
CONFIGS = ("cc3m_vitb16_bartlarge", "cc3m_vitl14_bartlarge")


def table(name: str) -> str:
    """A line for each array: path, shape, the mesh axes of its axes, and MiB on each of eight devices."""
    config = importlib.import_module(f"vlkd_jax.configs.{name}").get_config()
    count = {axis: 8 if config.mesh[axis] == -1 else config.mesh[axis] for axis in sharding.AXES}
    mesh = jax.sharding.AbstractMesh(tuple(count.values()), sharding.AXES)
    task = planned_task(config)
    state = abstract_state(task, make_optimizer(config.optim, config.steps, task.new), mesh)
    frozen = sharding.laid_out(task.abstract()[1], mesh)
    trees = {**state.parts(), "frozen": frozen}
    sharding.check_rules(trees)
    rows, total = [], 0.0
    for path, leaf in jax.tree_util.tree_leaves_with_path(trees):
        size = math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize / 2**20
        shape, spec = "x".join(map(str, leaf.shape)) or "-", ", ".join(map(_axes, leaf.sharding.spec)) or "whole"
        rows.append(f"{sharding.path_name(path)}  {shape}  {spec}  {size:.3f}")
        total += size
    mesh_text = " x ".join(f"{axis} {size}" for axis, size in count.items())
    return "\n".join([f"mesh {mesh_text}: {total:.1f} MiB a device", *rows, ""])


def _axes(over: str | tuple[str, ...] | None) -> str:
    return "-" if over is None else over if isinstance(over, str) else "+".join(over)


if __name__ == "__main__":
    for config_name in CONFIGS:
        (DIRECTORY / f"{config_name}.txt").write_text(table(config_name))
