"""The doctor: what each check finds on machines that are well and on machines that are not."""

import json
import os
import shutil
import socket
from collections import namedtuple
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import jax
import pytest
from test_processes import port  # noqa: F401  # a fixture
from tiny import ROOT, command_line, options, tiny_config

from vlkd_jax import cluster, doctor
from vlkd_jax.doctor import FAULT, NOTE, OK

ALONE = (None, None, None, 300, 300)
Usage = namedtuple("Usage", "total used free")


def only(findings):
    [finding] = findings
    return finding


def test_packages(monkeypatch):
    """An old flax, a missing optax and a libtpu of another jax are told, with what to install."""
    assert only(doctor.packages()).level == OK
    told = {"flax": "0.8.0", "libtpu": "0.0.1"}

    def changed(name):
        if name == "optax":
            raise PackageNotFoundError(name)
        return told.get(name) or version(name)

    monkeypatch.setattr(doctor, "version", changed)
    finding = only(doctor.packages())
    assert finding.level == FAULT
    for words in ("flax 0.8.0", "optax missing", "libtpu 0.0.1"):
        assert words in finding.seen
    assert finding.mend.startswith("pip install ") and "'libtpu==" in finding.mend and "flax<0.13,>=" in finding.mend


def test_devices(monkeypatch):
    found = list(doctor.devices())
    assert found[0].level == OK and found[0].seen.startswith("8 x cpu")
    monkeypatch.setattr(cluster, "tpu_chips", lambda: ["/dev/accel0"])
    unseen = list(doctor.devices())[-1]
    assert unseen.level == FAULT and "there is a TPU and jax computes on the CPU" in unseen.seen
    assert "JAX_PLATFORMS, which is cpu" in unseen.mend
    monkeypatch.delenv("JAX_PLATFORMS")
    assert list(doctor.devices())[-1].mend == "pip install jax[tpu]"

    def none():
        raise RuntimeError("Unable to initialize backend 'cuda'\nmore")

    monkeypatch.setattr(jax, "devices", none)
    finding = only(doctor.devices())
    assert finding.level == FAULT and "Unable to initialize backend 'cuda')" in finding.seen


def test_the_mesh_of_a_config(assets):
    config = tiny_config(assets, batch_size=16)
    config.mesh.data, config.mesh.fsdp = 2, 4
    finding = only(doctor.mesh(config))
    assert (finding.level, finding.seen) == (OK, "data 2 x fsdp 4 x model 1; 2 of 16 rows a device")
    config.mesh.data = 1
    assert (only(doctor.mesh(config)).level, "4 devices are not used" in only(doctor.mesh(config)).seen) == (NOTE, True)
    config.batch_size = 6
    faults = [f for f in doctor.examine(config, None, ALONE) if f.level == FAULT]
    assert faults[-1].name == "mesh" and "config.batch_size is 6; it must be a multiple of 4" in faults[-1].seen


def test_what_has_no_plan(assets):
    """Of pre-training a config tells its mesh alone."""
    config = tiny_config(assets, objective="bart_denoise", data__source="shapes_texts")
    found = list(doctor.examine(config, None, ALONE))
    assert "mesh" in {f.name for f in found} and "memory" not in {f.name for f in found}
    assert all(f.level != FAULT for f in found)


@pytest.mark.parametrize(("limit", "level"), [(2**40, OK), (2**20, FAULT)])
@pytest.mark.parametrize("on_device", [True, False])
def test_memory_against_the_plan(limit, level, on_device, monkeypatch, assets):
    config = tiny_config(assets)
    monkeypatch.setattr(doctor, "_device_memory", lambda: limit if on_device else None)
    monkeypatch.setattr(doctor, "_host_memory", lambda: limit)
    finding = only(doctor.memory(config))
    assert finding.level == level and ("a device" in finding.seen) == on_device
    assert ("config.accumulate" in finding.mend) == (level == FAULT)


def test_memory_of_this_machine():
    assert 2**28 < doctor._host_memory() < 2**45


def test_the_port(port, monkeypatch):  # noqa: F811
    monkeypatch.setenv("JAX_COORDINATOR_PORT", str(port))
    assert only(doctor.port(None)).level == OK
    with socket.create_server(("", port)):
        taken = only(doctor.port(None))
        assert taken.level == NOTE and f"{port}, the coordinator's, is taken" in taken.seen
        monkeypatch.setattr(doctor, "_is_here", lambda host: False)
        assert "answers" in only(doctor.port(f"localhost:{port}")).seen
    assert "nothing listens there yet" in only(doctor.port(f"localhost:{port}")).seen
    lost = only(doctor.port(f"nowhere.invalid:{port}"))
    assert lost.level == FAULT and "cannot be reached" in lost.seen and f"open port {port} in the firewall" in lost.mend


def test_the_disk(assets, tmp_path, monkeypatch):
    config = tiny_config(assets, keep=4)
    fits = only(doctor.disk(str(tmp_path / "a" / "b"), config))
    assert fits.level == OK and "config.keep=4 checkpoints take" in fits.seen and str(tmp_path) in fits.seen
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(2**40, 0, 2**29))
    assert only(doctor.disk(str(tmp_path), config)).level == FAULT
    assert only(doctor.disk("gs://bucket/run", config)).level == NOTE
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert "cannot be written in" in only(doctor.disk(str(tmp_path), None)).seen


@pytest.mark.parametrize(("backend", "level"), [("cpu", OK), ("gpu", FAULT)])
def test_little_shared_memory_is_a_fault_between_gpus(backend, level, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(2**26, 0, 2**26))
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    assert only(doctor.shared_memory()).level == level


def test_the_compilation_cache(tmp_path, monkeypatch):
    before = jax.config.jax_compilation_cache_dir
    try:
        for place, level in (("", NOTE), (str(tmp_path), OK), ("gs://b/c", OK), (str(tmp_path / "new"), OK)):
            jax.config.update("jax_compilation_cache_dir", place)
            assert only(doctor.compile_cache()).level == level
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def test_surroundings_that_contradict_themselves_end_the_examination(monkeypatch):
    for name, value in zip(cluster.JOBSET, ("localhost", "2", "0", "1", "0")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MEGASCALE_NUM_SLICES", "3")
    found = list(doctor.examine(None, None, ALONE))
    assert [finding.name for finding in found] == ["packages", "processes"]
    assert "MEGASCALE_NUM_SLICES is 3 and the JobSet's JOBSET_JOBS is 2" in found[-1].seen


def test_the_command(assets, tmp_path):
    given = [f"--config.{name}={value}" for name, value in options(assets).items()]
    argv = [f"--config={ROOT / 'configs' / 'base.py'}", *given, f"--workdir={tmp_path}"]
    result = command_line("doctor", [*argv, "--json"])
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert [f["name"] for f in found] == [
        *("packages", "processes", "devices", "mesh", "port", "disk", "/dev/shm", "compile cache", "memory")
    ]
    assert all(f["level"] != FAULT and f["seen"] for f in found)
    wrong = command_line("doctor", [*argv, "--config.mesh.data=3", "--config.mesh.fsdp=5"])
    assert wrong.returncode == 2
    assert (
        wrong.stderr.startswith("error: 1 of 4 findings") and "mesh" in wrong.stderr and "Traceback" not in wrong.stderr
    )
    assert "FAULT mesh" in wrong.stdout and Path(tmp_path).exists()
