"""A few examples of a source, drawn once: few-shot training, and a record of which they were."""

from __future__ import annotations

import json
import os
from typing import Any

import numpy as np

from vlkd_jax import processes
from vlkd_jax.data.sources import Record
from vlkd_jax.errors import UserError
from vlkd_jax.storage import locate, write_atomic

EXAMPLES_FILE = "examples.json"


class FewShot:
    """`count` records of a source, drawn by `seed`; of a source with classes as many of each.

    Raises:
      UserError: there are not so many.
    """

    def __init__(self, source: Any, count: int, seed: int):
        self.source = source
        labels = getattr(source, "labels", None)
        classes = sorted(set(labels)) if labels and all(isinstance(label, int) for label in labels) else [None]
        rng, chosen = np.random.default_rng([seed, *b"few-shot"]), []
        for label in classes:
            of_class = len(source) if label is None else np.flatnonzero(np.array(labels) == label)
            available = of_class if label is None else len(of_class)
            if available < count:
                what = "records" if label is None else f"records of class {label}"
                raise UserError(f"config.data.examples is {count}, and there are {available} {what} to train on")
            chosen += rng.choice(of_class, count, replace=False).tolist()
        self.indices = chosen

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Record:
        return self.source[self.indices[index]]


def record_examples(workdir: str | os.PathLike[str], source: Any) -> None:
    """Writes which records a few-shot run learns from into its workdir; of another run nothing.

    Every process calls this, process 0 writes.
    """
    if not isinstance(source, FewShot):
        return
    rows = [{"index": index, "name": source.source[index].name} for index in source.indices]
    text = json.dumps(rows, indent=1, ensure_ascii=False) + "\n"
    path = locate(workdir) / EXAMPLES_FILE
    processes.on_first(lambda: write_atomic(path, text.encode("utf-8", "surrogatepass")))
