"""Two processes that make the same calls: process 0 claims, hashes, writes and speaks, its errors are both's."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import environment, tiny_config, without_gloo

from vlkd_jax import runtime
from vlkd_jax.console import say
from vlkd_jax.identity import INPUTS_FILE, hash_inputs
from vlkd_jax.metrics import METRICS_FILE

PROCESS = """
import json, os, sys
from pathlib import Path
import jax
from tiny import tiny_config
from vlkd_jax import metrics, runtime
from vlkd_jax.errors import UserError
from vlkd_jax.evals.runner import write_rows
from vlkd_jax.identity import check_inputs, hash_inputs, read_inputs, record_inputs
from vlkd_jax.console import say
from vlkd_jax.metrics import MetricWriter
from vlkd_jax.workdir import claim

workdir, assets, port, index = sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=index)
runtime.set_process(jax.process_index())
opened = []
sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)

def refusal(work):
    try:
        work()
    except UserError as error:
        return str(error)

config = tiny_config(assets)
with claim(workdir, {"seed": 0}) as directory:
    owner = json.loads((directory / "run.lock").read_text())["pid"]
    inputs = hash_inputs(config)
    record_inputs(directory, inputs)
    assert read_inputs(directory) == inputs
    with MetricWriter(directory) as writer:
        writer.write(1, "train", {"loss": 0.5})
    rows = write_rows(directory / "suite", ({"id": id} for id in range(3)))
    changed = {"clip": inputs["clip"]}
    told = {
        "directory": os.fspath(directory),
        "owner": owner,
        "inputs": inputs,
        "rows": rows,
        "changed": refusal(lambda: check_inputs(directory, config, changed)),
        "again": refusal(lambda: claim(workdir, {"seed": 0}).__enter__()),
    }
told["seed"] = refusal(lambda: claim(workdir, {"seed": 1}).__enter__())
told["file"] = refusal(lambda: claim(assets / "clip" / "config.json", {}).__enter__())
told["written"] = sorted({path for path in opened if path.startswith(workdir)} - {workdir + "/run.lock"})
told["weights"] = any(path.endswith("model.safetensors") for path in opened)
say("once")
say("twice", everywhere=True)
print(json.dumps(told), flush=True)
"""


def run_two(workdir, assets) -> list[list[str]]:
    """The lines of both processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    paths = os.pathsep.join([environment()["PYTHONPATH"], str(Path(__file__).parent)])
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, workdir, assets, port, str(index)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment() | {"PYTHONPATH": paths},
        )
        for index in range(2)
    ]
    outputs = [process.communicate(timeout=180) for process in processes]
    for process, (_, err) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, err
    return [without_gloo(out) for out, _ in outputs]


def test_process_0_acts_for_both_and_its_errors_are_everybodys(assets, tmp_path):
    workdir = tmp_path / "run"
    (*spoken, first), (*spoken_by_1, second) = run_two(workdir, assets)
    assert spoken == ["once", "process 0: twice"] and spoken_by_1 == ["process 1: twice"]
    first, second = json.loads(first), json.loads(second)
    (events,) = (workdir / "tensorboard").iterdir()
    files = {workdir / name for name in ("config.json", INPUTS_FILE, METRICS_FILE, "suite/predictions.jsonl")}
    assert {path for path in workdir.rglob("*") if path.is_file()} == {*files, events}
    assert len((workdir / METRICS_FILE).read_text().splitlines()) == 1
    assert len((workdir / "suite" / "predictions.jsonl").read_text().splitlines()) == 3
    same = ("directory", "owner", "inputs", "rows")
    assert {name: first[name] for name in same} == {name: second[name] for name in same}
    assert first["directory"] == str(workdir)
    assert first["inputs"] == hash_inputs(tiny_config(assets)) == json.loads((workdir / INPUTS_FILE).read_text())
    for name, words in (
        ("changed", "model.safetensors (bart) is gone"),
        ("again", "this process already runs there"),
        ("seed", "seed: 0 -> 1"),
        ("file", "cannot be used as --workdir"),
    ):
        assert words in first[name] and second[name] == f"process 0: {first[name]}", name
    assert first["written"] and second["written"] == []
    assert first["weights"] and not second["weights"]


@pytest.mark.parametrize(
    "index, everywhere, expected",
    [
        *[(None, False, "text\n"), (None, True, "text\n"), (0, False, "text\n"), (0, True, "process 0: text\n")],
        *[(1, False, ""), (1, True, "process 1: text\n")],
    ],
)
def test_who_speaks(monkeypatch, capsys, index, everywhere, expected):
    monkeypatch.setattr(runtime._Process, "index", index)
    say("text", everywhere=everywhere)
    assert capsys.readouterr().out == expected


def test_speaking_starts_no_backend():
    code = """
from jax._src import xla_bridge
from vlkd_jax.console import say
from vlkd_jax.runtime import set_process
say("one")
say("two", everywhere=True)
set_process(1)
say("three", everywhere=True)
assert not xla_bridge._backends
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment())
    assert (done.returncode, done.stdout) == (0, "one\ntwo\nprocess 1: three\n"), done.stderr
