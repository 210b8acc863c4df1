"""Loading onto devices: each holds its part of every parameter, and a process reads nothing but its devices' parts."""

import dataclasses
import re
import shutil
import tracemalloc
from collections.abc import Callable

import jax
import numpy as np
import pytest
import safetensors
import torch
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file as save_torch
from tiny import make_mesh

from vlkd_jax.errors import UserError
from vlkd_jax.hf import load as load_module
from vlkd_jax.hf import names
from vlkd_jax.hf.load import load_bart, load_clip
from vlkd_jax.hf.save import save_bart
from vlkd_jax.models.configs import BartConfig
from vlkd_jax.sharding import shardings

LOAD = {"bart": load_bart, "clip": load_clip}
WEIGHTS = "model.safetensors"


@pytest.fixture(params=["bart", "clip"])
def kind(request):
    return request.param


@pytest.fixture
def directory(request, kind):
    return request.getfixturevalue(f"tiny_{kind}").directory


@pytest.fixture
def reads(monkeypatch):
    """[(tensor, bytes)] of everything that is read of safetensors files from now on."""
    reads, safe_open = [], safetensors.safe_open

    class Slice:
        def __init__(self, name, whole):
            self.name, self.get_dtype, self.get_shape, self.whole = name, whole.get_dtype, whole.get_shape, whole

        def __getitem__(self, index):
            part = self.whole[index]
            reads.append((self.name, part.nbytes))
            return part

    class Handle:
        def __init__(self, *args, **options):
            self.handle = safe_open(*args, **options)
            self.keys = self.handle.keys

        def get_slice(self, name):
            return Slice(name, self.handle.get_slice(name))

    monkeypatch.setattr(safetensors, "safe_open", Handle)
    return reads


def read_bytes(reads):
    return sum(count for _, count in reads)


def leaves(tree):
    return {path: leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def random_shardings(abstract, mesh, rng):
    """Every mesh axis over any axis that it divides, or none; two may share one."""

    def of_leaf(leaf):
        spec, left = [[] for _ in leaf.shape], list(leaf.shape)
        for name in rng.permutation(mesh.axis_names):
            axes = [k for k, size in enumerate(left) if size % mesh.shape[name] == 0]
            if axes and rng.random() < 0.8:
                axis = rng.choice(axes)
                spec[axis].append(str(name))
                left[axis] //= mesh.shape[name]
        return NamedSharding(mesh, P(*(tuple(axes) or None for axes in spec)))

    return jax.tree.map(of_leaf, abstract)


@dataclasses.dataclass
class Asked:
    """What `jax.make_array_from_callback` was called with."""

    shape: tuple
    sharding: jax.sharding.Sharding
    callback: Callable


@pytest.fixture
def unread(kind, directory, monkeypatch):
    """Function shardings -> a tree of `Asked`, whose callbacks a test can call as any process would."""

    def load(declared):
        with monkeypatch.context() as patch:
            patch.setattr(jax, "make_array_from_callback", Asked)
            return LOAD[kind](directory, declared)[1]

    return load


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_devices_hold_what_was_declared(kind, directory, tmp_path, rng, dtype):
    """Split in any way; all parts together are the file's tensors, as the way back from Flax to the file finds them."""
    shutil.copyfile(directory / "config.json", tmp_path / "config.json")
    tensors = {name: value.to(dtype) for name, value in load_torch(directory / WEIGHTS).items()}
    save_torch(tensors, tmp_path / WEIGHTS)
    config, whole = LOAD[kind](tmp_path)
    for mesh in (make_mesh(2, 2, 2), make_mesh(1, 8, 1)):
        declared = random_shardings(whole, mesh, rng)
        assert any(not sharding.is_fully_replicated for sharding in jax.tree.leaves(declared))
        _, params = LOAD[kind](tmp_path, declared)
        assert jax.tree.structure(params) == jax.tree.structure(whole)
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
        assert jax.tree.map(lambda leaf: leaf.sharding, params) == declared
        for path, leaf in leaves(params).items():
            for shard in leaf.addressable_shards:
                np.testing.assert_array_equal(shard.data, leaves(whole)[path][shard.index], str(path))
        back = names.to_hf(names.rows_for(config), jax.device_get(params))
        assert back.keys() == tensors.keys()
        for name, value in tensors.items():
            np.testing.assert_array_equal(back[name], value.float().numpy(), name)


@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)])
def test_each_part_is_read_once(kind, directory, reads, sizes):
    """However many devices hold it."""
    stored = sum(value.nbytes for value in load_file(directory / WEIGHTS).values())
    whole = LOAD[kind](directory)[1]
    assert read_bytes(reads) == stored
    reads.clear()
    LOAD[kind](directory, shardings(whole, make_mesh(*sizes)))
    assert read_bytes(reads) == stored


def test_one_sharding_is_for_all(kind, directory):
    whole = LOAD[kind](directory)[1]
    for sharding in (NamedSharding(make_mesh(2), P()), SingleDeviceSharding(jax.devices()[3])):
        params = LOAD[kind](directory, sharding)[1]
        assert {leaf.sharding for leaf in jax.tree.leaves(params)} == {sharding}
        jax.tree.map(np.testing.assert_array_equal, params, whole)
    with pytest.raises(ValueError, match=r"logit_scale|shared"):
        LOAD[kind](directory, {"another": sharding})


