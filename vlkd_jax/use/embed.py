"""Embeddings of pictures and texts in one space: `vlkd embed IMG... TEXT... --model=DIR`."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from vlkd_jax import entry
from vlkd_jax.commands import COMMANDS
from vlkd_jax.console import say
from vlkd_jax.errors import UserError
from vlkd_jax.use.arguments import in_portions, sort_arguments
from vlkd_jax.vlkd import VLKD


def main(values: SimpleNamespace) -> None:
    """Entry point."""
    pictures, texts = sort_arguments(values.inputs)
    output = Path(values.output) if values.output else None
    if output and output.suffix != ".npz":
        raise UserError(f"--output={output}: embeddings are written as .npz; give that ending")
    model = VLKD.from_pretrained(values.model)
    rows = [model.embed_images(block) for block in in_portions(pictures)]
    rows += [model.embed_texts(block) for block in in_portions(texts)]
    names, vectors = [*map(str, pictures), *texts], np.concatenate(rows)
    if output:
        np.savez(output, names=np.array(names), embeddings=vectors)
        say(f"{output}: {len(names)} embeddings of {vectors.shape[1]} numbers, under names and embeddings")
        return
    for name, vector in zip(names, vectors, strict=True):
        print(json.dumps({"input": name, "embedding": [round(float(x), 7) for x in vector]}))


if __name__ == "__main__":
    entry.run(main, COMMANDS["embed"])
