"""Plans: operations, traffic and memory of compiled programs against figures worked out by hand."""

import json
import math
import os
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tiny import ROOT, command_line, make_mesh, options, tiny_config

from vlkd_jax import plan, sharding
from vlkd_jax.configs import cc3m_vitb16_bartlarge, cc3m_vitl14_bartlarge, shapes_vlkd
from vlkd_jax.costs import collective_bytes, count_flops
from vlkd_jax.errors import UserError
from vlkd_jax.hf.names import parameter_shapes
from vlkd_jax.models.published import BARTS, CLIPS


def flops_of(function, *shapes):
    return count_flops(jax.make_jaxpr(function)(*(jnp.zeros(shape) for shape in shapes)).jaxpr)


def test_operations_are_counted_as_by_hand():
    """Products, their gradients, batches, convolutions, loops, recomputation."""
    product = 2 * 3 * 4 * 5
    assert flops_of(jnp.dot, (3, 4), (4, 5)) == product
    assert flops_of(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), (7, 3, 4), (7, 4, 5)) == 7 * product
    both = jax.grad(lambda a, b: jnp.dot(a, b).sum(), argnums=(0, 1))
    assert flops_of(both, (3, 4), (4, 5)) == 3 * product  # forward, and one for each gradient

    def looped(a, b):
        return jax.lax.scan(lambda carry, _: (carry + jnp.dot(a, b), None), jnp.zeros((3, 5)), None, length=11)[0]

    assert flops_of(looped, (3, 4), (4, 5)) == 11 * product

    def convolved(x, kernel):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=numbers)

    assert flops_of(convolved, (2, 8, 8, 3), (3, 3, 3, 16)) == 2 * (2 * 8 * 8 * 16) * (3 * 3 * 3)

    def twice(a, b):
        return jnp.sum(jnp.sin(jnp.dot(a, b)) @ jnp.ones((5, 5)))

    plain, again = flops_of(jax.grad(twice), (3, 4), (4, 5)), flops_of(jax.grad(jax.checkpoint(twice)), (3, 4), (4, 5))
    assert again > plain


def test_traffic_is_that_of_a_ring():
    """Eight devices: a sum, a gathering and a scattered sum, alone and five times in a loop."""
    mesh, size = make_mesh(fsdp=8), 64 * 256 * 4
    split, whole = NamedSharding(mesh, P("fsdp")), NamedSharding(mesh, P())

    def sent(function, inside, outside, shape=(64, 256)):
        compiled = jax.jit(function, in_shardings=inside, out_shardings=outside).lower(jnp.zeros(shape)).compile()
        return collective_bytes(compiled.as_text())

    assert sent(lambda x: x * 2, split, whole) == {"all-gather": size * 7 / 8}
    column_sums = sent(lambda x: x.sum(0), split, whole)
    assert column_sums == {"all-reduce": 2 * 256 * 4 * 7 / 8}

    def looped(x):
        def body(carry, _):
            total = jax.lax.with_sharding_constraint(jnp.sin(x * carry.sum()).sum(0), whole)
            return jnp.cos(total), None

        return jax.lax.scan(body, jnp.ones(256), None, length=5)[0]

    assert sent(looped, split, whole) == {"all-reduce": 5 * 2 * 256 * 4 * 7 / 8}


HLO = """HloModule m

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %s = f32[] add(%x, %y)
}

%body (p: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
  %ag = (bf16[1,128]{1,0}, bf16[8,128]{1,0}) all-gather-start(%x), replica_groups=[4,8]<=[32], dimensions={0}
  %agd = bf16[8,128]{1,0} all-gather-done(%ag)
  ROOT %t = (s32[], bf16[8,128]{1,0}) tuple(%i, %agd)
}

%fused (q: f32[16]) -> f32[2] {
  ROOT %rs = f32[2]{0} reduce-scatter(%q), replica_groups={{0,1,2,3,4,5,6,7},{8,9,10,11,12,13,14,15}}, to_apply=%add
}

ENTRY %main (a: f32[16]) -> f32[2] {
  %w = (s32[], bf16[8,128]{1,0}) while(%z), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"24"}}
  %m = f32[16]{0} all-reduce(%a), replica_groups=mesh['x'=4,'y'=2], device_ids=([2,4]T(1,0)) {'y','x':(1)2}
  %p = f32[16]{0} collective-permute(%a), source_target_pairs={{0,1},{1,0}}
  ROOT %f = f32[2]{0} fusion(%a), kind=kCustom, calls=%fused
}
"""


