"""The questions of a suite about pictures, from the official files of VQA v2 and OK-VQA or a user's own, checked."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from vlkd_jax.console import say
from vlkd_jax.errors import UserError
from vlkd_jax.evals.files import NONE, check_pictures, check_places, filled, place
from vlkd_jax.evals.suite import Row
from vlkd_jax.evals.vqa import HUMANS, HUMANS_AT_LEAST
from vlkd_jax.evals.vqa_files import (
    Entries,
    check_same_split,
    human_answers,
    read_annotations,
    read_questions,
    types_of,
)


def read_asked(suite: ConfigDict) -> Entries:
    """The questions of official VQA files with their answers and the names of their pictures, which are looked at.

    Raises:
      UserError: a file that is not there or cannot be used, files of different splits, an id that occurs twice, a
        question without answers or with too few of them for its metric, more pictures that cannot be used than
        `suite.max_unusable` allows.
    """
    check_places(suite, "questions", "annotations", "images")
    path = place(suite, "questions")
    data, questions = read_questions(path)
    known = {} if suite.annotations == NONE else _matching_annotations(suite, data, questions)
    name = _image_names(suite, [entry["image_id"] for entry in questions])
    items = [
        {"id": entry["question_id"], "question": entry["question"], "image": name(entry["image_id"])}
        | known.get(entry["question_id"], {"answers": []})
        for entry in questions
    ]
    check_pictures(suite, [item["image"] for item in items], path)
    return items


def _matching_annotations(suite: ConfigDict, asked: dict[str, Any], questions: Entries) -> dict[Any, Row]:
    """{question id: its human answers and its types} of all of `questions`, the list of the questions file `asked`."""
    path = place(suite, "annotations")
    data, entries = read_annotations(path)
    check_same_split((place(suite, "questions"), asked, questions), (path, data, entries))
    annotations = {entry["question_id"]: entry for entry in entries}
    without = [entry["question_id"] for entry in questions if entry["question_id"] not in annotations]
    if without:
        raise UserError(
            f"{path}: no answers for question {without[0]} ({len(without)} of {len(questions)} have none); use "
            f"matching files, or --config.{suite.name}.annotations={NONE} to answer without a score"
        )
    if len(annotations) > len(questions):
        say(f"{path}: {len(annotations) - len(questions):,} annotations are of no question that is asked")
    known = {
        entry["question_id"]: {"answers": human_answers(path, entry, suite.answer_field), **types_of(entry)}
        for entry in (annotations[question["question_id"]] for question in questions)
    }
    if suite.metric == "vqa_accuracy":
        _check_numbers(suite, path, {number: row["answers"] for number, row in known.items()})
    return known


def _check_numbers(suite: ConfigDict, path: Path, answers: dict[Any, list[str]]) -> None:
    """Says how many questions have other than ten answers. Raises UserError for one with fewer than are needed."""
    field, needed = f"config.{suite.name}.answers_needed", suite.answers_needed
    if not HUMANS_AT_LEAST <= needed <= HUMANS:
        raise UserError(
            f"{field} is {needed}; it must be from {HUMANS_AT_LEAST} to {HUMANS}, since of fewer than "
            f"{HUMANS_AT_LEAST} answers not even the one of all would score 1"
        )
    few = [number for number, given in answers.items() if len(given) < needed]
    if few:
        raise UserError(
            f"{path}: question {few[0]} has {len(answers[few[0]])} human answer(s), and VQA accuracy takes {HUMANS} "
            f"({len(few)} of {len(answers)} questions have fewer than {needed}); --{field}={HUMANS_AT_LEAST} scores "
            f"what is there, and --config.{suite.name}.metric=exact_match counts an answer as right that is one of them"
        )
    other = sum(len(given) != HUMANS for given in answers.values())
    if other:
        say(f"{path}: {other} of {len(answers)} questions have other than {HUMANS} answers; scored over what is there")


def _image_names(suite: ConfigDict, image_ids: Iterable[Any]) -> functools.partial[str]:
    """The function image id -> name of its picture: of the names with | between, that of most of these pictures."""
    folder, image_ids = place(suite, "images"), list(image_ids)
    choices = [
        functools.partial(_image_name, suite, template.replace("{split}", suite.split))
        for template in suite.image_name.split("|")
    ]
    if len(choices) == 1:
        return choices[0]
    return max(choices, key=lambda name: sum((folder / name(image_id)).is_file() for image_id in image_ids))


def _image_name(suite: ConfigDict, template: str, image_id: Any) -> str:
    return filled(suite, "image_name", template, image_id=image_id)
