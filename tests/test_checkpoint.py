"""Checkpoints: bit-equal round trips, damage found and passed over, kills, full disks, mismatches, two processes."""

import errno
import functools
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from vlkd_jax import checkpoint
from vlkd_jax.checkpoint import MANIFEST, Checkpoints
from vlkd_jax.errors import UserError


class State(NamedTuple):
    step: Any
    params: Any
    opt_state: Any
    rng: Any


def sharding_of(count: int):
    """Function leaf -> sharding over the first `count` devices: leading axis split where it can be, else replicated."""
    assert len(jax.devices()) >= 8, "8 fake devices are needed: run through launch/test.sh"
    mesh = jax.make_mesh((count,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:count])
    return lambda x: NamedSharding(mesh, P("data") if x.ndim and x.shape[0] % count == 0 else P())


@functools.cache
def state_maker(count: int, width: int):
    """Jitted function seed -> State; the optimizer's state has empty and masked parts."""
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.multi_transform({"slow": optax.adamw(1e-3), "frozen": optax.set_to_zero()}, {"a": "slow", "b": "frozen"}),
    )

    def init(seed):
        key = jax.random.key(seed)
        params = {
            "a": {"kernel": jax.random.normal(key, (16, width)), "half": jnp.full((8,), 1.7, jnp.bfloat16)},
            "b": {"scale": jnp.array([jnp.nan, -0.0, jnp.inf, 1e-40])},
        }
        opt_state = jax.tree.map(lambda x: x + jnp.asarray(0.3, x.dtype), optimizer.init(params))
        return State(seed, params, opt_state, jax.random.key_data(key))

    shape = jax.eval_shape(init, jnp.int32(0))
    return jax.jit(init, out_shardings=jax.tree.map(sharding_of(count), shape))


def make_state(seed: int, count: int = 1, width: int = 8) -> State:
    """Params in float32 and bfloat16, optimizer state, step and key over the first `count` devices."""
    return state_maker(count, width)(jnp.int32(seed))


def abstract(state: Any, count: int = 1) -> Any:
    shard = sharding_of(count)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=shard(x)), state)


def assert_same_bits(one: Any, other: Any) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()


def save_steps(directory: Path, *steps: int, keep: int = 9) -> None:
    with Checkpoints(directory, keep) as checkpoints:
        for step in steps:
            checkpoints.save(step, make_state(step), {"examples": 64 * step})


def restore(directory: Path, count: int = 1):
    return Checkpoints(directory).restore(abstract(make_state(0), count))


def step_names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("saved_on, loaded_on", [(1, 1), (8, 8), (8, 1), (1, 8), (4, 2)])
def test_round_trip_is_bit_equal_on_any_number_of_devices(tmp_path, saved_on, loaded_on):
    state = make_state(7, saved_on)
    with Checkpoints(tmp_path / "new" / "ckpt") as checkpoints:
        assert checkpoints.latest() is None
        checkpoints.save(7, state, {"examples": 448, "note": "é"})
        checkpoints.wait()
        assert checkpoints.latest() == 7
        step, loaded, meta = checkpoints.restore(abstract(state, loaded_on))
    assert (step, meta) == (7, {"examples": 448, "note": "é"})
    assert_same_bits(state, loaded)
    assert len(loaded.params["a"]["kernel"].sharding.device_set) == loaded_on


@pytest.mark.parametrize("count", [1, 8])
def test_the_state_may_be_donated_once_save_returns(tmp_path, count):
    change = jax.jit(lambda tree: jax.tree.map(lambda x: x + jnp.asarray(1, x.dtype), tree), donate_argnums=0)
    state = make_state(1, count, width=4096)
    with Checkpoints(tmp_path) as checkpoints:
        for step in range(1, 6):
            expected = jax.tree.map(np.array, state)
            checkpoints.save(step, state, {})
            for _ in range(3):
                state = change(state)
            jax.block_until_ready(state)
            checkpoints.wait()
            assert_same_bits(checkpoints.restore(abstract(state, count))[1], expected)


