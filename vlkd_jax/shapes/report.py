"""One static page about a run on the built-in world: what happened, figures, curves and examples.

Everything is inlined, so the file can be mailed: no script, no network. What models said is untrusted text and escaped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from vlkd_jax.evals import plots
from vlkd_jax.evals.markup import STYLE, bounds_of, escaped, percent, picture_uri, said
from vlkd_jax.evals.statistics import RESAMPLES, interval
from vlkd_jax.metrics import goodput, goodput_line, read_metrics
from vlkd_jax.shapes import world
from vlkd_jax.shapes.page import PAGE
from vlkd_jax.workdir import write_atomic

Rows = list[dict[str, Any]]

CAPTION_EXAMPLES = 4
"""Captions shown of each kind, right and wrong."""
LOSSES = {  # loss term: (title, unit of its axis)
    "ttdm": ("TTDM: student text to CLIP text", "squared distance"),
    "itcl": ("ITCL: picture to its own caption", "cross-entropy (nats)"),
    "icti": ("ICTI: infilling with the picture", "nats per token"),
}
RETENTION = {  # metric of HeldOut: (name, colour, marker)
    "retention/text_qa": ("Text-only questions answered right", "#0072B2", "o"),
    "retention/token_accuracy": ("Tokens right when filling in texts", "#D55E00", "s"),
}


def write_report(directory: Path, result: dict[str, Any], rows: Rows, metrics: Path, suite: ConfigDict) -> Path:
    """Writes `directory/index.html` and returns its path.

    Args:
      result: what `vlkd_jax.shapes.demo` puts in demo.json, fractions between 0 and 1. A `before_interval` beside a
        `before` is shown where there is one; the intervals of the blind answers are computed from `rows`.
      rows: predictions of the suite with `baselines` set.
      metrics: metrics.jsonl of the training run; a missing file or a missing kind leaves its curves out.
      suite: `config.shapes` of configs/suites.py; pictures are drawn again from its seed and split.
    """
    lines, unreadable = read_metrics(metrics)
    train, held_out = (_by_step(lines, kind) for kind in ("train", "eval"))
    groups = _bar_groups(result["vqa"], _intervals(rows, "vqa_blind"), result["n"])
    parts = {
        "style": STYLE,
        "story": _story(result, rows),
        "world": _world(suite),
        "sample": _sample(rows, suite),
        "bars": _bars(groups),
        "vqa_table": _vqa_table(groups),
        "kinds_table": _kinds_table(result),
        "other_table": _other_table(result),
        "resamples": f"{RESAMPLES:,}",
        "captioned": f"{result['caption']['n']:,}",
        "distinct": f"{round(result['caption']['distinct'] * result['caption']['n']):,}",
        "captions": _caption_examples(rows, suite),
        "caption_count": CAPTION_EXAMPLES,
        "smoothing": plots.SMOOTHING,
        "questions": _question_examples(rows, suite, list(result["vqa"]["by_type"])),
        "losses": _loss_curves(train, held_out),
        "retention": _retention_curves(held_out),
        "unreadable": f"<p>Lines of metrics.jsonl that could not be read: {unreadable}.</p>" if unreadable else "",
        "circumstances": _circumstances(result, suite, goodput(lines)),
    }
    directory.mkdir(parents=True, exist_ok=True)
    write_atomic(directory / "index.html", PAGE.substitute(parts).encode())
    return directory / "index.html"


# What happened


def _story(result: dict[str, Any], rows: Rows) -> str:
    vqa, caption, text_qa = result["vqa"], result["caption"], result["text_qa"]
    sentences = (
        f"A small text model (BART, the student) was trained for {result['steps']:,} steps on pictures with captions, "
        "beside a frozen image-text model (CLIP, the teacher); no question about a picture was among what it was "
        "trained on.",
        f"Then it was asked {result['n']:,} questions about pictures it had never seen, and it answered "
        f"<strong>{percent(vqa['after'])}</strong> right (95% interval {bounds_of(vqa['after_interval'])}): "
        f"before distillation it was {percent(vqa['before'])}, and always giving the most frequent answer to that "
        f"type of question scores {percent(vqa['majority'])}.",
        _picture_effect(rows, vqa["blind"]),
        f"Its captions reach an attribute F1 of {percent(caption['attribute_f1']['after'])} and are right in every "
        f"detail for {percent(caption['exact_match']['after'])} of the pictures. Of questions about a written "
        f"description, which it could answer from the start, it answers {percent(text_qa['after'])} right; before it "
        f"was {percent(text_qa['before'])}.",
    )
    return "".join(f"<p>{sentence}</p>" for sentence in sentences)


def _world(suite: ConfigDict) -> str:
    size, most = world.IMAGE_SIZE, world.COUNTS[-1]
    kinds = {"shapes": world.SHAPES, "colors": world.COLORS, "sizes": world.RADII, "places": world.POSITIONS}
    text = f"The built-in world: pictures of {size} by {size} pixels with one to {most} objects; there are "
    text += ", ".join(f"{len(some)} {name}" for name, some in kinds.items()) + "."
    if suite.split == "test":
        text += " Every picture asked about holds an object whose size, color and shape no training picture combined."
    return text


def _picture_effect(rows: Rows, blind: float) -> str:
    """What taking the picture away does to the same questions: the paired difference and its interval."""
    unseen = {row["id"]: row["score"] for row in rows if row["task"] == "vqa_blind"}
    pairs = [(row["score"] - unseen[row["id"]], row["image"]) for row in rows if row["task"] == "vqa"]
    differences, images = np.array([p[0] for p in pairs]), [p[1] for p in pairs]
    low, high = interval(differences, images)
    points = f"{100 * differences.mean():+.1f} points, 95% interval {100 * low:+.1f} to {100 * high:+.1f}"
    start = f"With the picture taken away, the same student answers {percent(blind)} of the same questions right: "
    if low > 0:
        return f"{start}seeing the picture makes the difference ({points})."
    if high < 0:
        return f"{start}it does <strong>worse</strong> with the picture than without ({points})."
    return f"{start}these questions show <strong>no effect of the picture</strong> ({points})."


def _intervals(rows: Rows, task: str) -> dict[str, tuple[float, float]]:
    """The interval of each question type's score, and of all under "overall"."""
    chosen = [row for row in rows if row["task"] == task]
    kinds = {kind: [row for row in chosen if row["type"] == kind] for kind in dict.fromkeys(r["type"] for r in chosen)}
    return {
        kind: interval(np.array([row["score"] for row in some]), [row["image"] for row in some])
        for kind, some in {"overall": chosen, **kinds}.items()
    }


