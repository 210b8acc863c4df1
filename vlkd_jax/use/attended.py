"""Where a student looked: the share of each token's reading that each part of a picture has."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from vlkd_jax.errors import UserError


class Attended(NamedTuple):
    """What an answer of T tokens was read from.

    Attributes:
      tokens: the T tokens, `</s>` the last.
      patches: float32 [T, rows, columns], the share of each token's reading that each patch of the picture has.
      whole: float32 [T], that of the token for the whole picture; the rest was read of the text.
      seen: uint8 [height, width, 3], the part of the picture that the model sees, which the patches divide.
    """

    tokens: list[str]
    patches: np.ndarray
    whole: np.ndarray
    seen: np.ndarray


def attended(tokens: list[str], weights: np.ndarray, seen: np.ndarray) -> Attended:
    """Attention of T tokens [T, image tokens], the picture's class token the first of these, over its patches.

    Raises:
      UserError: a model that reads a picture as one token.
    """
    if weights.shape[1] == 1:
        raise UserError("this student reads a picture as one token (image_tokens pooled); there are no parts to show")
    side = math.isqrt(weights.shape[1] - 1)
    return Attended(tokens, weights[:, 1:].reshape(-1, side, side), weights[:, 0], seen)
