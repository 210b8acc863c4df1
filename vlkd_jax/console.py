"""What people look at in a terminal: tables, and how far long work is. Drawn by rich; plain lines in a file."""

from __future__ import annotations

import contextlib
import io
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

from vlkd_jax import runtime

LINE_SECONDS = 10.0
"""How often a line says how far work is, where there is no terminal."""
WIDEST = 400


class Tell(Protocol):
    """Tells that `done` units are ready, and a `note` on them."""

    def __call__(self, done: int, note: str = "") -> None: ...


def say(text: str, everywhere: bool = False) -> None:
    """Prints a line at once (standard output may be a file); what its encoding lacks is escaped.

    Process 0 speaks for all. What concerns one process is said `everywhere`, with the process in front where there are
    several.
    """
    if everywhere:
        text = runtime.whose() + text
    elif runtime.process_index():
        return
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)


def aside(is_read_by_program: bool) -> contextlib.AbstractContextManager[object]:
    """While the block runs, what is said goes to standard error where a program reads the other: `--json`."""
    return contextlib.redirect_stdout(sys.stderr) if is_read_by_program else contextlib.nullcontext()


def duration(seconds: float) -> str:
    """`2:31`, or with hours `1:02:31`."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def rate(speed: float) -> str:
    """A number of things a second, with as many digits as tell something."""
    return f"{speed:,.{0 if speed >= 10 else 2}f}"


def table(rows: Iterable[Sequence[str]], head: Sequence[str] = ()) -> str:
    """Rows as lines in columns, the first to the left and the others to the right; in colour on a terminal.

    Lines are never broken: standard output may be a file, and a terminal breaks them itself.
    """
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    rows = [list(row) for row in rows]
    drawn = Table(box=SIMPLE_HEAD if head else None, show_header=bool(head), pad_edge=False, padding=(0, 1))
    for k in range(max(map(len, [head, *rows]))):
        title = Text(head[k]) if head else ""
        drawn.add_column(title, justify="right" if k else "left", no_wrap=True, style="bold" if not k and head else "")
    for row in rows:
        drawn.add_row(*map(Text, row))  # a bracket is a bracket, no markup
    encoding = sys.stdout.encoding or "utf-8"
    page = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="backslashreplace", newline="\n")
    Console(file=page, width=WIDEST, force_terminal=sys.stdout.isatty(), highlight=False).print(drawn)
    page.flush()
    lines = page.buffer.getvalue().decode(encoding).splitlines()
    return "\n".join(line.rstrip() for line in lines if line.strip())


@contextlib.contextmanager
def progress(name: str, total: int, unit: str, before: int = 0, everywhere: bool = False) -> Iterator[Tell]:
    """Tells how far work is and when it ends: a bar on a terminal, elsewhere a line every ten seconds.

    Args:
      total: units of all the work; `before` of them were done by an earlier run.
      everywhere: lines of every process, not of process 0 alone.

    Yields:
      A function to call with how many units are done.
    """
    if sys.stdout.isatty() and not runtime.process_index():
        with _bar(name, total, unit, before) as tell:
            yield tell
        return
    start = last = time.monotonic()

    def tell(done: int, note: str = "") -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < LINE_SECONDS and (done < total or last == start):
            return
        speed, last = max(done - before, 1e-9) / max(now - start, 1e-9), now
        left = duration((total - done) / speed)
        say(f"{name}  {done:,}/{total:,}  eta {left}  {rate(speed)} {unit}/s{note and '  '}{note}", everywhere)

    yield tell


@contextlib.contextmanager
def _bar(name: str, total: int, unit: str, before: int) -> Iterator[Tell]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    shown = "{task.fields[speed]} {task.fields[note]}"
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TextColumn("eta"), TimeRemainingColumn(), TextColumn(shown, markup=False)) as bar:
        task, start = bar.add_task(name, total=total, completed=before, speed="", note=""), time.monotonic()

        def tell(done: int, note: str = "") -> None:
            speed = (done - before) / max(time.monotonic() - start, 1e-9)
            bar.update(task, completed=done, speed=f"{rate(speed)} {unit}/s", note=note)

        yield tell
