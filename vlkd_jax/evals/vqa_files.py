"""The official files of VQA v2 and OK-VQA, or a user's own in their form: questions and annotations, checked."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vlkd_jax.data.files import read_json
from vlkd_jax.errors import UserError

ANSWER_FIELDS = ("answer", "raw_answer")
"""Of a human's answer: OK-VQA has both; `raw_answer` is what was typed."""
TYPES = ("question_type", "answer_type")
Entries = list[dict[str, Any]]


def read_questions(path: Path) -> tuple[dict[str, Any], Entries]:
    """The file and its list `questions`.

    Raises:
      UserError: no such file, no such list, an entry without a field that is needed, an id that occurs twice.
    """
    data = read_json(path)
    questions = _entries(data, path, "questions", ("question_id", "image_id", "question"))
    for entry in questions:
        if not isinstance(entry["question"], str):
            raise UserError(f"{path}: question {entry['question_id']}: field question is not a text")
    return data, questions


def read_annotations(path: Path) -> tuple[dict[str, Any], Entries]:
    """The file and its list `annotations`. Raises UserError as `read_questions` does."""
    data = read_json(path)
    return data, annotation_entries(data, path)


def annotation_entries(data: Any, path: Path) -> Entries:
    """The list `annotations` of a file's value. Raises UserError as `read_questions` does."""
    return _entries(data, path, "annotations", ("question_id", "answers"))


def version_of(data: dict[str, Any]) -> str:
    """What a file says of its own version and split; "": nothing."""
    info = data.get("info")
    version = info.get("version") if isinstance(info, dict) else None
    told = [f"version {version}" if version else "", str(data.get("data_subtype") or "")]
    return ", ".join(part for part in told if part)


def human_answers(path: Path, entry: dict[str, Any], field: str = "answer") -> list[str]:
    """The answers of an annotation. Raises UserError for one that has none, or one that is no text."""
    where = f"{path}: question {entry['question_id']}"
    humans = entry["answers"] if isinstance(entry["answers"], list) else [entry["answers"]]
    answers = [human.get(field) if isinstance(human, dict) else None for human in humans]
    wrong = [human for human, answer in zip(humans, answers, strict=True) if not isinstance(answer, str)]
    if wrong or not answers:
        given = repr(wrong[0])[:80] if wrong else "none"
        raise UserError(f'{where}: answers are {given}; each must be {{"{field}": TEXT}} as in the official files')
    return answers


def types_of(entry: dict[str, Any]) -> dict[str, str]:
    """The types of question and answer that an annotation gives."""
    return {name: entry[name] for name in TYPES if isinstance(entry.get(name), str)}


def check_same_split(questions: tuple[Path, dict, Entries], annotations: tuple[Path, dict, Entries]) -> None:
    """Raises UserError where two files, each (path, file, entries), are of different splits by what they say."""
    path, data, entries = annotations
    splits = [file.get("data_subtype") for file in (questions[1], data)]
    if all(splits) and splits[0] != splits[1]:
        raise UserError(
            f"{path}: data_subtype is {splits[1]!r}, and {splits[0]!r} in {questions[0]}; give the questions and "
            "annotations of one split"
        )
    images = {entry["question_id"]: entry["image_id"] for entry in entries if "image_id" in entry}
    for entry in questions[2]:
        image = images.get(entry["question_id"], entry["image_id"])
        if image != entry["image_id"]:
            raise UserError(
                f"{path}: question {entry['question_id']} is about image {image}, and about {entry['image_id']} in "
                f"{questions[0]}; give the questions and annotations of one split"
            )


def _entries(data: Any, path: Path, field: str, needed: Iterable[str]) -> Entries:
    """The objects in a file's list `field`, each with the fields `needed` and a question_id of its own."""
    entries = data.get(field) if isinstance(data, dict) else None
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{path}: no list {field!r} with entries; use the official questions and annotations")
    ids = set()
    for number, entry in enumerate(entries):
        missing = [name for name in needed if not isinstance(entry, dict) or name not in entry]
        if missing:
            raise UserError(f"{path}: {field}[{number}] has no field {missing[0]}; correct the entry")
        if not isinstance(entry["question_id"], (int, str)):
            raise UserError(f"{path}: {field}[{number}]: question_id is neither a number nor a text; correct the entry")
        if entry["question_id"] in ids:
            raise UserError(f"{path}: question_id {entry['question_id']} occurs twice in {field}; keep one of them")
        ids.add(entry["question_id"])
    return entries
