"""One suite from its items to its metrics: rows are on disk as they are computed, and a run that was cut off goes on.

A directory holds `settings.json`, what its rows depend on; `predictions.jsonl`, a row a line, which is called
`predictions.jsonl.part` until the last one; and for suites of published benchmarks `results.json`.
"""

from __future__ import annotations

import functools
import itertools
import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version
from typing import Any

import jax

from vlkd_jax import processes
from vlkd_jax.console import progress, say
from vlkd_jax.data.sources import has_lone_surrogate
from vlkd_jax.evals.suite import Item, Match, Row, Suite, predict_rows
from vlkd_jax.storage import AnyPath, Mirror, make_directory, write_atomic
from vlkd_jax.vlkd import VLKD

PREDICTIONS = "predictions.jsonl"
PART = f"{PREDICTIONS}.part"
RESULTS = "results.json"
SETTINGS = "settings.json"


def run_suite(
    name: str, kind: Suite, items: list[Item], model: VLKD, directory: AnyPath, settings: dict[str, Any]
) -> dict[str, Any]:
    """Predicts what is not in `directory` yet, writes it there and scores all of it. Every process calls this.

    Args:
      name: of the suite, for messages.
      settings: all that a row depends on beside its item, `batch_size` and `tower` among it. Rows in `directory` of
        other settings, or of other items, are computed anew.

    Returns:
      The suite's metrics and `seconds`, `programs` (how many were compiled for it) and `kept` (rows of a run before).
    """
    began, programs, batch_size = time.monotonic(), compiled_programs(), settings["batch_size"]
    rows = processes.on_first(lambda: _rows_of_a_run_before(directory, settings, items))
    kept = _whole_batches(rows, items, batch_size)
    if kept:
        say(f"{name}: {len(kept):,} of {len(items):,} rows stand in {directory}; going on behind them")
    else:
        processes.on_first(lambda: _begin(directory, settings))
    done = {_key(row) for row in kept}
    left = [item for item in items if _key(item.row) not in done]
    predicted = predict_rows(kind, left, model, batch_size, settings["tower"]) if left else ()
    rows = write_rows(directory, _told(name, predicted, len(kept), len(items)), kept)
    metrics = processes.on_first(lambda: _score(kind, directory, rows))
    metrics |= {"seconds": round(time.monotonic() - began, 2), "programs": compiled_programs() - programs}
    say(f"{name}: {metrics['seconds']:.1f} s, {directory / PREDICTIONS}")
    return metrics | {"kept": len(kept)}


def _key(row: Row) -> tuple[Any, Any]:
    return row.get("task"), row.get("id")


def _rows_of_a_run_before(directory: AnyPath, settings: dict[str, Any], items: list[Item]) -> list[Row]:
    """All rows in `directory`, finished or not; [] where they are of other settings or items, or there are none."""
    path = directory / SETTINGS
    if not path.is_file() or _read(path.read_bytes()) != _read(json.dumps(settings).encode()):
        return []
    file = directory / PREDICTIONS
    file = file if file.is_file() else directory / PART
    lines = file.read_bytes().decode(errors="replace").split("\n") if file.is_file() else []
    rows = [row for line in lines if isinstance(row := _read(line), dict)]  # the last line may be cut off
    asked = {_key(item.row): _read(json.dumps(item.row)) for item in items}
    return rows if all(asked.get(_key(row), {"": ""}).items() <= row.items() for row in rows) else []


