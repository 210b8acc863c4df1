"""The suites for a user's own pictures: questions with human answers in the official JSON files, and captions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from vlkd_jax.data.images import normalize_pixels, open_image, resize_and_crop
from vlkd_jax.data.sources import FolderPairs, read_json
from vlkd_jax.errors import UserError
from vlkd_jax.evals.captions import word_f1
from vlkd_jax.evals.statistics import interval
from vlkd_jax.evals.vqa import accuracy, normalize_answer
from vlkd_jax.predict import Predictor
from vlkd_jax.types import Params

Rows = list[dict[str, Any]]


def vqa(suite: ConfigDict, predictor: Predictor, params: Params) -> tuple[dict[str, Any], Rows]:
    """Answers the questions of official VQA files and scores them against ten human answers.

    Raises:
      UserError: a file that cannot be used, a question without annotation, a picture that is missing.
    """
    items = _read_questions(suite)
    names = sorted({item["image"] for item in items})
    number = {name: k for k, name in enumerate(names)}
    tokens = _image_tokens(predictor, [Path(suite.images) / name for name in names])
    text = predictor.text
    sources = [text.encode_template(suite.question_encoder, question=item["question"]) for item in items]
    prefixes = [text.encode_template(suite.question_decoder, question=item["question"]) for item in items]
    images = [number[item["image"]] for item in items]
    answers = predictor.generate(params, sources, prefixes, suite.answer_tokens, tokens, images)
    rows = [
        {
            "id": item["id"],
            "image": item["image"],
            "prompt": suite.question_decoder.format(question=item["question"]),
            "raw": answer,
            "normalised": normalize_answer(answer),
            "answers": item["answers"],
            "score": accuracy(answer, item["answers"]),
        }
        for item, answer in zip(items, answers, strict=True)
    ]
    scores = np.array([row["score"] for row in rows])
    return {"overall": float(scores.mean()), "overall_interval": interval(scores, images), "n": len(rows)}, rows


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


def captions(suite: ConfigDict, predictor: Predictor, params: Params) -> tuple[dict[str, Any], Rows]:
    """Captions every picture of a captions file once, greedily; references are all its captions there.

    Raises:
      UserError: see `FolderPairs`.
    """
    pairs = FolderPairs(suite.captions, suite.images)
    references: dict[str, list[str]] = {}
    for _, image, caption in pairs.pairs:
        references.setdefault(image, []).append(caption)
    names = list(references)
    tokens = _image_tokens(predictor, [Path(suite.images) / name for name in names])
    source = predictor.text.encode_template(suite.caption_encoder)
    prefix = predictor.text.encode_template(suite.caption_decoder)
    raw = predictor.generate(params, [source] * len(names), [prefix] * len(names), suite.caption_tokens, tokens)
    rows = [
        {
            "id": name,
            "image": name,
            "prompt": suite.caption_decoder,
            "raw": caption,
            "normalised": " ".join(caption.split()),
            "answers": references[name],
            "score": word_f1(caption, references[name]),
        }
        for name, caption in zip(names, raw, strict=True)
    ]
    scores = np.array([row["score"] for row in rows])
    metrics = {
        "word_f1": float(scores.mean()),
        "word_f1_interval": interval(scores, range(len(rows))),
        "distinct": len(set(raw)) / len(raw),
        "n": len(rows),
    }
    return metrics, rows


def _image_tokens(predictor: Predictor, paths: list[Path]) -> np.ndarray:
    pixels = (normalize_pixels(resize_and_crop(open_image(path), predictor.image_size)) for path in paths)
    return predictor.encode_images(pixels)[0]
