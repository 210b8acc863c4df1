"""The suite of captions: COCO, Flickr30k, nocaps, a user's own pictures."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from vlkd_jax.data.images import open_image
from vlkd_jax.evals.caption_metrics import DocumentFrequencies, bleu, cider, rouge_l
from vlkd_jax.evals.captioned import read_captioned
from vlkd_jax.evals.captions import word_f1
from vlkd_jax.evals.files import check_choice, if_unusable, place
from vlkd_jax.evals.ptb import tokenize
from vlkd_jax.evals.statistics import interval
from vlkd_jax.evals.suite import Prompt, Row, Suite, decoding_of

METRICS = ("coco",)


def caption_items(suite: ConfigDict) -> Iterator[Prompt]:
    """Every picture of a captions file, or of its split, once.

    References are all its captions there; a picture without any is captioned and not scored.

    Raises:
      UserError: see `read_captioned`; a field of the suite that has no meaning.
    """
    check_choice(suite, "metric", METRICS)
    decoding = decoding_of(suite, suite.caption_tokens)
    for image in read_captioned(suite):
        row = {"task": "caption", "id": image.id, "image": image.name, "prompt": suite.caption_decoder}
        row |= {"answers": image.captions} | ({"domain": image.domain} if image.domain else {})
        yield Prompt(
            row | if_unusable(suite),
            suite.caption_encoder,
            suite.caption_decoder,
            decoding,
            functools.partial(open_image, place(suite, "images") / image.name),
        )


def judge_caption(row: Row) -> Row:
    """`word_f1` against the references, where there are any."""
    normalised = {"normalised": " ".join(row["raw"].split())}
    return normalised | ({"score": word_f1(row["raw"], row["answers"])} if row["answers"] else {})


def score_captions(rows: list[Row]) -> dict[str, Any]:
    """BLEU, ROUGE-L and CIDEr-D as the standard tools give them, the mean of `word_f1`, and the share that differ.

    Of rows with a domain, as nocaps has them, the same `by_domain` (in, near, out), and for `entire`. The document
    frequencies of CIDEr are those of the references of the pictures that are scored together: of a domain its own.
    """
    domains: dict[str, list[Row]] = {}
    for row in rows:
        if "domain" in row:
            domains.setdefault(row["domain"].removesuffix("-domain"), []).append(row)
    metrics = _summary(rows)
    if not domains:
        return metrics
    return metrics | {"by_domain": {name: _summary(domains[name]) for name in sorted(domains)} | {"entire": metrics}}


def _summary(rows: list[Row]) -> dict[str, Any]:
    candidates = [tokenize(row["normalised"]) for row in rows]
    references = [[tokenize(answer) for answer in row["answers"]] for row in rows]
    frequencies = DocumentFrequencies(references)
    pairs = list(zip(candidates, references, strict=True))
    ciders = np.array([cider(*pair, frequencies) for pair in pairs])
    scores = np.array([row["score"] for row in rows])
    return {
        **{f"Bleu_{n}": value for n, value in enumerate(bleu(candidates, references), 1)},
        "ROUGE_L": float(np.mean([rouge_l(*pair) for pair in pairs])),
        "CIDEr": float(ciders.mean()),
        "CIDEr_interval": interval(ciders, range(len(rows))),
        "document_frequencies": f"references of these {len(rows)} pictures",
        "word_f1": float(scores.mean()),
        "word_f1_interval": interval(scores, range(len(rows))),
        "distinct": len({row["raw"] for row in rows}) / len(rows),
        "n": len(rows),
    }


def caption_results(rows: list[Row]) -> list[dict[str, Any]]:
    """What the COCO and nocaps servers take."""
    return [{"image_id": row["id"], "caption": row.get("normalised", "")} for row in rows]


SUITE = Suite(caption_items, judge_caption, score_captions, caption_results)