def test_traffic_of_a_program_text():
    """Asynchronous pairs count once, by what comes out; loops as often as they run; calls where they are called."""
    expected = {"all-gather": 24 * 8 * 128 * 2 * 7 / 8, "reduce-scatter": 2 * 4 * 7, "collective-permute": 16 * 4}
    assert collective_bytes(HLO) == expected | {"all-reduce": 2 * 16 * 4 * 3 / 4}
    with pytest.raises(ValueError, match="no replica_groups that this knows"):
        collective_bytes(HLO.replace("[4,8]<=[32]", "@somewhere"))


TPU_HLO = """HloModule m

%start (p: bf16[8,2]) -> (bf16[8,2], bf16[8,32]) {
  %ag = bf16[8,32]{1,0} all-gather(%p), channel_id=1, replica_groups=[1,16]<=[16], dimensions={1}
  ROOT %s = (bf16[8,2], bf16[8,32]) custom-call(%ag), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.7 (p: bf16[8,2]) -> (bf16[8,2], bf16[8,32]) {
  ROOT %ag.2 = bf16[8,32]{1,0} all-gather(%p), channel_id=1, replica_groups=[1,16]<=[16], dimensions={1}
}

%done (p: bf16[8,2]) -> bf16[8,32] {
  %ag.3 = bf16[8,32]{1,0} all-gather(%p), channel_id=1, replica_groups=[1,16]<=[16], dimensions={1}
  ROOT %d = bf16[8,32]{1,0} custom-call(%ag.3), custom_call_target="AsyncCollectiveDone"
}

%body (p: (s32[], bf16[8,2])) -> (s32[], bf16[8,2]) {
  %f = (bf16[8,2], bf16[8,32]) fusion(%x), kind=kCustom, calls=%start
  %g = (bf16[8,2], bf16[8,32]) fusion(%f), kind=kCustom, calls=%async_collective_fusion.7
  %h = bf16[8,32]{1,0} fusion(%g), kind=kCustom, calls=%done
  ROOT %t = (s32[], bf16[8,2]) tuple(%i, %x)
}

%cond (p: (s32[], bf16[8,2])) -> pred[] {
  %c = s32[]{:T(128)} constant(12)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %c), direction=LT
}

ENTRY %main (a: f32[16]) -> f32[2] {
  ROOT %w = (s32[], bf16[8,2]) while(%z), condition=%cond, body=%body
}
"""


def test_traffic_of_a_tpu_program_text():
    """A collective in several fused pieces counts once; a loop without a note runs as its condition says."""
    assert collective_bytes(TPU_HLO) == {"all-gather": 12 * 8 * 32 * 2 * 15 / 16}
    with pytest.raises(ValueError, match="a loop without a length that this knows"):
        collective_bytes(TPU_HLO.replace("direction=LT", "direction=NE"))


@pytest.fixture(scope="module")
def planned(assets):
    config = tiny_config(assets, steps=10, loss__denoise=0.3, data__replay="shapes_texts")
    config.mesh.data = -1
    return config