def test_one_process_of_eight_reads_an_eighth(kind, directory, reads, unread):
    """As a process asks that holds one device: its parts alone, layer by layer."""
    whole = LOAD[kind](directory)[1]
    declared, stored = shardings(whole, make_mesh(1, 8, 1)), load_file(directory / WEIGHTS)
    for device in jax.devices()[:8]:
        reads.clear()
        params, held = unread(declared), 0
        assert not reads
        for path, asked in leaves(params).items():
            index = asked.sharding.devices_indices_map(asked.shape)[device]
            part = asked.callback(index)
            assert part.shape == asked.sharding.shard_shape(asked.shape)
            np.testing.assert_array_equal(part, leaves(whole)[path][index])
            held += part.nbytes
        assert read_bytes(reads) == held < sum(value.nbytes for value in stored.values()) / 4
        split = [(name, count) for name, count in reads if re.search(r"(_proj|fc[12]|shared)\.weight", name)]
        assert split and all(count == stored[name].nbytes / 8 for name, count in split)


def test_any_part_is_read_alone(kind, directory, reads, rng, unread):
    """Bounds at random, which no mesh asks for; only the order of a patch's pixels cannot be cut in the file."""
    whole = leaves(LOAD[kind](directory)[1])
    for _ in range(5):
        for path, asked in leaves(unread(SingleDeviceSharding(jax.devices()[0]))).items():
            bounds = [sorted(rng.choice(size + 1, 2, replace=False).tolist()) for size in asked.shape]
            index = tuple(slice(*bound) for bound in bounds)
            reads.clear()
            part = asked.callback(index)
            assert part.shape == tuple(stop - start for start, stop in bounds)
            np.testing.assert_array_equal(part, whole[path][index])
            cut = whole[path][:, index[1]] if "patch_embedding" in str(path) else part
            assert read_bytes(reads) == cut.nbytes
            asked.callback(index)
            assert read_bytes(reads) == cut.nbytes


def test_host_memory_is_that_of_one_share(tmp_path, monkeypatch, rng):
    """All allocations are counted, from a file that other code wrote."""
    config = BartConfig(4096, 256, 4, 4, 4, 4, 1024, 1024, 64)
    draw = lambda leaf: rng.standard_normal(leaf.shape, np.float32)  # noqa: E731
    save_bart(tmp_path, config, jax.tree.map(draw, names.parameter_shapes(config)))
    size = (tmp_path / WEIGHTS).stat().st_size
    declared = shardings(names.parameter_shapes(config), make_mesh(1, 8, 1))

    def of_first_device(shape, sharding, callback):
        return callback(sharding.devices_indices_map(shape)[jax.devices()[0]])

    def peak(declared):
        load_bart(tmp_path, declared)  # what is traced and cached at the first time
        tracemalloc.start()
        load_bart(tmp_path, declared)
        top = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return top

    assert size > 25e6 and size < peak(None) < 1.3 * size
    monkeypatch.setattr(jax, "make_array_from_callback", of_first_device)
    assert size / 8 < peak(declared) < size / 6


def test_copies_of_the_table_are_compared_some_rows_at_a_time(tiny_bart, tmp_path, reads, monkeypatch):
    shutil.copyfile(tiny_bart.directory / "config.json", tmp_path / "config.json")
    tensors = load_file(tiny_bart.directory / WEIGHTS)
    table = tensors["model.shared.weight"]
    tensors["lm_head.weight"] = table.copy()
    save_file(tensors, tmp_path / WEIGHTS)
    monkeypatch.setattr(load_module, "BLOCK", 10)
    declared = shardings(load_bart(tmp_path)[1], make_mesh(1, 8, 1))
    reads.clear()
    load_bart(tmp_path, declared)
    of_table = [count for name, count in reads if name in ("lm_head.weight", "model.shared.weight")]
    assert max(of_table) == table.nbytes // 8 and sum(of_table) == 3 * table.nbytes
    tensors["lm_head.weight"][-1, -1] += 1
    save_file(tensors, tmp_path / WEIGHTS)
    reads.clear()
    with pytest.raises(UserError, match=r"lm_head\.weight differs from model\.shared\.weight"):
        load_bart(tmp_path, declared)


def test_misfits_are_told_before_anything_is_read(kind, directory, tmp_path, reads):
    whole = LOAD[kind](directory)[1]
    shutil.copyfile(directory / "config.json", tmp_path / "config.json")
    tensors = load_file(directory / WEIGHTS)
    missing, mis_shaped = sorted(name for name in tensors if name.endswith("fc1.weight"))[:2]
    del tensors[missing]
    tensors[mis_shaped] = tensors[mis_shaped].T.copy()
    save_file(tensors, tmp_path / WEIGHTS)
    reads.clear()
    with pytest.raises(UserError, match=f"missing: {missing}; {mis_shaped} is .*asks for"):
        LOAD[kind](tmp_path, shardings(whole, make_mesh(1, 8, 1)))
    assert not reads
