"""Questions about pictures: `vlkd ask IMG... "question"... --model=DIR`; every picture is asked every question."""

from __future__ import annotations

import json
from types import SimpleNamespace

from vlkd_jax import entry
from vlkd_jax.commands import COMMANDS
from vlkd_jax.console import say
from vlkd_jax.errors import UserError
from vlkd_jax.use.arguments import chosen_decoding, listed, sort_arguments
from vlkd_jax.vlkd import VLKD


def main(values: SimpleNamespace) -> None:
    """Entry point."""
    pictures, questions = sort_arguments(values.inputs)
    if not pictures or not questions:
        missing = "picture" if not pictures else "question"
        raise UserError(f'no {missing} given; for example: vlkd ask photo.jpg "what color is the car?" --model=DIR')
    choices = [text.strip() for text in values.choices.split(",")] if values.choices else []
    model, options = VLKD.from_pretrained(values.model), chosen_decoding(values)
    if choices and options:
        raise UserError(f"--{next(iter(options))} chooses how an answer is written; with --choices none is")
    told = []
    for picture in pictures:
        if choices:
            answers = model.rank(picture, choices, questions)
        else:
            answers = [
                listed(said, options.get("returns", 1))
                for said in model.answer(picture, questions, scores=True, **options)
            ]
        for question, said in zip(questions, answers, strict=True):
            texts = [text._asdict() for text in said]
            told.append({"image": str(picture), "question": question, "answers": texts})
            if not values.json:
                several = len(pictures) * len(questions) > 1
                head = f"{picture}: {question} " if several else ""
                for text in texts:
                    scored = f"  ({text['score']:.2f})" if values.scores or choices else ""
                    say(f"{head}{text['text']}{scored}")
    if values.json:
        print(json.dumps(told))


if __name__ == "__main__":
    entry.run(main, COMMANDS["ask"])
