"""A batch in parts: the same losses and the same parameters as at once, on one device and on several."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import make_mesh, tiny_config

from vlkd_jax import losses
from vlkd_jax.data.streams import train_stream
from vlkd_jax.sharding import put_everywhere, put_rows
from vlkd_jax.step import make_train_step, terms_in_parts
from vlkd_jax.tasks import make_task
from vlkd_jax.types import Batch, TrainState

STEPS = 3
OPTIONS = {
    "vlkd": {"loss__denoise": 0.5, "loss__l2": 0.1, "data__context_length": 0},
    "bart_denoise": {"data__source": "shapes_texts"},
    "clip_contrastive": {},
}


@pytest.fixture(scope="module", params=OPTIONS)
def prepared(request, assets):
    """(task, parameters a little away from their start, what is frozen, batches) of each objective."""
    config = tiny_config(assets, objective=request.param, **OPTIONS[request.param])
    task, rng = make_task(config), np.random.default_rng(1)
    params = jax.tree.map(lambda x: np.asarray(x + 0.05 * rng.normal(size=np.shape(x)), np.float32), task.load_params())
    stream = train_stream(config, task, 0)
    return task, params, task.load_frozen(), [next(stream).replace(index=None) for _ in range(STEPS)]


def run(prepared, accumulate, mesh=None):
    """(parameters after the steps, each step's metrics) with plain gradient descent, which hides no gradient's size."""
    task, params, frozen, batches = prepared
    optimizer, zero = optax.sgd(0.02), jnp.int32(0)
    state = TrainState(zero, params, optimizer.init(params), zero, zero)
    step, metrics = jax.jit(make_train_step(task, optimizer, 0.0, 0, accumulate)), []
    if mesh is not None:
        state, frozen = put_everywhere(mesh, jax.tree.map(np.asarray, (state, frozen)))
        batches = [put_rows(mesh, batch) for batch in batches]
    with jax.set_mesh(mesh or make_mesh()):
        for batch in batches:
            state, measured = step(state, frozen, batch)
            metrics.append(jax.tree.map(float, measured))
    return jax.tree.map(np.asarray, state.params), metrics


@pytest.fixture(scope="module")
def at_once(prepared):
    return run(prepared, 1)


def same(ours, theirs, start):
    """Parameters equal to 1e-5, and to a thousandth of how far training moved them."""
    for one, other, before in zip(*map(jax.tree.leaves, (ours[0], theirs[0], start)), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)
        assert np.linalg.norm(one - other) <= 1e-3 * np.linalg.norm(other - before) + 1e-6
    for one, other in zip(ours[1], theirs[1], strict=True):
        assert one == pytest.approx(other, rel=1e-5)


@pytest.mark.parametrize("accumulate", [2, 4])
def test_parts_of_a_batch_are_the_batch(prepared, at_once, accumulate):
    same(run(prepared, accumulate), at_once, prepared[1])
    metrics = at_once[1][-1]
    assert {"loss", *prepared[0].weights} <= set(metrics) and ("itcl_accuracy" in metrics) == ("itcl" in metrics)
    moved = [np.linalg.norm(a - b) for a, b in zip(*map(jax.tree.leaves, (at_once[0], prepared[1])))]
    assert max(moved) > 1e-3


def test_parts_of_a_batch_on_several_devices(prepared, at_once):
    same(run(prepared, 2, make_mesh(data=2, fsdp=2)), at_once, prepared[1])


def lowered(prepared, accumulate, repeats=1):
    """One step for a batch `repeats` times as large, not compiled yet."""
    task, params, frozen, batches = prepared
    batch = jax.tree.map(lambda x: np.repeat(x, repeats, 0), batches[0])
    optimizer, zero = optax.sgd(0.1), jnp.int32(0)
    state = TrainState(zero, params, optimizer.init(params), zero, zero)
    return jax.jit(make_train_step(task, optimizer, 0.0, 0, accumulate)).lower(state, frozen, batch)


def test_memory_falls_with_the_parts(prepared):
    whole, quarter = (lowered(prepared, parts, 8).compile().memory_analysis().temp_size_in_bytes for parts in (1, 4))
    assert quarter < 0.35 * whole


def test_the_teacher_runs_once(prepared):
    task = prepared[0]
    if task.teacher is None:
        return
    kernel = "x".join(map(str, prepared[2]["clip"]["vision_model"]["patch_embedding"]["kernel"].shape))
    for parts in (1, 2):
        lines = lowered(prepared, parts).as_text().splitlines()
        assert len([line for line in lines if "dot_general" in line and f"tensor<{kernel}x" in line]) == 1


def stub(terms):
    """A task's terms that need no model, of a batch of 12 rows in three parts."""
    batch = Batch(text_ids=np.arange(24).reshape(12, 2), replay=Batch(text_ids=np.arange(12)))
    return jax.jit(terms_in_parts(terms, 3))({}, {}, batch, jax.random.key(5)), batch


def test_rows_of_pairs_come_back_in_order():
    def terms(params, frozen, batch, rng):
        rows = batch.text_ids.astype(jnp.float32)
        count = jnp.sum(batch.replay.text_ids, dtype=jnp.float32), jnp.float32(batch.replay.text_ids.size)
        return {"itcl": losses.Pairs(rows, rows + 0.5, jnp.float32(7)), "sum": count}

    joined, batch = stub(terms)
    np.testing.assert_array_equal(joined["itcl"].image, batch.text_ids)
    np.testing.assert_array_equal(joined["itcl"].sentence, batch.text_ids + 0.5)
    assert joined["itcl"].scale == 7 and joined["sum"] == (66, 12)


def test_each_part_draws_its_own_dropout():
    drawn, _ = stub(lambda params, frozen, batch, rng: {"x": (jax.random.uniform(rng), jnp.float32(1))})
    expected = [jax.random.uniform(jax.random.fold_in(jax.random.key(5), k)) for k in range(3)]
    assert float(drawn["x"][0]) == pytest.approx(float(sum(expected))) and len(set(map(float, expected))) == 3
