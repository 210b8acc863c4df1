"""Text abilities: figures are means over tokens, and each question is asked beside its own description."""

import types

import jax.numpy as jnp
import numpy as np
import pytest

from vlkd_jax.data.text import BartText
from vlkd_jax.evals import retention
from vlkd_jax.evals.retention import answer_texts, mean_terms, without_dropout
from vlkd_jax.shapes import world
from vlkd_jax.shapes.sources import text_questions
from vlkd_jax.types import Batch

COUNT = 40


def test_means_are_over_what_is_counted_not_over_batches(rng):
    """Batches with 1 and with 9 counted tokens: each token weighs the same."""
    batches = [Batch(text_ids=rng.normal(size=(2, 5)), target_mask=np.arange(10).reshape(2, 5) < n) for n in (1, 9, 4)]

    def terms(params, frozen, batch, rng):
        assert rng is None
        kept = batch.target_mask
        total, count = params * (batch.text_ids * kept).sum(), kept.sum(dtype=np.float32)
        return {"text": (total, count), "one": (frozen * jnp.float32(1), jnp.float32(1))}

    means = mean_terms(without_dropout(terms), 2.0, 3.0, batches)
    kept = np.concatenate([batch.text_ids[batch.target_mask] for batch in batches])
    assert means == {"text": pytest.approx(2 * kept.mean(), rel=1e-5), "one": 3}


def test_descriptions_are_of_the_scene_that_is_asked_about():
    """A description names every attribute of its scene, and the answer follows from that scene."""
    items = text_questions(COUNT, seed=5)
    asked = list(world.question_set(5, "validation", COUNT))
    assert [(item.question, item.answer, item.kind) for item in items] == [
        (q.question, q.answer, q.kind) for *_, q in asked
    ]
    for item, (index, _, _) in zip(items, asked, strict=True):
        scene = world.make_scene(5, "validation", index)
        assert item.scene == index and all(word in item.context for thing in scene.things for word in thing.attributes)
    assert len({item.context for item in items}) > COUNT / 3


def test_each_question_is_asked_beside_its_description(assets, monkeypatch):
    items = text_questions(COUNT, seed=5)
    expected = {(item.context, item.question): f"answer {k}" for k, item in enumerate(items)}
    text = BartText(assets / "bart")

    def generate(model, requests, decoding):
        for request in requests:
            assert request.source == [*request.prefix, text.mask] and request.image is None
            question = text.decode(request.prefix).removeprefix("question: ").removesuffix(" answer:")
            yield (expected[text.decode(request.context), question],)

    monkeypatch.setattr(retention, "generate", generate)
    answers = answer_texts(types.SimpleNamespace(bart_text=text), items)
    assert answers == [expected[item.context, item.question] for item in items]
