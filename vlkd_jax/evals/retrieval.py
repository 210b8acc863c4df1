"""Text-to-image retrieval."""

from __future__ import annotations

import numpy as np


def text_to_image_hits(texts: np.ndarray, images: np.ndarray) -> np.ndarray:
    """bool [n]: whether image k is the nearest (cosine) to text k. Both float [n, E], L2-normalised.

    A tie counts as a miss unless the right image comes first.
    """
    return np.argmax(texts @ images.T, 1) == np.arange(len(texts))
