"""How a process ends other than by its own plan: by a signal, by a step that does not end, by the loss of another.

Ctrl-C and SIGTERM: one line and an exit code of their own, and in training the step under way is saved first. Python
runs its own handlers only between two lines of the main thread, which may compile or compute for minutes; so a thread
reads the signals' numbers from a pipe.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}
"""The signals that are answered, and what they are called; the exit code is 128 and the signal's number."""
LOST = 4
"""The exit code of a process that made no step in time, or that lost another one."""
GOES_ON = "the same command again goes on from the last checkpoint"
GRACE = 2.0
"""Seconds for which process 0 waits before it leaves: without its coordinator the others cannot tell why they leave."""
_END = b"\0"
_leaving = threading.Lock()


class Interrupted(Exception):
    """The run was asked to end, and has come to a point where it can. Not a mistake, so no UserError."""

    def __init__(self, number: int, message: str = ""):
        super().__init__(f"stopped by {NAMES[number]}{message and ' '}{message}")
        self.code = exit_code(number)


class LostPeer(Exception):
    """Another process of this run is gone, or cannot be reached."""

    def __init__(self, reason: str):
        super().__init__(f"{whose()}lost another process ({reason}); {GOES_ON}")


def exit_code(number: int) -> int:
    """What a shell says of a program that this signal ended: 130 for Ctrl-C, 143 for SIGTERM."""
    return 128 + int(number)  # it may be numpy's, which sys.exit would print


class _Watch:
    """What the watching thread and the program tell one another."""

    active = False
    deferred = False  # whether the program looks at `asked` from time to time
    asked: int | None = None


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """While the block runs, a signal of `NAMES` ends the process with one line, at once or where `deferred` lets it.

    Nothing changes in a block within a block, outside the main thread, and for a signal that is ignored (as `nohup` and
    shells' `&` do). Handlers are put back at the end.
    """
    numbers = [number for number in NAMES if signal.getsignal(number) not in (signal.SIG_IGN, None)]
    if _Watch.active or threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = {number: signal.signal(number, lambda *_: None) for number in numbers}
    pipe_before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    thread = threading.Thread(target=_read, args=(reader, numbers), name="signals", daemon=True)
    _Watch.active, _Watch.asked = True, None
    thread.start()
    try:
        yield
    finally:
        _Watch.active, _Watch.asked = False, None
        signal.set_wakeup_fd(pipe_before)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.write(writer, _END)
        thread.join()
        os.close(writer)
        os.close(reader)


def _read(reader: int, numbers: list[int]) -> None:
    while (byte := os.read(reader, 1)) != _END:
        if byte[0] not in numbers:
            continue
        if _Watch.deferred and _Watch.asked is None:
            _Watch.asked = byte[0]
        else:
            leave(f"stopped by {NAMES[signal.Signals(byte[0])]}", exit_code(byte[0]))


class _Process:
    """This process among several."""

    index: int | None = None
    on_abort: Callable[[int], None] | None = None  # C calls it as long as the process lives


def process_index() -> int | None:
    """Which of several processes this is; None where there is one. JAX is not asked, so no device is touched."""
    return _Process.index


def set_process(index: int) -> None:
    """Notes that this is process `index` of several."""
    _Process.index = index


def whose() -> str:
    """`process 1: ` before what one of several processes tells, or nothing."""
    return "" if _Process.index is None else f"process {_Process.index}: "


def answer_aborts(message: str, code: int) -> None:
    """From here on an abort of JAX's own runtime ends with a line of ours and an exit code of ours.

    Where another process is lost, and where a start fails, that runtime tells of it and calls abort(). A handler of
    Python's would be run too late, as abort() goes on when it returns; this one does not return.
    """
    _Process.on_abort = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda _: leave(message, code))
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    libc.signal(signal.SIGABRT, ctypes.cast(_Process.on_abort, ctypes.c_void_p))


def leave(message: str, code: int, stacks: bool = False) -> None:
    """Prints a line on standard error and ends the process at once: threads that read ahead would hold it.

    With `stacks` what every thread is doing follows the line. Whichever thread comes here first is heard, no other.
    """
    with _leaving:
        try:
            with contextlib.suppress(OSError, ValueError):  # nobody may be there to read it
                if sys.stdout.isatty():
                    os.write(1, b"\x1b[?25h")  # a progress bar hides the cursor
                print(" ".join(message.split()), file=sys.stderr, flush=True)
            if stacks:
                faulthandler.dump_traceback(file=2, all_threads=True)
            if _Process.index == 0:
                time.sleep(GRACE)
        finally:
            os._exit(code)


class Watchdog:
    """Ends a process that hangs, with what every thread is doing and exit code `LOST`.

    A peer that is stuck or gone leaves the others waiting in the same step for ever, and the job would hold its
    machines. Use it in a `with` block, and call `beat` after each part of the work.

    Args:
      seconds: how long a part may take; 0: any time.
      what: the part's name in the line.
    """

    def __init__(self, seconds: float, what: str = "step"):
        self._seconds, self._what = seconds, what
        self._last: tuple[int | None, float] = (None, 1.0)
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self, step: int, allow: float = 1.0) -> None:
        """The work has come to `step`; until the next call `allow` times the seconds may pass."""
        self._last = (step, allow)

    def __enter__(self) -> Watchdog:
        if self._seconds:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        if self._seconds:
            self._thread.join()

    def _watch(self) -> None:
        tick, waited, last = min(self._seconds / 10, 1.0), 0.0, self._last
        while not self._end.wait(tick):
            if last is not self._last:
                last, waited = self._last, 0.0
            waited += tick  # and not the clock: what was suspended (Ctrl-Z) may go on afterwards
            step, allow = last
            if waited > self._seconds * allow:
                since = "the start" if step is None else f"step {step}"
                leave(
                    f"{whose()}no {self._what} for {self._seconds * allow:g} s, the last was {since}; another process "
                    f"may be stuck or gone; what each thread is doing follows; {GOES_ON}",
                    LOST,
                    stacks=True,
                )


def tell(text: str) -> None:
    """Prints a help text. A reader who has seen enough (`| head`) ends the process without a word."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os._exit(0)
    except OSError as e:
        leave(f"error: standard output cannot be written ({e.strerror}); send it elsewhere", 2)


@contextlib.contextmanager
def deferred() -> Iterator[Callable[[], int | None]]:
    """While the block runs, the first signal waits: the yielded function gives its number. The second ends at once.

    Raises:
      Interrupted: at the end, when there was one that the block has not answered.
    """
    _Watch.deferred = True
    try:
        yield lambda: _Watch.asked
    finally:
        _Watch.deferred = False
    if _Watch.asked:
        raise Interrupted(_Watch.asked)
