"""Two processes of four devices each are one run: the same numbers, one writer, and an end when one of them is lost."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
from tiny import ROOT, arguments, environment, make_mesh, tiny_config, without_gloo, write_pictures

from vlkd_jax.cache_teacher import cache_teacher
from vlkd_jax.runs import load_run
from vlkd_jax.train import train

OPTIONS = {"data__context_length": 0, "loss__denoise": 0.5, "student__whiten": 16, "dropout": 0.1}
MESH = {"mesh__data": 2, "mesh__fsdp": 4}
LOST = 4
"""Exit code of a process that has lost another one."""
WATCHDOG = 60
"""Seconds: a busy machine's first step takes some 20, compilation included."""
FAULTS = [signal.SIGKILL, signal.SIGSTOP] * int(os.environ.get("VLKD_FAULTS", "1"))
"""One after another in one run, each at a step of its own, to the one and the other process in turn."""
STEPS = 10 + 3 * len(FAULTS)
"""Of the run that is interrupted."""


class Ended(NamedTuple):
    """How the processes of a run ended."""

    codes: list[int]
    outputs: list[str]
    errors: list[str]


class Processes:
    """Two processes of one command, each with four fake devices."""

    def __init__(self, module: str, argv: list[str]):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            coordinator = f"--coordinator=127.0.0.1:{probe.getsockname()[1]}"
        surroundings = environment() | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
        command = [sys.executable, "-m", f"vlkd_jax.{module}", *argv, coordinator, "--processes=2"]
        self.processes = [
            subprocess.Popen(
                [*command, f"--process={index}"],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=surroundings,
                cwd=ROOT,
            )
            for index in range(2)
        ]

    def wait(self, seconds: float = 300) -> Ended:
        """Waits for both; one that is stopped is killed when the other has ended."""
        try:
            told = [process.communicate(timeout=seconds) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()
        return Ended([p.returncode for p in self.processes], [out for out, _ in told], [err for _, err in told])


def run(module: str, argv: list[str]) -> Ended:
    return Processes(module, argv).wait()


def train_lines(workdir: Path) -> list[dict]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "train"]


TERMS = ("ttdm", "itcl", "icti")


def losses(workdir: Path) -> dict[int, dict]:
    kept = ("loss", *TERMS, "denoise", "grad_norm", "lr", "skipped", "unusable_records")
    return {line["step"]: {name: line[name] for name in kept} for line in train_lines(workdir)}