def test_50_random_flips_and_truncations_are_all_found(tmp_path, capsys):
    save_steps(tmp_path, 10, 20)
    expected = make_state(10)
    newest = tmp_path / "step_00000020"
    files = sorted(path for path in newest.rglob("*") if path.is_file() and path.stat().st_size)
    assert newest / MANIFEST in files and len(files) >= 6
    chance = random.Random(0)
    for case in range(50):
        file = files[case % len(files)]
        content = file.read_bytes()
        place = chance.randrange(len(content))
        if chance.random() < 0.6:
            file.write_bytes(
                content[:place] + bytes([content[place] ^ (1 << chance.randrange(8))]) + content[place + 1 :]
            )
        else:
            file.write_bytes(content[:place])
        step, state, meta = restore(tmp_path)
        assert (step, meta) == (10, {"examples": 640}), file
        assert_same_bits(state, expected)
        assert "warning: checkpoint" in (warning := capsys.readouterr().err) and str(newest) in warning
        file.write_bytes(content)
    assert restore(tmp_path)[0] == 20
    assert capsys.readouterr().err == ""


def test_incomplete_steps_are_passed_over_and_kept(tmp_path, capsys):
    save_steps(tmp_path, 10, 20, 30)
    (tmp_path / "step_00000020" / MANIFEST).unlink()
    shutil.rmtree(tmp_path / "step_00000030" / "state" / "d")
    (tmp_path / "step_00000040").mkdir()
    (tmp_path / "step_notes").mkdir()
    (tmp_path / "step_00000050.orbax-checkpoint-tmp").mkdir()
    before = step_names(tmp_path)
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.latest() == 10
    assert checkpoints.latest() == 10
    assert capsys.readouterr().err.count("warning") == 3  # once for each, not once a call
    assert restore(tmp_path)[0] == 10
    assert step_names(tmp_path) == before


def test_only_the_last_good_steps_are_kept(tmp_path):
    save_steps(tmp_path, 1, 2, 3, 4, keep=2)
    assert step_names(tmp_path) == ["step_00000003", "step_00000004"]
    with Checkpoints(tmp_path, keep=1) as checkpoints:  # a later process that has verified nothing yet
        checkpoints.save(5, make_state(5), {}, wait=True)
        assert step_names(tmp_path) == ["step_00000005"]


def test_what_was_not_seen_to_be_good_does_not_count_as_kept(tmp_path):
    save_steps(tmp_path, 10, 20, 30)
    file = next(path for path in (tmp_path / "step_00000030" / "state").rglob("d/*"))
    file.write_bytes(file.read_bytes()[::-1])
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.restore(abstract(make_state(0)))[0] == 20
        checkpoints.save(25, make_state(25), {}, wait=True)
        assert step_names(tmp_path) == ["step_00000020", "step_00000025", "step_00000030"]
        checkpoints.save(30, make_state(30), {}, wait=True)
        assert step_names(tmp_path) == ["step_00000025", "step_00000030", "step_00000030.damaged-1"]
        assert_same_bits(checkpoints.restore(abstract(make_state(0)))[1], make_state(30))
        checkpoints.save(40, make_state(40), {})
        checkpoints.save(50, make_state(50), {}, wait=True)
        assert step_names(tmp_path) == ["step_00000040", "step_00000050"]


def test_a_complete_step_is_not_written_again(tmp_path):
    save_steps(tmp_path, 10)
    written = (tmp_path / "step_00000010" / MANIFEST).stat().st_mtime_ns
    save_steps(tmp_path, 10)
    assert (tmp_path / "step_00000010" / MANIFEST).stat().st_mtime_ns == written


def test_leftovers_of_a_killed_run_are_removed_by_the_next_save(tmp_path):
    for name in ("step_00000010.orbax-checkpoint-tmp", "step_00000005.deleted", "step_mine.orbax-checkpoint-tmp"):
        (tmp_path / name).mkdir(parents=True)
    save_steps(tmp_path, 10)
    assert step_names(tmp_path) == ["step_00000010", "step_mine.orbax-checkpoint-tmp"]


