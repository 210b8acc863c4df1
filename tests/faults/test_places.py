"""Where a run may be started, by whom and in what surroundings; and what earlier versions left."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile

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

READ_ONLY = """
for place in "$1" "$2"; do
  mount --bind "$place" "$place" && mount -o remount,bind,ro "$place" || exit 9
done
shift 2
exec "$@"
"""
"""Runs a command for which two places cannot be written, which even root then cannot."""


def export_and_use(assets, place, workdir, cwd=ROOT, prefix=(), **surroundings):
    """Trains two steps, exports, captions a picture with the export: all by the command line; what it said."""
    picture = place / "a picture.png"
    Image.new("RGB", (40, 30), "red").save(picture)
    env = environment() | {"JAX_COMPILATION_CACHE_DIR": None, "XDG_CACHE_HOME": None, "HOME": str(place / "home")}
    env = {name: value for name, value in (env | surroundings).items() if value is not None}
    told = []
    for argv in (
        ["train", *arguments(assets, workdir, steps=2, save_every=2)],
        ["export", f"--checkpoint={workdir}", f"--output={workdir}/export"],
        ["caption", str(picture), f"--model={workdir}/export", "--max_new_tokens=3"],
    ):
        command = [*prefix, sys.executable, "-m", "vlkd_jax", *argv]
        run = subprocess.run(command, capture_output=True, text=True, env=env, cwd=cwd)
        assert run.returncode == 0 and "Traceback" not in run.stderr, (argv, run.stdout[-2000:], run.stderr[-3000:])
        told.append(run.stdout)
    assert "step 2/2" in told[0] and "a picture.png" in told[2]
    lines = [json.loads(line) for line in (workdir / METRICS_FILE).read_text().splitlines()]
    assert lines[-1]["kind"] == "goodput" and (workdir / "export" / "model.safetensors").is_file()


SURROUNDINGS = {
    "no HOME": {"HOME": None},
    "a HOME that cannot be written": {"HOME": "/proc"},
    "LANG=C": {"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
}


@pytest.mark.parametrize("what", SURROUNDINGS)
def test_surroundings(assets, tmp_path, what):
    export_and_use(assets, tmp_path, tmp_path / "run", **SURROUNDINGS[what])


def test_another_directory_and_a_path_with_spaces_and_letters(assets, tmp_path):
    models = shutil.copytree(assets, tmp_path / "Modelle für Läufe")
    export_and_use(models, tmp_path, tmp_path / "mein Lauf, 日本 ß", cwd="/")


def test_models_and_a_checkout_that_cannot_be_written(assets, tmp_path):
    models, root = shutil.copytree(assets, tmp_path / "models"), [] if os.geteuid() == 0 else ["--map-root-user"]
    prefix = ["unshare", *root, "--mount", "sh", "-c", READ_ONLY, "sh", str(models), str(ROOT)]
    if shutil.which("unshare") is None or subprocess.run([*prefix, "true"], capture_output=True).returncode:
        pytest.skip("this system lets nobody mount in a namespace of their own")
    assert subprocess.run([*prefix, "touch", str(ROOT / "x")], capture_output=True).returncode
    export_and_use(models, tmp_path, tmp_path / "run", prefix=prefix)


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
