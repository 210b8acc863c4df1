"""Devices: the mesh, which axis of every parameter is split over which of its axes, and how batches are spread.

What papers of 2022 call pjit is `jax.jit` with shardings. Axes are "auto": the compiler places the collectives.
`data` and `fsdp` split the batch; `fsdp` and `model` split parameters, their moments and the frozen teacher.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from vlkd_jax.errors import UserError, few
from vlkd_jax.types import ConfigDict

AXES = ("data", "fsdp", "model")
BATCH = ("data", "fsdp")
"""The axes over which rows of a batch are spread."""

_LAYERS = r"(.*/)?(encoder|decoder|vision_model|text_model)/layers/(.*/)?"
RULES: tuple[tuple[str, P], ...] = (
    # layers are stacked on the first axis, which is never split: a scan over them reads one at a time
    (rf"{_LAYERS}(q_proj|k_proj|v_proj|fc1)/kernel", P(None, "fsdp", "model")),
    (rf"{_LAYERS}(out_proj|fc2)/kernel", P(None, "model", "fsdp")),
    (rf"{_LAYERS}(q_proj|k_proj|v_proj|fc1)/bias", P(None, "model")),
    (rf"{_LAYERS}((out_proj|fc2)/bias|\w*layer_norm[12]?/(scale|bias))", P()),
    # a vocabulary has seldom a divisor worth the name: tables are split along their width, as the maps into a width are
    (
        r"(.*/)?((shared|token_embedding|position_embedding|embed_positions)/embedding"
        r"|(patch_embedding|(visual|text|image|sentence)_projection"
        r"|layer\d_\d+/(conv\d|downsample_conv)|attention_pool/attention/\w+_proj)/kernel)",
        P(None, ("fsdp", "model")),
    ),
    (
        r"(.*/)?((layernorm_embedding|pre_layrnorm|post_layernorm|final_layer_norm)/(scale|bias)"
        r"|(bn\d|downsample_bn)/(scale|bias|mean|var)|vision_model/conv\d/kernel|attention_pool/attention/\w+_proj/bias"
        r"|classification_head/(dense|out_proj)/(kernel|bias))",
        P(),
    ),
    (r"(.*/)?(class_embedding|final_logits_bias|logit_scale|image_whitening/(mean|matrix))", P()),
    (r"(.*/)?(count|step|skipped|skipped_in_row)", P()),
)
"""Ordered: a regular expression on the whole path of a leaf of the train state or the frozen teacher (a moment's path
ends as its parameter's), and the mesh axes over which its array axes are split. Every rule matches something in every
run."""


def make_mesh(config: ConfigDict) -> Mesh:
    """The mesh of `config.mesh`: `data`, `fsdp`, `model`, one of which may be -1, all the devices that are left.

    With `slices` above 1 the axis `data` spans the slow network between slices of a pod (or between processes where
    the devices know of no slices), `fsdp` and `model` never do.

    Raises:
      UserError: sizes that do not fit the devices.
    """
    count = jax.device_count()
    sizes = mesh_sizes(config, count)
    used = math.prod(sizes)
    if used < count and jax.process_count() > 1:
        told = _told(config)
        raise UserError(f"{told} uses {used} of {count} devices; processes without work cannot take part: use all")
    if config.slices == 1:
        return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:used])
    if config.slices < 1 or sizes[0] % config.slices:
        raise UserError(f"config.mesh.slices is {config.slices}; it must divide config.mesh.data, here {sizes[0]}")
    inner, outer = (sizes[0] // config.slices, *sizes[1:]), (config.slices, 1, 1)
    by_process, devices = getattr(jax.devices()[0], "slice_index", None) is None, jax.devices()[:used]
    try:
        placed = mesh_utils.create_hybrid_device_mesh(inner, outer, devices, process_is_granule=by_process)
    except (ValueError, AssertionError) as e:
        raise UserError(f"config.mesh.slices is {config.slices}, which the devices here do not have ({e})") from e
    return Mesh(placed, AXES)


def mesh_sizes(config: ConfigDict, count: int) -> list[int]:
    """How many of `count` devices lie along each of `AXES`. Raises UserError for sizes that do not fit."""
    sizes = [config[axis] for axis in AXES]
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        told = _told(config)
        raise UserError(f"{told}; each must be at least 1, and one of them may be -1, all devices that are left")
    given = math.prod(size for size in sizes if size != -1)
    sizes = [count // given if size == -1 else size for size in sizes]
    if not 1 <= math.prod(sizes) <= count:
        raise UserError(f"{_told(config)}, and there are {count} devices; make their product {count} at most")
    return sizes


def _told(config: ConfigDict) -> str:
    return f"config.mesh is {', '.join(f'{axis}={config[axis]}' for axis in AXES)}"


def one_device() -> Mesh:
    """A mesh of one device."""
    return jax.make_mesh((1, 1, 1), AXES, axis_types=(AxisType.Auto,) * 3, devices=jax.local_devices()[:1])


def local_mesh() -> Mesh:
    """A mesh of all devices of this process, over which a batch is spread."""
    devices = jax.local_devices()
    return jax.make_mesh((len(devices), 1, 1), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole."""
    return NamedSharding(mesh, P())


def over_batch(mesh: Mesh) -> NamedSharding:
    """The first axis is split over the rows' devices."""
    return NamedSharding(mesh, P(BATCH))


def row_shards(mesh: Mesh) -> int:
    """Into how many parts a batch is split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def shardings(tree: Any, mesh: Mesh) -> Any:
    """By `RULES`, a NamedSharding for each leaf of a nested tree of parameters, optimizer state or both.

    Raises:
      UserError: naming every leaf that no rule matches, and every one whose size its mesh axes do not divide.
    """
    wrong: list[str] = []

    def of_leaf(path: Any, leaf: Any) -> NamedSharding:
        name = path_name(path)
        spec = next((spec for pattern, spec in RULES if re.fullmatch(pattern, name)), None)
        if spec is None or len(spec) > len(leaf.shape):
            wrong.append(f"no sharding rule for {name} {list(leaf.shape)}")
            return replicated(mesh)
        for axis, over in enumerate(spec):
            parts = _parts(mesh.shape, over)
            if leaf.shape[axis] % parts:
                split = " x ".join(_axes(over))
                wrong.append(f"{name} {list(leaf.shape)}: axis {axis} cannot be split over {split} = {parts}")
        return NamedSharding(mesh, spec)

    result = jax.tree_util.tree_map_with_path(of_leaf, tree)
    if wrong:
        raise UserError(f"config.mesh: {few(wrong, '; ')}")
    return result


def laid_out(tree: Any, mesh: Mesh) -> Any:
    """`jax.ShapeDtypeStruct` leaves that carry their `shardings`. Raises UserError as that does."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree, shardings(tree, mesh)
    )


