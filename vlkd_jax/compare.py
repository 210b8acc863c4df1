"""Compares two systems on the same items: each figure's difference with a paired bootstrap, clustered by picture.

`python -m vlkd_jax.compare A B`: directories of two evaluations (or one suite of each), or two files of predictions
with `--suite` and `--annotations` as for `vlkd score`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from vlkd_jax import console, entry
from vlkd_jax.commands import COMMANDS
from vlkd_jax.errors import UserError, few
from vlkd_jax.evals import caption_metrics, glue_suite
from vlkd_jax.evals.predictions import read_jsonl
from vlkd_jax.evals.retrieval_suite import AT
from vlkd_jax.evals.runner import PREDICTIONS
from vlkd_jax.evals.scoring import Files, judged_rows
from vlkd_jax.evals.statistics import RESAMPLES, interval
from vlkd_jax.evals.suite import Row
from vlkd_jax.evals.summary_suite import ROUGE
from vlkd_jax.runtime import tell
from vlkd_jax.score import files_given

Statistic = Callable[[np.ndarray], float]
Figures = dict[str, tuple[np.ndarray, Statistic]]
"""{figure: (what each item adds to it, [n] or [n, k]; the figure from the sums over items and their number)}."""


def compare(rows_a: Sequence[Row], rows_b: Sequence[Row], seed: int = 0) -> dict[str, dict[str, Any]]:
    """{figure: {"a", "b", "difference" (b - a), "interval" (95%, of the difference), "n"}}.

    All questions about one picture are drawn together. CIDEr is the mean of what the drawn pictures have under the
    document frequencies of all references, which stay as they are; BLEU is counted anew for each draw.

    Args:
      rows_a, rows_b: judged rows; those without a score are left out.

    Raises:
      UserError: the two are not about the same items with the same answers.
    """
    a, b = _paired(rows_a, rows_b)
    results: dict[str, dict[str, Any]] = {}
    tasks = list(dict.fromkeys(row["task"] for row in a))
    for task in tasks:
        chosen = [k for k, row in enumerate(a) if row["task"] == task]
        of_a, of_b = ([rows[k] for k in chosen] for rows in (a, b))
        clusters = [row["id"] if row["image"] is None else row["image"] for row in of_a]
        figures_b = _figures(of_b)
        for name, (values_a, statistic) in _figures(of_a).items():
            label = name if len(tasks) == 1 else f"{task}/{name}"
            results[label] = _difference(values_a, figures_b[name][0], statistic, clusters, seed)
    return results


def _difference(
    values_a: np.ndarray, values_b: np.ndarray, statistic: Statistic, clusters: Sequence[Any], seed: int
) -> dict[str, Any]:
    count = len(values_a)
    values_a, values_b = values_a.reshape(count, -1), values_b.reshape(count, -1)
    width = values_a.shape[1]

    def of_a(total: np.ndarray) -> float:
        return statistic(np.append(total[:width], total[-1]))

    def of_b(total: np.ndarray) -> float:
        return statistic(total[width:])

    both = np.hstack([values_a, values_b])
    total = np.append(both.sum(0), count)
    result = {"a": float(of_a(total)), "b": float(of_b(total))}
    bounds = interval(both, clusters, lambda t: of_b(t) - of_a(t), seed)
    return result | {"difference": result["b"] - result["a"], "interval": bounds, "n": count}


def _paired(rows_a: Sequence[Row], rows_b: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """The scored rows of both, in the order of the first."""
    of_a, of_b = ({(row["task"], row["id"]): row for row in rows if "score" in row} for rows in (rows_a, rows_b))
    if not of_a or not of_b:
        raise UserError(f"{'A' if not of_a else 'B'} has no scored predictions; answer with annotations first")
    for name, other, first, second in (("A", "B", of_a, of_b), ("B", "A", of_b, of_a)):
        alone = [str(key[1]) for key in first if key not in second]
        if alone:
            raise UserError(
                f"{name} has scores for {few(alone)}, and {other} has none; compare runs over the same items"
            )
    for key, row in of_a.items():
        if any(row.get(field) != of_b[key].get(field) for field in ("answers", "image", "metric", "label", "texts")):
            raise UserError(f"{key[0]} {key[1]} has another picture or other answers in A than in B: of other data")
    return list(of_a.values()), [of_b[key] for key in of_a]


def _figures(rows: Sequence[Row]) -> Figures:
    """What the rows of one task are compared by."""
    if "rouge" in rows[0]:
        return {name: (np.array([row["rouge"][name] for row in rows]), _mean) for name in ROUGE}
    if rows[0]["task"] == "denoise":
        return {
            "denoise_loss": (np.array([[row["loss"], row["tokens"]] for row in rows]), _ratio),
            "token_accuracy": (np.array([[row["right"], row["tokens"]] for row in rows]), _ratio),
        }
    if rows[0]["task"].startswith("glue_"):
        return glue_suite.figures(rows)
    if "image_ranks" in rows[0]:
        return _recalls(rows)
    if (
        rows[0]["task"] == "caption" and "things" not in rows[0]
    ):  # those of the built-in world have figures of their own
        return _of_captions(rows)
    name = {"vqa": "accuracy", "classification": "top_1"}.get(rows[0]["task"], "score")
    return {name: (np.array([row["score"] for row in rows]), _mean)}


def _mean(total: np.ndarray) -> float:
    return total[0] / total[-1]


def _ratio(total: np.ndarray) -> float:
    return total[0] / total[1]


def _recalls(rows: Sequence[Row]) -> Figures:
    figures: Figures = {}
    for k in AT:
        hits = [[rank is not None and rank <= k for rank in row["image_ranks"]] for row in rows]
        figures[f"text_to_image_r_at_{k}"] = (np.array([[sum(some), len(some)] for some in hits], float), _ratio)
        first = [row["text_rank"] is not None and row["text_rank"] <= k for row in rows]
        figures[f"image_to_text_r_at_{k}"] = (np.array(first, float), _mean)
    return figures


def _of_captions(rows: Sequence[Row]) -> Figures:
    candidates = caption_metrics.tokenize_all([row["normalised"] for row in rows])
    references = [caption_metrics.tokenize_all(row["answers"]) for row in rows]
    scores = caption_metrics.scores(candidates, references)
    counts = [caption_metrics.bleu_counts(*pair) for pair in zip(candidates, references, strict=True)]
    return {
        "CIDEr": (scores["CIDEr"], _mean),
        "Bleu_4": (np.array(counts), lambda total: caption_metrics.bleu(total)[3]),
        "ROUGE_L": (scores["ROUGE_L"], _mean),
    }


def read_evaluation(path: Path) -> dict[str, list[Row]]:
    """{suite: rows} of an evaluation's directory, of one suite's directory or of a predictions.jsonl.

    Raises:
      UserError: nothing of the kind there.
    """
    if path.is_file():
        return {"": read_jsonl(path)}
    if (path / PREDICTIONS).is_file():
        return {"": read_jsonl(path / PREDICTIONS)}
    suites = {str(file.parent.relative_to(path)): read_jsonl(file) for file in sorted(path.rglob(PREDICTIONS))}
    if not suites:
        raise UserError(
            f"{path}: no {PREDICTIONS} there; give the --workdir of vlkd evaluate, or a file of predictions"
        )
    return suites


def compare_paths(a: Path, b: Path, files: Files | None) -> dict[str, dict[str, dict[str, Any]]]:
    """{suite: `compare`} of what both have; `files` tells what two files of predictions are scored against."""
    if files is not None:
        of_a, of_b = ({files.suite: judged_rows(dataclasses.replace(files, predictions=path))[0]} for path in (a, b))
    else:
        of_a, of_b = read_evaluation(a), read_evaluation(b)
    if len(of_a) == len(of_b) == 1:
        of_b = dict(zip(of_a, of_b.values()))
    shared = [name for name in of_a if name in of_b]
    if not shared:
        raise UserError(f"{a} has {few(list(of_a))} and {b} has {few(list(of_b))}: no suite that both have")
    try:
        return {name: compare(of_a[name], of_b[name]) for name in shared}
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:  # rows that somebody has changed
        told = f"{type(error).__name__} {error}"
        raise UserError(f"{a} or {b}: a row is not as vlkd evaluate wrote it ({told}); evaluate again") from error


def figure_rows(figures: dict[str, dict[str, Any]]) -> list[tuple[str, ...]]:
    """Cells of a table: name, both sides, their difference, its interval (* where 0 is left out), n."""
    rows = []
    for name, figure in figures.items():
        low, high = figure["interval"]
        cells = (f"{figure['a']:.4f}", f"{figure['b']:.4f}", f"{figure['difference']:+.4f}")
        clear = "" if low <= 0 <= high else " *"
        rows.append((name, *cells, f"[{low:+.4f}, {high:+.4f}]{clear}", f"{figure['n']:,}"))
    return rows


def table(results: dict[str, dict[str, dict[str, Any]]], a: Path, b: Path) -> str:
    """The differences for people."""
    lines = [f"A: {a}", f"B: {b}", ""]
    for suite, figures in results.items():
        lines += [console.table(figure_rows(figures), (suite, "A", "B", "B - A", "95% of B - A", "n")), ""]
    told = f"{RESAMPLES:,} paired resamples by picture; *: 0 is left out"
    return "\n".join([*lines, f"{told}; CIDEr's document frequencies are those of all references"])


def main(values: SimpleNamespace) -> None:
    """Entry point."""
    a, b = Path(values.a), Path(values.b)
    if bool(values.suite) != bool(values.annotations):
        raise UserError("--suite and --annotations belong together: they tell what two files of predictions answer")
    for path in (a, b):
        if not path.exists():
            raise UserError(f"{path}: not there")
    results = compare_paths(a, b, files_given(a, values) if values.suite else None)
    tell(json.dumps(results, indent=1) if values.json else table(results, a, b))


if __name__ == "__main__":
    entry.run(main, COMMANDS["compare"])
