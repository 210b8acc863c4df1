"""One mesh: rules that cover a run, arrays that lie as declared, and the numbers of one device on any mesh."""

import functools
import importlib.util
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from tiny import ROOT, generate, make_mesh, tiny_config

from vlkd_jax import predict, sharding
from vlkd_jax.data.streams import train_stream
from vlkd_jax.errors import UserError
from vlkd_jax.optim import make_optimizer
from vlkd_jax.shapes.sources import ShapesPairs
from vlkd_jax.step import make_train_step
from vlkd_jax.tasks import make_task
from vlkd_jax.train import abstract_state, start_state, train
from vlkd_jax.types import TrainState
from vlkd_jax.vlkd import VLKD

MESHES = {"data 8": (8, 1, 1), "fsdp 8": (1, 8, 1), "model 8": (1, 1, 8), "2 x 2 x 2": (2, 2, 2)}
MIXED = {"loss__denoise": 0.5, "loss__l2": 0.1, "data__context_length": 0, "student__whiten": 1}


class Run(NamedTuple):
    """What five steps on a mesh gave: each step's metrics, and the state with its shardings as found and declared."""

    metrics: list[dict[str, float]]
    state: TrainState
    declared: Any


@pytest.fixture(scope="module")
def task(assets):
    return make_task(tiny_config(assets, **MIXED))


@pytest.fixture(scope="module")
def run(assets, task):
    """Function (mesh sizes, accumulate) -> Run."""
    config = tiny_config(assets, **MIXED)
    stream = train_stream(config, task, 0)
    batches = [next(stream).replace(index=None) for _ in range(5)]
    optimizer = make_optimizer(config.optim, 5, task.new)

    @functools.cache
    def run(sizes: tuple[int, int, int], accumulate: int = 1) -> Run:
        mesh = make_mesh(*sizes)
        with jax.set_mesh(mesh):
            params, frozen = (sharding.shardings(tree, mesh) for tree in task.abstract())
            state = start_state(task.load_params(params), optimizer, mesh)
            declared = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(task, optimizer, mesh))
            step = make_train_step(task, optimizer, 0.0, 0, accumulate)
            step = jax.jit(step, donate_argnums=0, out_shardings=(declared, sharding.replicated(mesh)))
            frozen, metrics = task.load_frozen(frozen), []
            for batch in batches:
                state, values = step(state, frozen, sharding.put(mesh, batch))
                metrics.append({name: float(value) for name, value in values.items()})
        return Run(metrics, state, declared)

    return run


@pytest.mark.parametrize("sizes", MESHES.values(), ids=MESHES)
def test_every_mesh_gives_one_devices_numbers(run, sizes):
    one, many = run((1, 1, 1)), run(sizes)
    assert len({step["loss"] for step in one.metrics}) == 5 and one.metrics[-1]["skipped_in_row"] == 0
    for ours, theirs in zip(many.metrics, one.metrics, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)  # grad_norm among them
    for part in ("params", "opt_state"):
        for ours, theirs in zip(
            jax.tree.leaves(getattr(many.state, part)), jax.tree.leaves(getattr(one.state, part)), strict=True
        ):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("sizes", "accumulate"), [((1, 1, 1), 4), ((2, 1, 1), 2), ((2, 2, 2), 2)], ids=str)
