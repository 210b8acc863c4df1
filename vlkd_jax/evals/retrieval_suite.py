"""The suites of retrieval: captions find their picture, and pictures one of their captions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from vlkd_jax import predict
from vlkd_jax.console import say
from vlkd_jax.errors import UserError
from vlkd_jax.evals.files import NONE, check_choice, filled, if_unusable, place
from vlkd_jax.evals.prepared import captioned
from vlkd_jax.evals.retrieval import ranks
from vlkd_jax.evals.statistics import interval
from vlkd_jax.evals.suite import Match, Row, Suite, with_pictures
from vlkd_jax.vlkd import VLKD

METRICS = ("recall",)
AT = (1, 5, 10)


def retrieval_items(suite: ConfigDict) -> Iterator[Match]:
    """Every picture of a captions file, or of its split, with the first `captions_each` of its captions.

    Raises:
      UserError: see `read_captioned`; a picture without a caption, a field of the suite that has no meaning.
    """
    check_choice(suite, "metric", METRICS)
    if suite.captions_each < 0:
        raise UserError(f"config.{suite.name}.captions_each is {suite.captions_each}; it must be at least 0 (all)")
    if suite.captions == NONE:
        raise UserError(f"config.{suite.name}.captions is {NONE}; retrieval needs captions")
    pictures = captioned(suite)
    images = [image for image, _ in pictures]
    without = [image.name for image in images if not image.captions]
    if without:
        raise UserError(
            f"{place(suite, 'captions')}: {len(without)} of {len(images)} pictures have no caption, such as "
            f"{without[0]}; leave them out of the file"
        )
    fewer = sum(len(image.captions) < suite.captions_each for image in images)
    if fewer:
        path, each = place(suite, "captions"), suite.captions_each
        say(f"{path}: {fewer} of {len(images)} pictures have fewer than {each} captions")
    for image, picture in pictures:
        captions = image.captions[: suite.captions_each or None]
        texts = tuple(filled(suite, "text_template", suite.text_template, caption=caption) for caption in captions)
        row = {"task": "retrieval", "id": image.id, "image": image.name, "texts": list(texts)}
        yield Match(row | if_unusable(suite), texts, picture)


def rank_matches(model: VLKD, matches: list[Match], batch_size: int, tower: str) -> Iterator[Row]:
    """Rows with `image_ranks`, the rank of the picture for each of its texts, and `text_rank`, that of its best text.

    A picture that cannot be used is not searched, and its texts are not either.
    """
    faulty, usable = [], []

    def pictures():
        for match, picture in with_pictures(matches, faulty):
            usable.append(match)
            yield picture

    embeddings = list(predict.image_embeddings(model, pictures(), batch_size))
    if usable:
        yield from _ranked(model, usable, np.concatenate(embeddings), batch_size, tower)
    yield from faulty


def _ranked(model: VLKD, matches: list[Match], images: np.ndarray, batch_size: int, tower: str) -> Iterator[Row]:
    embed = {"student": predict.embed_texts, "clip": predict.embed_texts_clip}[tower]
    texts = embed(model, [text for match in matches for text in match.texts], batch_size)
    counts, numbers = [len(match.texts) for match in matches], np.arange(len(matches))
    image_of = np.repeat(numbers, counts)
    image_ranks = np.split(ranks(texts, images, image_of, numbers), np.cumsum(counts)[:-1])
    text_ranks = ranks(images, texts, numbers, image_of)
    for match, of_texts, of_image in zip(matches, image_ranks, text_ranks, strict=True):
        yield match.row | {"image_ranks": of_texts.tolist(), "text_rank": int(of_image)}


def judge_match(row: Row) -> Row:
    """The share of its texts that find the picture first; what has no ranks found nothing."""
    if "text_rank" not in row:
        return {"image_ranks": [None] * len(row["texts"]), "text_rank": None, "score": 0.0}
    return {"score": sum(rank == 1 for rank in row["image_ranks"]) / len(row["image_ranks"])}


def score_retrieval(rows: list[Row]) -> dict[str, Any]:
    """Recall at 1, 5 and 10 from text to image and from image to text, each with its interval, clustered by picture."""
    searches = {
        "text_to_image": [(rank, row["image"]) for row in rows for rank in row["image_ranks"]],
        "image_to_text": [(row["text_rank"], row["image"]) for row in rows],
    }
    metrics: dict[str, Any] = {}
    for name, pairs in searches.items():
        for k in AT:
            hits = np.array([rank is not None and rank <= k for rank, _ in pairs], float)
            metrics[f"{name}_r_at_{k}"] = float(hits.mean())
            metrics[f"{name}_r_at_{k}_interval"] = interval(hits, [image for _, image in pairs])
    return metrics | {"n": len(rows), "texts": len(searches["text_to_image"])}


SUITE = Suite(retrieval_items, judge_match, score_retrieval, predict=rank_matches)