def test_a_plan_for_the_devices_here(planned):
    """Parameters and moments fall with fsdp as the rules say; traffic is of the gradient's size."""
    results = {}
    for data, fsdp in ((1, 1), (8, 1), (1, 8)):
        planned.mesh.data, planned.mesh.fsdp = data, fsdp
        results[data, fsdp] = plan.plan(planned, "local", 0.4)
    task = plan.planned_task(planned)
    params, frozen = task.abstract()
    count = sum(math.prod(x.shape) for x in jax.tree.leaves([params, frozen]))
    trained = sum(math.prod(x.shape) for x in jax.tree.leaves(params))
    for result in results.values():
        assert result["bytes_per_chip"] == sum(result["bytes_by_kind"].values())
        assert result["flops_per_step"] == results[1, 1]["flops_per_step"] > 6 * 8 * trained  # of 8 rows, at the least
        assert result["fits"] is None and result["images_per_second"] is None
    kinds = {shape: result["bytes_by_kind"] for shape, result in results.items()}
    assert kinds[1, 1]["parameters"] == kinds[8, 1]["parameters"] == 4 * count
    assert kinds[1, 1]["optimizer"] == pytest.approx(8 * trained, rel=0.01)
    assert kinds[1, 8]["parameters"] < 0.2 * kinds[1, 1]["parameters"]
    assert kinds[1, 8]["optimizer"] < 0.2 * kinds[1, 1]["optimizer"]
    assert kinds[8, 1]["batch"] == kinds[1, 8]["batch"] == kinds[1, 1]["batch"] / 8
    assert results[1, 1]["collective_bytes"] == 0
    once = 2 * 4 * trained * 7 / 8  # three texts pass the encoder and two the decoder: each has its gradient reduced
    assert 2 * once < results[8, 1]["collectives"]["all-reduce"] < 5 * once
    assert "all-gather" in results[1, 8]["collectives"]


def test_a_batch_is_what_the_pipeline_makes(planned):
    from vlkd_jax.data.streams import train_sources, train_stream
    from vlkd_jax.tasks import make_task

    task = make_task(planned)
    real = next(iter(train_stream(planned, task, 0, sources=train_sources(planned, task)))).replace(index=None)
    shapes = plan.abstract_batch(planned, plan.planned_task(planned), make_mesh())
    assert jax.tree.structure(real) == jax.tree.structure(shapes)
    for ours, theirs in zip(jax.tree.leaves(shapes), jax.tree.leaves(real), strict=True):
        assert ours.shape == theirs.shape and ours.dtype == np.asarray(theirs).dtype


@pytest.mark.parametrize("config", [cc3m_vitb16_bartlarge, cc3m_vitl14_bartlarge])
def test_published_configs_are_planned_without_models(config):
    task = plan.planned_task(config.get_config())
    params, frozen = task.abstract()
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(params))
    assert count == pytest.approx(408e6, rel=0.01) and "clip" in frozen


def test_published_sizes():
    """Millions of parameters, as the models' pages say."""

    def millions(config):
        return sum(math.prod(x.shape) for x in jax.tree.leaves(parameter_shapes(config))) / 1e6

    sizes = {name: millions(config) for name, config in {**CLIPS, **BARTS}.items()}
    expected = {"vit_b32": 151.3, "vit_b16": 149.6, "vit_l14": 427.6, "base": 139.5, "large": 406.3}
    assert sizes == pytest.approx(expected, abs=0.1)


def test_what_does_not_fit(planned):
    """The compiler's refusal is read; the cheapest change is named first."""
    said = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 35.25G of 15.75G hbm. Exceeded by 19.5G."
    known = {"parameters": 2**30, "optimizer": 2**30, "batch": 0}
    program = plan._too_large(RuntimeError(said), 1.0, known, 2.0)
    assert sum(program.bytes.values()) == int(35.25 * 2**30) and program.limit == int(15.75 * 2**30)
    of_libtpu = "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (16.54G) "
    of_libtpu += "exceeds available HBM (15.75G)."
    real = plan._too_large(RuntimeError(of_libtpu), 1.0, known, 2.0)
    assert (
        real.collectives is None
        and real.bytes["temporaries"] == int(16.54 * 2**30)
        and real.limit == int(15.75 * 2**30)
    )
    with pytest.raises(UserError, match=r"the step does not fit \(RESOURCE_EXHAUSTED: x\); raise config\.accumulate"):
        plan._too_large(RuntimeError("RESOURCE_EXHAUSTED: x\nmore"), 1.0, known, 2.0)
    with pytest.raises(RuntimeError, match="another"):
        plan._too_large(RuntimeError("another"), 1.0, known, 2.0)
    result = {"fits": False, "bytes_per_chip": 35 * 2**30, "memory_per_chip": 16 * 2**30, "chips": 16}
    result |= {"bytes_by_kind": program.bytes, "mesh": {"fsdp": 16}}
    planned.remat, planned.accumulate = False, 1
    told = plan.advice(result, planned)
    assert told[0] == "19.00 GiB too much" and "--config.remat=True" in told[1] and "--config.accumulate=4" in told[2]
    assert plan.advice(result | {"fits": True}, planned) == []