def test_an_accumulated_step_is_a_whole_one(run, sizes, accumulate):
    """On a mesh too; the contrastive loss keeps its whole batch."""
    one, many = run((1, 1, 1)), run(sizes, accumulate)
    for ours, theirs in zip(many.metrics, one.metrics, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("sizes", MESHES.values(), ids=MESHES)
def test_arrays_lie_as_declared(run, sizes):
    many = run(sizes)
    for leaf, declared in zip(jax.tree.leaves(many.state), jax.tree.leaves(many.declared), strict=True):
        assert leaf.sharding.is_equivalent_to(declared, leaf.ndim)
    specs = {leaf.sharding.spec for leaf in jax.tree.leaves(many.state.params)}
    assert P(None, "fsdp", "model") in specs and P() in specs


def bytes_of(tree, device) -> int:
    return sum(
        shard.data.nbytes
        for leaf in jax.tree.leaves(tree)
        for shard in leaf.addressable_shards
        if shard.device == device
    )


@pytest.mark.parametrize("part", ["params", "opt_state"])
def test_memory_falls_with_the_devices(run, part):
    """All but norms, biases and scalars, which are whole everywhere, is an eighth on each of eight devices."""
    device = jax.devices()[0]
    whole, split = (getattr(run(sizes).state, part) for sizes in ((1, 1, 1), (1, 8, 1)))
    kept = sum(leaf.nbytes for leaf in jax.tree.leaves(split) if leaf.sharding.is_fully_replicated)
    assert bytes_of(split, device) - kept == (bytes_of(whole, device) - kept) // 8
    assert kept < 0.1 * bytes_of(whole, device)


def test_what_no_rule_matches_and_what_cannot_be_split_is_named():
    leaf = jax.ShapeDtypeStruct((7, 12), jnp.float32)
    tree = {"bart": {"adapter": {"kernel": leaf}, "shared": {"embedding": leaf}}}
    with pytest.raises(UserError) as caught:
        sharding.shardings(tree, make_mesh(1, 8, 1))
    assert "no sharding rule for bart/adapter/kernel [7, 12]" in str(caught.value)
    assert "bart/shared/embedding [7, 12]: axis 1 cannot be split over fsdp x model = 8" in str(caught.value)
    with pytest.raises(UserError, match=r"match no parameter: .*q_proj"):
        sharding.check_rules({"bart": {"shared": {"embedding": leaf}}})


@pytest.mark.parametrize("objective", ["vlkd", "bart_denoise", "clip_contrastive", "classify", "summarize"])
def test_the_rules_cover_every_task_and_none_is_idle(assets, objective):
    config = tiny_config(assets, objective=objective)
    task, mesh = make_task(config), make_mesh(2, 2, 2)
    state = abstract_state(task, make_optimizer(config.optim, 5, task.new), mesh)
    sharding.check_rules([state.parts(), task.abstract()[1]])
    for name, leaf in zip(("params/" + n for n in names(state.params)), jax.tree.leaves(state.params), strict=True):
        moments = [
            m
            for n, m in zip(names(state.opt_state), jax.tree.leaves(state.opt_state), strict=True)
            if n.endswith(name.removeprefix("params/")) and m.shape == leaf.shape
        ]
        assert len(moments) >= 2 and {m.sharding for m in moments} == {leaf.sharding}, name


def names(tree):
    return [sharding.path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def golden():
    spec = importlib.util.spec_from_file_location("golden_shardings", ROOT / "tests" / "golden" / "shardings.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["cc3m_vitb16_bartlarge", "cc3m_vitl14_bartlarge"])
def test_the_layout_of_the_published_sizes(name):
    assert golden().table(name) == (ROOT / "tests" / "golden" / f"{name}.txt").read_text()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mesh__data": 3, "mesh__fsdp": 4}, ["data=3, fsdp=4, model=1", "8 devices"]),
        ({"mesh__data": -1, "mesh__fsdp": -1}, ["data=-1, fsdp=-1", "one of them"]),
        ({"mesh__model": 0}, ["model=0", "at least 1"]),
        ({"mesh__data": 4, "mesh__slices": 3}, ["mesh.slices is 3", "divide config.mesh.data, here 4"]),
        ({"mesh__data": 4, "mesh__slices": 2}, ["mesh.slices is 2", "do not have"]),
        ({"mesh__data": 4, "mesh__fsdp": 2, "batch_size": 12}, ["batch_size is 12", "multiple of 8"]),
        ({"accumulate": 3}, ["batch_size is 8", "accumulate 3"]),
    ],
)
def test_meshes_that_cannot_be(assets, tmp_path, changes, words):
    with pytest.raises(UserError) as caught:
        train(tiny_config(assets, **changes), tmp_path)
    assert all(word in str(caught.value) for word in words), caught.value


class Device(NamedTuple):
    process_index: int


class Layout(NamedTuple):
    """What `data_share` looks at of a mesh."""

    devices: np.ndarray
    shape: dict[str, int]


def layout(data, fsdp, model, processes):
    count = data * fsdp * model
    devices = np.empty(count, object)
    devices[:] = [Device(k * processes // count) for k in range(count)]
    sizes = (data, fsdp, model)
    return Layout(devices.reshape(sizes), dict(zip(sharding.AXES, sizes, strict=True)))


@pytest.mark.parametrize(
    ("sizes", "processes", "shares"),
    [((8, 1, 1), 2, [0, 1]), ((2, 2, 2), 4, [0, 1, 2, 3]), ((1, 1, 8), 4, [0, 0, 0, 0]), ((2, 1, 4), 4, [0, 0, 1, 1])],
)
def test_processes_that_split_a_model_read_the_same_rows(monkeypatch, sizes, processes, shares):
    mesh = layout(*sizes, processes)
    for process, share in enumerate(shares):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        assert sharding.data_share(mesh) == (share, max(shares) + 1)


def test_a_model_that_lies_across_processes_unevenly_is_refused(monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 0)
    with pytest.raises(UserError, match="unevenly"):
        sharding.data_share(layout(2, 1, 3, 3))


@pytest.fixture(scope="module")
def models(assets):
    """The same random student on one device and on meshes of eight."""
    task = make_task(tiny_config(assets))
    trees = task.abstract()
    rng = np.random.default_rng(0)
    drawn = jax.tree.map(lambda x: np.float32(x + 0.3 * rng.normal(size=x.shape)), task.load_params())

    def on(mesh):
        params, frozen = (sharding.shardings(tree, mesh) for tree in trees)
        return VLKD.of(task, jax.device_put(drawn, params), task.load_frozen(frozen), mesh)

    return {name: on(make_mesh(*sizes)) for name, sizes in ({"one": (1, 1, 1)} | MESHES).items()}


@pytest.mark.parametrize("name", MESHES)
def test_answers_and_embeddings_are_one_devices(models, name):
    one, many = models["one"], models[name]
    pictures = [ShapesPairs(0, "train")[i].image for i in range(5)]
    prompts = [one.bart_text.encode(f"a {word} circle") for word in ("small", "large", "red", "blue", "green")]
    said = [generate(model, 8, prompts, prompts, 12, images=pictures) for model in (one, many)]
    assert said[0] == said[1] and len(set(said[0])) > 1
    for embed in (
        lambda m: predict.embed_images(m, pictures, 8),
        lambda m: predict.embed_texts(m, ["a red circle"] * 3, 8),
    ):
        np.testing.assert_allclose(embed(many), embed(one), atol=1e-5)