def _read(text: str | bytes) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _whole_batches(rows: Sequence[Row], items: list[Item], batch_size: int) -> list[Row]:
    """Of an earlier run's rows those of its first whole batches: the next batch is then what it would have been.

    Where items are compared with one another, a task is kept whole or not at all.
    """
    kept: list[Row] = []
    of_task = {task: list(group) for task, group in itertools.groupby(rows, lambda row: row["task"])}
    for task, group in itertools.groupby(items, lambda item: item.row["task"]):
        asked, answered = list(group), of_task.get(task, [])
        if len(answered) == len(asked):
            kept += answered
            continue
        if not isinstance(asked[0], Match):
            answered = [row for row in answered if "fault" not in row]  # those come last, and are looked at again
            kept += answered[: len(answered) // batch_size * batch_size]
        return kept
    return kept


def _begin(directory: AnyPath, settings: dict[str, Any]) -> None:
    """Removes what stands there and notes what the rows to come depend on."""
    make_directory(directory)
    for name in (PREDICTIONS, PART):
        if (directory / name).is_file():
            say(f"{directory / name}: replaced, it holds no whole batch of these settings and items")
            (directory / name).unlink()
    write_atomic(directory / SETTINGS, (json.dumps(settings, indent=1) + "\n").encode())


def _told(name: str, rows: Iterable[Row], before: int, total: int) -> Iterator[Row]:
    """The rows; it is told how many there are and when the last is due."""
    with progress(name, total, "rows", before) as tell:
        for count, row in enumerate(rows, before + 1):
            tell(count)
            yield row


def write_rows(directory: AnyPath, rows: Iterable[Row], kept: Sequence[Row] = ()) -> list[Row]:
    """Writes rows as they come behind those `kept`, and returns all. Every process calls it, process 0 writes.

    They go to `directory/predictions.jsonl.part`, which becomes predictions.jsonl at the end: what had been computed
    stays there whatever happens, in an object store as far as `storage.Mirror` had copied it. Half an emoji (a lone
    surrogate), which UTF-8 cannot hold, becomes its JSON escape.
    """
    if not processes.is_first():
        return [*kept, *rows]
    written = list(kept)
    with Mirror(make_directory(directory)) as mirror:
        part = mirror.local / PART
        write_atomic(part, "".join(map(_line, kept)).encode(errors="backslashreplace"))
        mirror.copy()  # over the part that a run cut off has left
        with open(part, "ab") as file:
            for row in rows:
                file.write(_line(row).encode(errors="backslashreplace"))
                file.flush()
                written.append(row)
                if mirror.due():
                    mirror.copy()
        part.replace(mirror.local / PREDICTIONS)
    return written


def _line(row: Row) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def read_rows(directory: AnyPath) -> list[Row]:
    """The rows that `write_rows` wrote there."""
    return [json.loads(line) for line in (directory / PREDICTIONS).read_bytes().decode().split("\n") if line]


def _score(kind: Suite, directory: AnyPath, rows: list[Row]) -> dict[str, Any]:
    """Metrics of all rows; writes what the benchmark's server takes.

    Rows of pictures that could not be used are counted by reason: those `left_out` of the score, and `misses` in it.
    """
    scored = [row for row in rows if "score" in row]
    metrics = {"scorer": f"vlkd_jax {version('vlkd_jax')}"} | (kind.score(scored) if scored else {"n": 0})
    for name, is_scored in (("left_out", False), ("misses", True)):
        faults = Counter(row["fault"] for row in rows if "fault" in row and ("score" in row) == is_scored)
        metrics |= {name: dict(faults)} if faults else {}
    unscored = sum("score" not in row and "fault" not in row for row in rows)
    metrics |= {"unscored": unscored} if unscored else {}
    cut = sum("cut" in row for row in rows)
    if cut:
        say(f"{directory / PREDICTIONS}: {cut} of {len(rows)} texts are cut: the model has no room for more")
        metrics["cut"] = cut
    escaped = sum(has_lone_surrogate(json.dumps(row, ensure_ascii=False)) for row in rows)
    if escaped:
        say(f"{directory / PREDICTIONS}: {escaped} row(s) hold half an emoji, which stands escaped; the model read ?")
        metrics["escaped"] = escaped
    if kind.results:
        write_atomic(directory / RESULTS, (json.dumps(kind.results(rows), indent=1) + "\n").encode())
    return metrics


@functools.cache
def _compiled() -> list[float]:
    """Seconds of each program that jax has compiled, or read from its cache, since the first call."""
    seconds: list[float] = []

    def listen(event: str, duration: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            seconds.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    return seconds


def compiled_programs() -> int:
    """How many programs jax has compiled, or read from its cache, since this was first asked."""
    return len(_compiled())
