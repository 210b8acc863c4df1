"""Ranks of texts and pictures among one another."""

from __future__ import annotations

import numpy as np

BLOCK = 256
"""Rows that are compared with all others at once: 256 pictures and 25,000 captions take 26 MB."""


def ranks(queries: np.ndarray, keys: np.ndarray, query_of: np.ndarray, key_of: np.ndarray) -> np.ndarray:
    """int [q]: the rank, from 1, of the best key of each query's own picture among the keys of all other pictures.

    Equal ones count as better, and so does what is not a number: embeddings that are all alike find nothing.

    Args:
      queries, keys: float [q, E] and [k, E], L2-normalised.
      query_of, key_of: int [q] and [k], the picture that each belongs to; each query has a key.
    """
    blocks = []
    for start in range(0, len(queries), BLOCK):
        similarity = queries[start : start + BLOCK] @ keys.T
        own = query_of[start : start + BLOCK, None] == key_of
        best = np.where(own, similarity, -np.inf).max(1, keepdims=True)
        blocks.append(1 + np.sum(~(similarity < best) & ~own, 1))
    return np.concatenate(blocks)
