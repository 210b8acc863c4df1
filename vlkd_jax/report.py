"""One page about an evaluation, of any suite: figures, bars by type, the best and the worst with their pictures.

`python -m vlkd_jax.report OUT` reads what `vlkd evaluate` wrote there and writes OUT/report/index.html.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from string import Template
from types import SimpleNamespace
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from vlkd_jax import entry
from vlkd_jax.commands import COMMANDS
from vlkd_jax.data.files import read_json
from vlkd_jax.errors import RecordError, UserError
from vlkd_jax.evals import plots
from vlkd_jax.evals.markup import STYLE, escaped, picture_uri, said, table
from vlkd_jax.evals.predictions import read_jsonl
from vlkd_jax.evals.prepared import picture_named
from vlkd_jax.evals.runner import PREDICTIONS
from vlkd_jax.evals.statistics import RESAMPLES
from vlkd_jax.evals.suite import Row
from vlkd_jax.evals.suites import SUITES
from vlkd_jax.evaluate import METRICS, TEMPLATES
from vlkd_jax.runtime import tell
from vlkd_jax.storage import write_atomic

EXAMPLES = 6
"""Shown of the best and of the worst of each task."""
TYPES_SHOWN = 24
"""Bars in one figure: the types with the most items."""
SIDE = 288
"""Pixels of a picture's longer side."""
REPEATED = 0.05
"""A text said for a larger share of pictures, and for more than three, is warned of."""
FRACTIONS = ("Bleu", "METEOR", "ROUGE_L", "CIDEr", "SPICE")
"""Beginnings of names of figures that are not shown in per cent, as the standard tools do not."""

PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>VLKD evaluation: $names</title>
<style>$style
td:nth-child(2) { font-weight: 700; }
td:nth-child(3):not(:last-child) { font-weight: normal; }
.warning { border-left: 5px double var(--wrong); background: #fff9f4; padding: .5rem .75rem; }
.photo { width: 160px; height: auto; max-height: 200px; object-fit: contain; flex: none; align-self: flex-start; }
.card .photo + div { font-size: .9rem; }
</style>
</head>
<body>
<main>
<h1>Evaluation: $names</h1>
$suites
<section><h2>How this was made</h2><dl class="made">$circumstances</dl></section>
</main>
</body>
</html>
""")


def write_report(directory: Path) -> Path:
    """Writes `directory/report/index.html` about the evaluation in `directory` and returns its path.

    Raises:
      UserError: no finished suite there.
    """
    path = directory / METRICS
    if not path.is_file():
        raise UserError(f"{path}: not there; give the --workdir of vlkd evaluate")
    result = read_json(path)
    suites = result.get("suites") if isinstance(result, dict) else None
    if not suites:
        raise UserError(f"{path}: no suite in it; let vlkd evaluate finish one")
    try:
        rows = {name: read_jsonl(directory / name / PREDICTIONS) for name in suites}
        page = PAGE.substitute(
            names=escaped(", ".join(suites)),
            style=STYLE,
            suites="\n".join(_section(name, metrics, rows[name]) for name, metrics in suites.items()),
            circumstances=_circumstances(result),
        )
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:  # files that somebody has changed
        told = f"{type(error).__name__} {error}"
        raise UserError(f"{directory}: not as vlkd evaluate left it ({told}); evaluate again") from error
    (directory / "report").mkdir(exist_ok=True)
    write_atomic(directory / "report" / "index.html", page.encode())
    return directory / "report" / "index.html"


def _section(name: str, metrics: dict[str, Any], rows: list[Row]) -> str:
    suite = ConfigDict(metrics["suite"])
    picture = functools.partial(_picture, suite)
    tasks: dict[str, list[Row]] = {}
    for row in rows:
        tasks.setdefault(row["task"], []).append(row)
    parts = [f"<section><h2>{escaped(name)}</h2>"]
    parts += _warnings(metrics, tasks)
    parts += _figures(metrics)
    for task, of_task in tasks.items():
        parts += _examples(escaped(task), of_task, metrics, picture)
    made = {
        "scorer": metrics.get("scorer"),
        **{field.replace("_", " "): metrics["suite"].get(field) for field in TEMPLATES if field != "image_name"},
        "decoding": _told(metrics["suite"].get("decoding")),
        "files": "; ".join(f"{f['path']} (sha256 {f['sha256'][:16]}…)" for f in metrics.get("files", {}).values()),
    }
    return "\n".join([*parts, f'<dl class="made">{_lines(made)}</dl>', "</section>"])


def _told(values: dict[str, Any] | None) -> str:
    return ", ".join(f"{name} {value}" for name, value in (values or {}).items())


def _lines(values: dict[str, Any]) -> str:
    return "".join(f"<dt>{escaped(name)}</dt><dd>{escaped(value)}</dd>" for name, value in values.items() if value)


# Figures


def _warnings(metrics: dict[str, Any], tasks: dict[str, list[Row]]) -> Iterator[str]:
    for task, rows in tasks.items():
        texts = Counter(row["raw"].strip() for row in rows if "raw" in row)
        if task != "caption" or not texts:
            continue
        [(text, count)] = texts.most_common(1)
        if count > max(3, REPEATED * len(rows)):
            yield (
                f'<p class="warning"><strong>One caption repeats:</strong> {said(text)} was said for {count:,} of '
                f"{len(rows):,} pictures ({len(texts):,} different captions in all). A model that does not look at the "
                "picture says the same of each.</p>"
            )
    faults = {**metrics.get("left_out", {}), **metrics.get("misses", {})}
    if faults:
        told = ", ".join(f"{reason} {count}" for reason, count in faults.items())
        yield f'<p class="warning">Pictures that could not be used: {escaped(told)}.</p>'


def _figures(metrics: dict[str, Any]) -> Iterator[str]:
    """The table of all figures with their intervals, then bars by type."""
    groups = {"": metrics} | {
        name: value for name, value in metrics.items() if isinstance(value, dict) and "n" in value and name != "before"
    }
    rows = []
    for group, values in groups.items():
        for name, value in values.items():
            if isinstance(value, float) and name != "seconds":
                label = f"{group}: {name}" if group else name
                bounds = values.get(f"{name}_interval")
                shown = "" if bounds is None else "–".join(_number(name, bound, "") for bound in bounds)
                rows.append((escaped(label), _number(name, value), shown, f"{values.get('n', ''):,}"))
    if rows:
        yield table(("figure", "value", "95% interval", "n"), rows)
        yield (
            f'<p class="note">Intervals by bootstrap over pictures ({RESAMPLES:,} resamples; all questions about one '
            "picture stay together). Names of figures are those of metrics.json.</p>"
        )
    if "rules" in metrics:
        yield "<h3>The same answers by other programs’ rules</h3>"
        yield table(("rule", "accuracy"), [(escaped(k), _number("", v)) for k, v in metrics["rules"].items()])
    for group, values in groups.items():
        for name in ("by_answer_type", "by_question_type", "by_type", "by_domain"):
            if values.get(name):
                yield _bars(f"{group} {name}".replace("_", " ").strip(), values[name])


def _number(name: str, value: float, mark: str = "%") -> str:
    return f"{value:.4f}" if name.startswith(FRACTIONS) else f"{100 * value:.1f}{mark}"


def _bars(title: str, values: dict[str, dict[str, Any]]) -> str:
    """One figure; of captions by domain their CIDEr."""
    largest = sorted(values, key=lambda name: -values[name]["n"])[:TYPES_SHOWN]
    shown = {}
    for name in (name for name in values if name in largest):
        figures = values[name]
        value, bounds = (
            (figures["accuracy"], figures["interval"])
            if "accuracy" in figures
            else (figures["CIDEr"], figures["CIDEr_interval"])
        )
        shown[f"{name} ({figures['n']:,})"] = (value, bounds)
    label = "right answers (%)" if "accuracy" in next(iter(values.values())) else "CIDEr"
    more = f" The {TYPES_SHOWN} most frequent of {len(values)}." if len(values) > TYPES_SHOWN else ""
    return (
        f'<h3>{escaped(title.capitalize())}</h3><figure><img src="{plots.bars_by_name(shown, label)}" '
        f'alt="{escaped(label)} {escaped(title)}: {escaped(", ".join(shown))}">'
        f"<figcaption>Whiskers: 95% intervals; in brackets how many.{more}</figcaption></figure>"
    )


# Examples


def _examples(task: str, rows: list[Row], metrics: dict[str, Any], picture: Callable[[Row], str]) -> Iterator[str]:
    """The best and the worst by score, each of another picture; where all score the same, the first ones."""
    scored = [row for row in rows if "score" in row]
    if not scored:
        yield f"<h3>{task} without a score</h3>" + "".join(_card(row, picture) for row in rows[:EXAMPLES])
        return
    order = sorted(scored, key=lambda row: -row["score"])
    count = min(EXAMPLES, (len({_shown(row) for row in scored}) + 1) // 2)
    best = _of_different_pictures(order, count)
    shown = {_shown(row) for row in best}
    others = [row for row in scored if _shown(row) not in shown]
    worst = _of_different_pictures(sorted(others, key=lambda row: row["score"]), count)
    spread = "all of one score" if order[0]["score"] == order[-1]["score"] else "by score, then in the order asked"
    yield f"<h3>{task}: best and worst</h3>"
    overlap = " The score of one caption is its word overlap, word_f1." if "word_f1" in metrics else ""
    yield (
        f'<p class="note">Picked by rule: {spread}; each of another picture. Left the best, right the worst.'
        f"{overlap}</p>"
    )
    columns = ("".join(_card(row, picture) for row in some) for some in (best, worst))
    yield '<div class="pair">' + "".join(f"<div>{column}</div>" for column in columns) + "</div>"


def _shown(row: Row) -> Any:
    return row["id"] if row["image"] is None else row["image"]


def _of_different_pictures(rows: Iterable[Row], count: int) -> list[Row]:
    chosen: dict[Any, Row] = {}
    for row in rows:
        if len(chosen) < count:
            chosen.setdefault(_shown(row), row)
    return list(chosen.values())


def _card(row: Row, picture: Callable[[Row], str]) -> str:
    lines = {}
    if "prompt" in row:
        lines["prompt"] = said(row["prompt"])
    if "raw" in row:
        lines["said"] = f"<strong>{said(row['raw'])}</strong>"
    if row.get("answers"):
        answers = Counter(row["answers"]).most_common(5)
        lines["right"] = "<br>".join(said(text) + (f" × {count}" if count > 1 else "") for text, count in answers)
    if "texts" in row:
        ranks = row.get("image_ranks") or [None] * len(row["texts"])
        lines["captions"] = "<br>".join(f"{said(text)}: rank {rank}" for text, rank in zip(row["texts"], ranks))
        lines["best caption"] = f"rank {row.get('text_rank')}"
    if "best" in row:
        lines["nearest"] = escaped(", ".join(row["best"]))
        lines["right class"] = f"rank {row['rank']}"
    told = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in lines.items())
    score = row.get("score")
    kind = "right" if score is None or score >= 0.5 else "wrong"
    badge = "no score" if score is None else f"score {score:.2f}"
    name = f"{row['task']} {row['id']}"
    return (
        f'<article class="card {kind}">{picture(row)}<div><p class="badge">{badge} <small>{escaped(name)}</small></p>'
        f"<dl>{told}</dl></div></article>"
    )


def _picture(suite: ConfigDict, row: Row) -> str:
    """An `<img>`, words where the picture is not there any more, nothing for an item without one."""
    if row["image"] is None or row["task"].endswith("_blind"):
        return ""
    shown_by = SUITES[suite.kind].picture
    try:
        image = shown_by(suite, row) if shown_by else picture_named(suite, row["image"])
    except (RecordError, OSError) as error:
        return f'<p class="none photo">picture {escaped(row["image"])} cannot be shown: {escaped(error)}</p>'
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    kind = "PNG" if max(image.size) <= 96 else "JPEG"
    return f'<img class="photo" src="{picture_uri(image, kind, SIDE)}" alt="picture {escaped(row["image"])}">'


def _circumstances(result: dict[str, Any]) -> str:
    model = {name: value for name, value in result.get("checkpoint", {}).items() if name != "inputs"}
    made = {
        "model": _told(model),
        "date": result.get("date"),
        "seed": result.get("seed"),
        "dtype": result.get("dtype"),
        "batch size": result.get("batch_size"),
        "embeddings of": result.get("tower"),
        "devices": ", ".join(result.get("devices", [])),
        "mesh": _told(result.get("mesh")),
        "versions": f"Python {result.get('python')}, {_told(result.get('versions'))}",
        "not finished": ", ".join(result.get("unfinished", [])),
        "files of the start": json.dumps(result.get("checkpoint", {}).get("inputs", {})),
    }
    return _lines({name: value if value != 0 else "0" for name, value in made.items()})


def main(values: SimpleNamespace) -> None:
    """Entry point."""
    tell(f"wrote {write_report(Path(values.out))}")


if __name__ == "__main__":
    entry.run(main, COMMANDS["report"])