# Tables and bars


def _bar_groups(vqa: dict[str, Any], blind: dict[str, tuple], n: int) -> dict[tuple[str, int], dict[str, plots.Bar]]:
    """(label, n) -> series -> (fraction, interval)."""
    figures = {"overall": vqa | {"n": n}, **vqa["by_type"]}
    return {
        ("all questions" if kind == "overall" else kind, f["n"]): {
            "before": (f["before"], f.get("before_interval")),
            "after": (f["after"], f["after_interval"]),
            "blind": (f["blind"], blind[kind]),
            "majority": (f["majority"], None),
        }
        for kind, f in figures.items()
    }


def _bars(groups: dict[tuple[str, int], dict[str, plots.Bar]]) -> str:
    named = {("all" if k == 0 else label): group for k, ((label, _), group) in enumerate(groups.items())}
    wide, narrow = (plots.bars(named, upright) for upright in (True, False))
    alt = "Bar chart of answers right by question type; the table below holds the same figures."
    return f'<picture><source media="(min-width: 720px)" srcset="{wide}"><img src="{narrow}" alt="{alt}"></picture>'


def _cell(value: float | None, bounds: Iterable[float] | None = None) -> str:
    if value is None:
        return "<td>–</td>"
    return f"<td>{percent(value)}" + (f"<small>{bounds_of(bounds)}</small></td>" if bounds else "</td>")


def _vqa_table(groups: dict[tuple[str, int], dict[str, plots.Bar]]) -> str:
    return "".join(
        f'<tr><th scope="row">{escaped(label)}<small>n = {n:,}</small></th>'
        + "".join(_cell(*group[key]) for key in plots.SERIES)
        + "</tr>"
        for (label, n), group in groups.items()
    )


def _kinds_table(result: dict[str, Any]) -> str:
    """After distillation: kinds of object that no training picture shows beside kinds that training saw."""
    seen = result["seen_kinds"]
    lines = [("all questions", result["n"], result["vqa"], seen["vqa"])]
    lines += [(kind, f["n"], f, seen["vqa"]["by_type"][kind]) for kind, f in result["vqa"]["by_type"].items()]
    lines += [
        (f"captions: {label}", result["caption"]["n"], result["caption"][name], seen["caption"][name])
        for name, label in (("attribute_f1", "attribute F1"), ("exact_match", "right in every detail"))
    ]
    return "".join(
        f'<tr><th scope="row">{escaped(label)}<small>n = {n:,} each</small></th>'
        + "".join(_cell(figure["after"], figure["after_interval"]) for figure in pair)
        + "</tr>"
        for label, n, *pair in lines
    )


