"""The suites for a user's own pictures: questions with human answers in the official JSON files, and captions.

Files are read and checked whole before a model is asked anything: what a score needs, ids, the pictures.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from vlkd_jax.data.images import check_picture, open_image
from vlkd_jax.data.sources import FolderPairs, image_files, raise_if_too_many, read_json
from vlkd_jax.errors import RecordError, UserError
from vlkd_jax.evals.captions import word_f1
from vlkd_jax.evals.statistics import interval
from vlkd_jax.evals.suite import Prompt, Row, Suite
from vlkd_jax.evals.vqa import accuracy, normalize_answer

NONE = "none"
"""In the place of a file of answers or captions: there are none, and nothing is scored."""
HUMANS = 10
"""Answers that VQA accuracy takes: of fewer, even the right one would not score 1."""
METRICS = ("vqa_accuracy", "exact_match")
PICTURES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"))


def vqa_items(suite: ConfigDict) -> Iterator[Prompt]:
    """The questions of official VQA files, those of one picture behind one another.

    Raises:
      UserError: a file that cannot be used, an id that occurs twice, a question without answers or with too few of
        them for its metric, more pictures that cannot be used than `suite.max_unusable` allows.
    """
    items = sorted(_read_questions(suite), key=lambda item: item["image"])
    _check_pictures(suite, [item["image"] for item in items], suite.questions)
    for item in items:
        row = {"task": "vqa", "id": item["id"], "image": item["image"]}
        row["prompt"] = suite.question_decoder.format(question=item["question"])
        yield Prompt(
            row | {"answers": item["answers"], "metric": suite.metric},
            suite.question_encoder,
            suite.question_decoder,
            suite.answer_tokens,
            functools.partial(open_image, Path(suite.images) / item["image"]),
            {"question": item["question"]},
        )


def _read_questions(suite: ConfigDict) -> list[dict[str, Any]]:
    questions = _entries(suite.questions, "questions", ("question_id", "image_id", "question"))
    answers = None if suite.annotations == NONE else _read_answers(suite)
    for entry in questions:
        if not isinstance(entry["question"], str):
            raise UserError(f"{suite.questions}: question {entry['question_id']}: field question is not a text")
        if answers is not None and entry["question_id"] not in answers:
            raise UserError(
                f"{suite.annotations}: no answers for question {entry['question_id']}; use matching files, or "
                f"--config.{suite.name}.annotations={NONE} to answer without a score"
            )
    return [
        {
            "id": entry["question_id"],
            "question": entry["question"],
            "image": _image_name(suite, entry["image_id"]),
            "answers": answers[entry["question_id"]] if answers is not None else [],
        }
        for entry in questions
    ]


def _read_answers(suite: ConfigDict) -> dict[Any, list[str]]:
    if suite.metric not in METRICS:
        raise UserError(f"config.{suite.name}.metric is {suite.metric!r}; it is one of {', '.join(METRICS)}")
    entries = _entries(suite.annotations, "annotations", ("question_id", "answers"))
    return {entry["question_id"]: _human_answers(suite, entry) for entry in entries}


def _human_answers(suite: ConfigDict, entry: dict[str, Any]) -> list[str]:
    where = f"{suite.annotations}: question {entry['question_id']}"
    humans = entry["answers"] if isinstance(entry["answers"], list) else [entry["answers"]]
    answers = [human.get("answer") if isinstance(human, dict) else None for human in humans]
    wrong = [human for human, answer in zip(humans, answers, strict=True) if not isinstance(answer, str)]
    if wrong or not answers:
        given = repr(wrong[0])[:80] if wrong else "none"
        raise UserError(f'{where}: answers are {given}; each must be {{"answer": TEXT}} as in the official files')
    if suite.metric == "vqa_accuracy" and len(answers) < HUMANS:
        raise UserError(
            f"{where} has {len(answers)} human answer(s), and VQA accuracy takes {HUMANS}; "
            f"--config.{suite.name}.metric=exact_match counts an answer as right that is one of them"
        )
    return answers


def _entries(path: str, field: str, needed: Iterable[str]) -> list[dict[str, Any]]:
    """The objects in a file's list `field`, each with the fields `needed` and a question_id of its own."""
    data = read_json(path)
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


def _image_name(suite: ConfigDict, image_id: Any) -> str:
    try:
        return suite.image_name.format(image_id=image_id)
    except (LookupError, ValueError, TypeError, AttributeError) as e:
        raise UserError(
            f"config.{suite.name}.image_name {suite.image_name!r} does not fit image id {image_id!r} ({e}); it can "
            "hold {image_id}, as in {image_id:012d}.jpg"
        ) from e


