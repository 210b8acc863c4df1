"""Writes the tables of tests/golden: how the CC3M configs lay out every array of the run on eight devices.

`python tests/golden/shardings.py` regenerates them; look at the difference before it is committed.
"""

import importlib
import math
from pathlib import Path
from types import SimpleNamespace

import jax

from vlkd_jax import sharding
from vlkd_jax.hf.names import parameter_shapes
from vlkd_jax.models.configs import BartConfig, ClipConfig, ClipTextConfig, ClipVisionConfig
from vlkd_jax.models.vlkd import NEW, Student
from vlkd_jax.optim import make_optimizer
from vlkd_jax.train import abstract_state

DIRECTORY = Path(__file__).parent
BART_LARGE = BartConfig(50265, 1024, 12, 12, 16, 16, 4096, 4096)
CLIPS = {
    "cc3m_vitb16_bartlarge": ClipConfig(
        ClipVisionConfig(768, 3072, 12, 12, image_size=224, patch_size=16), ClipTextConfig(49408, 512, 2048, 12, 8), 512
    ),
    "cc3m_vitl14_bartlarge": ClipConfig(
        ClipVisionConfig(1024, 4096, 24, 16, image_size=224, patch_size=14),
        ClipTextConfig(49408, 768, 3072, 12, 12),
        768,
    ),
}
"""The published sizes of each config's teacher."""


def table(name: str) -> str:
    """A line for each array: path, shape, the mesh axes of its axes, and MiB on each of eight devices."""
    config = importlib.import_module(f"vlkd_jax.configs.{name}").get_config()
    count = {axis: 8 if config.mesh[axis] == -1 else config.mesh[axis] for axis in sharding.AXES}
    mesh = jax.sharding.AbstractMesh(tuple(count.values()), sharding.AXES)
    clip = CLIPS[name]
    student = Student(BART_LARGE, clip.projection_dim, clip.projection_dim)
    params = jax.eval_shape(student.init, jax.random.key(0), *student.example_inputs())["params"]
    optimizer = make_optimizer(config.optim, config.steps, NEW)
    state = abstract_state(SimpleNamespace(abstract=lambda: (params, {})), optimizer, mesh)
    frozen = sharding.laid_out({"clip": parameter_shapes(clip)}, mesh)
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
    for config_name in CLIPS:
        (DIRECTORY / f"{config_name}.txt").write_text(table(config_name))
