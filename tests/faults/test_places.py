"""Where a run may be started, by whom and in what surroundings; and what earlier versions left."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from tiny import ROOT, arguments, environment, tiny_config

from vlkd_jax import ckpt
from vlkd_jax.errors import UserError
from vlkd_jax.metrics import METRICS_FILE
from vlkd_jax.runs import load_run
from vlkd_jax.train import train

NOBODY = {"user": 65534, "group": 65534, "extra_groups": []} if os.geteuid() == 0 else {}
"""What makes a subprocess one that may not write where it does not own; whoever is not root is that already."""


@pytest.fixture
def place(tmp_path_factory):
    """A folder that everybody may enter: pytest's own are closed to other users."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        os.chmod(folder, 0o777)
        yield Path(folder)


def export_and_back(assets, place, workdir, cwd=ROOT, user=None, **surroundings):
    """Trains two steps, exports, captions a picture with the export: all by the command line; what it said."""
    python = [sys.executable, "-m", "vlkd_jax"]
    picture = str(place / "a picture.png")
    commands = [
        ["train", *arguments(assets, workdir, steps=2, save_every=2)],
        ["export", f"--checkpoint={workdir}", f"--output={workdir}/export"],
        ["caption", picture, f"--model={workdir}/export", "--max_new_tokens=3"],
    ]
    env = {**environment(), **surroundings}
    env = {name: value for name, value in env.items() if value is not None}
    told = []
    for argv in commands:
        run = subprocess.run([*python, *argv], capture_output=True, text=True, env=env, cwd=cwd, **(user or {}))
        assert run.returncode == 0, (argv, run.stdout[-2000:], run.stderr[-3000:])
        told.append(run.stdout)
    return told


@pytest.fixture
def picture(place):
    Image.new("RGB", (40, 30), "red").save(place / "a picture.png")
    return place / "a picture.png"


def copied(assets, place, mode):
    """The models where everybody can read them, with these rights."""
    models = shutil.copytree(assets, place / "models")
    for path in (models, *models.rglob("*")):
        path.chmod(mode | (0o111 if path.is_dir() else 0))
    return models


SURROUNDINGS = {
    "read-only models": {},
    "no HOME": {"HOME": None, "XDG_CACHE_HOME": None, "JAX_COMPILATION_CACHE_DIR": None},
    "a HOME that cannot be written": {"HOME": "/proc", "XDG_CACHE_HOME": None, "JAX_COMPILATION_CACHE_DIR": None},
    "LANG=C": {"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "another directory": {},
    "spaces and letters": {},
}


@pytest.mark.parametrize("what", SURROUNDINGS)
def test_training_export_and_use(assets, place, picture, what):
    """By a user who owns nothing but the workdir: neither models nor the checkout can be written."""
    models = copied(assets, place, 0o444)
    workdir = place / ("mein Lauf, 日本 ß" if what == "spaces and letters" else "run")
    workdir.mkdir()
    workdir.chmod(0o777)
    cwd = "/" if what == "another directory" else ROOT
    try:
        told = export_and_back(models, place, workdir, cwd, NOBODY, **SURROUNDINGS[what])
    finally:
        for path in (models, *models.rglob("*")):
            path.chmod(0o755)
    assert "step 2/2" in told[0] and "a picture.png" in told[2]
    lines = [json.loads(line) for line in (workdir / METRICS_FILE).read_text().splitlines()]
    assert lines[-1]["kind"] == "goodput" and (workdir / "export" / "model.safetensors").is_file()


# what earlier versions left: runs of two steps, written by the code of that time (2026-11)

WEIGHTS = "247927d529865c5e48d2f712361e126a7a5fbf04b075a5767af8c4e7bb4d3483"
"""The sha256 of the parameters that run_format2 ended with, as that version held them in memory."""


def unpacked(name, place):
    with tarfile.open(ROOT / "tests" / "golden" / name) as file:
        file.extractall(place, filter="data")
    return place / "run", place / "models"


def sha256_of(params):
    leaves = jax.tree_util.tree_leaves_with_path(params)
    digest = hashlib.sha256()
    for path, leaf in sorted(leaves, key=lambda item: jax.tree_util.keystr(item[0])):
        digest.update(jax.tree_util.keystr(path).encode() + np.asarray(leaf).tobytes())
    return digest.hexdigest()


def test_a_run_of_an_earlier_version_goes_on(tmp_path, capsys):
    """Its models have moved, and fields of a config that it did not know take their defaults."""
    run, models = unpacked("run_format2.tar.gz", tmp_path)
    looks = list(ckpt.look(run, hashes=True))
    assert [(told["step"], told["fault"]) for told in looks] == [(2, None)]
    assert sha256_of(load_run(run, clip=models / "clip", bart=models / "bart")[1]) == WEIGHTS
    state = train(tiny_config(models, steps=4, save_every=2, keep=1), run)
    assert int(state.step) == 4 and "step 2 of 4" in capsys.readouterr().out


def test_a_run_of_an_older_format_is_refused_in_a_line(tmp_path):
    run, models = unpacked("run_format1.tar.gz", tmp_path)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    words = "was written in format 1 by an older version of vlkd_jax; this one reads format 2: finish that run with"
    with pytest.raises(UserError, match=words):
        train(tiny_config(models, steps=4, save_every=2, keep=1), run)
    with pytest.raises(UserError, match=words):
        load_run(run, clip=models / "clip", bart=models / "bart")
    (told,) = ckpt.look(run)
    assert "format 1" in told["fault"]
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path in before} == before
