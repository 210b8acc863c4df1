"""The working directory: configuration compared field by field, one owner at a time, stale locks taken over."""

import errno
import json
import os
import subprocess
import sys
import threading
import time

import pytest

from vlkd_jax import workdir as module
from vlkd_jax.errors import UserError
from vlkd_jax.workdir import CONFIG_FILE, LOCK_FILE, claim, write_atomic

CONFIG = {"seed": 0, "model": {"width": 96, "layers": [2, 2], "clip": {"sha256": "ab"}}, "steps": 100, "none": None}

OWNER = """
import sys, time
from vlkd_jax.errors import UserError
from vlkd_jax.workdir import claim
try:
    with claim(sys.argv[1], {"seed": 0}):
        print("owner", flush=True)
        time.sleep(120)
except UserError as error:
    print("refused", error, flush=True)
"""


def start_owner(workdir) -> subprocess.Popen:
    command = [sys.executable, "-c", OWNER, str(workdir)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def claim_error(workdir, config=CONFIG, **options) -> str:
    with pytest.raises(UserError) as caught, claim(workdir, config, **options):
        pytest.fail("claimed")
    message = str(caught.value)
    assert "\n" not in message and str(workdir) in message
    return message


def leave_foreign_lock(workdir) -> None:
    (workdir / LOCK_FILE).write_text(json.dumps({"host": "elsewhere", "pid": 12, "since": "2026-01-01T00:00:00+0000"}))


def test_first_claim_writes_the_config_and_later_claims_compare(tmp_path):
    for _ in range(3):
        with claim(tmp_path / "a" / "b", CONFIG | {"pair": (1, 2)}) as workdir:
            assert workdir == tmp_path / "a" / "b"
            assert json.loads((workdir / CONFIG_FILE).read_text()) == CONFIG | {"pair": [1, 2]}
        assert os.listdir(workdir) == [CONFIG_FILE]


def test_every_differing_field_is_named(tmp_path):
    with claim(tmp_path, CONFIG):
        before = (tmp_path / CONFIG_FILE).read_bytes()
    changed = {"seed": 1, "model": {"width": 96, "layers": [2, 3], "clip": {"sha256": "cd"}}, "steps": 200, "new": "x"}
    message = claim_error(tmp_path, changed)
    for change in (
        "seed: 0 -> 1",
        "model.layers: [2, 2] -> [2, 3]",
        'model.clip.sha256: "ab" -> "cd"',
        "steps: 100 -> 200",
        'new: (absent) -> "x"',
        "none: null -> (absent)",
    ):
        assert change in message
    assert "model.width" not in message and "--workdir" in message
    assert (tmp_path / CONFIG_FILE).read_bytes() == before


def test_allowed_fields_may_differ(tmp_path):
    with claim(tmp_path, CONFIG):
        pass
    changed = CONFIG | {"steps": 200, "model": CONFIG["model"] | {"clip": {"sha256": "cd"}}}
    assert "steps" not in claim_error(tmp_path, changed, allowed=("steps", "model.cl"))
    with claim(tmp_path, changed, allowed=("steps", "model.clip")):
        assert json.loads((tmp_path / CONFIG_FILE).read_text()) == changed
    assert "steps: 200 -> 100" in claim_error(tmp_path, CONFIG)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe"])
def test_a_damaged_config_is_named(tmp_path, content):
    (tmp_path / CONFIG_FILE).write_bytes(content)
    assert CONFIG_FILE in claim_error(tmp_path)
    assert (tmp_path / CONFIG_FILE).read_bytes() == content and not (tmp_path / LOCK_FILE).exists()


def test_a_workdir_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot be used" in claim_error(tmp_path / "file")
    assert "cannot be used" in claim_error(tmp_path / "file" / "below")


def test_a_second_run_is_refused_until_the_first_ends(tmp_path):
    owner = start_owner(tmp_path)
    assert owner.stdout.readline() == "owner\n"
    assert f"process {owner.pid} on" in claim_error(tmp_path, {"seed": 0})
    owner.kill()
    owner.wait()
    assert (tmp_path / LOCK_FILE).exists()
    since = time.monotonic()
    with claim(tmp_path, {"seed": 0}):
        assert time.monotonic() - since < 1.0
        assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()
        assert "this process" in claim_error(tmp_path, {"seed": 0})
    assert not (tmp_path / LOCK_FILE).exists()


def test_of_many_that_start_together_one_wins(tmp_path):
    runs = [start_owner(tmp_path) for _ in range(6)]
    words = sorted(run.stdout.readline().split()[0] for run in runs)
    for run in runs:
        run.kill()
        run.wait()
    assert words == ["owner"] + ["refused"] * 5


def test_an_exception_releases_the_lock(tmp_path):
    with pytest.raises(KeyError), claim(tmp_path, CONFIG):
        raise KeyError("in the run")
    with claim(tmp_path, CONFIG):
        (tmp_path / LOCK_FILE).unlink()  # tidied away by somebody


def test_the_lock_of_a_dead_run_on_another_machine_is_taken_over(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "STALE_SECONDS", 0.4)
    leave_foreign_lock(tmp_path)
    with claim(tmp_path, CONFIG):
        assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()
    assert "left by process 12 on elsewhere" in capsys.readouterr().out


def test_a_live_run_on_another_machine_is_respected(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "STALE_SECONDS", 20.0)
    leave_foreign_lock(tmp_path)
    threading.Timer(0.5, os.utime, [tmp_path / LOCK_FILE]).start()
    assert "process 12 on elsewhere" in claim_error(tmp_path)
    assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == 12


def test_the_owner_shows_that_it_lives(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BEAT_SECONDS", 0.05)
    with claim(tmp_path, CONFIG):
        seen = {os.stat(tmp_path / LOCK_FILE).st_mtime_ns for _ in range(10) if time.sleep(0.05) is None}
    assert len(seen) > 2


def test_file_systems_without_locks_go_by_the_touches(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(module.fcntl, "lockf", no_locks)
    monkeypatch.setattr(module, "STALE_SECONDS", 0.4)
    with claim(tmp_path, CONFIG):
        assert (tmp_path / LOCK_FILE).exists()
    leave_foreign_lock(tmp_path)
    with claim(tmp_path, CONFIG):
        assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()


def test_write_atomic_leaves_the_old_file_when_it_fails(tmp_path, monkeypatch):
    write_atomic(tmp_path / "file", b"old")

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module.os, "replace", fail)
    with pytest.raises(OSError):
        write_atomic(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]
