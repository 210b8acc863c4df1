"""Pictures and texts of the built-in world as records, drawn on the fly."""

from __future__ import annotations

from ml_collections import ConfigDict

from vlkd_jax.data.sources import Record, TextQuestion
from vlkd_jax.shapes import world

WORLD_SIZE = 1 << 31
"""The built-in world draws scenes on the fly; this is only how many different indices it has."""


class ShapesPairs:
    """Picture and caption of the built-in world. There is no question and no answer here."""

    def __init__(self, seed: int, split: str, twins: int = 1, complete: float = 0.0):
        self.seed, self.split, self.twins, self.complete = seed, split, twins, complete

    def __len__(self) -> int:
        return WORLD_SIZE

    def __getitem__(self, index: int) -> Record:
        scene = world.make_scene(self.seed, self.split, index, self.twins)
        text = world.caption(scene, world.generator(self.seed, self.split, index, 3), self.complete)
        return Record(text, world.render(scene), name=f"shapes {self.split} {index}")


class ShapesTexts:
    """Texts of the built-in world, never a picture: descriptions, and questions with answers about a description.

    One in twenty is a caption alone, three are captions beside a full description of the same scene, the rest questions
    with their answer beside a full description; what has to be read to answer is always in the context.
    """

    def __init__(self, seed: int, split: str):
        self.seed, self.split = seed, split

    def __len__(self) -> int:
        return WORLD_SIZE

    def __getitem__(self, index: int) -> Record:
        scene = world.make_scene(self.seed, self.split, index)
        rng = world.generator(self.seed, self.split, index, 4)
        name = f"shapes text {self.split} {index}"
        part = rng.random()
        if part < 0.05:
            return Record(world.caption(scene, rng), name=name)
        context = world.caption(scene, rng, complete=1.0)
        if part < 0.2:
            return Record(world.caption(scene, rng), context=context, name=name)
        question = None
        while question is None:
            question = world.ask(scene, world.QUESTION_TYPES[int(rng.integers(len(world.QUESTION_TYPES)))], rng)
        prompt = f"question: {question.question} answer:"
        return Record(f"{prompt} {question.answer}", context=context, prompt=prompt, name=name)


def pairs(config: ConfigDict, split: str) -> ShapesPairs:
    """`ShapesPairs` for a run; only what it trains on has hard negatives."""
    twins, complete = (1, 1.0) if split == "validation" else (config.data.twins, config.data.complete)
    return ShapesPairs(_world_seed(config, split), split, twins, complete)


def texts(config: ConfigDict, split: str) -> ShapesTexts:
    """`ShapesTexts` for a run."""
    return ShapesTexts(_world_seed(config, split), split)


def _world_seed(config: ConfigDict, split: str) -> int:
    """Every seed trains on scenes of its own; the held-out ones are the same for all, so that figures compare."""
    return config.seed if split == "train" else 0


def text_questions(count: int, seed: int = 0, split: str = "validation") -> list[TextQuestion]:
    """Questions beside a full description of their scene, the types in turn."""
    return [
        TextQuestion(
            world.caption(scene, world.generator(seed, split, index, 5), complete=1.0),
            question.question,
            question.answer,
            question.kind,
            index,
        )
        for index, scene, question in world.question_set(seed, split, count)
    ]