WRITER = """
import sys
import jax, jax.numpy as jnp
from vlkd_jax.checkpoint import Checkpoints
make = jax.jit(lambda step: {"w": jax.random.bits(jax.random.key(step), (1_000_000,)), "step": step})
checkpoints = Checkpoints(sys.argv[1], keep=2)
step = (checkpoints.latest() or 0) + 1
while True:
    checkpoints.save(step, make(jnp.int32(step)), {"step": step})
    checkpoints.wait()
    print(step, flush=True)
    step += 1
"""


def test_sigkill_during_a_save_leaves_a_complete_step(tmp_path):
    chance = random.Random(1)
    make = jax.jit(lambda step: {"w": jax.random.bits(jax.random.key(step), (1_000_000,)), "step": step})
    for _ in range(4):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, tmp_path], stdout=subprocess.PIPE, text=True)
        complete = int(writer.stdout.readline())
        time.sleep(chance.uniform(0.0, 0.3))
        writer.kill()
        complete = max([complete, *map(int, writer.stdout.read().split())])
        writer.wait()
        step, state, meta = Checkpoints(tmp_path).restore(abstract(make(jnp.int32(0))))
        assert complete <= step <= complete + 1 and meta == {"step": step}
        assert_same_bits(state, make(jnp.int32(step)))


def test_a_full_disk_is_noticed_before_the_save(tmp_path, monkeypatch):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(10, make_state(10), {}, wait=True)
        for free_blocks in range(0, 5):
            monkeypatch.setattr(
                checkpoint.os, "statvfs", lambda _, n=free_blocks: SimpleNamespace(f_bavail=n, f_frsize=256)
            )
            with pytest.raises(UserError) as caught:
                checkpoints.save(20, make_state(20), {})
            message = str(caught.value)
            assert str(tmp_path) in message and f"{256 * free_blocks} bytes free" in message and "\n" not in message
            assert "step 10 is untouched" in message
    assert step_names(tmp_path) == ["step_00000010"] and restore(tmp_path)[0] == 10


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_while_the_manifest_is_written(tmp_path, monkeypatch, number):
    def full(path, data):
        raise OSError(number, os.strerror(number), str(path))

    save_steps(tmp_path, 10)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.restore(abstract(make_state(0)))
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_atomic", full)
        checkpoints.save(20, make_state(20), {})
        with pytest.raises(UserError, match=r"no space for the checkpoint of step 20.*step 10 is untouched"):
            checkpoints.wait()
    assert step_names(tmp_path) == ["step_00000010"] and checkpoints.latest() == 10
    checkpoints.save(20, make_state(20), {})  # there is room again
    checkpoints.close()
    assert restore(tmp_path)[0] == 20


def test_a_disk_that_fills_while_arrays_are_written(tmp_path, monkeypatch):
    def save_async(path, state):
        (path.parent / f"{path.name}.orbax-checkpoint-tmp" / "state").mkdir(parents=True)

        def result():
            raise ValueError("RESOURCE_EXHAUSTED: Failed to write 9760768 bytes: No space left on device")

        return SimpleNamespace(result=result)

    save_steps(tmp_path, 10)
    monkeypatch.setattr(checkpoint.ocp, "save_async", save_async)
    with pytest.raises(UserError, match="no space"), Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(20, make_state(20), {})
    assert step_names(tmp_path) == ["step_00000010"] and restore(tmp_path)[0] == 10


