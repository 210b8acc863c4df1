"""Ctrl-C and SIGTERM: one line and an exit code of its own, and in training the step under way is saved first.

Python runs its own handlers only between two lines of the main thread, which may compile or compute for minutes; so a
thread reads the signals' numbers from a pipe.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}
"""The signals that are answered, and what they are called; the exit code is 128 and the signal's number."""
_END = b"\0"


class Interrupted(Exception):
    """The run was asked to end, and has come to a point where it can. Not a mistake, so no UserError."""

    def __init__(self, number: int, message: str = ""):
        super().__init__(f"stopped by {NAMES[number]}{message and ' '}{message}")
        self.code = exit_code(number)


def exit_code(number: int) -> int:
    """What a shell says of a program that this signal ended: 130 for Ctrl-C, 143 for SIGTERM."""
    return 128 + number


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


def leave(message: str, code: int) -> None:
    """Prints a line on standard error and ends the process at once: threads that read ahead would hold it."""
    with contextlib.suppress(OSError, ValueError):  # nobody may be there to read it
        print(" ".join(message.split()), file=sys.stderr, flush=True)
    os._exit(code)


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
