"""The suite of the built-in world: questions, captions and retrieval on held-out scenes, and text-only questions."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from scipy.optimize import linear_sum_assignment

from vlkd_jax import predict
from vlkd_jax.errors import UserError
from vlkd_jax.evals.captions import f1
from vlkd_jax.evals.retrieval import ranks
from vlkd_jax.evals.statistics import interval
from vlkd_jax.evals.suite import Match, Prompt, Row, Suite, decoding_of
from vlkd_jax.evals.vqa import exact_match, plain
from vlkd_jax.shapes import world
from vlkd_jax.shapes.sources import text_questions
from vlkd_jax.vlkd import VLKD

Attributes = list[tuple[str, str, str, str]]
"""(size, colour, shape, position) of each object; "" where unsaid."""


def items(suite: ConfigDict) -> Iterator[Prompt | Match]:
    """All that is asked: with pictures `vqa`, `caption` and `retrieval`, without `text_qa` and, where `suite.baselines`
    is set, `vqa_blind`: the same questions with the picture taken away.

    Args:
      suite: `config.shapes` of configs/suites.py.

    Raises:
      UserError: an unknown split, or nothing to ask.
    """
    if suite.split not in world.SPLITS:
        raise UserError(f"config.{suite.name}.split is {suite.split!r}; it is one of {', '.join(world.SPLITS)}")
    for field in ("questions", "captions", "retrieval", "text_questions"):
        if suite[field] < 1:
            raise UserError(f"config.{suite.name}.{field} is {suite[field]}; it must be at least 1")
    yield from _questions(suite, "vqa")
    yield from _captions(suite)
    yield from _text_questions(suite)
    if suite.baselines:
        yield from _questions(suite, "vqa_blind")
    yield from _matches(suite)


def _picture(suite: ConfigDict, index: int) -> functools.partial:
    return functools.partial(_render, suite.seed, suite.split, index)


def _render(seed: int, split: str, index: int) -> np.ndarray:
    return world.render(world.make_scene(seed, split, index))


def _questions(suite: ConfigDict, task: str) -> Iterator[Prompt]:
    for number, (index, _, question) in enumerate(world.question_set(suite.seed, suite.split, suite.questions)):
        row = {"task": task, "id": f"{suite.split}-{number}", "image": index, "type": question.kind}
        row["prompt"] = suite.question_decoder.format(question=question.question)
        yield Prompt(
            row | {"answers": [question.answer]},
            suite.question_encoder,
            suite.question_decoder,
            decoding_of(suite, suite.answer_tokens),
            _picture(suite, index) if task == "vqa" else None,
            {"question": question.question},
        )


def _captions(suite: ConfigDict) -> Iterator[Prompt]:
    for index in range(suite.captions):
        things = [thing.attributes for thing in world.make_scene(suite.seed, suite.split, index).things]
        row = {"task": "caption", "id": f"{suite.split}-{index}", "image": index, "prompt": suite.caption_decoder}
        yield Prompt(
            row | {"answers": [", ".join(map(" ".join, things))], "things": things},
            suite.caption_encoder,
            suite.caption_decoder,
            decoding_of(suite, suite.caption_tokens),
            _picture(suite, index),
        )


def _text_questions(suite: ConfigDict) -> Iterator[Prompt]:
    """Answered from a written description, without an image: the ability that has to stay."""
    for number, question in enumerate(text_questions(suite.text_questions, suite.seed, suite.split)):
        asked = suite.question_decoder.format(question=question.question)
        row = {"task": "text_qa", "id": f"{suite.split}-text-{number}", "image": question.scene, "type": question.kind}
        yield Prompt(
            row | {"prompt": f"{question.context} {asked}", "answers": [question.answer]},
            suite.question_encoder,
            suite.question_decoder,
            decoding_of(suite, suite.answer_tokens),
            None,
            {"question": question.question},
            question.context,
        )


def _matches(suite: ConfigDict) -> Iterator[Match]:
    """Complete captions and their pictures; of scenes that a caption cannot tell apart the first."""
    seen = set()
    for index in range(suite.retrieval):
        scene = world.make_scene(suite.seed, suite.split, index)
        attributes = tuple(thing.attributes for thing in scene.things)
        if attributes in seen:
            continue
        seen.add(attributes)
        text = world.caption(scene, world.generator(suite.seed, suite.split, index, 5), complete=1.0)
        row = {"task": "retrieval", "id": f"{suite.split}-{index}", "image": index}
        yield Match(row, (text,), _picture(suite, index))


def _matched(model: VLKD, matches: list[Match], batch_size: int, _: str) -> Iterator[Row]:
    """Whether each caption finds its picture, by the student's embedding and by the teacher's own."""
    images = predict.embed_images(model, (match.open_image() for match in matches), batch_size)
    texts, numbers = [text for match in matches for text in match.texts], np.arange(len(matches))
    student, teacher = (
        ranks(embed(model, texts, batch_size), images, numbers, numbers) == 1
        for embed in (predict.embed_texts, predict.embed_texts_clip)
    )
    for match, hit, clip_hit in zip(matches, student, teacher, strict=True):
        yield match.row | {"text": match.texts[0], "hit": bool(hit), "clip_hit": bool(clip_hit)}


def judge(row: Row) -> Row:
    """Exact match of an answer; of a caption `scene_match`, and its attribute F1 as the score."""
    if row["task"] == "retrieval":
        return {"score": float(row["hit"])}
    if row["task"] != "caption":
        score = float(exact_match(row["raw"], row["answers"][0]))
        return {"normalised": plain(row["raw"]), "score": score}
    match = scene_match(row["raw"], [tuple(thing) for thing in row["things"]])
    return {"normalised": plain(row["raw"]), "score": f1(*match[1:]), "match": [int(count) for count in match]}


def scene_match(caption: str, true: Attributes) -> tuple[bool, int, int, int]:
    """(exact, right, said, true): a caption against the objects of the scene it describes.

    Objects of the caption are paired with objects of the scene so that most attributes agree; `right` counts the
    attributes (size, colour, shape, position) that agree in that pairing, `said` and `true` those of either side.
    `exact`: every object with every attribute, and nothing more.
    """
    said = world.parse_caption(caption)
    agree = np.zeros((len(said), len(true)), int)
    for row, column in np.ndindex(agree.shape):
        agree[row, column] = sum(a == b != "" for a, b in zip(said[row], true[column], strict=True))
    right = int(agree[linear_sum_assignment(agree, maximize=True)].sum())
    return Counter(said) == Counter(true), right, sum(a != "" for one in said for a in one), 4 * len(true)


def score(rows: list[Row]) -> dict[str, Any]:
    """Metrics by task, fractions between 0 and 1 with 95% intervals; `vqa_majority`: see `majority`."""
    tasks: dict[str, list[Row]] = {}
    for row in rows:
        tasks.setdefault(row["task"], []).append(row)
    scorers = {"caption": _score_captions, "retrieval": _score_retrieval}
    metrics = {task: scorers.get(task, _by_type)(of_task) for task, of_task in tasks.items()}
    return metrics | ({"vqa_majority": majority(tasks["vqa"])} if "vqa_blind" in tasks else {})


def majority(rows: list[Row]) -> dict[str, float]:
    """Accuracy of always giving the most frequent answer of the question's type, counted on these questions."""
    counts: dict[str, Counter] = {}
    for row in rows:
        counts.setdefault(row["type"], Counter())[row["answers"][0]] += 1
    best = {kind: count.most_common(1)[0][1] for kind, count in counts.items()}
    shares = {kind: best[kind] / counts[kind].total() for kind in counts}
    return shares | {"overall": sum(best.values()) / len(rows)}


