"""What pictures show: `vlkd caption IMG... --model=DIR`."""

from __future__ import annotations

import json
from types import SimpleNamespace

from vlkd_jax import entry
from vlkd_jax.commands import COMMANDS
from vlkd_jax.console import say
from vlkd_jax.errors import UserError
from vlkd_jax.use.arguments import chosen_decoding, in_portions, listed, sort_arguments
from vlkd_jax.vlkd import VLKD


def main(values: SimpleNamespace) -> None:
    """Entry point."""
    pictures, texts = sort_arguments(values.images)
    if texts:
        raise UserError(f"{texts[0]}: no such picture; questions about pictures are asked by vlkd ask")
    model, options = VLKD.from_pretrained(values.model), chosen_decoding(values)
    told = []
    for block in in_portions(pictures):
        for picture, said in zip(block, model.caption(block, scores=True, **options), strict=True):
            texts = [text._asdict() for text in listed(said, options.get("returns", 1))]
            told.append({"image": str(picture), "captions": texts})
            if not values.json:
                for text in texts:
                    say(f"{picture}: {text['text']}" + (f"  ({text['score']:.2f})" if values.scores else ""))
    if values.json:
        print(json.dumps(told))


if __name__ == "__main__":
    entry.run(main, COMMANDS["caption"])
