"""What a run needs on machines that are not here: `python -m vlkd_jax.plan --config=X --topology=v5e:4x4 [--sweep]`.

Compiles the real train step for a TPU topology (libtpu, which needs no TPU for that) or for the devices here
(`local`), and reads memory, floating-point operations and the network's traffic off the program. Weights are not read.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import time
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vlkd_jax import console, entry, sharding
from vlkd_jax.checks import check_batch_size, check_config
from vlkd_jax.commands import COMMANDS
from vlkd_jax.config import model_directory
from vlkd_jax.console import say
from vlkd_jax.costs import collective_bytes, count_flops
from vlkd_jax.errors import UserError
from vlkd_jax.hf.load import read_bart_config, read_clip_config
from vlkd_jax.models.published import BARTS, CLIPS
from vlkd_jax.optim import make_optimizer
from vlkd_jax.runtime import tell
from vlkd_jax.step import make_train_step
from vlkd_jax.tasks.distill import task_of
from vlkd_jax.tasks.task import Task
from vlkd_jax.train import abstract_state
from vlkd_jax.types import Batch

CC3M = 3_318_333
"""Image-caption pairs of CC3M's training split, as published."""
LOCAL = "local"


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a chip has, by its maker's documentation.

    Attributes:
      memory: bytes.
      flops: dense bfloat16 operations a second.
      link: bytes a second to its neighbours, all links together, one way.
    """

    memory: int
    flops: float
    link: float


CHIPS = {
    "v4": Chip(32 * 2**30, 275e12, 300e9),
    "v5e": Chip(16 * 2**30, 197e12, 200e9),
    "v5p": Chip(95 * 2**30, 459e12, 600e9),
    "v6e": Chip(32 * 2**30, 918e12, 448e9),
}
SWEEP = ("v5e:2x2", "v5e:4x4", "v5e:8x8", "v5e:16x16", "v4:2x2x4", "v6e:4x4")


def planned_task(config: ConfigDict) -> Task:
    """The task from its models' config.json, or where no model is named from `config.plan`'s published sizes.

    Raises:
      UserError: an objective that is not planned, no models and no sizes.
    """
    if config.objective != "vlkd":
        raise UserError(f"config.objective is {config.objective!r}; only vlkd is planned")
    models = []
    for name, read, published in (("clip", read_clip_config, CLIPS), ("bart", read_bart_config, BARTS)):
        size = config.plan[name]
        if config[name]:
            models.append(read(model_directory(config[name])))
        elif size in published:
            models.append(published[size])
        else:
            raise UserError(
                f"config.{name} is empty; name a directory, or with config.plan.{name} one of {', '.join(published)}"
            )
    return task_of(config, *models)


def abstract_batch(config: ConfigDict, task: Task, mesh: Mesh) -> Batch:
    """A batch's shapes, dtypes and shardings, as the pipeline makes it."""
    rows, data, layout = config.batch_size, config.data, sharding.over_batch(mesh)

    def array(*shape: int, dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=layout)

    def texts(**lengths: int) -> dict[str, jax.ShapeDtypeStruct]:
        ids = {f"{name}_ids": array(length, dtype=jnp.int32) for name, length in lengths.items() if length}
        masks = {f"{name}_mask": array(length, dtype=jnp.bool) for name, length in lengths.items() if length}
        return {**ids, **masks, "target_mask": array(lengths["text"], dtype=jnp.bool)}

    clip = task.configs["clip"]
    replay = None
    if task.mixes_replay:
        lengths = {"text": data.text_length, "source": data.replay_length, "context": data.context_length}
        replay = Batch(**texts(**lengths))
    return Batch(
        pixels=array(clip.vision.image_size, clip.vision.image_size, 3, dtype=jnp.uint8),
        replay=replay,
        **texts(text=data.text_length, source=data.source_length, clip=clip.text.max_position_embeddings),
    )