def _score_captions(rows: list[Row]) -> dict[str, Any]:
    matches, images = np.array([row["match"] for row in rows], float), [row["image"] for row in rows]
    total = matches.sum(0)
    return {
        "exact_match": float(total[0] / len(rows)),
        "exact_match_interval": interval(matches[:, 0], images),
        "attribute_f1": f1(*total[1:]),
        "attribute_f1_interval": interval(matches[:, 1:], images, lambda t: f1(*t[:3])),
        "distinct": len({row["raw"] for row in rows}) / len(rows),
        "n": len(rows),
    }


def _score_retrieval(rows: list[Row]) -> dict[str, Any]:
    """R@1 of complete captions against the teacher's embeddings of distinct scenes, by both text towers."""
    hits = np.array([row["hit"] for row in rows], float)
    return {
        "r_at_1": float(hits.mean()),
        "r_at_1_interval": interval(hits, [row["image"] for row in rows]),
        "clip_r_at_1": float(np.mean([row["clip_hit"] for row in rows])),
        "n": len(rows),
    }


def _by_type(rows: list[Row]) -> dict[str, Any]:
    """Mean score with its interval, overall and for each type."""
    scores, images = np.array([row["score"] for row in rows]), np.array([row["image"] for row in rows])
    metrics: dict[str, Any] = {
        "overall": float(scores.mean()),
        "overall_interval": interval(scores, images),
        "n": len(rows),
        "by_type": {},
    }
    for kind in dict.fromkeys(row["type"] for row in rows):
        chosen = np.array([row["type"] == kind for row in rows])
        metrics["by_type"][kind] = {
            "accuracy": float(scores[chosen].mean()),
            "interval": interval(scores[chosen], images[chosen]),
            "n": int(chosen.sum()),
        }
    return metrics


SUITE = Suite(items, judge, score, predict=_matched, picture=lambda suite, row: _picture(suite, row["image"])())