def _other_table(result: dict[str, Any]) -> str:
    caption, text_qa, ranks = result["caption"], result["text_qa"], result["retrieval"]
    retrieval = {"before": ranks["before"], "after": ranks["r_at_1"], "after_interval": ranks["r_at_1_interval"]}
    lines = (
        ("captions: attribute F1", caption["n"], caption["attribute_f1"], None),
        ("captions: right in every detail", caption["n"], caption["exact_match"], None),
        ("text-only questions, no picture", text_qa["n"], text_qa, None),
        ("retrieval: the right picture first", ranks["n"], retrieval, ranks["clip_r_at_1"]),
    )
    return "".join(
        f'<tr><th scope="row">{label}<small>n = {n:,}</small></th>'
        + _cell(figure["before"], figure.get("before_interval"))
        + f"{_cell(figure['after'], figure['after_interval'])}{_cell(teacher)}</tr>"
        for label, n, figure, teacher in lines
    )


# Examples


def _picture(suite: ConfigDict, index: int) -> str:
    """An `<img>` of a scene, drawn again; its alternative text tells what is on it."""
    from PIL import Image

    scene = world.make_scene(suite.seed, suite.split, index)
    alt = "Picture: " + ", ".join(" ".join(thing.attributes) for thing in scene.things)
    source = picture_uri(Image.fromarray(world.render(scene)))
    return f'<img class="scene" src="{source}" width="144" height="144" alt="{alt}">'


def _question(row: dict[str, Any], suite: ConfigDict) -> str:
    """The bare question of a row's prompt."""
    before, _, after = suite.question_decoder.partition("{question}")
    return escaped(row["prompt"].removeprefix(before).removesuffix(after))


def _sample(rows: Rows, suite: ConfigDict) -> str:
    """The first picture with what is asked about it, to show what the page is about."""
    row = next(row for row in rows if row["task"] == "vqa")
    told = f"“{_question(row, suite)}”<br>Right answer: {said(row['answers'][0])}"
    return f'<figure class="sample">{_picture(suite, row["image"])}<figcaption>{told}</figcaption></figure>'


def _card(suite: ConfigDict, row: dict[str, Any], right: bool, verdict: str, lead: str, lines: dict[str, str]) -> str:
    """One example; `verdict`, `lead` and the values of `lines` are HTML."""
    kind, mark = ("right", "✓") if right else ("wrong", "✗")
    told = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in lines.items())
    return (
        f'<article class="card {kind}">{_picture(suite, row["image"])}<div><p class="badge">{mark} {verdict}</p>'
        f"<p>{lead}</p><dl>{told}</dl></div></article>"
    )


def _question_examples(rows: Rows, suite: ConfigDict, kinds: list[str]) -> str:
    """Of each type the first question answered right and the first answered wrong, in the order they were asked."""
    blind = {row["id"]: row["raw"] for row in rows if row["task"] == "vqa_blind"}

    def card(row: dict[str, Any]) -> str:
        lines = {
            "answer": f"<strong>{said(row['raw'])}</strong>",
            "right answer": said(row["answers"][0]),
            "no picture": said(blind[row["id"]]),
        }
        right = row["score"] == 1
        return _card(suite, row, right, "right" if right else "wrong", _question(row, suite), lines)

    parts = []
    for kind in kinds:
        asked = [row for row in rows if row["task"] == "vqa" and row["type"] == kind]
        right, wrong = (_first(asked, lambda row, r=r: (row["score"] == 1) == r, 1) for r in (True, False))
        count = sum(row["score"] == 1 for row in asked)
        parts.append(f"<h4>{escaped(kind)} <small>{count:,} of {len(asked):,} right</small></h4>")
        parts.append(_pair(card, right, wrong, "No question of this type was answered"))
    return "".join(parts)


def _caption_examples(rows: Rows, suite: ConfigDict) -> str:
    """The first captions that are right in every detail, and the first that are not."""

    def card(row: dict[str, Any]) -> str:
        right = row["score"] == 1
        lead, lines = said(f"{row['prompt']} {row['raw']}"), {"reference": escaped(row["answers"][0])}
        verdict = "right in every detail" if right else f"wrong: attribute F1 {percent(row['score'])}"
        return _card(suite, row, right, verdict, lead, lines)

    captions = [row for row in rows if row["task"] == "caption"]
    right, wrong = (
        _first(captions, lambda row, r=r: (row["score"] == 1) == r, CAPTION_EXAMPLES) for r in (True, False)
    )
    return _pair(card, right, wrong, "No caption was")


