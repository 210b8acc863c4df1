"""The values that travel: `Batch` from the data pipeline to the losses, `TrainState` through the train step.

Shape letters, used in every annotation and docstring: B batch, N image tokens (patches and class token), L clean
caption, S corrupted caption, C context, T target, P forced prefix, Q tokens of a cached step, D student width, V its
vocabulary, E CLIP joint width, Dv and Dt the widths of CLIP's towers, H heads, K head width, M decoder memory (N + S),
W beams, R memories that beams share (B / W). Masks are bool, True = keep; sequences are padded on the right.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.struct
import jax
from jax.typing import ArrayLike, DTypeLike

try:
    from jaxtyping import Bool, Float, Float32, Int, Key, UInt8
except ImportError:  # only the tests check shapes; the models run without it

    class Float:
        """Stands for jaxtyping's classes: `Float[Array, "B E"]` is `Array`."""

        def __class_getitem__(cls, item: tuple[Any, str]) -> Any:
            return item[0]

    Bool = Float32 = Int = Key = UInt8 = Float

try:
    from ml_collections import ConfigDict
except ImportError:  # whoever builds a task from its models' configurations has none
    ConfigDict = Any

__all__ = [
    "Array",
    "ArrayLike",
    "Batch",
    "Bool",
    "ConfigDict",
    "DTypeLike",
    "Float",
    "Float32",
    "Int",
    "Key",
    "Params",
    "Quantized",
    "TeacherOutputs",
    "TrainState",
    "UInt8",
]

Array = jax.Array
Params = Any
"""A nested dict of arrays, as Flax makes it."""


class Quantized(NamedTuple):
    """Vectors as int8, each with a scale of its own: `values * scale`."""

    values: Any
    scale: Any


class TeacherOutputs(NamedTuple):
    """Image tokens, E wide or as wide as CLIP's image tower, and the embeddings of image and text.

    In a batch they come from a teacher cache: the embeddings are not normalised there, each may be compressed (see
    compression.py), and `tokens` is None where the image's embedding is the one token.
    """

    tokens: Any
    image: Any
    text: Any


@flax.struct.dataclass
class Batch:
    """One batch; a field that a task does not use is None.

    Attributes:
      index: int64 [B], which record of the source each row is (to name the rows of a bad batch).
      pixels: uint8 [B, height, width, 3]; what reads them normalises them with CLIP's statistics.
      clip_ids, clip_mask: int32 and bool [B, 77 or the model's positions], the clean caption in CLIP's tokens.
      text_ids, text_mask: int32 and bool [B, L], the clean text in BART's tokens, `<s>` to `</s>`; also the target.
      target_mask: bool [B, L], which of text_ids the losses count: all but padding and a given prompt.
      source_ids, source_mask: int32 and bool [B, S], the corrupted text that the student's encoder reads.
      labels: int32 [B], the class of each text, or float32 [B], its score.
      context_ids, context_mask: int32 and bool [B, C], a text the decoder may read beside it (text-only records).
      teacher: `TeacherOutputs` of a cache, in place of pixels, clip_ids and clip_mask.
      replay: a text-only batch mixed in to keep the student's text abilities.
    """

    index: Any = None
    pixels: Any = None
    clip_ids: Any = None
    clip_mask: Any = None
    text_ids: Any = None
    text_mask: Any = None
    target_mask: Any = None
    source_ids: Any = None
    source_mask: Any = None
    labels: Any = None
    context_ids: Any = None
    context_mask: Any = None
    teacher: Any = None
    replay: Batch | None = None


@flax.struct.dataclass
class TrainState:
    """All that a checkpoint holds, in the parts that `parts` gives. The frozen teacher is not part of it.

    Attributes:
      step: int32 [], optimizer steps taken, skipped ones included.
      params: float32 tree, the trained parameters.
      opt_state: optax state over `params`.
      skipped: int32 [], updates skipped so far because the loss or its gradient was not finite.
      skipped_in_row: int32 [], how many of the last steps were skipped without a good one between.
    """

    step: Array
    params: Params
    opt_state: Any
    skipped: Array
    skipped_in_row: Array

    def parts(self) -> dict[str, Any]:
        """What is stored apart, so that each can be read without the others: params, opt_state and the progress."""
        progress = {"step": self.step, "skipped": self.skipped, "skipped_in_row": self.skipped_in_row}
        return {"params": self.params, "opt_state": self.opt_state, "progress": progress}

    @classmethod
    def from_parts(cls, parts: dict[str, Any]) -> TrainState:
        """The state whose `parts` these are."""
        return cls(params=parts["params"], opt_state=parts["opt_state"], **parts["progress"])
