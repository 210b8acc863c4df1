"""The suites for a user's own pictures: questions with human answers in the official JSON files, and captions."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from vlkd_jax.data.images import open_image
from vlkd_jax.data.sources import FolderPairs, read_json
from vlkd_jax.errors import UserError
from vlkd_jax.evals.captions import word_f1
from vlkd_jax.evals.statistics import interval
from vlkd_jax.evals.suite import Prompt, Row, Suite
from vlkd_jax.evals.vqa import accuracy, normalize_answer


def vqa_items(suite: ConfigDict) -> Iterator[Prompt]:
    """The questions of official VQA files, those of one picture behind one another.

    Raises:
      UserError: a file that cannot be used, a question without annotation, a picture that is missing.
    """
    for item in sorted(_read_questions(suite), key=lambda item: item["image"]):
        row = {"task": "vqa", "id": item["id"], "image": item["image"]}
        row["prompt"] = suite.question_decoder.format(question=item["question"])
        yield Prompt(
            row | {"answers": item["answers"]},
            suite.question_encoder,
            suite.question_decoder,
            suite.answer_tokens,
            functools.partial(open_image, Path(suite.images) / item["image"]),
            {"question": item["question"]},
        )


def _read_questions(suite: ConfigDict) -> list[dict[str, Any]]:
    questions, annotations = read_json(suite.questions), read_json(suite.annotations)
    try:
        truth = {a["question_id"]: [x["answer"] for x in a["answers"]] for a in annotations["annotations"]}
        items = [
            {
                "id": q["question_id"],
                "question": q["question"],
                "image": suite.image_name.format(image_id=q["image_id"]),
                "answers": truth.get(q["question_id"]),
            }
            for q in questions["questions"]
        ]
    except (KeyError, TypeError, ValueError) as e:
        raise UserError(
            f"{suite.questions} and {suite.annotations}: field {e} is missing or of the wrong kind; "
            "use the official questions and annotations"
        ) from e
    unknown = [item["id"] for item in items if not item["answers"]]
    if unknown or not items:
        which = unknown[0] if unknown else "(none)"
        raise UserError(f"{suite.annotations}: no answers for question {which}; use matching files")
    return items


def judge_answer(row: Row) -> Row:
    """The official accuracy against ten human answers."""
    return {"normalised": normalize_answer(row["raw"]), "score": accuracy(row["raw"], row["answers"])}


def score_vqa(rows: list[Row]) -> dict[str, Any]:
    """Mean accuracy with its interval, clustered by picture."""
    scores = np.array([row["score"] for row in rows])
    overall = {"overall": float(scores.mean()), "overall_interval": interval(scores, [row["image"] for row in rows])}
    return overall | {"n": len(rows)}


def caption_items(suite: ConfigDict) -> Iterator[Prompt]:
    """Every picture of a captions file, once; references are all its captions there.

    Raises:
      UserError: see `FolderPairs`.
    """
    references: dict[str, list[str]] = {}
    for _, image, caption in FolderPairs(suite.captions, suite.images).pairs:
        references.setdefault(image, []).append(caption)
    for name, captions in references.items():
        yield Prompt(
            {"task": "caption", "id": name, "image": name, "prompt": suite.caption_decoder, "answers": captions},
            suite.caption_encoder,
            suite.caption_decoder,
            suite.caption_tokens,
            functools.partial(open_image, Path(suite.images) / name),
        )


def judge_caption(row: Row) -> Row:
    """`word_f1` against the references."""
    return {"normalised": " ".join(row["raw"].split()), "score": word_f1(row["raw"], row["answers"])}


def score_captions(rows: list[Row]) -> dict[str, Any]:
    """Mean of `word_f1` with its interval, and the share of captions that differ from one another."""
    scores = np.array([row["score"] for row in rows])
    return {
        "word_f1": float(scores.mean()),
        "word_f1_interval": interval(scores, range(len(rows))),
        "distinct": len({row["raw"] for row in rows}) / len(rows),
        "n": len(rows),
    }


VQA = Suite(vqa_items, judge_answer, score_vqa)
CAPTION = Suite(caption_items, judge_caption, score_captions)
