"""Text abilities: figures are means over tokens, and each question is asked beside its own description."""

import numpy as np
import pytest

from vlkd_jax.data.text import BartText
from vlkd_jax.evals.retention import answer_texts, mean_terms, text_questions, without_dropout
from vlkd_jax.shapes import world
from vlkd_jax.types import Batch

COUNT = 40


def test_means_are_over_what_is_counted_not_over_batches(rng):
    """Batches with 1 and with 9 counted tokens: each token weighs the same."""
    batches = [Batch(text_ids=rng.normal(size=(2, 5)), target_mask=np.arange(10).reshape(2, 5) < n) for n in (1, 9, 4)]

    def terms(params, frozen, batch, rng):
        assert rng is None
        kept = batch.target_mask
        return {"text": (params * (batch.text_ids * kept).sum(), kept.sum()), "one": (frozen * 1.0, 1.0)}

    found = mean_terms(without_dropout(terms), 2.0, 3.0, batches)
    kept = np.concatenate([batch.text_ids[batch.target_mask] for batch in batches])
    assert found == {"text": pytest.approx(2 * kept.mean(), rel=1e-5), "one": 3}


def test_descriptions_are_of_the_scene_that_is_asked_about():
    """A description names every attribute of its scene, and the answer follows from that scene."""
    items = text_questions(5, "validation", COUNT)
    asked = list(world.question_set(5, "validation", COUNT))
    assert [question for _, question in items] == [question for _, _, question in asked]
    for (description, _), (index, _, _) in zip(items, asked, strict=True):
        scene = world.make_scene(5, "validation", index)
        assert all(word in description for thing in scene.things for word in thing.attributes)
    assert len({description for description, _ in items}) > COUNT / 3


def test_each_question_is_asked_beside_its_description(assets):
    items = text_questions(5, "validation", COUNT)
    expected = {(description, question.question): f"answer {k}" for k, (description, question) in enumerate(items)}

    class Oracle:
        text = BartText(assets / "bart")

        def generate(self, params, sources, prefixes, max_new_tokens, contexts):
            decode = self.text.decode
            said = []
            for source, prefix, context in zip(sources, prefixes, contexts, strict=True):
                assert source == [*prefix, self.text.mask]
                question = decode(prefix).removeprefix("question: ").removesuffix(" answer:")
                said.append(expected[decode(context), question])
            return said

    assert answer_texts(Oracle(), None, items) == [expected[d, question.question] for d, question in items]
