"""On a GPU: the same numbers as on the CPU, a step, answers and a checkpoint. Left out where there is no GPU.

These need jax, flax, optax, orbax-checkpoint, numpy and pytest alone. Where nothing else is installed, run
`python -m pytest --noconftest tests/test_gpu.py` from the root of the checkout.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.workload import Workload, answer, image_memory
from vlkd_jax.checkpoint import Checkpoints
from vlkd_jax.decoding import Decoding
from vlkd_jax.types import TrainState

pytestmark = pytest.mark.gpu
ROWS, LENGTH, STEPS = 8, 24, 3
CPU = jax.devices("cpu")[0]


@pytest.fixture(scope="module", autouse=True)
def gpu() -> jax.Device:
    """The first GPU; full precision, as everything here is compared with the CPU."""
    try:
        device = jax.devices("gpu")[0]
    except RuntimeError:
        pytest.skip("no GPU here")
    with jax.default_device(device), jax.default_matmul_precision("highest"):
        yield device


@pytest.fixture(scope="module")
def workload(gpu) -> Workload:
    return Workload.of("tiny", jnp.float32)


@pytest.fixture(scope="module")
def start(workload) -> tuple:
    """(parameters, frozen) on this host; matrices larger than drawn: with small ones BART repeats its last token."""

    def enlarge(path: tuple, x: jax.Array) -> np.ndarray:
        return np.asarray(x) * np.float32(6 if path[-1].key == "kernel" else 1)

    return jax.tree_util.tree_map_with_path(enlarge, workload.draw(1))


@pytest.fixture(scope="module")
def batches(workload) -> list:
    rng = np.random.default_rng(2)
    return [workload.batch(rng, ROWS, LENGTH) for _ in range(STEPS)]


def run(workload: Workload, start: tuple, batches: list, device: jax.Device) -> tuple[TrainState, list[dict]]:
    """The state after a step on each batch, and each step's metrics; everything on `device`."""
    with jax.default_device(device):
        params, frozen = jax.device_put(start, device)
        state = workload.state(params)
        step, told = jax.jit(workload.train_step(), donate_argnums=0), []
        for batch in jax.device_put(batches, device):
            before = state
            state, metrics = step(state, frozen, batch)
            told.append(jax.device_get(metrics))
            assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before.params)), "a donated state is still there"
    assert {leaf.devices() == {device} for leaf in jax.tree.leaves(state)} == {True}
    return state, told


@pytest.fixture(scope="module")
def trained(workload, start, batches, gpu) -> tuple[TrainState, list[dict]]:
    return run(workload, start, batches, gpu)


def test_losses_and_gradients_are_the_cpus(workload, start, batches, trained):
    _, wanted = run(workload, start, batches, CPU)
    for given, reference in zip(trained[1], wanted, strict=True):
        assert given.keys() == reference.keys()
        for name in reference:
            np.testing.assert_allclose(given[name], reference[name], rtol=1e-4, err_msg=name)
    assert len({float(metrics["loss"]) for metrics in wanted}) == STEPS


def test_steps_are_applied_and_finite(start, trained):
    state, _ = trained
    assert (int(state.step), int(state.skipped)) == (STEPS, 0)
    for leaf in jax.tree.leaves(state):
        assert np.isfinite(leaf).all()
    before, after = start[0]["image_projection"]["kernel"], np.asarray(state.params["image_projection"]["kernel"])
    assert not np.array_equal(before, after)


def test_bfloat16_steps_are_near_float32s(workload, start, batches, trained, gpu):
    with jax.default_matmul_precision("default"):
        state, told = run(dataclasses.replace(workload, dtype=jnp.bfloat16), start, batches, gpu)
    assert int(state.skipped) == 0
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {np.dtype(np.float32)}
    for given, reference in zip(told, trained[1], strict=True):
        for name in ("ttdm", "itcl", "icti"):
            np.testing.assert_allclose(given[name], reference[name], rtol=0.05, err_msg=name)


def test_greedy_answers_are_the_cpus(workload, start, gpu):
    prompts = workload.prompts(np.random.default_rng(3), ROWS, ask=True)

    def answers(device: jax.Device) -> np.ndarray:
        with jax.default_device(device):
            params, frozen, inputs = jax.device_put((*start, prompts), device)
            image = image_memory(workload.student, workload.teacher, params, frozen["clip"], inputs.pixels)
            return np.asarray(answer(workload.student, params, image, inputs, Decoding(max_new_tokens=10)))

    given = answers(gpu)
    np.testing.assert_array_equal(given, answers(CPU))
    assert any(len(np.unique(row)) > 2 for row in given), "nothing but repetitions: equal whatever is computed"


def test_a_checkpoint_comes_back_bit_for_bit(trained, gpu, tmp_path):
    parts = trained[0].parts()
    placed = jax.sharding.SingleDeviceSharding(gpu)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed), parts)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(STEPS, parts, {"examples": STEPS * ROWS})
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        step, restored, meta = checkpoints.restore(abstract)
    assert (step, meta) == (STEPS, {"examples": STEPS * ROWS})
    assert jax.tree.structure(restored) == jax.tree.structure(parts)
    for given, wanted in zip(jax.tree.leaves(restored), jax.tree.leaves(parts), strict=True):
        assert given.devices() == {gpu} and given.dtype == wanted.dtype
        assert np.asarray(given).tobytes() == np.asarray(wanted).tobytes()