def check_rules(tree: Any) -> None:
    """Raises UserError naming the rules that match no leaf of `tree`, which is all that a run holds."""
    names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    idle = [pattern for pattern, _ in RULES if not any(re.fullmatch(pattern, name) for name in names)]
    if idle:
        raise UserError(f"sharding rules that match no parameter: {', '.join(idle)}")


def path_name(path: Any) -> str:
    """`bart/encoder/layers/fc1/kernel` of a path in a tree."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def data_share(mesh: Mesh) -> tuple[int, int]:
    """(index, count): which share of a batch's rows this process reads. Processes that split a model read the same.

    Raises:
      UserError: the rows of two processes overlap in part.
    """
    shards: dict[int, set[int]] = {}
    for position, devices in enumerate(mesh.devices.reshape(row_shards(mesh), -1)):
        for device in devices:
            shards.setdefault(device.process_index, set()).add(position)
    groups = sorted({tuple(sorted(positions)) for positions in shards.values()})
    if sum(map(len, groups)) != row_shards(mesh):
        raise UserError(
            "config.mesh: `model` lies across processes unevenly; let it be a multiple or a divisor of theirs"
        )
    return groups.index(tuple(sorted(shards[jax.process_index()]))), len(groups)


def put(mesh: Mesh, tree: Any) -> Any:
    """A batch of this process's rows (numpy) as global arrays, split over the batch axes."""
    sharding, (_, shares) = over_batch(mesh), data_share(mesh)

    def put_leaf(x: np.ndarray) -> jax.Array:
        shape = (x.shape[0] * shares, *x.shape[1:])
        return jax.make_array_from_process_local_data(sharding, np.asarray(x), shape)

    return jax.tree.map(put_leaf, tree)


def put_rows(mesh: Mesh, tree: Any) -> Any:
    """A batch that every process holds whole (numpy): split over its rows where they divide evenly, else repeated."""

    def put_leaf(x: np.ndarray) -> jax.Array:
        sharding = replicated(mesh) if x.shape[0] % row_shards(mesh) else over_batch(mesh)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(put_leaf, tree)


def put_everywhere(mesh: Mesh, tree: Any) -> Any:
    """Numpy arrays that every process holds alike, whole on every device."""
    shared = replicated(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, shared, lambda index: x[index]), tree)


def put_each(mesh: Mesh, number: int) -> jax.Array:
    """int32 [devices]: each process's number, on every device of its own."""
    numbers = np.full(mesh.size, number, np.int32)
    return jax.make_array_from_callback((mesh.size,), NamedSharding(mesh, P(AXES)), lambda index: numbers[index])


def constrain(x: jax.Array, *spec: Any) -> jax.Array:
    """x, laid out so on the mesh of `jax.set_mesh` while a function is compiled; where there is none, x.

    An axis that the mesh does not divide, as of a short last batch, is whole everywhere.
    """
    sizes = jax.sharding.get_abstract_mesh().shape
    if not sizes:
        return x
    fitting = [over if length % _parts(sizes, over) == 0 else None for length, over in zip(x.shape, spec, strict=False)]
    return jax.lax.with_sharding_constraint(x, P(*fitting))


def _parts(sizes: Mapping[str, int], over: str | tuple[str, ...] | None) -> int:
    """In how many parts an array axis is split that lies over these mesh axes."""
    return math.prod(sizes[axis] for axis in _axes(over))


def _axes(over: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (over,) if isinstance(over, str) else over or ()
