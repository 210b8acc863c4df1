"""Tables and progress, in a terminal and in a file."""

import os
import subprocess
import sys

import pytest
from tiny import environment

from vlkd_jax import console


def test_a_table_in_a_file(capsys):
    rows = [("a [bold]b[/]", "1.0"), ("naïve 中", "22.55"), ("", "-")]
    lines = console.table(rows, ("name", "value")).splitlines()
    assert lines[0].split() == ["name", "value"] and set(lines[1].strip()) == {"─"}
    assert [line.rsplit(maxsplit=1)[-1] for line in lines[2:]] == ["1.0", "22.55", "-"]
    assert lines[2].strip().startswith("a [bold]b[/]") and "\x1b" not in "".join(lines)
    wide = console.table([("x" * 300, "y")])
    assert wide.count("\n") == 0 and wide.endswith("y")
    assert console.table([("a", "1"), ("b", "2")]).split() == ["a", "1", "b", "2"]


@pytest.mark.parametrize(
    ("seconds", "told"), [(0, "0:00"), (59.9, "0:59"), (151, "2:31"), (3600, "1:00:00"), (90061, "25:01:01")]
)
def test_durations(seconds, told):
    assert console.duration(seconds) == told


def test_lines_of_progress_in_a_file(capsys, monkeypatch):
    """A line where ten seconds have passed, from the rate of this run alone; none where all is quick."""
    now = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    with console.progress("vqa", 1000, "rows", before=400) as tell:
        for done, seconds in ((410, 5), (430, 15), (431, 20), (700, 150), (1000, 300)):
            now[0] = 100.0 + seconds
            tell(done, "3 bad" if done == 700 else "")
    assert capsys.readouterr().out.splitlines() == [
        "vqa  430/1,000  eta 4:45  2.00 rows/s",
        "vqa  700/1,000  eta 2:30  2.00 rows/s  3 bad",
        "vqa  1,000/1,000  eta 0:00  2.00 rows/s",
    ]
    with console.progress("quick", 2, "rows") as tell:
        tell(1)
        tell(2)
    assert capsys.readouterr().out == ""


def test_what_a_program_reads_stays_clean(capsys):
    for is_read_by_program in (True, False):
        with console.aside(is_read_by_program):
            console.say("a line")
    print("{}")
    assert capsys.readouterr() == ("a line\n{}\n", "a line\n")


BAR = """
from vlkd_jax import console, runtime
with console.progress("vqa", 4, "rows") as tell:
    for done in range(1, 5):
        tell(done, "note")
    console.say("a line between")
    if {leave}:
        runtime.leave("error: it ends", 2)
print(console.table([("a", "1")], ("name", "value")))
"""


@pytest.mark.parametrize("leave", [False, True])
def test_a_bar_in_a_terminal(leave):
    """With the cursor put back however it ends."""
    reader, writer = os.openpty()
    settings = environment() | {"TERM": "xterm", "COLUMNS": "100"}
    command = [sys.executable, "-c", BAR.format(leave=leave)]
    with subprocess.Popen(command, stdout=writer, stderr=writer, stdin=writer, env=settings) as process:
        os.close(writer)
        told = b""
        while chunk := _read(reader):
            told += chunk
    text = told.decode()
    assert process.returncode == (2 if leave else 0)
    assert "vqa" in text and "a line between" in text and (leave or ("4/4" in text and "note" in text))
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")
    assert ("error: it ends" in text) == leave and ("name" in text) != leave


def _read(reader):
    try:
        return os.read(reader, 65536)
    except OSError:  # Linux says so when nobody holds the other end
        return b""
