"""How a process ends by a signal, by the watchdog, by an abort: what is saved, one line, the exit code.

And nothing is left behind where a program goes on.
"""

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
from vlkd_jax.commands import COMMANDS
from vlkd_jax.options import EXIT_CODES
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


@pytest.mark.parametrize("number", [signal.SIGTERM, int(signal.SIGTERM), np.int32(signal.SIGTERM)])
def test_a_signal_that_another_process_received(number):
    interrupted = runtime.Interrupted(number, "after step 3")
    assert (interrupted.code, type(interrupted.code)) == (143, int) and str(interrupted) == (
        "stopped by SIGTERM after step 3"
    )


def ending(code: str) -> tuple[int, str, str, float]:
    """(exit code, output, errors, seconds) of a program with `runtime` and `time`."""
    program = f"import os, threading, time\nfrom vlkd_jax import runtime\n{code}"
    since = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment(), cwd=ROOT, timeout=60
    )
    return done.returncode, done.stdout, done.stderr, time.monotonic() - since


STUCK = """
def stuck():
    time.sleep(60)

threading.Thread(target=stuck, daemon=True).start()
with runtime.Watchdog({seconds}, "update") as watchdog:
    time.sleep({seconds} / 2)
    for step in range(5):
        watchdog.beat(step)
        time.sleep({seconds} / 2)
    watchdog.beat(7, allow=4)
    time.sleep(2.5 * {seconds})
    print("in time", flush=True)
    watchdog.beat(8)
    stuck()
"""


def test_the_watchdog_ends_what_hangs():
    code, out, err, seconds = ending(STUCK.format(seconds=0.6))
    assert (code, out) == (runtime.LOST, "in time\n") and seconds < 30
    line, stacks = err.split("\n", 1)
    assert line.startswith("no update for 0.6 s, the last was step 8; another process may be stuck or gone")
    assert stacks.count("most recent call first") == 3 and stacks.count(" in stuck\n") == 2
    code, out, err, _ = ending("runtime.set_process(3)\nwith runtime.Watchdog(0.2):\n    time.sleep(60)")
    assert code == runtime.LOST and err.startswith("process 3: no step for 0.2 s, the last was the start;")


def test_a_watchdog_that_is_off_or_over_ends_nothing():
    code, out, err, _ = ending(
        "with runtime.Watchdog(0): time.sleep(0.5)\nwith runtime.Watchdog(0.2): pass\ntime.sleep(0.5)\nprint('end')"
    )
    assert (code, out, err) == (0, "end\n", "")


def test_a_suspended_process_goes_on():
    """Ctrl-Z and fg: the time between does not count."""
    run = start(
        [
            "-c",
            "import time\nfrom vlkd_jax.runtime import Watchdog\nwith Watchdog(1.5):\n    print('runs', flush=True)\n"
            "    time.sleep(0.5)\n    print('end')",
        ]
    )
    assert run.stdout.readline() == "runs\n"
    run.send_signal(signal.SIGSTOP)
    time.sleep(2.5)
    run.send_signal(signal.SIGCONT)
    assert run.communicate(timeout=60) == ("end\n", "") and run.returncode == 0


@pytest.mark.parametrize("where", ["os.abort()", "threading.Thread(target=os.abort).start(); time.sleep(60)"])
def test_an_abort_of_the_runtime_is_answered(where):
    code, out, err, _ = ending(
        f"runtime.answer_aborts('another  one', 7)\nruntime.answer_aborts('a\\nline', 4)\n{where}"
    )
    assert (code, out, err) == (4, "", "a line\n")


def test_whoever_leaves_first_is_heard_alone():
    """And process 0 leaves after the others, which need its coordinator to tell why they leave."""
    code, out, err, seconds = ending(
        "runtime.set_process(0)\nthreading.Thread(target=runtime.leave, args=('first', 5)).start()\n"
        "time.sleep(0.5)\nruntime.leave('second', 6)"
    )
    assert (code, out, err) == (5, "", "first\n") and seconds > runtime.GRACE


def test_the_exit_codes_are_told():
    assert runtime.LOST in EXIT_CODES
    for number in runtime.NAMES:
        assert runtime.exit_code(number) in EXIT_CODES
        assert all(runtime.exit_code(number) in command.exit_codes for command in COMMANDS.values())