def test_speed_by_hand():
    chip = plan.Chip(16 * 2**30, 100e12, 100e9)
    result = {"fits": True, "flops_per_step": 8e14, "collective_bytes": 1e11, "chips": 4, "batch_size": 1000}
    speed = plan._speed(result, chip, 0.5)
    assert (speed["compute_seconds"], speed["network_seconds"], speed["bound"]) == (4.0, 1.0, "compute")
    assert speed["images_per_second"] == 250 and speed["images_per_second_without_overlap"] == 200
    assert speed["chip_hours_per_cc3m_epoch"] == pytest.approx(3_318_333 / 250 * 4 / 3600)
    slow = plan._speed(result | {"collective_bytes": 1e12}, chip, 0.5)
    assert slow["bound"] == "network" and slow["images_per_second"] == 100


def test_a_sweep_is_a_table():
    base = {"mesh": {"data": 1, "fsdp": 4, "model": 1}, "bytes_per_chip": 2**33, "bound": "compute"}
    base |= {"chip_hours_per_cc3m_epoch": 2.0, "batch_size": 1024, "collective_bytes": 2**29}
    base |= {"images_per_second_without_overlap": 1000.0}
    results = [
        base | {"topology": "v5e:2x2", "chips": 4, "fits": True, "images_per_second": 400.0},
        base | {"topology": "v5e:4x4", "chips": 16, "fits": True, "images_per_second": 1200.0},
        base
        | {"topology": "v4:2x2x4", "chips": 16, "fits": False, "images_per_second": None, "collective_bytes": None},
    ]
    lines = plan.sweep_table(results).splitlines()
    assert lines[3] == "| v5e:4x4 | fsdp 4 | 1,024 | yes | 8.00 | 0.50 | 1,200 | 75 | 75% (62%) | compute | 2.0 |"
    assert lines[4].endswith("| no | 8.00 | - | - | - | - | - | - |")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"topology": "v9:2x2"}, "write local, or GENERATION:AxB"),
        ({"topology": "v5e"}, "write local, or GENERATION:AxB"),
        ({"topology": None}, "give --topology, such as v5e:4x4, or --sweep"),
        ({"mesh": "fsdp:2"}, "--mesh=fsdp:2: write data=N,fsdp=N,model=N"),
        ({"mesh": "rows=2"}, "no axis rows; they are data, fsdp, model"),
        ({"mesh": "data=3,fsdp=5"}, "there are 8 devices"),
        ({"utilisation": 2.0}, "--utilisation=2.0: it is a share of the peak"),
        ({"objective": "bart_denoise"}, "only vlkd is planned"),
    ],
)
def test_mistakes(changes, message, assets):
    """One line each, before anything is compiled."""
    values = {
        "topology": "local",
        "mesh": None,
        "utilisation": 0.4,
        "sweep": False,
        "json": False,
        "rows": None,
    } | changes
    config = tiny_config(assets, objective=values.pop("objective", "vlkd"))
    with pytest.raises(UserError, match=message):
        plan.main(SimpleNamespace(config=config, **values))


