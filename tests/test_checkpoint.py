"""Checkpoints: bit-equal round trips, whole and in parts, damage found and passed over, kills, full disks, mismatches,
other formats, two processes.
"""

import errno
import functools
import hashlib
import json
import os
import random
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from running import same_bits
from tiny import tiny_config, without_gloo

from vlkd_jax import checkpoint, manifest
from vlkd_jax.checkpoint import Checkpoints
from vlkd_jax.errors import UserError
from vlkd_jax.manifest import MANIFEST
from vlkd_jax.runs import load_run
from vlkd_jax.train import train


def sharding_of(count: int):
    """Function leaf -> sharding over the first `count` devices: leading axis split where it can be, else replicated."""
    assert len(jax.devices()) >= 8, "8 fake devices are needed: run through launch/test.sh"
    mesh = jax.make_mesh((count,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:count])
    return lambda x: NamedSharding(mesh, P("data") if x.ndim and x.shape[0] % count == 0 else P())


@functools.cache
def state_maker(count: int, width: int):
    """Jitted function seed -> parts of a state; the optimizer's has empty and masked branches."""
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
        return {"params": params, "opt_state": opt_state, "progress": {"step": seed, "rng": jax.random.key_data(key)}}

    shape = jax.eval_shape(init, jnp.int32(0))
    return jax.jit(init, out_shardings=jax.tree.map(sharding_of(count), shape))


def make_state(seed: int, count: int = 1, width: int = 8) -> dict[str, Any]:
    """Params in float32 and bfloat16, optimizer state, step and key over the first `count` devices."""
    return state_maker(count, width)(jnp.int32(seed))


def abstract(state: Any, count: int = 1) -> Any:
    shard = sharding_of(count)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=shard(x)), state)


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
    same_bits(state, loaded)
    assert len(loaded["params"]["a"]["kernel"].sharding.device_set) == loaded_on


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
            same_bits(checkpoints.restore(abstract(state, count))[1], expected)


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
        same_bits(state, expected)
        assert "warning: checkpoint" in (warning := capsys.readouterr().err) and str(newest) in warning
        file.write_bytes(content)
    assert restore(tmp_path)[0] == 20
    assert capsys.readouterr().err == ""


def test_incomplete_steps_are_passed_over_and_kept(tmp_path, capsys):
    save_steps(tmp_path, 10, 20, 30)
    (tmp_path / "step_00000020" / MANIFEST).unlink()
    shutil.rmtree(tmp_path / "step_00000030" / "opt_state" / "d")
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
    file = next(path for path in (tmp_path / "step_00000030" / "params").rglob("d/*"))
    file.write_bytes(file.read_bytes()[::-1])
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.restore(abstract(make_state(0)))[0] == 20
        checkpoints.save(25, make_state(25), {}, wait=True)
        assert step_names(tmp_path) == ["step_00000020", "step_00000025", "step_00000030"]
        checkpoints.save(30, make_state(30), {}, wait=True)
        assert step_names(tmp_path) == ["step_00000025", "step_00000030", "step_00000030.damaged-1"]
        same_bits(checkpoints.restore(abstract(make_state(0)))[1], make_state(30))
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
        patch.setattr(manifest, "write_atomic", full)
        checkpoints.save(20, make_state(20), {})
        with pytest.raises(UserError, match=r"no space for the checkpoint of step 20.*step 10 is untouched"):
            checkpoints.wait()
    assert step_names(tmp_path) == ["step_00000010"] and checkpoints.latest() == 10
    checkpoints.save(20, make_state(20), {})  # there is room again
    checkpoints.close()
    assert restore(tmp_path)[0] == 20


def test_a_disk_that_fills_while_arrays_are_written(tmp_path, monkeypatch):
    def save_async(path, parts):
        (path.parent / f"{path.name}.orbax-checkpoint-tmp" / "params").mkdir(parents=True)

        def result():
            raise ValueError("RESOURCE_EXHAUSTED: Failed to write 9760768 bytes: No space left on device")

        return SimpleNamespace(result=result)

    save_steps(tmp_path, 10)
    monkeypatch.setattr(checkpoint.ocp, "save_checkpointables_async", save_async)
    with pytest.raises(UserError, match="no space"), Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(20, make_state(20), {})
    assert step_names(tmp_path) == ["step_00000010"] and restore(tmp_path)[0] == 10


