"""The suite of questions about pictures, from the official files of VQA v2 and OK-VQA or a user's own in their form.

Files are read and checked whole before a model is asked anything: what a score needs, ids, the pictures.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from vlkd_jax.data.files import read_json
from vlkd_jax.data.sources import TextLines
from vlkd_jax.errors import UserError
from vlkd_jax.evals.files import NONE, check_choice, check_places, if_unusable, place
from vlkd_jax.evals.prepared import asked
from vlkd_jax.evals.statistics import interval
from vlkd_jax.evals.suite import Prompt, Row, Suite, decoding_of
from vlkd_jax.evals.vqa import HUMANS, RULES, accuracy, normalize_answer
from vlkd_jax.evals.vqa_files import (
    ANSWER_FIELDS,
    TYPES,
    annotation_entries,
    human_answers,
    types_of,
)

METRICS = ("vqa_accuracy", "exact_match")


def vqa_items(suite: ConfigDict) -> Iterator[Prompt]:
    """The questions of official VQA files, those of one picture behind one another.

    Raises:
      UserError: a file that is not there or cannot be used, files of different splits, an id that occurs twice, a
        question without answers or with too few of them for its metric, more pictures that cannot be used than
        `suite.max_unusable` allows, a field of the suite that has no meaning.
    """
    check_choice(suite, "metric", METRICS)
    check_choice(suite, "answer_field", ANSWER_FIELDS)
    check_places(suite, "answers")
    candidates, decoding = _candidates(suite), decoding_of(suite, suite.answer_tokens)
    for item, picture in asked(suite):
        row = {"task": "vqa", "id": item["id"], "image": item["image"]}
        row["prompt"] = suite.question_decoder.format(question=item["question"])
        row |= {"answers": item["answers"], "metric": suite.metric} | types_of(item) | if_unusable(suite)
        yield Prompt(
            row,
            suite.question_encoder,
            suite.question_decoder,
            decoding,
            picture,
            {"question": item["question"]},
            candidates=candidates,
        )


def _candidates(suite: ConfigDict) -> tuple[str, ...]:
    """The different answers to choose from that `suite.answers` names; none: answers are generated."""
    if suite.answers == NONE:
        return ()
    path = place(suite, "answers")
    if path.suffix != ".json":
        lines = TextLines(path)
        return tuple(dict.fromkeys(lines.key(k).strip() for k in range(len(lines))))
    data = read_json(path)
    if not isinstance(data, list):
        return _most_frequent(suite, path, data)
    wrong = [answer for answer in data if not isinstance(answer, str) or not answer.strip()]
    if wrong or not data:
        given = f"{wrong[0]!r:.80} in it" if wrong else "nothing in it"
        raise UserError(f"{path}: {given}; config.{suite.name}.answers takes a JSON list of texts")
    return tuple(dict.fromkeys(answer.strip() for answer in data))


def _most_frequent(suite: ConfigDict, path: Path, data: Any) -> tuple[str, ...]:
    """Of official annotations the answers that most questions have; equally frequent ones by the alphabet."""
    if suite.answers_top < 1:
        raise UserError(f"config.{suite.name}.answers_top is {suite.answers_top}; it must be at least 1")
    if suite.answers == suite.annotations:
        raise UserError(f"config.{suite.name}.answers is the file of the answers to be scored; give a training set's")
    counts: Counter[str] = Counter()
    for entry in annotation_entries(data, path):
        answer = entry.get("multiple_choice_answer")
        if not isinstance(answer, str) or not answer.strip():
            answer = _most_common(human_answers(path, entry))
        counts[answer.strip()] += 1
    return tuple(sorted(counts, key=lambda answer: (-counts[answer], answer))[: suite.answers_top])


def _most_common(answers: list[str]) -> str:
    counts = Counter(answers)
    return min(counts, key=lambda answer: (-counts[answer], answer))


def judge_answer(row: Row) -> Row:
    """The official accuracy against the human answers, or whether it is one of them, as the row's `metric` says."""
    normalised = normalize_answer(row["raw"])
    if not row["answers"]:
        return {"normalised": normalised}
    if row["metric"] == "exact_match":
        return {"normalised": normalised, "score": float(normalised in map(normalize_answer, row["answers"]))}
    return {"normalised": normalised, "score": accuracy(row["raw"], row["answers"])}


def score_vqa(rows: list[Row]) -> dict[str, Any]:
    """Mean score with its interval, clustered by picture, also of each type of answer and of question.

    For VQA accuracy, `rules` holds what each of `vqa.RULES` makes of the same answers, and `other_than_ten` how many
    rows have another number of human answers, if any.
    """
    overall = _figures(rows)
    metrics = {"overall": overall["accuracy"], "overall_interval": overall["interval"], "n": len(rows)}
    metrics |= {"metric": rows[0]["metric"], "scorer": f"vlkd_jax {version('vlkd_jax')}, by the public rule"}
    for kind in TYPES:
        names = sorted({row[kind] for row in rows if kind in row})
        of_type = {name: [row for row in rows if row.get(kind) == name] for name in names}
        metrics |= {f"by_{kind}": {name: _figures(some) for name, some in of_type.items()}} if names else {}
    if metrics["metric"] != "vqa_accuracy":
        return metrics
    metrics["rules"] = {
        name: float(np.mean([rule(row.get("raw", ""), row["answers"]) for row in rows])) for name, rule in RULES.items()
    }
    other = sum(len(row["answers"]) != HUMANS for row in rows)
    return metrics | ({"other_than_ten": other} if other else {})


def _figures(rows: Sequence[Row]) -> dict[str, Any]:
    scores = np.array([row["score"] for row in rows])
    bounds = interval(scores, [row["image"] for row in rows])
    return {"accuracy": float(scores.mean()), "interval": bounds, "n": len(rows)}


def vqa_results(rows: list[Row]) -> list[dict[str, Any]]:
    """What the VQA servers take: an answer for every question, an empty one where its picture could not be used."""
    return [{"question_id": row["id"], "answer": row.get("raw", "")} for row in rows]


SUITE = Suite(vqa_items, judge_answer, score_vqa, vqa_results)
