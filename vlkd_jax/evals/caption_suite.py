"""The suite of captions: COCO, Flickr30k, nocaps, a user's own pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from vlkd_jax.evals import caption_metrics, standard_captions
from vlkd_jax.evals.captions import word_f1
from vlkd_jax.evals.files import check_choice, if_unusable
from vlkd_jax.evals.prepared import captioned
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
    for image, picture in captioned(suite):
        row = {"task": "caption", "id": image.id, "image": image.name, "prompt": suite.caption_decoder}
        row |= {"answers": image.captions} | ({"domain": image.domain} if image.domain else {})
        yield Prompt(
            row | if_unusable(suite),
            suite.caption_encoder,
            suite.caption_decoder,
            decoding,
            picture,
        )


def judge_caption(row: Row) -> Row:
    """`word_f1` against the references, where there are any."""
    normalised = {"normalised": " ".join(row["raw"].split())}
    return normalised | ({"score": word_f1(row["raw"], row["answers"])} if row["answers"] else {})


def score_captions(rows: list[Row], spice_jars: Path | None = None) -> dict[str, Any]:
    """BLEU, METEOR, ROUGE-L and CIDEr-D of the standard tools, the mean of `word_f1`, and the share that differ.

    By the tools themselves where Java and pycocoevalcap are there, else by `caption_metrics`, without METEOR;
    `scorer` says which, `not_computed` why. Of rows with a domain, as nocaps has them, the same `by_domain` (in, near,
    out), and for `entire`. The document frequencies of CIDEr are those of the references of the pictures that are
    scored together: of a domain its own; `CIDEr_entire_frequencies` takes those of all domains.

    Args:
      spice_jars: the directory of SPICE's program; None: no SPICE.

    Raises:
      UserError: SPICE cannot be run.
    """
    why_absent = standard_captions.why_absent()
    tools = caption_metrics if why_absent else standard_captions
    captions = [row["normalised"] for row in rows]
    tokens = iter(tools.tokenize_all(captions + [answer for row in rows for answer in row["answers"]]))
    candidates = [next(tokens) for _ in rows]
    references = [[next(tokens) for _ in row["answers"]] for row in rows]
    spices = None
    if spice_jars is not None:
        spices = standard_captions.spice(captions, [row["answers"] for row in rows], spice_jars)

    def summary(chosen: Sequence[int]) -> tuple[dict[str, Any], np.ndarray]:
        values = tools.scores([candidates[k] for k in chosen], [references[k] for k in chosen])
        if spices is not None:
            values["SPICE"] = spices[list(chosen)]
        return _summary([rows[k] for k in chosen], values)

    entire, ciders = summary(range(len(rows)))
    entire["scorer"] = tools.name()
    missing = {"METEOR": why_absent} if why_absent else {}
    missing |= {} if spice_jars else {"SPICE": "needs the path of its program, --spice_jars of vlkd score"}
    entire |= {"not_computed": missing} if missing else {}
    domains: dict[str, list[int]] = {}
    for k, row in enumerate(rows):
        if "domain" in row:
            domains.setdefault(row["domain"].removesuffix("-domain"), []).append(k)
    if not domains:
        return entire
    by_domain = {}
    for name in sorted(domains):
        figures, _ = summary(domains[name])
        by_domain[name] = figures | {"CIDEr_entire_frequencies": float(ciders[domains[name]].mean())}
    return entire | {"by_domain": by_domain | {"entire": dict(entire)}}


def _summary(rows: list[Row], values: dict[str, Any]) -> tuple[dict[str, Any], np.ndarray]:
    """Metrics, and CIDEr of each picture; `values` are of `caption_metrics.scores`."""
    metrics = {f"Bleu_{n}": float(value) for n, value in enumerate(values["Bleu"], 1)}
    metrics |= {"METEOR": float(values["METEOR"])} if "METEOR" in values else {}
    overlap = np.array([row["score"] for row in rows])
    for name, of_each in {**values, "word_f1": overlap}.items():
        if name not in ("Bleu", "METEOR"):
            metrics |= {name: float(of_each.mean()), f"{name}_interval": interval(of_each, range(len(rows)))}
    metrics["document_frequencies"] = f"references of these {len(rows)} pictures"
    metrics["distinct"] = len({row["normalised"] for row in rows}) / len(rows)
    return metrics | {"n": len(rows)}, values["CIDEr"]


def caption_results(rows: list[Row]) -> list[dict[str, Any]]:
    """What the COCO and nocaps servers take."""
    return [{"image_id": row["id"], "caption": row.get("normalised", "")} for row in rows]


SUITE = Suite(caption_items, judge_caption, score_captions, caption_results)