def topology_mesh(config: ConfigDict, topology: str) -> Mesh:
    """The mesh of `config.mesh` over the chips of a topology, or the devices here.

    Raises:
      UserError: no such topology, libtpu is missing, or sizes that do not fit.
    """
    if topology == LOCAL:
        return sharding.make_mesh(config.mesh)
    generation, _, shape = topology.partition(":")
    if generation not in CHIPS or not re.fullmatch(r"\d+(x\d+){1,2}", shape):
        raise UserError(f"--topology={topology}: write local, or GENERATION:AxB or AxBxC with {', '.join(CHIPS)}")
    if find_spec("libtpu") is None and "TPU_LIBRARY_PATH" not in os.environ:
        raise UserError("vlkd plan for a TPU needs libtpu, which is not installed: pip install 'vlkd_jax[plan]'")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # or libtpu asks the cloud which machine this is
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no chip is touched
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")  # of no effect here; without one libtpu warns
    from jax.experimental import topologies

    try:
        parts = {"chip_config_name": "megacore"} if generation == "v4" else {}  # both cores of a chip are one device
        described = topologies.get_topology_desc(platform="tpu", topology_name=topology, **parts)
    except Exception as error:  # of libtpu, of several kinds
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"--topology={topology}: libtpu does not know it ({reason})") from error
    sizes, count = sharding.mesh_sizes(config.mesh, len(described.devices)), len(described.devices)
    if math.prod(sizes) != count:
        raise UserError(f"config.mesh uses {math.prod(sizes)} of the {count} chips of {topology}; use them all")
    return topologies.make_mesh(described, tuple(sizes), sharding.AXES)


@dataclasses.dataclass(frozen=True)
class Program:
    """The compiled train step.

    Attributes:
      flops: of a step on all chips together: products of matrices and convolutions, recomputed ones among them.
      bytes: of each chip: "parameters" (trained and frozen), "optimizer", "batch", "temporaries" (activations,
        gradients, buffers).
      collectives: kind -> bytes that each chip sends in a step; None: it was not compiled to its end.
      limit: bytes that the compiler had for all this; None: it did not say.
      seconds: that compiling took.
    """

    flops: float
    bytes: dict[str, int]
    collectives: dict[str, float] | None
    limit: int | None
    seconds: float


def compile_step(config: ConfigDict, task: Task, mesh: Mesh) -> Program:
    """The step as training jits it, compiled for a mesh whose devices need not be there."""
    since = time.monotonic()
    optimizer = make_optimizer(config.optim, config.steps, task.new)
    state, frozen = abstract_state(task, optimizer, mesh), sharding.laid_out(task.abstract()[1], mesh)
    sharding.check_rules([state.parts(), frozen])
    batch = abstract_batch(config, task, mesh)
    step = make_train_step(task, optimizer, config.dropout, config.seed, config.accumulate)
    layout = jax.tree.map(lambda leaf: leaf.sharding, state), sharding.replicated(mesh)
    known = {
        "parameters": _shard_bytes([state.params, frozen]),
        "optimizer": _shard_bytes([state.opt_state]),
        "batch": _shard_bytes([batch]),
    }
    with jax.set_mesh(mesh):
        traced = jax.jit(step, donate_argnums=0, out_shardings=layout).trace(state, frozen, batch)
        flops = count_flops(traced.jaxpr.jaxpr)
        try:
            compiled = traced.lower().compile()
        except jax.errors.JaxRuntimeError as error:
            return _too_large(error, flops, known, time.monotonic() - since)
    memory = compiled.memory_analysis()
    temporaries = memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    temporaries += max(0, memory.output_size_in_bytes - memory.alias_size_in_bytes)
    traffic = collective_bytes(compiled.as_text())
    return Program(flops, known | {"temporaries": temporaries}, traffic, None, time.monotonic() - since)


REFUSALS = (
    r"HLO temporaries \((?P<temporaries>[\d.]+[KMG])\) exceeds available HBM \((?P<limit>[\d.]+[KMG])\)",
    r"Used (?P<used>[\d.]+[KMG]) of (?P<limit>[\d.]+[KMG]) hbm",
)
"""How the TPU compiler says that a program does not fit."""


def _too_large(error: Exception, flops: float, known: dict[str, int], seconds: float) -> Program:
    """What the TPU compiler says of a program that it refuses because it does not fit.

    Raises:
      UserError: it does not fit, and by how much is not said in a way that this knows.
    """
    match = next(filter(None, (re.search(pattern, str(error)) for pattern in REFUSALS)), None)
    if not match and "RESOURCE_EXHAUSTED" in str(error):
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"the step does not fit ({reason}); raise config.accumulate, or take more chips") from error
    if not match:
        raise error
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    told = {name: int(float(size[:-1]) * units[size[-1]]) for name, size in match.groupdict().items()}
    temporaries = told.get("temporaries", told.get("used", 0) - sum(known.values()))
    return Program(flops, known | {"temporaries": max(0, temporaries)}, None, told["limit"], seconds)


