"""Retrieval: a text looks for its picture among the pictures, not a picture for its text."""

import numpy as np

from vlkd_jax.evals.retrieval import text_to_image_hits


def test_hits_are_a_search_by_every_text(rng):
    """Against a plain loop; searching in the other direction would give other hits."""
    images = rng.normal(size=(60, 4))
    texts = images + 0.9 * rng.normal(size=images.shape)
    images, texts = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (images, texts))
    expected = [max(range(60), key=lambda k: float(np.dot(text, images[k]))) == n for n, text in enumerate(texts)]
    assert text_to_image_hits(texts, images).tolist() == expected
    assert 0 < sum(expected) < 60 and text_to_image_hits(images, texts).tolist() != expected
