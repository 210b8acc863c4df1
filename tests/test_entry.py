"""How a program ends: one line and a documented exit code for what the user can mend, a traceback for the rest."""

import errno
import os
import subprocess
import sys
import threading

import pytest
from tiny import environment

from vlkd_jax import entry
from vlkd_jax.errors import UserError
from vlkd_jax.options import Command, argument, choice, flag, integer, text

PROGRAM = Command("program", "program", "", "Does nothing.")


def ending(capsys, error):
    """(exit code, standard error) of a program whose main raises `error`."""

    def main(_):
        raise error

    with pytest.raises(SystemExit) as caught:
        entry.run(main, PROGRAM, argv=["program"])
    return caught.value.code, capsys.readouterr().err


def test_exit_codes(capsys, monkeypatch):
    monkeypatch.setattr(entry, "_has_threads", lambda: False)
    assert ending(capsys, UserError("a.json: field x\n  is  5;\tmake it 6")) == (
        2,
        "error: a.json: field x is 5; make it 6\n",
    )
    assert ending(capsys, entry.Diverged("10 updates")) == (3, "error: 10 updates\n")
    code, err = ending(capsys, OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl"))
    assert code == 2 and err.startswith("error: metrics.jsonl: no space left") and err.count("\n") == 1
    for fault in (OSError(errno.EIO, "broken"), KeyError("x"), ValueError("y")):
        with pytest.raises(type(fault)):
            ending(capsys, fault)


def test_a_program_that_succeeds_just_returns(capsys):
    assert entry.run(lambda _: None, PROGRAM, argv=["program"]) is None
    with pytest.raises(SystemExit):
        entry.run(lambda _: None, PROGRAM, argv=["program", "stray"])
    assert "stray" in capsys.readouterr().err


def test_every_kind_of_option(capsys):
    options = (
        text("text", "TEXT", "words"),
        integer("count", "N", "how many", default=3, minimum=1),
        choice("size", "how large", ("base", "tiny"), default="base"),
        flag("all_of_it", "whole"),
        argument("places", "PLACE", several=True),
    )
    program, given = Command("program", "program", "", "", options), []
    entry.run(given.append, program, argv=["program", "a", "b"])
    entry.run(given.append, program, argv=["program", "a", "--count=4", "--all-of-it", "b", "--text", "x y"])
    default = {"text": None, "count": 3, "size": "base", "all_of_it": False, "places": ("a", "b")}
    assert [vars(values) for values in given] == [default, default | {"count": 4, "all_of_it": True, "text": "x y"}]
    for wrong in ("--count=0", "--count=x", "--size=large", "--text="):
        with pytest.raises(SystemExit) as caught:
            entry.run(given.append, program, argv=["program", "a", wrong])
        err = capsys.readouterr().err
        assert caught.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1
        assert wrong.partition("=")[0] in err
    with pytest.raises(SystemExit):
        entry.run(given.append, program, argv=["program"])
    assert "PLACE" in capsys.readouterr().err


def test_help_is_told_before_anything_is_required(capsys):
    program = Command(
        "program", "program", "", "Does nothing.", (text("text", "TEXT", "words", required=True),), "--text=x"
    )
    entry.run(lambda _: pytest.fail("it ran"), program, argv=["program", "-h"])
    out = capsys.readouterr().out
    assert out.startswith("Usage: python -m program [OPTIONS]\n\n  Does nothing.\n")
    assert "Example:\n  python -m program --text=x\n" in out and "Exit codes:\n  0 done" in out


def test_threads_that_read_ahead_do_not_keep_it_alive(capsys, monkeypatch):
    """A thread that is no daemon would otherwise hold the process after the error."""
    codes, release = [], threading.Event()

    def leave(code):
        codes.append(code)
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", leave)
    thread = threading.Thread(target=release.wait)
    thread.start()
    try:
        assert ending(capsys, UserError("x")) == (2, "error: x\n")
    finally:
        release.set()
        thread.join()
    assert codes == [2]


@pytest.mark.parametrize("platform", ["cuda", "nonsense"])
def test_devices_that_are_not_there_are_one_line(platform, tmp_path):
    argv = [sys.executable, "-m", "vlkd_jax", "demo", f"--workdir={tmp_path}/run"]
    done = subprocess.run(argv, capture_output=True, text=True, env=environment() | {"JAX_PLATFORMS": platform})
    assert (done.returncode, done.stdout) == (2, "")
    line = done.stderr.splitlines()[-1]
    assert line.startswith(f"error: JAX_PLATFORMS={platform} cannot be used here") and "JAX_PLATFORMS=cpu" in line
    assert "Traceback" not in done.stderr and os.listdir(tmp_path) == []


@pytest.mark.parametrize("given", [["--workdir="], ["--workdir", ""]])
def test_an_empty_value_is_no_directory(given, tmp_path):
    argv = [sys.executable, "-m", "vlkd_jax", "train", "--config=shapes_vlkd", *given]
    done = subprocess.run(argv, capture_output=True, text=True, env=environment(), cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --workdir is empty; give a value: --workdir=...\n" and os.listdir(tmp_path) == []


def test_paths_that_the_system_refuses_are_one_line(capsys, monkeypatch):
    monkeypatch.setattr(entry, "_has_threads", lambda: False)
    for number in (errno.EACCES, errno.EEXIST, errno.EISDIR, errno.ENOTDIR):
        code, err = ending(capsys, OSError(number, os.strerror(number), "a.json"))
        assert code == 2 and err == (
            f"error: a.json: {os.strerror(number)}; name another path, or correct its permissions\n"
        )


PRINTS = """
import sys
from vlkd_jax import entry
from vlkd_jax.console import say
from vlkd_jax.options import Command

def main(_):
    for k in range(int(sys.argv[1])):
        say("caf" + chr(233))

entry.run(main, Command("program", "", "", ""), argv=["program"])
"""


def test_a_terminal_that_lacks_a_letter_ends_no_run():
    settings = environment() | {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0"}
    done = subprocess.run([sys.executable, "-c", PRINTS, "1"], capture_output=True, text=True, env=settings)
    assert (done.returncode, done.stdout, done.stderr) == (0, "caf\\xe9\n", "")


def test_a_reader_that_goes_away():
    """`| head`: a run ends in one line, help without a word."""
    for command, expected in (
        (["-c", PRINTS, "100000"], (2, b"error: standard output was closed before the end; send it to a file\n")),
        (["-m", "vlkd_jax", "--help"], (0, b"")),
        (["-m", "vlkd_jax.train", "--help"], (0, b"")),
    ):
        reader, writer = os.pipe()
        os.close(reader)
        done = subprocess.run([sys.executable, *command], stdout=writer, stderr=subprocess.PIPE, env=environment())
        os.close(writer)
        assert (done.returncode, done.stderr) == expected