def _check_pictures(suite: ConfigDict, names: Iterable[str], file: str) -> None:
    """Raises UserError when more pictures than `suite.max_unusable` allows are missing, cut off or no pictures."""
    names, faults = list(dict.fromkeys(names)), []
    for name in names:
        try:
            check_picture(Path(suite.images) / name)
        except RecordError as e:
            faults.append(RecordError(e.reason, f"{file}: {e}"))
    raise_if_too_many(faults, len(names), suite.max_unusable, f"config.{suite.name}.max_unusable")


def judge_answer(row: Row) -> Row:
    """The official accuracy against ten human answers, or whether it is one of them, as the row's `metric` says."""
    normalised = normalize_answer(row["raw"])
    if not row["answers"]:
        return {"normalised": normalised}
    if row["metric"] == "exact_match":
        return {"normalised": normalised, "score": float(normalised in map(normalize_answer, row["answers"]))}
    return {"normalised": normalised, "score": accuracy(row["raw"], row["answers"])}


def score_vqa(rows: list[Row]) -> dict[str, Any]:
    """Mean score with its interval, clustered by picture."""
    scores = np.array([row["score"] for row in rows])
    overall = {"overall": float(scores.mean()), "overall_interval": interval(scores, [row["image"] for row in rows])}
    return overall | {"metric": rows[0]["metric"], "n": len(rows)}


def vqa_results(rows: list[Row]) -> list[dict[str, Any]]:
    """What the VQA servers take: an answer for every question, an empty one where its picture could not be used."""
    return [{"question_id": row["id"], "answer": row.get("raw", "")} for row in rows]


def caption_items(suite: ConfigDict) -> Iterator[Prompt]:
    """Every picture of a captions file, once, or with `captions` "none" every picture of the folder.

    References are all its captions there; a picture without any is captioned and not scored.

    Raises:
      UserError: see `FolderPairs`; a folder without pictures.
    """
    references = _references(suite)
    ids = _image_ids(suite)
    for name, captions in references.items():
        row = {"task": "caption", "id": ids.get(name, name), "image": name, "prompt": suite.caption_decoder}
        yield Prompt(
            row | {"answers": captions},
            suite.caption_encoder,
            suite.caption_decoder,
            suite.caption_tokens,
            functools.partial(open_image, Path(suite.images) / name),
        )


def _references(suite: ConfigDict) -> dict[str, list[str]]:
    """Picture -> its captions."""
    folder = Path(suite.images)
    if suite.captions == NONE:
        names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.suffix.lower() in PICTURES)
        if not names:
            raise UserError(f"{folder}: no pictures there; correct config.{suite.name}.images")
        _check_pictures(suite, names, suite.captions)
        return {name: [] for name in names}
    references: dict[str, list[str]] = {name: [] for name in _image_ids(suite)}
    if not references or read_json(suite.captions).get("annotations"):
        pairs = FolderPairs(suite.captions, suite.images, max_unusable=1.0)  # the suite's own limit is the next line's
        raise_if_too_many([*pairs.faults.values()], len(pairs), suite.max_unusable, f"config.{suite.name}.max_unusable")
        for pair in pairs.pairs:
            if not isinstance(pair, RecordError) and isinstance(pair[1], str):
                captions = references.setdefault(pair[1], [])
                captions += [pair[2]] if isinstance(pair[2], str) and pair[2].strip() else []
    _check_pictures(suite, [name for name, captions in references.items() if not captions], suite.captions)
    return references


def _image_ids(suite: ConfigDict) -> dict[str, Any]:
    """Picture -> its id in a COCO file; other files have none."""
    if not suite.captions.endswith(".json"):
        return {}
    path = Path(suite.captions)
    try:
        ids = {name: image_id for image_id, name in image_files(path, read_json(path)).items()}
        if not all(isinstance(name, str) for name in ids):
            raise TypeError("a file_name is not a text")
        return ids
    except (KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{path}: images are not a list of objects with id and file_name ({e}); correct it") from e


def judge_caption(row: Row) -> Row:
    """`word_f1` against the references, where there are any."""
    normalised = {"normalised": " ".join(row["raw"].split())}
    return normalised | ({"score": word_f1(row["raw"], row["answers"])} if row["answers"] else {})


def score_captions(rows: list[Row]) -> dict[str, Any]:
    """Mean of `word_f1` with its interval, and the share of captions that differ from one another."""
    scores = np.array([row["score"] for row in rows])
    return {
        "word_f1": float(scores.mean()),
        "word_f1_interval": interval(scores, range(len(rows))),
        "distinct": len({row["raw"] for row in rows}) / len(rows),
        "n": len(rows),
    }


def caption_results(rows: list[Row]) -> list[dict[str, Any]]:
    """What the COCO and nocaps servers take."""
    return [{"image_id": row["id"], "caption": row.get("normalised", "")} for row in rows]


VQA = Suite(vqa_items, judge_answer, score_vqa, vqa_results)
CAPTION = Suite(caption_items, judge_caption, score_captions, caption_results)
