"""Predictions from files, with what they are scored against: the rows that the suites' own `judge` and `score` take.

No model and no picture is needed. Everything is checked before anything is scored.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from pathlib import Path
from typing import Any

from vlkd_jax.data.files import read_json
from vlkd_jax.errors import UserError, few
from vlkd_jax.evals import caption_suite, summary_suite, vqa_suite
from vlkd_jax.evals.captioned import read_references
from vlkd_jax.evals.predictions import read_lines, read_predictions
from vlkd_jax.evals.suite import Row, Suite
from vlkd_jax.evals.vqa import HUMANS, HUMANS_AT_LEAST
from vlkd_jax.evals.vqa_files import (
    check_same_split,
    human_answers,
    read_annotations,
    read_questions,
    types_of,
    version_of,
)
from vlkd_jax.manifest import file_sha256

KINDS = {"vqav2": "vqa", "okvqa": "vqa", "caption": "caption", "nocaps": "caption", "xsum": "summary"}
"""What `vlkd score` takes as a suite -> the kind of suite whose functions score it."""
SUITES: dict[str, Suite] = {"vqa": vqa_suite.SUITE, "caption": caption_suite.SUITE, "summary": summary_suite.SUITE}


@dataclasses.dataclass(frozen=True)
class Files:
    """What is scored, and against what.

    Attributes:
      suite: a key of `KINDS`.
      predictions: see `predictions.read_predictions`.
      annotations: official annotations, captions (COCO, nocaps or Karpathy's), or one reference a line.
      questions: of VQA, the questions that count; None: those of the annotations.
      split: of Karpathy's files.
      answer_field: of VQA, the field of each human answer.
      allow_partial: whether some of the split may have no prediction; they are left out.
    """

    suite: str
    predictions: Path
    annotations: Path
    questions: Path | None = None
    split: str = "test"
    answer_field: str = "answer"
    allow_partial: bool = False

    def hashes(self) -> dict[str, Any]:
        """{field: {"path", "sha256"}} of each file."""
        paths = {name: getattr(self, name) for name in ("predictions", "annotations", "questions")}
        return {name: {"path": str(path), "sha256": file_sha256(path)} for name, path in paths.items() if path}


def judged_rows(files: Files) -> tuple[list[Row], dict[str, Any]]:
    """The rows of what has a prediction, and what a result tells of where the answers come from.

    Raises:
      UserError: a file that cannot be used; predictions for what is not in the split, or none for what is.
    """
    kind = KINDS[files.suite]
    said = read_predictions(files.predictions, kind)
    known, about = {"vqa": _questions, "caption": _captions, "summary": _summaries}[kind](files)
    _check_unknown(files, said, known)
    scorable = {key: row for key, row in known.items() if row["answers"]}
    missing = [key for key in scorable if key not in said]
    if missing and not files.allow_partial:
        raise UserError(
            f"{files.predictions}: no prediction for {few([str(key) for key in missing])} ({len(missing):,} of "
            f"{len(scorable):,} of the split have none); --allow_partial scores those that have one"
        )
    judge = SUITES[kind].judge
    rows = [{"task": kind, "id": key, **row, "raw": said[key]} for key, row in scorable.items() if key in said]
    if not rows:
        raise UserError(f"{files.annotations}: no references for any prediction of {files.predictions}")
    return [row | judge(row) for row in rows], about | ({"missing": len(missing)} if missing else {})


def _check_unknown(files: Files, said: Collection[Any], known: Collection[Any]) -> None:
    unknown = [key for key in said if key not in known]
    if not unknown:
        return
    others = {str(key): key for key in known}
    twin = others.get(str(unknown[0]))
    hint = "another split, or another suite?"
    if twin is not None:
        hint = f"there its id is the {'number' if isinstance(twin, int) else 'text'} {twin!r}"
    raise UserError(
        f"{files.predictions}: predictions for {few([repr(key) for key in unknown])}, which "
        f"{files.questions or files.annotations} does not have ({len(unknown):,} of {len(said):,}); {hint}"
    )


def _questions(files: Files) -> tuple[dict[Any, Row], dict[str, Any]]:
    path = files.annotations
    data, entries = read_annotations(path)
    annotations = {entry["question_id"]: entry for entry in entries}
    asked = list(annotations)
    if files.questions is not None:
        questions, of_questions = read_questions(files.questions)
        check_same_split((files.questions, questions, of_questions), (path, data, entries))
        asked = [entry["question_id"] for entry in of_questions]
        without = [key for key in asked if key not in annotations]
        if without:
            raise UserError(f"{path}: no answers for question {few([str(key) for key in without])}; use matching files")
    known = {}
    for key in asked:
        entry = annotations[key]
        answers = human_answers(path, entry, files.answer_field)
        if len(answers) < HUMANS_AT_LEAST:
            raise UserError(
                f"{path}: question {key} has {len(answers)} human answer(s); VQA accuracy takes {HUMANS}, "
                f"and {HUMANS_AT_LEAST} at least"
            )
        row = {"image": entry.get("image_id", key), "answers": answers, "metric": "vqa_accuracy"}
        known[key] = row | types_of(entry)
    return known, {"annotation_version": version_of(data), "answer_field": files.answer_field}


def _captions(files: Files) -> tuple[dict[Any, Row], dict[str, Any]]:
    data = read_json(files.annotations)
    images = read_references(files.annotations, data, files.split)
    domains = {key: {"domain": image.domain} if image.domain else {} for key, image in images.items()}
    if files.suite == "nocaps" and not all(domains.values()):
        raise UserError(f"{files.annotations}: images without a domain; nocaps' own file has one for each")
    return {
        key: {"image": key, "answers": image.captions} | (domains[key] if files.suite == "nocaps" else {})
        for key, image in images.items()
    }, {}


def _summaries(files: Files) -> tuple[dict[Any, Row], dict[str, Any]]:
    lines = read_lines(files.annotations)
    if "" in lines:
        raise UserError(f"{files.annotations} line {lines.index('') + 1}: empty; a line holds one reference")
    return {k: {"image": k, "answers": [line]} for k, line in enumerate(lines)}, {}
