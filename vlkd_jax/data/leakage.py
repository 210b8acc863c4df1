"""Pictures of an evaluation set that training has seen: `vlkd leakage --train=DIR --eval=DIR --output=OUT`.

Both are directories of `vlkd prepare`, whose hashes.jsonl holds for each record the sha256 of the picture as it came,
and a perceptual hash (ImageHash's pHash, 64 bits) of it as it is kept. Memory grows with the evaluation set alone.
"""

from __future__ import annotations

import io
import itertools
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image

from vlkd_jax import entry
from vlkd_jax.commands import COMMANDS
from vlkd_jax.data.builder import HASHES, MANIFEST
from vlkd_jax.data.records import RecordPairs
from vlkd_jax.errors import UserError
from vlkd_jax.evals.markup import STYLE, escaped, percent, picture_uri, table
from vlkd_jax.runtime import tell
from vlkd_jax.workdir import output_directory

BLOCK = 100_000
"""Training pictures that are compared at once."""
SHOWN = 60
"""Pairs on the page, the nearest first."""
PAIRS = ".sample .scene { object-fit: contain; } .beside { align-items: start; }"
"""Style of two pictures side by side, of any shape."""
MAX_DISTANCE = 8
"""Above it nearly every picture has a near one."""


def find(train: Path, evaluation: Path, distance: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Counts, and every evaluation picture that has a duplicate, with the nearest training picture.

    Args:
      distance: differing bits of the perceptual hash at most, for a near duplicate.

    Raises:
      UserError: a directory without hashes.
    """
    rows = [row for block in _blocks(evaluation) for row in block]
    if not rows:
        raise UserError(f"{evaluation}: no record in it")
    exact: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        exact.setdefault(row["image"], []).append(index)
    captions = {row["caption"] for row in rows}
    table_of = _Bands(np.array([int(row["phash"], 16) for row in rows], np.uint64), distance)
    best: dict[int, tuple[int, int, str]] = {}  # evaluation picture -> (distance, training record, its key); -1: exact
    shared_captions: set[str] = set()
    count = 0
    for block in _blocks(train):
        for at, row in enumerate(block):
            for index in exact.get(row["image"], ()):
                _keep(best, index, -1, count + at, row["key"])
            if row["caption"] in captions:
                shared_captions.add(row["caption"])
        for at, index, bits in table_of.near(np.array([int(row["phash"], 16) for row in block], np.uint64)):
            _keep(best, index, bits, count + at, block[at]["key"])
        count += len(block)
    leaks = [
        {
            "eval": rows[index]["key"],
            "eval_record": index,
            "train": key,
            "train_record": record,
            "kind": "exact" if bits < 0 else "near",
            "distance": max(bits, 0),
        }
        for index, (bits, record, key) in sorted(best.items())
    ]
    kinds = Counter(leak["kind"] for leak in leaks)
    told = {"train": count, "eval": len(rows), "distance": distance, "exact": kinds["exact"], "near": kinds["near"]}
    told |= {"exact_share": kinds["exact"] / len(rows), "near_share": kinds["near"] / len(rows)}
    told["eval_captions_seen"] = sum(row["caption"] in shared_captions for row in rows)
    told["captions_share"] = told["eval_captions_seen"] / len(rows)
    return told, leaks


def _keep(best: dict[int, tuple[int, int, str]], index: int, bits: int, record: int, key: str) -> None:
    if index not in best or (bits, record) < best[index][:2]:
        best[index] = bits, record, key


def _blocks(directory: Path) -> Iterator[list[dict[str, str]]]:
    path = directory / HASHES
    if not (directory / MANIFEST).is_file() or not path.is_file():
        raise UserError(f"{directory}: no {MANIFEST} with {HASHES} in it; name an --output of vlkd prepare")
    block: list[dict[str, str]] = []
    try:
        with open(path, encoding="utf-8") as file:
            for line in file:
                row = json.loads(line)
                block.append({name: row[name] for name in ("key", "image", "caption", "phash")})
                if len(block) == BLOCK:
                    yield block
                    block = []
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not as vlkd prepare writes it ({error}); prepare the data again") from error
    yield block


class _Bands:
    """Hashes that are found by those that differ in few bits.

    Of hashes that differ in d bits, cut into d + 1 bands, one band at least is the same.
    """

    def __init__(self, hashes: np.ndarray, distance: int):
        self.hashes, self.distance = hashes, distance
        edges = np.linspace(0, 64, distance + 2).round().astype(int)
        self.bands = [(np.uint64(a), np.uint64((1 << int(b - a)) - 1)) for a, b in itertools.pairwise(edges)]
        self.orders = [np.argsort(self._band(hashes, band), kind="stable") for band in self.bands]

    @staticmethod
    def _band(hashes: np.ndarray, band: tuple[np.uint64, np.uint64]) -> np.ndarray:
        return (hashes >> band[0]) & band[1]

    def near(self, others: np.ndarray) -> Iterator[tuple[int, int, int]]:
        """(index among `others`, index among the hashes, differing bits); a pair may come more than once."""
        for band, order in zip(self.bands, self.orders, strict=True):
            values, wanted = self._band(self.hashes, band)[order], self._band(others, band)
            first, last = np.searchsorted(values, wanted, "left"), np.searchsorted(values, wanted, "right")
            at = np.repeat(np.arange(len(others)), last - first)
            offsets = np.arange(len(at)) - np.repeat(np.cumsum(last - first) - (last - first), last - first)
            index = order[np.repeat(first, last - first) + offsets]
            bits = np.bitwise_count(others[at] ^ self.hashes[index])
            for k in np.flatnonzero(bits <= self.distance):
                yield int(at[k]), int(index[k]), int(bits[k])


def page(told: dict[str, Any], leaks: list[dict[str, Any]], train: Path, evaluation: Path) -> str:
    """The page: counts, and the nearest pairs side by side with their captions."""
    rows = [
        ("the same file", f"{told['exact']:,}", percent(told["exact_share"])),
        (f"nearly the same (up to {told['distance']} of 64 bits)", f"{told['near']:,}", percent(told["near_share"])),
        (
            "captions that training has too",
            f"{told['eval_captions_seen']:,}",
            percent(told["eval_captions_seen"] / told["eval"]),
        ),
    ]
    chosen = sorted(leaks, key=lambda leak: (leak["kind"] != "exact", leak["distance"], leak["eval_record"]))[:SHOWN]
    sides = {"eval": _pairs(evaluation), "train": _pairs(train)} if chosen else {}
    cards = []
    for leak in chosen:
        shown = [_shown(sides[side][leak[f"{side}_record"]], side, leak[side]) for side in ("eval", "train")]
        kind = "the same file" if leak["kind"] == "exact" else f"{leak['distance']} bits differ"
        cards.append(f"<h4>{kind}</h4><div class='beside'>{''.join(shown)}</div>")
    more = f"<p class='note'>The {len(chosen)} nearest of {len(leaks):,}; all are in leaks.jsonl.</p>" if leaks else ""
    title = f"{told['exact'] + told['near']:,} of {told['eval']:,} evaluation pictures are in training"
    return (
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{title}</title><style>{STYLE}{PAIRS}</style>"
        f"<main><h1>{title}</h1><p>{escaped(evaluation)} against the {told['train']:,} of {escaped(train)}.</p>"
        f"{table(('', 'evaluation pictures', 'share'), rows)}<p class='note'>Near is a suspicion: plain pictures have "
        f"near hashes too. Look at the pairs.</p>{''.join(cards)}{more}</main></html>\n"
    )


def _pairs(directory: Path) -> RecordPairs:
    return RecordPairs(directory, json.loads((directory / MANIFEST).read_text())["options"]["split"])


def _shown(record: Any, side: str, key: str) -> str:
    image = Image.open(io.BytesIO(record.image))
    return (
        f"<figure class='sample'><img class='scene' alt='' src='{picture_uri(image.convert('RGB'), 'JPEG', 216)}'>"
        f"<figcaption>{side}: {escaped(record.text)}<br><small>{escaped(key)}</small></figcaption></figure>"
    )


def main(values: SimpleNamespace) -> None:
    """Entry point."""
    train, evaluation = Path(values.train), Path(values.eval)
    if values.distance > MAX_DISTANCE:
        raise UserError(f"--distance={values.distance}: {MAX_DISTANCE} bits at most; above it everything is near")
    output = output_directory(Path(values.output), "--output")
    told, leaks = find(train, evaluation, values.distance)
    (output / "leaks.jsonl").write_text("".join(json.dumps(leak) + "\n" for leak in leaks))
    (output / "leakage.json").write_text(json.dumps(told, indent=1) + "\n")
    (output / "index.html").write_text(page(told, leaks, train, evaluation), encoding="utf-8")
    if values.json:
        tell(json.dumps(told))
        return
    tell(
        f"of {told['eval']:,} evaluation pictures {told['exact']:,} are in training as the same file, {told['near']:,} "
        f"nearly; {told['eval_captions_seen']:,} captions; see {output / 'index.html'}"
    )


if __name__ == "__main__":
    entry.run(main, COMMANDS["leakage"])