def _shard_bytes(trees: Any) -> int:
    """Bytes of a device's parts."""
    leaves = jax.tree.leaves(trees)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def plan(config: ConfigDict, topology: str, utilisation: float, rows: int | None = None) -> dict[str, Any]:
    """What `--json` prints.

    Args:
      utilisation: share of the chips' peak that a step's operations reach.
      rows: of a batch for each chip; None: the config's whole batch, however many chips there are.

    Raises:
      UserError: a config, models or a topology that cannot be planned.
    """
    check_config(config)
    mesh, task = topology_mesh(config, topology), planned_task(config)
    if rows:
        config = config.copy_and_resolve_references()
        config.batch_size = rows * mesh.size
    check_batch_size(config, mesh)
    program = compile_step(config, task, mesh)
    chip, total = CHIPS.get(topology.partition(":")[0]), sum(program.bytes.values())
    limit = program.limit or (chip.memory if chip else None)
    result = {
        "topology": topology,
        "mesh": dict(mesh.shape),
        "chips": mesh.size,
        "batch_size": config.batch_size,
        "accumulate": config.accumulate,
        "fits": total <= limit if limit else None,
        "bytes_per_chip": total,
        "bytes_by_kind": program.bytes,
        "memory_per_chip": limit,
        "flops_per_step": program.flops,
        "collective_bytes": None if program.collectives is None else sum(program.collectives.values()),
        "collectives": program.collectives,
        "compile_seconds": round(program.seconds, 1),
        "versions": {name: _version(name) for name in ("jax", "jaxlib", "libtpu")},
    }
    return result | _speed(result, chip, utilisation)


def _speed(result: dict[str, Any], chip: Chip | None, utilisation: float) -> dict[str, Any]:
    """Figures that hang on the chip's documented speed; None where it is not known or the program does not fit."""
    names = ("compute_seconds", "network_seconds", "images_per_second", "images_per_second_without_overlap")
    names += ("bound", "chip_hours_per_cc3m_epoch")
    if chip is None or not result["fits"]:
        return {"utilisation": utilisation, **dict.fromkeys(names)}
    compute = result["flops_per_step"] / (result["chips"] * chip.flops * utilisation)
    network = result["collective_bytes"] / chip.link
    images = result["batch_size"] / max(compute, network)  # the two overlap where the compiler can do it
    hours = CC3M / images * result["chips"] / 3600
    apart = result["batch_size"] / (compute + network)
    values = compute, network, images, apart, "network" if network > compute else "compute", hours
    return {"utilisation": utilisation, **dict(zip(names, values, strict=True))}


def advice(result: dict[str, Any], config: ConfigDict) -> list[str]:
    """What to change where a step does not fit, the cheapest first."""
    if result["fits"] is not False:
        return []
    over, kinds = result["bytes_per_chip"] - result["memory_per_chip"], result["bytes_by_kind"]
    lines = [f"{_gib(over)} GiB too much"]
    if not config.remat:
        lines.append("--config.remat=True recomputes layers instead of keeping them")
    elif config.remat_policy != "nothing":
        lines.append("--config.remat_policy=nothing keeps less of each layer")
    parts = 2 ** math.ceil(math.log2(max(2.0, kinds["temporaries"] / max(1, kinds["temporaries"] - over))))
    lines.append(f"--config.accumulate={config.accumulate * parts} computes the batch in parts")
    held = kinds["parameters"] + kinds["optimizer"]
    if result["mesh"]["fsdp"] < result["chips"] and held > over / 2:
        lines.append(f"--mesh=data=1,fsdp={result['chips']} splits parameters and moments over all chips")
    return [*lines, "or more chips"]


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f}"


