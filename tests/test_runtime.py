"""Ctrl-C and SIGTERM: what is saved, one line, the exit code; and nothing left behind where a program goes on."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny import ROOT, arguments, environment, tiny_config

from vlkd_jax import runtime
from vlkd_jax.commands import COMMANDS, EXIT_CODES
from vlkd_jax.train import train

STEPS = 40
SLOWED = """
import sys, time
from vlkd_jax import entry, train
from vlkd_jax.commands import COMMANDS
log = train._Loop._log
train._Loop._log = lambda loop, step, *rest: (log(loop, step, *rest), time.sleep({seconds} if step > 2 else 0))
entry.run(train.main, COMMANDS["train"])
"""


@pytest.fixture(autouse=True)
def signals_are_not_ignored():
    """As they are, with all that a program starts, when a shell's `&` or nohup started it: tests among others."""
    ignored = [number for number in runtime.NAMES if signal.getsignal(number) == signal.SIG_IGN]
    for number in ignored:
        signal.signal(number, signal.SIG_DFL)
    yield
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)


def start(command: list[str]) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, *command], **pipes, text=True, env=environment(), cwd=ROOT)


def interrupted(argv: list[str], number: int, seconds: float = 0.2, times: int = 1) -> tuple[int, str, str]:
    """(exit code, output, errors) of training that was sent a signal when it had told of its third step."""
    run = start(["-c", SLOWED.format(seconds=seconds), *argv])
    told = ""
    for line in run.stdout:
        told += line
        if line.startswith("step 3/"):
            break
    for _ in range(times):
        run.send_signal(number)
        time.sleep(0.3)
    out, err = run.communicate(timeout=120)
    return run.returncode, told + out, err


@pytest.fixture(scope="module")
def whole(assets, tmp_path_factory):
    """The state of a run that nobody interrupts."""
    return train(tiny_config(assets, steps=STEPS, save_every=STEPS), tmp_path_factory.mktemp("whole") / "run")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_saves_its_step_and_goes_on_as_if_nothing_had_been(assets, tmp_path, whole, number):
    run = tmp_path / "run"
    code, _, err = interrupted(arguments(assets, run, steps=STEPS, save_every=STEPS), number)
    assert code == 128 + number == {"SIGINT": 130, "SIGTERM": 143}[number.name]
    line = re.fullmatch(
        rf"stopped by {runtime.NAMES[number]} after step (\d+); step (\d+) is saved, and the same command goes on "
        r"from there\n",
        err,
    )
    assert line and line[1] == line[2] and 3 <= int(line[1]) < STEPS, err
    assert os.listdir(run / "checkpoints") == [f"step_{int(line[1]):08d}"] and not (run / "run.lock").exists()
    state = train(tiny_config(assets, steps=STEPS, save_every=STEPS), run)
    for ours, theirs in zip(jax_leaves(state), jax_leaves(whole), strict=True):
        assert ours.tobytes() == theirs.tobytes()


def jax_leaves(state):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state)]


def test_a_second_signal_ends_at_once(assets, tmp_path):
    since = time.monotonic()
    code, _, err = interrupted(arguments(assets, tmp_path / "run", steps=STEPS), signal.SIGINT, seconds=60, times=2)
    assert (code, err) == (130, "stopped by Ctrl-C\n") and time.monotonic() - since < 60
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_with_early_stopping_the_last_evaluated_step_stands(assets, tmp_path):
    """A state between two evaluations is never kept: it might be one that early stopping turns down."""
    changes = {"eval__every": 2, "early_stop__metric": "retention/text_qa", "early_stop__max_drop": 99.0}
    changes |= {"data__replay": "shapes_texts", "data__context_length": 0}
    code, out, err = interrupted(arguments(assets, tmp_path / "run", steps=STEPS, **changes), signal.SIGINT)
    assert code == 130, (out, err)
    after, kept = map(int, re.match(r"stopped by Ctrl-C after step (\d+); step (\d+) is saved", err).groups())
    assert kept % 2 == 0 and kept <= after < kept + 2


@pytest.mark.parametrize("command", ["train", "evaluate", "demo"])
@pytest.mark.parametrize("seconds", [0, 0.8])
def test_start_up_ends_in_one_line(command, seconds, tmp_path):
    argv = {
        "train": ["--config=shapes_vlkd", f"--workdir={tmp_path}/run"],
        "evaluate": ["--config=suites:shapes", f"--checkpoint={tmp_path}", f"--workdir={tmp_path}/out"],
        "demo": [f"--workdir={tmp_path}/run"],
    }[command]
    run = start(["-m", "vlkd_jax", command, *argv])
    while not catches_sigterm(run.pid):
        assert run.poll() is None
    time.sleep(seconds)
    run.send_signal(signal.SIGINT)
    out, err = run.communicate(timeout=60)
    assert (run.returncode, err) == (130, "stopped by Ctrl-C\n"), (out, err)


def catches_sigterm(pid: int) -> bool:
    """Whether the program has come so far as to answer signals; Python alone leaves SIGTERM to the system."""
    status = Path(f"/proc/{pid}/status").read_text()
    return bool(int(re.search(r"SigCgt:\s*(\w+)", status)[1], 16) & 1 << (signal.SIGTERM - 1))


def test_handlers_are_put_back():
    before = [signal.getsignal(number) for number in runtime.NAMES]
    with runtime.watched():
        assert [signal.getsignal(number) for number in runtime.NAMES] != before
        with runtime.watched(), runtime.deferred() as signal_number:
            assert signal_number() is None
    assert [signal.getsignal(number) for number in runtime.NAMES] == before


def test_a_signal_that_the_block_did_not_answer_ends_it():
    with pytest.raises(runtime.Interrupted, match=r"^stopped by Ctrl-C$") as caught:
        interrupt_itself()
    assert caught.value.code == 130
    with runtime.deferred() as signal_number:  # and is over then: a program may go on
        assert signal_number() is None


def interrupt_itself():
    with runtime.watched(), runtime.deferred() as signal_number:
        os.kill(os.getpid(), signal.SIGINT)
        while not signal_number():
            time.sleep(0.01)


def test_a_signal_that_is_ignored_stays_so():
    """As in a shell's background jobs."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with runtime.watched():
            assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_exit_codes_are_told():
    for number in runtime.NAMES:
        assert runtime.exit_code(number) in EXIT_CODES
        assert all(runtime.exit_code(number) in command.exit_codes for command in COMMANDS.values())
