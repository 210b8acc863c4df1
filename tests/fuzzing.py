"""Hostile files: broken JSON and bytes from hypothesis, and what must hold of whatever reads them.

A reader gives what it read, or refuses in one line. It runs nothing, writes nowhere else, and comes to an end.
"""

import contextlib
import json
import os
import signal
import sys
import time

import hypothesis
from hypothesis import strategies as st

SECONDS = 20
"""What a reader may take for one file."""
TEXT = st.text(st.characters(), max_size=8)  # lone surrogates among them
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    TEXT,
    st.sampled_from(["a.png", 1, "1", "", 0, -1, 2**31, 2**63, 1e308]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXT, inner, max_size=3)),
    max_leaves=6,
)


@st.composite
def broken(draw, whole):
    """A JSON value with one or two places replaced by something else, or taken out."""
    value = json.loads(json.dumps(whole))
    for _ in range(draw(st.integers(1, 2))):
        places = list(_places(value))
        if not places:
            return draw(VALUES)
        parent, key = places[draw(st.integers(0, len(places) - 1))]
        if draw(st.booleans()):
            parent[key] = draw(VALUES)
        else:
            del parent[key]
    return value


def _places(value):
    """(container, key) of everything within a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items):
        yield value, key
        yield from _places(inner)


@st.composite
def damaged(draw, whole: bytes):
    """The bytes with up to four changes: a flipped bit, a number, a cut, a piece put in, taken out or doubled."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(len(data) - 1, 0)))
        kind = draw(st.sampled_from(["flip", "number", "cut", "insert", "remove", "double"]))
        if kind == "flip" and data:
            data[place] ^= 1 << draw(st.integers(0, 7))
        elif kind == "number":
            value = draw(st.sampled_from([0, 1, 127, 255, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**62]))
            size = draw(st.sampled_from([1, 2, 4, 8]))
            order = draw(st.sampled_from(["little", "big"]))
            data[place : place + size] = (value % 256**size).to_bytes(size, order)
        elif kind == "cut":
            del data[place:]
        elif kind == "insert":
            data[place:place] = draw(st.binary(min_size=1, max_size=12))
        else:
            piece = data[place : place + draw(st.integers(1, 64))]
            if kind == "double":
                data[place:place] = piece
            else:
                del data[place : place + len(piece)]
    return bytes(data)


class Executed(BaseException):
    """A reader started a program, unpickled a name, or wrote outside of the folder it was given."""


_watched: list[str] = []  # the folder that may be written to, while a reader is watched
_RUNS = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "subprocess.Popen", "pickle.find_class", "ctypes.dlopen")


def _audit(event, arguments):
    if not _watched:
        return
    if event in _RUNS:
        raise Executed(f"{event} {arguments}")
    if event == "open" and isinstance(arguments[0], str) and isinstance(arguments[1], str):
        path, mode = os.path.realpath(arguments[0]), arguments[1]
        written = set(mode) & set("wax+")
        if written and not path.startswith((_watched[0], "/dev/", "/proc/")) and "__pycache__" not in path:
            raise Executed(f"open {path} {mode}")


sys.addaudithook(_audit)  # for good: there is no way to take one back


@contextlib.contextmanager
def harmless(folder):
    """Raises when the block runs a program, writes outside of `folder`, or takes longer than `SECONDS`."""

    def late(*_):
        raise TimeoutError(f"the reader takes more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    _watched.append(os.path.realpath(folder))
    try:
        yield
    finally:
        _watched.pop()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def fuzz(check, *strategies, examples, seconds):
    """Calls `check` with `examples` draws, and with as many again and again until the seconds are over; how many."""
    settings = hypothesis.settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
    )
    counted, end, seed = 0, time.monotonic() + seconds, 0

    def counting(values):
        nonlocal counted
        counted += 1
        check(*values)

    while not seed or time.monotonic() < end:
        hypothesis.seed(seed)(settings(hypothesis.given(st.tuples(*strategies))(counting)))()
        seed += 1
    return counted