def test_models_that_are_not_named(assets):
    config = tiny_config(assets, clip="")
    with pytest.raises(
        UserError, match=r"config\.clip is empty; name a directory, or with config\.plan\.clip one of vit_b32"
    ):
        plan.planned_task(config)
    config.plan.clip = "vit_b32"
    assert plan.planned_task(config).configs["clip"] == CLIPS["vit_b32"]


def test_the_command(assets):
    """`--json` prints one object and nothing beside it."""
    given = [f"--config.{name}={value}" for name, value in options(assets).items()]
    argv = ["--config=configs/base.py", *given, "--topology=local", "--mesh=data=2,fsdp=4", "--json"]
    result = command_line("plan", argv)
    assert result.returncode == 0, result.stderr
    told = json.loads(result.stdout)
    assert told["mesh"] == {"data": 2, "fsdp": 4, "model": 1} and told["chips"] == 8
    wanted = {"fits", "chips", "bytes_per_chip", "flops_per_step", "collective_bytes", "images_per_second"}
    assert wanted <= set(told) and tuple(told["mesh"]) == sharding.AXES


LIBTPU = Path(sys.prefix) / "libtpu"


def plan_for_tpus(*argv: str) -> subprocess.CompletedProcess[str]:
    """`vlkd plan` of the built-in world with the TPU compiler that launch/setup.sh puts beside the packages."""
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        pytest.skip("libtpu is for Linux on x86-64 alone")
    known = {key: value for key, value in os.environ.items() if not key.startswith(("JAX_", "XLA_"))}
    known |= {"PYTHONPATH": f"{ROOT}:{LIBTPU}", "TPU_LIBRARY_PATH": str(LIBTPU / "libtpu" / "libtpu.so")}
    command = [sys.executable, "-m", "vlkd_jax.plan", "--config=shapes_vlkd", "--config.dtype=bfloat16", *argv]
    return subprocess.run(command, env=known, capture_output=True, text=True, cwd=ROOT)


def test_plans_for_tpus():
    """Compiled for chips that are not here: one device a chip, memory of the chip, traffic that follows the mesh."""
    result = plan_for_tpus("--topology=v5e:2x2,v4:2x2x1", "--sweep", "--rows=16", "--json")
    assert (result.returncode, result.stderr) == (0, "")
    small, large = json.loads(result.stdout)
    for told, memory in ((small, 16), (large, 32)):
        assert told["fits"] and told["chips"] == 4 and told["batch_size"] == 64
        assert told["memory_per_chip"] == memory * 2**30 and told["images_per_second"] > 0
    task = plan.planned_task(shapes_vlkd.get_config())
    trained, frozen = (sum(math.prod(x.shape) for x in jax.tree.leaves(tree)) for tree in task.abstract())
    assert small["bytes_by_kind"]["parameters"] == 4 * (trained + frozen)
    assert small["bytes_by_kind"]["optimizer"] == pytest.approx(8 * trained, rel=0.01)
    once = 2 * 2 * trained * 3 / 4  # gradients in bfloat16, around a ring of four; layers are in loops
    assert once < small["collectives"]["all-reduce"] < 8 * once

    split = plan_for_tpus("--topology=v5e:2x2", "--mesh=data=1,fsdp=4", "--json")
    assert split.returncode == 0, split.stderr
    told = json.loads(split.stdout)
    assert told["bytes_by_kind"]["parameters"] < 0.4 * small["bytes_by_kind"]["parameters"]
    assert sum(told["collectives"].values()) > 2 * trained * 3 / 4  # gathered in bfloat16, at the least


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--topology=v5e:3x5"], "error: --topology=v5e:3x5: libtpu does not know it ("),
        (["--topology=v5e:4x4", "--mesh=data=4"], "error: config.mesh uses 4 of the 16 chips of v5e:4x4; use them all"),
    ],
)
def test_tpus_that_cannot_be_planned_for(argv, told):
    result = plan_for_tpus(*argv)
    assert result.returncode == 2 and result.stderr.startswith(told) and result.stderr.count("\n") == 1