def table(result: dict[str, Any], config: ConfigDict) -> str:
    """One topology's plan as text."""
    axes = ", ".join(f"{axis}={size}" for axis, size in result["mesh"].items())
    limit = result["memory_per_chip"]
    rows = [
        ("fits", {True: "yes", False: "NO", None: "not known here"}[result["fits"]]),
        ("bytes per chip", f"{_gib(result['bytes_per_chip'])} GiB" + (f" of {_gib(limit)}" if limit else "")),
        *((f"  {kind}", f"{_gib(size)} GiB") for kind, size in result["bytes_by_kind"].items()),
        ("flops per step", f"{result['flops_per_step']:.3e}"),
    ]
    if result["collectives"] is not None:
        rows.append(("sent by each chip in a step", f"{_gib(result['collective_bytes'])} GiB"))
        rows += [(f"  {kind}", f"{_gib(size)} GiB") for kind, size in result["collectives"].items()]
    if result["images_per_second"]:
        rows += [
            (f"images/s at {result['utilisation']:.0%} of peak", f"{result['images_per_second']:,.0f}"),
            (
                "bound by",
                f"{result['bound']} ({result['compute_seconds']:.2f} s, network {result['network_seconds']:.2f} s)",
            ),
            (f"chip-hours for an epoch of CC3M ({CC3M:,})", f"{result['chip_hours_per_cc3m_epoch']:.1f}"),
        ]
    chips = "1 chip" if result["chips"] == 1 else f"{result['chips']} chips"
    head = f"{result['topology']}: {chips} ({axes}), batch {result['batch_size']:,}"
    return "\n".join([head, console.table(rows), *advice(result, config)])


def sweep_table(results: list[dict[str, Any]]) -> str:
    """A line for each topology.

    Efficiency is images/s a chip against the first of the same kind of chip that fits, and behind it that against this
    first one's operations alone, as if no traffic were hidden behind them.
    """
    head = [
        "topology",
        "mesh",
        "batch",
        "fits",
        "GiB a chip",
        "GiB sent",
        "images/s",
        "a chip",
        "efficiency",
        "bound by",
    ]
    head.append("chip-hours an epoch")
    first: dict[str, float] = {}
    lines = [head, ["---"] * len(head)]
    for result in results:
        axes = ", ".join(f"{axis} {size}" for axis, size in result["mesh"].items() if size > 1) or "1"
        cells = [result["topology"], axes, f"{result['batch_size']:,}", "yes" if result["fits"] else "no"]
        sent = result["collective_bytes"]
        cells += [_gib(result["bytes_per_chip"]), "-" if sent is None else _gib(sent)]
        images = result["images_per_second"]
        if images:
            each = images / result["chips"]
            reference = first.setdefault(result["topology"].partition(":")[0], each)
            worst = result["images_per_second_without_overlap"] / result["chips"] / reference
            cells += [f"{images:,.0f}", f"{each:,.0f}", f"{each / reference:.0%} ({worst:.0%})", result["bound"]]
            cells.append(f"{result['chip_hours_per_cc3m_epoch']:.1f}")
        lines.append(cells + ["-"] * (len(head) - len(cells)))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _with_mesh(config: ConfigDict, text: str | None) -> ConfigDict:
    """The config with the axes of `--mesh`; those that it does not name are 1."""
    if not text:
        return config
    if not re.fullmatch(r"\w+=-?\d+(,\w+=-?\d+)*", text):
        raise UserError(f"--mesh={text}: write data=N,fsdp=N,model=N, or some of them")
    given = {axis: int(size) for axis, size in (part.split("=") for part in text.split(","))}
    if unknown := set(given) - set(sharding.AXES):
        raise UserError(f"--mesh={text}: no axis {', '.join(sorted(unknown))}; they are {', '.join(sharding.AXES)}")
    for axis in sharding.AXES:
        config.mesh[axis] = given.get(axis, 1)
    return config


def main(values: SimpleNamespace) -> None:
    """Entry point."""
    config = _with_mesh(values.config, values.mesh)
    if not 0 < values.utilisation <= 1:
        raise UserError(f"--utilisation={values.utilisation}: it is a share of the peak, above 0 and at most 1")
    if not values.topology and not values.sweep:
        raise UserError("give --topology, such as v5e:4x4, or --sweep")
    if values.topology != LOCAL:
        jax.config.update("jax_platforms", "cpu")  # with libtpu installed, jax would look for a TPU here
    if not values.sweep:
        result = plan(config, values.topology, values.utilisation, values.rows)
        tell(json.dumps(result) if values.json else table(result, config))
        return
    results = []
    for topology in (values.topology or ",".join(SWEEP)).split(","):
        results.append(plan(config, topology, values.utilisation, values.rows))
        if not values.json:
            say(f"{topology} compiled in {results[-1]['compile_seconds']:.0f} s")
    tell(json.dumps(results) if values.json else sweep_table(results))


if __name__ == "__main__":
    entry.run(main, COMMANDS["plan"])