def test_another_failure_of_the_writer_comes_out_at_the_next_save(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_hash_files", lambda path: 1 / 0)
        checkpoints.save(10, make_state(10), {})
        with pytest.raises(ZeroDivisionError):
            checkpoints.save(20, make_state(20), {})
    checkpoints.close()
    assert checkpoints.latest() is None


def change_shape(state):
    return state._replace(rng=jax.ShapeDtypeStruct((3,), state.rng.dtype, sharding=state.rng.sharding))


def change_dtype(state):
    return state._replace(step=jax.ShapeDtypeStruct((), jnp.float32, sharding=state.step.sharding))


def add_leaf(state):
    return state._replace(params=state.params | {"more": state.step})


def drop_leaf(state):
    return state._replace(params={"a": state.params["a"]})


@pytest.mark.parametrize(
    "change, words",
    [
        (change_shape, ["rng", "uint32[2]", "uint32[3]"]),
        (change_dtype, ["step", "int32[]", "float32[]"]),
        (add_leaf, ["params/more is not in it"]),
        (drop_leaf, ["params/b/scale is only in it"]),
    ],
)
def test_a_checkpoint_of_another_model_stops_the_run(tmp_path, capsys, change, words):
    """Also when an older step would fit."""
    wanted = change(abstract(make_state(0)))
    fitting = jax.tree.map(lambda x: jax.device_put(jnp.zeros(x.shape, x.dtype), x.sharding), wanted)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(10, fitting, {})
        checkpoints.save(20, make_state(20), {}, wait=True)
        with pytest.raises(UserError) as caught:
            checkpoints.restore(wanted)
    message = str(caught.value)
    assert all(word in message for word in [*words, "step_00000020", "--workdir"]) and "\n" not in message
    assert capsys.readouterr().err == ""


def test_mistakes_of_the_caller(tmp_path):
    with pytest.raises(UserError, match="at least 1"):
        Checkpoints(tmp_path, keep=0)
    with pytest.raises(UserError, match="mount"):
        Checkpoints("gs://bucket/run")
    with Checkpoints(tmp_path / "none") as checkpoints:
        with pytest.raises(UserError, match="no usable checkpoint"):
            checkpoints.restore(abstract(make_state(0)))
        assert not (tmp_path / "none").exists()
        with pytest.raises(TypeError):
            checkpoints.save(1, make_state(1), {"array": np.zeros(2)})
        with pytest.raises(ValueError, match="sharding"):
            checkpoints.restore(jax.eval_shape(lambda: make_state(0)))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be made"):
        Checkpoints(tmp_path / "file" / "checkpoints").save(1, make_state(1), {})


PROCESS = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from vlkd_jax.checkpoint import Checkpoints
from vlkd_jax.errors import UserError
directory, port, index = sys.argv[1:]
jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=int(index))
mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
shardings = {"w": NamedSharding(mesh, P("data")), "n": NamedSharding(mesh, P())}
make = jax.jit(lambda n: {"w": jnp.arange(8.0) * n, "n": n}, out_shardings=shardings)
checkpoints = Checkpoints(directory, keep=2)
for step in (1, 2, 3):
    checkpoints.save(step, make(step), {"step": step})
checkpoints.wait()
if index == "0":
    file = next(path for path in (checkpoints.directory / "step_00000003").rglob("*_METADATA"))
    file.write_bytes(file.read_bytes()[:-1])
like = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), jax.eval_shape(make, 0), shardings)
step, state, meta = checkpoints.restore(like)
assert step == 2 and meta == {"step": 2}, step
for shard in state["w"].addressable_shards:
    assert np.array_equal(np.asarray(shard.data), np.arange(8.0)[shard.index] * 2)
try:
    checkpoints.restore({"n": like["n"]})
except UserError as error:
    print("refused", "w is only in it" in str(error), flush=True)
import vlkd_jax.checkpoint as module
if index == "0":
    module._free_bytes = lambda directory: 0
try:
    checkpoints.save(4, make(4), {})
except UserError as error:
    print("full", "no space" in str(error), flush=True)
checkpoints.close()
"""


def test_two_processes_save_fall_back_and_fail_together(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, tmp_path, port, str(index)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for index in range(2)
    ]
    outputs = [process.communicate(timeout=120) for process in processes]
    for process, (out, err) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, err
        lines = [line for line in out.splitlines() if not line.startswith("[Gloo]")]
        assert lines == ["refused True", "full True"]
    assert [err.count("warning: checkpoint") for _, err in outputs] == [1, 0]
    assert step_names(tmp_path) == ["step_00000002", "step_00000003"]