def _first(rows: Rows, fits: Callable[[dict[str, Any]], bool], count: int) -> Rows:
    return [row for row in rows if fits(row)][:count]


def _pair(card: Callable[[dict[str, Any]], str], right: Rows, wrong: Rows, none: str) -> str:
    """Right ones beside wrong ones; where there are none of a kind, words say so and the others take both columns."""
    if right and wrong:
        columns = ["".join(map(card, some)) for some in (right, wrong)]
        return '<div class="pair">' + "".join(f"<div>{column}</div>" for column in columns) + "</div>"
    told = "".join(
        f'<p class="none">{none} {name}.</p>' for name, some in (("right", right), ("wrong", wrong)) if not some
    )
    return f'{told}<div class="pair">{"".join(map(card, right + wrong))}</div>'


# Curves


def _by_step(lines: list[dict[str, Any]], kind: str) -> dict[int, dict]:
    """The lines of a kind; the later line of a step counts."""
    return dict(sorted({line["step"]: line for line in lines if line["kind"] == kind}.items()))


def _points(lines: dict[int, dict], name: str) -> tuple[list[int], list[float]]:
    """(steps, values) of one metric, without those that are not finite."""
    points = [(step, float(values[name])) for step, values in lines.items() if name in values]
    points = [(step, value) for step, value in points if math.isfinite(value)]
    return [p[0] for p in points], [p[1] for p in points]


def _ends(name: str, steps: list[int], values: list[float], unit: str = "") -> str:
    return f"{name}: {values[0]:.3g}{unit} at step {steps[0]}, {values[-1]:.3g}{unit} at step {steps[-1]}"


def _loss_curves(train: dict[int, dict], held_out: dict[int, dict]) -> str:
    panels = []
    for term, (title, unit) in LOSSES.items():
        trained, kept = _points(train, term), _points(held_out, f"held_out/{term}")
        curves = [plots.Curve("training", *trained, "#0072B2", noisy=True)] if trained[0] else []
        curves += [plots.Curve("held-out pairs", *kept, "#D55E00", marker="s")] if kept[0] else []
        if curves:
            alt = f"Curves of {title}: " + "; ".join(_ends(c.name, c.steps, c.values) for c in curves)
            panels.append(f'<img src="{plots.panel(title, unit, curves)}" alt="{alt}">')
    return f'<div class="panels">{"".join(panels)}</div>' if panels else '<p class="none">No losses were recorded.</p>'


def _retention_curves(held_out: dict[int, dict]) -> str:
    curves = []
    for metric, (name, color, marker) in RETENTION.items():
        steps, values = _points(held_out, metric)
        if steps:
            curves.append(plots.Curve(name, steps, [100 * v for v in values], color, marker=marker))
    if not curves:
        return '<p class="none">No held-out figures were recorded during training.</p>'
    ends = [_ends(c.name, c.steps, c.values, unit="%") for c in curves]
    picture = plots.panel("Text abilities during training", "right (%)", curves, top=105)
    image = f'<img src="{picture}" alt="Curves: {"; ".join(ends)}">'
    told = "".join(f"<p>{line}.</p>" for line in ends)
    return f'<figure class="beside">{image}<figcaption>{told}</figcaption></figure>'


# How it was made


def _circumstances(result: dict[str, Any], suite: ConfigDict, time_spent: dict[str, float]) -> str:
    pictures = {index for index, _, _ in world.question_set(suite.seed, suite.split, suite.questions)}
    lines = {
        "date": result["date"],
        "seed": result["seed"],
        "training": f"{result['steps']:,} steps",
        "questions": f"{result['n']:,} about {len(pictures):,} pictures, split “{suite.split}”",
        "captions": f"{result['caption']['n']:,}",
        "text-only questions": f"{result['text_qa']['n']:,}",
        "retrieval": f"{result['retrieval']['n']:,} pictures",
        "devices": ", ".join(result["devices"]) + f" ({result['machine']})",
        "versions": f"Python {result['python']}, " + ", ".join(f"{k} {v}" for k, v in result["versions"].items()),
        **({"time of training": goodput_line(time_spent)} if time_spent else {}),
        "the same again": f"vlkd demo --workdir=DIR --seed={result['seed']}",
    }
    return "".join(f"<dt>{name}</dt><dd>{escaped(value)}</dd>" for name, value in lines.items())
