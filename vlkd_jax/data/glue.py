"""GLUE's nine tasks (Wang et al. 2019) in their official TSV files: what is classified, and as what.

Columns are found by the names in a file's first line, as the tasks' files have them in different places; CoLA's has no
such line. Files that hold numbers in place of the labels' words, as Hugging Face's copies do, are read too.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

from vlkd_jax.data.files import read_text
from vlkd_jax.data.sources import Record
from vlkd_jax.errors import UserError

TRAIN = "train"
ENDINGS = (".tsv", ".tsv.gz")


@dataclasses.dataclass(frozen=True)
class GlueTask:
    """One of the tasks.

    Attributes:
      texts: the columns of one text or of two; of CoLA, whose test set alone has names, numbers.
      labels: the classes by their names, in Hugging Face's order; none: a score.
      metrics: the official ones, the first of which leads; keys of `evals.glue_suite.METRICS`.
      label: the column of the label.
      validation: names of the files that are held out, without ending.
      folder: where GLUE's own archive has it.
    """

    texts: tuple[str, ...]
    labels: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)
    label: str = "label"
    validation: tuple[str, ...] = ("dev",)
    folder: str = ""


PAIR = ("sentence1", "sentence2")
ENTAILMENT = ("entailment", "not_entailment")
GLUE = {
    "cola": GlueTask(("3",), ("unacceptable", "acceptable"), ("matthews",), "1", folder="CoLA"),
    "sst2": GlueTask(("sentence",), ("negative", "positive"), folder="SST-2"),
    "mrpc": GlueTask(
        ("#1 String", "#2 String"),
        ("not_equivalent", "equivalent"),
        ("f1", "accuracy"),
        "Quality",
        folder="MRPC",
    ),
    "stsb": GlueTask(PAIR, (), ("pearson", "spearman"), "score", folder="STS-B"),
    "qqp": GlueTask(
        ("question1", "question2"), ("not_duplicate", "duplicate"), ("f1", "accuracy"), "is_duplicate", folder="QQP"
    ),
    "mnli": GlueTask(
        PAIR,
        ("entailment", "neutral", "contradiction"),
        label="gold_label",
        validation=("dev_matched", "dev_mismatched"),
        folder="MNLI",
    ),
    "qnli": GlueTask(("question", "sentence"), ENTAILMENT, folder="QNLI"),
    "rte": GlueTask(PAIR, ENTAILMENT, folder="RTE"),
    "wnli": GlueTask(PAIR, ("not_entailment", "entailment"), folder="WNLI"),
}
"""By the names that Hugging Face gives them."""


class GlueRows:
    """The lines of one file: `Record`s with `text`, `second` and `label`.

    Args:
      path: of the file, which may be a .gz.
      task: a key of `GLUE`.
      labelled: whether each line must have a label; of a test set it has none.

    Raises:
      UserError: naming the file, the line and the field: no such file or column, a line with other columns, a label
        that the task has not, no lines.
    """

    def __init__(self, path: Path, task: str, labelled: bool = True):
        self.path, self.task = path, GLUE[task]
        lines = [line for line in read_text(path).split("\n") if line.strip()]
        headless = self.task.label.isdecimal() and labelled
        texts = ("sentence",) if self.task.label.isdecimal() and not labelled else self.task.texts
        head = lines[: not headless]
        names = head[0].rstrip("\r").split("\t") if head else [str(k) for k in range(4)]
        needed = [*texts, *([self.task.label] if labelled else [])]
        missing = [name for name in needed if name not in names]
        if missing:
            raise UserError(f"{path}: no column {missing[0]}; {task} has {', '.join(needed)}, this file {head[:1]}")
        self.rows, places = [], [names.index(name) for name in needed]
        for number, line in enumerate(lines[len(head) :], 1 + len(head)):
            cells = line.rstrip("\r").split("\t")
            if len(cells) <= max(places):
                told = f"{len(cells)} columns, and the first line {len(names)}"
                raise UserError(f"{path} line {number}: {told}; restore the official file")
            values = [cells[place] for place in places]
            label = _label(self.task, values.pop(), f"{path} line {number}") if labelled else None
            self.rows.append((number, *values, *[""] * (2 - len(values)), label))
        if not self.rows:
            raise UserError(f"{path}: no lines in it")

    @property
    def labels(self) -> list[float | None]:
        """Of every line."""
        return [row[-1] for row in self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Record:
        number, text, second, label = self.rows[index]
        return Record(text, second=second, label=label, name=f"{self.path} line {number}")


def _label(task: GlueTask, value: str, where: str) -> float:
    """The number of a class, or a score."""
    value = value.strip()
    if not task.labels:
        try:
            score = float(value)
        except ValueError:
            score = math.nan
        if math.isfinite(score):
            return score
        raise UserError(f"{where}: {task.label} is {value!r}; it must be a number")
    if value in task.labels:
        return task.labels.index(value)
    if value.isdecimal() and int(value) < len(task.labels):
        return int(value)
    raise UserError(f"{where}: the label is {value!r}; it is one of {', '.join(task.labels)}, or its number from 0")


def glue_file(directory: str | Path, name: str) -> Path:
    """The file NAME.tsv, or NAME.tsv.gz, of a task's folder. Raises UserError when there is neither."""
    for ending in ENDINGS:
        if (path := Path(directory) / f"{name}{ending}").is_file():
            return path
    raise UserError(f"{directory}: no {name}.tsv there; give the folder of one of GLUE's tasks, such as glue/RTE")