def wait_for(condition, seconds: float = 240):
    """Waits until the condition holds. Fails when it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.05)


def reached(workdir: Path, step: int) -> bool:
    there = (workdir / "metrics.jsonl").is_file()
    return there and max((line["step"] for line in train_lines(workdir)), default=0) >= step


def close(ours, theirs, atol=1e-5):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-4, atol=atol)


def same_bits(ours, theirs):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.fixture(scope="module")
def two(assets, tmp_path_factory):
    """The workdir of a whole run of two processes, and how they ended."""
    workdir = tmp_path_factory.mktemp("two")
    return workdir, run("train", arguments(assets, workdir, steps=6, eval__every=6, **OPTIONS, **MESH))


def test_two_processes_train_as_one(assets, two, tmp_path):
    workdir, ended = two
    assert ended.codes == [0, 0], ended.errors
    train(tiny_config(assets, steps=6, eval__every=6, **OPTIONS, **MESH), tmp_path)
    one, many = losses(tmp_path), losses(workdir)
    assert list(one) == list(many) == [2, 3, 4, 5, 6]
    for step, values in many.items():
        assert values == pytest.approx(one[step], rel=1e-4, abs=1e-6)
    close(load_run(workdir)[1], load_run(tmp_path)[1], atol=1e-4)  # whitening magnifies rounding


def test_one_process_writes_and_speaks(two):
    workdir, ended = two
    kept = {"config.json", "inputs.json", "metrics.jsonl", "tensorboard", "checkpoints", "parents"}
    assert kept == set(os.listdir(workdir))
    assert len(list((workdir / "tensorboard").iterdir())) == 1
    lines = [without_gloo(out) for out in ended.outputs]
    assert any("step 6/6" in line for line in lines[0]) and "8 device(s) (data 2 x fsdp 4)" in ended.outputs[0]
    assert lines[1] == [] and ended.errors[1] == ""


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 4, 1), (2, 2, 2)], ids=str)
def test_its_checkpoint_is_read_by_one_process(two, sizes):
    """On 1, 4 and 8 devices, bit for bit."""
    same_bits(load_run(two[0], mesh=make_mesh(*sizes))[1], load_run(two[0])[1])


def test_two_processes_cache_a_teacher_as_one_does(assets, tmp_path):
    """Each computes files of its own; both then read all of them."""
    (tmp_path / "captions.tsv").write_text("\n".join(write_pictures(tmp_path / "images", 40)) + "\n")
    folder = {"data__source": "folder", "data__captions": str(tmp_path / "captions.tsv")}
    options = folder | {"data__images": str(tmp_path / "images"), "steps": 3, **MESH}
    argv = arguments(assets, tmp_path, **options)
    argv = [argument for argument in argv if not argument.startswith("--workdir")]
    two = run("cache_teacher", [*argv, f"--output={tmp_path / 'two'}"])
    assert two.codes == [0, 0], "\n".join(two.errors)
    one = cache_teacher(tiny_config(assets, **options), tmp_path / "one")
    again = json.loads((tmp_path / "two" / "manifest.json").read_text())
    assert {**again, "shards": 0} == {**one, "shards": 0, "batch_rows": again["batch_rows"], "rows": again["rows"]}
    rows = [
        np.concatenate([np.load(path) for path in sorted((tmp_path / name).glob("*.npy"))]) for name in ("one", "two")
    ]
    for name in ("tokens", "image", "text"):
        np.testing.assert_allclose(rows[0][name], rows[1][name], rtol=1e-4, atol=1e-5)
    options["data__teacher_cache"] = str(tmp_path / "two")
    ended = run("train", arguments(assets, tmp_path / "run", **options))
    assert ended.codes == [0, 0], ended.errors
    train(tiny_config(assets, **options), tmp_path / "alone")
    for ours, theirs in zip(train_lines(tmp_path / "run"), train_lines(tmp_path / "alone"), strict=True):
        assert [ours[name] for name in TERMS] == pytest.approx([theirs[name] for name in TERMS], rel=1e-4)


def test_one_process_goes_on_where_two_stopped_and_two_where_one_did(assets, two, tmp_path):
    """Another number of processes sees the same batches."""
    options = {**OPTIONS, **MESH, "optim__schedule": "constant"}
    first = run("train", arguments(assets, tmp_path, steps=2, **options))
    train(tiny_config(assets, steps=4, **options), tmp_path)
    last = run("train", arguments(assets, tmp_path, steps=6, **options))
    assert first.codes + last.codes == [0] * 4, first.errors + last.errors
    train(tiny_config(assets, steps=6, **options), tmp_path / "whole")
    close(load_run(tmp_path)[1], load_run(tmp_path / "whole")[1], atol=2e-4)


@pytest.fixture(scope="module")
def long_run(assets):
    """Function (workdir, watchdog_seconds) -> arguments of a run of `STEPS`."""
    options = {"data__context_length": 0, "dropout": 0.1, **MESH, "steps": STEPS, "save_every": 4}
    return lambda workdir, watchdog=0: arguments(assets, workdir, **options, watchdog_seconds=watchdog)


def test_faults_and_signals_change_nothing(long_run, tmp_path):
    """The same command again and again ends with the bits of an uninterrupted run, whatever ended it in between."""
    whole = run("train", long_run(tmp_path / "whole"))
    assert whole.codes == [0, 0], whole.errors
    for number, fault in enumerate(FAULTS):
        _lose_a_process(long_run(tmp_path / "run", WATCHDOG), tmp_path / "run", 5 + 3 * number, number % 2, fault)
    _stop_by_sigterm(long_run(tmp_path / "run"), tmp_path / "run", 5 + 3 * len(FAULTS))
    ended = run("train", long_run(tmp_path / "run"))
    assert ended.codes == [0, 0], ended.errors
    same_bits(load_run(tmp_path / "run")[1], load_run(tmp_path / "whole")[1])


def _lose_a_process(argv, workdir, step, victim, fault):
    """The other process ends within the watchdog's time and a little, with its own code and a reason."""
    job = Processes("train", argv)
    wait_for(lambda: reached(workdir, step))
    job.processes[victim].send_signal(fault)
    lost, other = time.monotonic(), job.processes[1 - victim]
    other.wait(3 * WATCHDOG)
    took = time.monotonic() - lost
    job.processes[victim].kill()
    error = job.wait().errors[1 - victim]
    assert other.returncode == LOST and took < WATCHDOG + 30, error
    assert "Traceback" not in error
    lost_line = "lost another process" in error or "as another one was lost" in error
    assert lost_line or ("no step" in error and "Thread" in error)


def _stop_by_sigterm(argv, workdir, step):
    """Sent to one of them: all stop at one step, saved within 30 seconds."""
    job = Processes("train", argv)
    wait_for(lambda: reached(workdir, step))
    job.processes[1].send_signal(signal.SIGTERM)
    asked = time.monotonic()
    ended = job.wait(60)
    assert time.monotonic() - asked < 30
    assert ended.codes == [143, 143], ended.errors
    stopped = load_run(workdir)[2]
    assert f"step {stopped} is saved" in ended.errors[0] and step <= stopped < STEPS


def test_every_item_is_counted_once(assets, two, tmp_path):
    """Evaluation by two processes gives the predictions of one, each once."""
    sizes = {"questions": 28, "captions": 8, "retrieval": 10, "text_questions": 28}
    argv = ["--config=suites:shapes", f"--checkpoint={two[0]}", *(f"--config.shapes.{k}={v}" for k, v in sizes.items())]
    argv += ["--config.batch_size=8"]
    ended = run("evaluate", [*argv, f"--workdir={tmp_path / 'two'}"])
    assert ended.codes == [0, 0], ended.errors
    one = subprocess.run(
        [sys.executable, "-m", "vlkd_jax.evaluate", *argv, f"--workdir={tmp_path / 'one'}", "--config.mesh.data=1"],
        env=environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert one.returncode == 0, one.stderr
    rows = [(tmp_path / name / "shapes" / "predictions.jsonl").read_text() for name in ("two", "one")]
    assert rows[0] == rows[1]
    keys = [(row["task"], row["id"]) for row in map(json.loads, rows[0].splitlines())]
    assert len(keys) == len(set(keys)) and len(keys) > 60
