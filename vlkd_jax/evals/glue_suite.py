"""The suite of GLUE's tasks, for a classifier of texts that was fine-tuned on one: their official metrics.

Source: Wang et al. 2019, section 3; positive classes and averages as in the tasks' own scripts.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from scipy.stats import rankdata

from vlkd_jax import predict
from vlkd_jax.data.glue import GLUE, GlueRows, glue_file
from vlkd_jax.errors import UserError
from vlkd_jax.evals.files import check_choice, place
from vlkd_jax.evals.statistics import interval
from vlkd_jax.evals.suite import Row, Suite
from vlkd_jax.vlkd import VLKD

POSITIVE = 1
"""Number of the class that F1 is of."""


@dataclasses.dataclass(frozen=True)
class Classified:
    """A text, or a pair, to be classified; `labels`: the classes that the model must have, in their order."""

    row: Row
    texts: tuple[str, str]
    labels: tuple[str, ...]


def glue_items(suite: ConfigDict) -> Iterator[Classified]:
    """Every line of a task's file.

    Raises:
      UserError: a task that there is not, a file that is not there or cannot be used.
    """
    check_choice(suite, "metric", ("glue",))
    check_choice(suite, "task", GLUE)
    task = GLUE[suite.task]
    path = place(suite, "rows")
    records = GlueRows(glue_file(path.parent, path.name.removesuffix(".tsv")), suite.task, suite.labelled)
    for number, record in enumerate(map(records.__getitem__, range(len(records)))):
        texts = [record.text, *([record.second] if record.second else [])]
        row = {"task": f"glue_{suite.task}", "id": number, "image": None, "prompt": " | ".join(texts)}
        label = record.label
        row["answers"] = [] if label is None else [task.labels[int(label)] if task.labels else f"{label:g}"]
        yield Classified(row, (record.text, record.second), task.labels)


def _classify(model: VLKD, items: list[Classified], batch_size: int, _: str) -> Iterator[Row]:
    outputs = predict.classify(model, [item.texts for item in items], batch_size)
    for item, values in zip(items, outputs, strict=True):
        said = item.labels[int(values.argmax())] if item.labels else f"{values[0]:.6g}"
        yield item.row | {"raw": said, "outputs": [round(float(value), 5) for value in values]}


def judge_class(row: Row) -> Row:
    """Whether the class is right; of a score how near it is: minus the squared error."""
    normalised = {"normalised": row["raw"]}
    if not row["answers"]:
        return normalised
    if GLUE[row["task"].removeprefix("glue_")].labels:
        return normalised | {"score": float(row["raw"] == row["answers"][0])}
    return normalised | {"score": -((float(row["raw"]) - float(row["answers"][0])) ** 2)}


def figures(rows: list[Row]) -> dict[str, tuple[np.ndarray, Callable[[np.ndarray], float]]]:
    """{metric: (what each row adds [n, k], the metric from the sums and their number)}, the task's first one first.

    Spearman's is Pearson's of the ranks among these rows, which stay as they are when rows are drawn for an interval.
    """
    task = GLUE[rows[0]["task"].removeprefix("glue_")]
    said, true = ([row[name] if name == "raw" else row["answers"][0] for row in rows] for name in ("raw", "answers"))
    if not task.labels:
        x, y = np.array(said, float), np.array(true, float)
        return {"pearson": (_moments(x, y), pearson), "spearman": (_moments(rankdata(x), rankdata(y)), pearson)}
    positive = task.labels[POSITIVE]
    x, y = (np.array([value == positive for value in values], float) for values in (said, true))
    right = np.array([a == b for a, b in zip(said, true, strict=True)], float)
    available = {
        "accuracy": (right, lambda total: total[0] / total[-1]),
        "f1": (np.stack([x * y, x, y], 1), lambda total: 2 * total[0] / max(total[1] + total[2], 1)),
        "matthews": (_moments(x, y), pearson),  # of two classes they are the same
    }
    return {name: available[name] for name in task.metrics}


def _moments(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x, y = x - x.mean(), y - y.mean()  # a correlation stays; the sums keep their digits
    return np.stack([x, y, x * x, y * y, x * y], 1)


def pearson(total: np.ndarray) -> float:
    """The correlation from the sums of x, y, x x, y y, x y and their number; 0 where one of them is constant."""
    x, y, xx, yy, xy = total[:5] / total[-1]
    spread = (xx - x * x) * (yy - y * y)
    return float((xy - x * y) / math.sqrt(spread)) if spread > 1e-12 else 0.0


def score_classes(rows: list[Row]) -> dict[str, Any]:
    """The task's official metrics with 95% intervals, and beside them the most frequent class's accuracy."""
    metrics: dict[str, Any] = {"n": len(rows)}
    for name, (values, statistic) in figures(rows).items():
        total = np.append(values.reshape(len(rows), -1).sum(0), len(rows))
        metrics |= {name: float(statistic(total)), f"{name}_interval": interval(values, range(len(rows)), statistic)}
    if GLUE[rows[0]["task"].removeprefix("glue_")].labels:
        answers = [row["answers"][0] for row in rows]
        metrics["majority"] = max(map(answers.count, set(answers))) / len(answers)
    return metrics


def check_labels(name: str, model: VLKD, item: Classified) -> None:
    """Raises UserError for a model that is no classifier with these classes."""
    if model.classifier_config is None:
        raise UserError(f"{name}: texts to classify, and this model is no classifier; give a run of objective classify")
    if model.classifier_config.labels != item.labels:
        mine, theirs = (", ".join(labels) or "a score" for labels in (model.classifier_config.labels, item.labels))
        raise UserError(f"{name}: its classes are {theirs}, and this model's {mine}; give one fine-tuned on this task")


SUITE = Suite(glue_items, judge_class, score_classes, predict=_classify, check=check_labels)
