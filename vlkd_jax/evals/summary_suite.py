"""The suite of summaries: XSum, or a user's own documents. No picture: text abilities that have to stay."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from vlkd_jax.data.documents import read_column
from vlkd_jax.errors import UserError
from vlkd_jax.evals.files import NONE, check_choice, check_places, place
from vlkd_jax.evals.statistics import interval
from vlkd_jax.evals.suite import Prompt, Row, Suite, decoding_of

METRICS = ("rouge",)
ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")


def summary_items(suite: ConfigDict) -> Iterator[Prompt]:
    """The documents of a file with the summaries of the same numbers: a text a line, or JSONL or Parquet.

    Raises:
      UserError: files that are not there, are empty or differ in length; an empty line.
    """
    check_choice(suite, "metric", METRICS)
    check_places(suite, "documents", "summaries")
    decoding = decoding_of(suite, suite.summary_tokens)
    documents = read_column(place(suite, "documents"), "document")
    summaries = None if suite.summaries == NONE else read_column(place(suite, "summaries"), "summary")
    if summaries is not None and len(summaries) != len(documents):
        raise UserError(
            f"{place(suite, 'summaries')}: {len(summaries)} lines, and {len(documents)} in "
            f"{place(suite, 'documents')}; give the files of one split"
        )
    for number, document in enumerate(documents):
        row = {"task": "summary", "id": number, "image": None, "prompt": suite.summary_decoder}
        row["answers"] = [] if summaries is None else [summaries[number]]
        fields = {"document": document}
        yield Prompt(row, suite.summary_encoder, suite.summary_decoder, decoding, fields=fields, cut="document")


def rouge(summary: str, reference: str) -> dict[str, float]:
    """F1 of ROUGE-1, -2, -L and -Lsum with stemmer, in [0, 1]; sentences stand apart by a newline for the last.

    Source: Google's `rouge_score`, which the published figures for XSum come from.
    """
    return {name: value.fmeasure for name, value in _scorer().score(reference, summary).items()}


@functools.cache
def _scorer():
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(ROUGE, use_stemmer=True)


def judge_summary(row: Row) -> Row:
    """ROUGE against the reference, where there is one; the score is ROUGE-L."""
    normalised = {"normalised": " ".join(row["raw"].split())}
    if not row["answers"]:
        return normalised
    values = rouge(normalised["normalised"], row["answers"][0])
    return normalised | {"rouge": values, "score": values["rougeL"]}


def score_summaries(rows: list[Row]) -> dict[str, Any]:
    """Mean F1 of each ROUGE with its interval, in [0, 1]."""
    metrics: dict[str, Any] = {"n": len(rows), "scorer": f"rouge_score {version('rouge-score')}, with stemmer"}
    for name in ROUGE:
        values = np.array([row["rouge"][name] for row in rows])
        metrics |= {name: float(values.mean()), f"{name}_interval": interval(values, range(len(values)))}
    return metrics


def summary_results(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The summaries in the order of the documents."""
    return [{"id": row["id"], "summary": row["normalised"]} for row in rows]


SUITE = Suite(summary_items, judge_summary, score_summaries, summary_results)
