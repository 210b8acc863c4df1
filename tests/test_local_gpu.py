"""launch/local_gpu.sh: what it installs for which driver, what it runs, and mistakes. None of it needs a GPU."""

import os
import subprocess
from pathlib import Path

import pytest
from test_launch import calls, make_checkout, run

OPTIONS = ["train", "--config=shapes_vlkd", "--workdir=out put"]


@pytest.fixture
def checkout(tmp_path) -> Path:
    return make_checkout(tmp_path)


def launch(checkout: Path, *argv: str, driver: str = "", **environment: str) -> subprocess.CompletedProcess:
    """Runs the script beside an nvidia-smi that knows of this driver."""
    smi = checkout.parent / "bin" / "nvidia-smi"
    smi.write_text(f'#!/bin/bash\n[[ -n "{driver}" ]] && printf "{driver}\\n{driver}\\n"\n')
    smi.chmod(0o755)
    kept = {key: value for key, value in os.environ.items() if not key.startswith("VLKD_")}
    environment = kept | {"PATH": f"{checkout.parent}/bin:{os.environ['PATH']}"} | environment
    return run([checkout / "launch" / "local_gpu.sh", *argv], env=environment, cwd=checkout.parent)


@pytest.mark.parametrize(
    "driver, environment, extra",
    [
        ("580.159.04", {}, "cuda13"),
        ("575.57.08", {}, "cuda12"),
        ("1000.1", {}, "cuda13"),
        ("580.159.04", {"VLKD_CUDA": "12"}, "cuda12"),
        ("", {"VLKD_CUDA": "13"}, "cuda13"),
    ],
)
def test_the_driver_chooses_the_libraries(checkout, driver, environment, extra):
    result = launch(checkout, *OPTIONS, driver=driver, **environment)
    assert (result.returncode, result.stderr) == (0, "")
    told = calls(checkout)
    installs = [line.split(" install ")[1] for line in told if " pip install " in line]
    assert installs[0].endswith(f"-r {checkout}/requirements.lock jax[{extra}]") and len(installs) == 2
    python = f"{checkout}/.venv-gpu/bin/python"
    assert told[-2].startswith(f"{python} -c import jax") and told[-1] == f"{python} -m vlkd_jax {' '.join(OPTIONS)}"

    assert launch(checkout, *OPTIONS, driver=driver, **environment).stdout == ""
    assert len(calls(checkout)) == 2, "set up again"
    other = {"cuda12": "13", "cuda13": "12"}[extra]
    assert "Setting up" in launch(checkout, *OPTIONS, VLKD_CUDA=other).stdout
    assert any(line.endswith(f"jax[cuda{other}]") for line in calls(checkout))


@pytest.mark.parametrize(
    "argv, environment, words",
    [
        ([], {}, "no command given"),
        (OPTIONS, {}, "nvidia-smi finds no NVIDIA driver"),
        (OPTIONS, {"driver": "Failed to initialize NVML"}, "nvidia-smi finds no NVIDIA driver"),
        (OPTIONS, {"VLKD_CUDA": "11"}, "VLKD_CUDA must be 12 or 13, got 11"),
    ],
)
def test_a_mistake_is_one_line_and_sets_nothing_up(checkout, argv, environment, words):
    result = launch(checkout, *argv, **environment)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert result.stderr.startswith(f"error: {words}") and not (checkout / ".venv-gpu").exists()


def test_no_run_on_a_cpu_by_mistake(checkout):
    """A jax that finds no GPU would train on the CPU without a word."""
    fake = checkout.parent / "bin" / "python3.11"
    fake.write_text(fake.read_text() + '[[ "$1 $2" != "-c import jax"* ]]\n')
    result = launch(checkout, *OPTIONS, driver="580.1")
    assert result.returncode == 1 and result.stderr.startswith("error: jax finds no GPU that it can use (VLKD_CUDA=13)")
    assert result.stderr.count("\n") == 1 and calls(checkout)[-1].endswith('jax.devices("gpu")')


def test_help_sets_nothing_up(checkout):
    result = launch(checkout, "--help")
    assert result.returncode == 0 and result.stdout.startswith("usage: launch/local_gpu.sh COMMAND")
    assert not (checkout / ".venv-gpu").exists()