def test_another_failure_of_the_writer_comes_out_at_the_next_save(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "hash_files", lambda path: 1 / 0)
        checkpoints.save(10, make_state(10), {})
        with pytest.raises(ZeroDivisionError):
            checkpoints.save(20, make_state(20), {})
    checkpoints.close()
    assert checkpoints.latest() is None


def change_shape(parts):
    rng = parts["progress"]["rng"]
    other = jax.ShapeDtypeStruct((3,), rng.dtype, sharding=rng.sharding)
    return parts | {"progress": parts["progress"] | {"rng": other}}


def change_dtype(parts):
    step = jax.ShapeDtypeStruct((), jnp.float32, sharding=parts["progress"]["step"].sharding)
    return parts | {"progress": parts["progress"] | {"step": step}}


def add_leaf(parts):
    return parts | {"params": parts["params"] | {"more": parts["progress"]["step"]}}


def drop_leaf(parts):
    return parts | {"params": {"a": parts["params"]["a"]}}


def add_part(parts):
    return parts | {"average": {"a": parts["progress"]["step"]}}


@pytest.mark.parametrize(
    "change, words",
    [
        (change_shape, ["progress/rng is uint32[2] there, uint32[3] here"]),
        (change_dtype, ["progress/step is int32[] there, float32[] here"]),
        (add_leaf, ["params/more is not in it"]),
        (drop_leaf, ["params/b/scale is only in it"]),
        (add_part, ["it has no part average", "average/a is not in it"]),
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
    with pytest.raises(UserError, match="begins with gs://, s3://"):
        Checkpoints("http://host/run")
    with Checkpoints(tmp_path / "none") as checkpoints:
        with pytest.raises(UserError, match="no usable checkpoint"):
            checkpoints.restore(abstract(make_state(0)))
        assert not (tmp_path / "none").exists()
        with pytest.raises(TypeError):
            checkpoints.save(1, make_state(1), {"array": np.zeros(2)})
        with pytest.raises(ValueError, match="params/half"):  # at a slash Orbax would wait for ten minutes
            checkpoints.save(1, {"params/half": make_state(1)["params"]}, {})
        with pytest.raises(ValueError, match="at least one part"):
            checkpoints.restore({})
        with pytest.raises(ValueError, match="sharding"):
            checkpoints.restore(jax.eval_shape(lambda: make_state(0)))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be made"):
        Checkpoints(tmp_path / "file" / "checkpoints").save(1, make_state(1), {})


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def largest(directory: Path) -> Path:
    return max((path for path in directory.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def contents(directory: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


ALL = ("params", "opt_state", "progress")


@pytest.mark.parametrize("names", [("params",), ("opt_state",), ("progress", "params"), ALL])
def test_some_parts_are_read_without_the_others(tmp_path, names):
    """From eight devices to one, bit for bit."""
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(7, make_state(7, 8), {"examples": 448})
    wanted = {name: part for name, part in abstract(make_state(0)).items() if name in names}
    step, parts, meta = Checkpoints(tmp_path).restore(wanted)
    assert (step, meta) == (7, {"examples": 448})
    same_bits(parts, {name: part for name, part in make_state(7).items() if name in names})


def test_a_flip_in_any_file_of_one_part_stops_only_who_reads_it(tmp_path, capsys):
    save_steps(tmp_path, 10, 20)
    newest, wanted = tmp_path / "step_00000020", abstract(make_state(0))
    files = sorted(path for path in newest.rglob("*") if path.is_file() and path.stat().st_size)
    seen = set()
    for file in files:
        content, part = file.read_bytes(), file.relative_to(newest).parts[0]
        seen.add(part)
        flip(file)
        for name in ALL:
            step, parts, meta = Checkpoints(tmp_path).restore({name: wanted[name]})
            assert step == (20 if part in ALL and name != part else 10), (file, name)
            assert meta == {"examples": 64 * step}
            same_bits(parts, {name: make_state(step)[name]})
        assert restore(tmp_path)[0] == 10
        file.write_bytes(content)
    assert {*ALL, "_CHECKPOINT_METADATA", MANIFEST} <= seen
    assert "passed over" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["missing", "shorter", "all missing"])
def test_an_optimizer_that_is_visibly_damaged_is_told_where_it_is_not_read(tmp_path, capsys, damage):
    """Even where no older step is left to read."""
    save_steps(tmp_path, 20)
    file = largest(tmp_path / "step_00000020" / "opt_state")
    if damage == "all missing":
        shutil.rmtree(tmp_path / "step_00000020" / "opt_state")
    elif damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-1])
    step, parts, _ = Checkpoints(tmp_path).restore({"params": abstract(make_state(0))["params"]})
    assert step == 20
    same_bits(parts, {"params": make_state(20)["params"]})
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 1 and "step_00000020 is read without its damaged part: opt_state/" in warnings[0]
    assert Checkpoints(tmp_path).latest() is None
    with pytest.raises(UserError, match="no usable checkpoint"):
        restore(tmp_path)


def test_a_step_read_in_part_does_not_count_as_kept(tmp_path):
    """The parameters of step 20 are good and its optimizer is not: step 10 stays until two others are known to be."""
    save_steps(tmp_path, 10, 20)
    flip(largest(tmp_path / "step_00000020" / "opt_state"))
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.restore({"params": abstract(make_state(0))["params"]})[0] == 20
        checkpoints.save(30, make_state(30), {}, wait=True)
        assert step_names(tmp_path) == ["step_00000010", "step_00000020", "step_00000030"]
        checkpoints.save(20, make_state(20), {}, wait=True)  # written anew, for it is not known to be good
        assert step_names(tmp_path) == ["step_00000020", "step_00000020.damaged-1", "step_00000030"]
    same_bits(restore(tmp_path)[1], make_state(30))


def test_a_step_damaged_after_it_was_written_is_written_again(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        for step in (10, 20):
            checkpoints.save(step, make_state(step), {}, wait=True)
        flip(largest(tmp_path / "step_00000020" / "opt_state"))
        assert checkpoints.restore(abstract(make_state(0)))[0] == 10
        checkpoints.save(20, make_state(20), {}, wait=True)
        same_bits(checkpoints.restore(abstract(make_state(0)))[1], make_state(20))


def test_meta_of_many_kilobytes(tmp_path):
    hashes = {f"file_{i}": hashlib.sha256(bytes([i])).hexdigest() for i in range(200)}
    meta = {"config_version": 3, "inputs": hashes, "model": {"layers": [1, 2], "rate": 0.1, "name": "é", "none": None}}
    assert len(json.dumps(meta)) > 15_000
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(1), meta)
    assert restore(tmp_path)[2] == meta


def of_format(directory: Path, step: int, number: int) -> Path:
    """A step as another version of the program wrote it: format 1 kept the whole state in one piece."""
    path = directory / f"step_{step:08d}"
    (path / "state" / "d").mkdir(parents=True)
    (path / "state" / "d" / "0").write_bytes(b"arrays")
    files = {"state/d/0": [6, hashlib.sha256(b"arrays").hexdigest()]}
    tree = {"params/a/kernel": ["float32", [16, 8]]}
    body = {"format": number, "step": step, "meta": {"examples": 1}, "tree": tree, "files": files}
    line = json.dumps(body).encode() + b"\n"
    seal = json.dumps({"sha256": hashlib.sha256(line).hexdigest()}).encode()
    (path / MANIFEST).write_bytes(seal + b"\n" + line)
    return path


@pytest.mark.parametrize("number, age", [(1, "an older"), (3, "a newer")])
def test_a_checkpoint_of_another_format_is_refused_and_left_alone(tmp_path, capsys, number, age):
    save_steps(tmp_path, 10)  # an older step that could be read: it would take the run back unnoticed
    path = of_format(tmp_path, 20, number)
    before = contents(tmp_path)
    with Checkpoints(tmp_path) as checkpoints:
        parts = abstract(make_state(0))
        for use in (
            checkpoints.latest,
            lambda: checkpoints.restore(parts),
            lambda: checkpoints.restore({"params": parts["params"]}),
            lambda: checkpoints.save(20, make_state(20), {}),
        ):
            with pytest.raises(UserError) as caught:
                use()
            assert str(caught.value) == (
                f"checkpoint {path} was written in format {number} by {age} version of vlkd_jax; this one reads "
                "format 2: finish that run with the version that started it, or train again into another --workdir"
            )
    assert contents(tmp_path) == before and capsys.readouterr().err == ""


def test_a_checkpoint_of_another_format_is_never_pruned(tmp_path):
    path = of_format(tmp_path, 1, 1)
    before = contents(path)
    save_steps(tmp_path, 2, 3, 4, keep=1)
    assert step_names(tmp_path) == ["step_00000001", "step_00000004"] and contents(path) == before
    assert restore(tmp_path)[0] == 4  # the newest can be read, whatever lies before it


def test_a_run_of_format_1_does_not_go_on(assets, tmp_path):
    """Nor does it begin anew, as it would if its checkpoint counted as damaged."""
    path = of_format(tmp_path / "checkpoints", 4, 1)
    before = contents(path)
    with pytest.raises(UserError, match="written in format 1 by an older version"):
        train(tiny_config(assets, steps=1), tmp_path)
    assert step_names(tmp_path / "checkpoints") == ["step_00000004"] and contents(path) == before


@pytest.mark.parametrize("part", ["params", "opt_state"])
def test_what_a_damaged_part_of_a_run_stops(assets, tmp_path, part):
    """An evaluation reads parameters alone; training goes on from what is whole, and so begins step 2 again."""
    state = train(tiny_config(assets, steps=2, save_every=1), tmp_path)
    flip(largest(tmp_path / "checkpoints" / "step_00000002" / part))
    _, params, step = load_run(tmp_path)
    assert step == (2 if part == "opt_state" else 1)
    if part == "opt_state":
        same_bits(params, state.params)
    same_bits(train(tiny_config(assets, steps=2, save_every=1), tmp_path), state)
    assert step_names(tmp_path / "checkpoints") == ["step_00000001", "step_00000002", "step_00000002.damaged-1"]


PROCESS = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from vlkd_jax.checkpoint import Checkpoints
from vlkd_jax.errors import UserError
directory, other, port, index = sys.argv[1:]
jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=int(index))
mesh = jax.make_mesh((2, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
shardings = {"params": {"w": NamedSharding(mesh, P("fsdp", "data")), "n": NamedSharding(mesh, P())}}
shardings["opt_state"] = shardings["params"]["n"]
numbers = np.arange(32.0, dtype=np.float32).reshape(4, 8)
make = jax.jit(lambda n: {"params": {"w": numbers * n, "n": n}, "opt_state": n}, out_shardings=shardings)
checkpoints = Checkpoints(directory, keep=2)
for step in (1, 2, 3):
    checkpoints.save(step, make(step), {"step": step})
checkpoints.wait()
if index == "0":
    file = checkpoints.directory / "step_00000003" / "opt_state" / "_METADATA"
    file.write_bytes(file.read_bytes().swapcase())
like = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), jax.eval_shape(make, 0), shardings)
step, state, meta = checkpoints.restore(like)
assert step == 2 and meta == {"step": 2}, step
for shard in state["params"]["w"].addressable_shards:
    assert shard.data.shape == (2, 4) and np.array_equal(np.asarray(shard.data), numbers[shard.index] * 2)
step, state, meta = checkpoints.restore({"params": like["params"]})
assert step == 3 and list(state) == ["params"], (step, state)
for shard in state["params"]["w"].addressable_shards:
    assert np.array_equal(np.asarray(shard.data), numbers[shard.index] * 3)
step, state, meta = Checkpoints(other).restore(like)
assert (step, meta) == (7, {"processes": 1}) and int(state["opt_state"]) == 7
for shard in state["params"]["w"].addressable_shards:
    assert shard.data.shape == (2, 4) and np.array_equal(np.asarray(shard.data), numbers[shard.index] * 7)
try:
    checkpoints.restore({"params": {"n": like["params"]["n"]}})
except UserError as error:
    print("refused", "params/w is only in it" in str(error), flush=True)
import vlkd_jax.checkpoint as module
if index == "0":
    module._free_bytes = lambda directory: 0
try:
    checkpoints.save(4, make(4), {})
except UserError as error:
    print("full", "no space" in str(error), flush=True)
checkpoints.close()
"""


def state_of_process(step: int, count: int) -> dict[str, Any]:
    """The state of `PROCESS` on the first `count` devices of this one: its second axis over data and fsdp."""
    mesh = jax.make_mesh(
        (max(count // 2, 1), min(count, 2)), ("data", "fsdp"), (AxisType.Auto,) * 2, devices=jax.devices()[:count]
    )
    split, whole = NamedSharding(mesh, P(None, ("data", "fsdp"))), NamedSharding(mesh, P())
    numbers = jnp.arange(32.0).reshape(4, 8) * step
    state = {"params": {"w": numbers, "n": jnp.int32(step)}, "opt_state": jnp.int32(step)}
    return jax.device_put(state, {"params": {"w": split, "n": whole}, "opt_state": whole})


def test_two_processes_save_fall_back_and_fail_together(tmp_path):
    """And read what one process saved on eight devices, as one reads on eight, four or one what they saved."""
    shared, single = tmp_path / "shared", tmp_path / "single"
    with Checkpoints(single) as checkpoints:
        checkpoints.save(7, state_of_process(7, 8), {"processes": 1})
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, shared, single, port, str(index)],
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
        assert without_gloo(out) == ["refused True", "full True"]
    assert [err.count("warning: checkpoint") for _, err in outputs] == [1, 0]
    assert step_names(shared) == ["step_00000002", "step_00000003"]
    for count in (8, 4, 1):
        expected = state_of_process(2, count)
        wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), expected)
        step, parts, meta = Checkpoints(shared).restore(wanted)
        assert (step, meta) == (2, {"step": 2})
        same_bits(parts, expected)
        assert {shard.data.shape for shard in parts["params"]["w"].addressable_shards} == {(4, 8 // count)}


@pytest.mark.parametrize("name", ["run [1]", "a[", "a*", "what?", "back\\slash", os.fsdecode(b"caf\xe9")])
def test_a_path_that_checkpoints_cannot_be_read_from_is_refused(tmp_path, name):
    with pytest.raises(UserError, match="cannot be read from such a path") as caught:
        Checkpoints(tmp_path / name)
    held = next((c for c in name if c in "[*?\\"), None)
    assert (repr(held) if held else "not UTF-8") in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UserError, match="cannot be read from such a path"):
        Checkpoints(tmp_path / name / "below")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["a b", "a]", "#1%20", "{x}", "a\nb", "$HOME", "~", "café 日本", "'\"", "-x", "a,b=c"])
def test_every_other_path_will_do(tmp_path, name):
    save_steps(tmp_path / name, 1)
    step, restored, _ = restore(tmp_path / name)
    assert step == 1
    same_bits(restored, make_state(1))


def test_a_link_leads_around_a_path_that_will_not_do(tmp_path):
    (tmp_path / "run [1]").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "run [1]")
    save_steps(tmp_path / "link" / "checkpoints", 1)
    assert restore(tmp_path / "link" / "checkpoints")[0] == 1


def test_a_checkpoint_that_cannot_be_opened_again_is_not_sealed(tmp_path, monkeypatch):
    """As on the paths that are refused: what Orbax has written there it does not find again."""
    monkeypatch.setattr(checkpoint, "check_directory", lambda directory: None)
    with Checkpoints(tmp_path / "run [1]") as checkpoints:
        with pytest.raises(UserError, match=r"damaged right after it was written.*cannot be opened again"):
            checkpoints.save(1, make_state(1), {}, wait=True)
        assert checkpoints.latest() is None
    assert not list(tmp_path.rglob(MANIFEST))


def test_every_array_is_opened_again(tmp_path):
    save_steps(tmp_path, 1)
    path, tree = tmp_path / "step_00000001", checkpoint._signatures(make_state(1))
    checkpoint._open_again(path, tree)
    wrong = {**tree, "params": {**tree["params"], "params/b/scale": ["float32", [5]]}}
    with pytest.raises(manifest.Damaged, match="its part params holds other arrays"):
        checkpoint._open_again(path, wrong)
    shutil.rmtree(path / "opt_state" / "d")
    with pytest.raises(manifest.Damaged, match="cannot be opened again"):
        checkpoint._open_again(path, tree)
