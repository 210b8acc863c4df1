"""BART as a classifier of texts (Lewis et al. 2020, section 3.1), as `BartForSequenceClassification` is built."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from vlkd_jax.models.bart import INIT_STD, Bart, shift_right
from vlkd_jax.models.configs import BartConfig
from vlkd_jax.models.layers import Dense
from vlkd_jax.types import Array, ArrayLike, Bool, DTypeLike, Float, Float32, Int


@dataclasses.dataclass(frozen=True)
class ClassifierConfig:
    """What a classifier is: its BART, and the names of its classes; none: it gives a score."""

    bart: BartConfig
    labels: tuple[str, ...]

    @property
    def outputs(self) -> int:
        """How many numbers it gives."""
        return max(len(self.labels), 1)

    def to_hf(self) -> dict[str, Any]:
        """A complete config.json for `BartForSequenceClassification`."""
        names = self.labels or ("score",)
        return self.bart.to_hf() | {
            "architectures": ["BartForSequenceClassification"],
            "classifier_dropout": 0.0,
            "id2label": {str(k): name for k, name in enumerate(names)},
            "label2id": {name: k for k, name in enumerate(names)},
            "problem_type": "single_label_classification" if self.labels else "regression",
        }


class Head(nn.Module):
    """A hidden layer as wide as BART, and the outputs; float32."""

    width: int
    outputs: int

    def setup(self) -> None:
        normal = nn.initializers.normal(INIT_STD)
        self.dense = Dense(self.width, dtype=jnp.float32, kernel_init=normal)
        self.out_proj = Dense(self.outputs, dtype=jnp.float32, kernel_init=normal)

    def __call__(self, state: Float[ArrayLike, "B D"]) -> Float32[Array, "B outputs"]:
        return self.out_proj(jnp.tanh(self.dense(state.astype(jnp.float32))))


class Classifier(nn.Module):
    """Encoder and decoder read the same text, and the decoder's last state, at `</s>`, is classified."""

    config: BartConfig
    outputs: int
    dtype: DTypeLike = jnp.float32
    remat: str | None = None

    def setup(self) -> None:
        self.bart = Bart(self.config, dtype=self.dtype, remat=self.remat)
        self.classification_head = Head(self.config.d_model, self.outputs)

    def __call__(
        self, ids: Int[ArrayLike, "B S"], mask: Bool[ArrayLike, "B S"], deterministic: bool = True
    ) -> Float32[Array, "B outputs"]:
        """Logits of the classes, or the score, of texts from `<s>` to `</s>`. Raises UserError when S is too long."""
        memory = self.bart.encode(ids, mask, deterministic)
        inputs = shift_right(ids, self.config.decoder_start_token_id)
        hidden = self.bart.decode(inputs, memory, mask, deterministic)
        last = jnp.sum(mask, -1) - 1
        return self.classification_head(jnp.take_along_axis(hidden, last[:, None, None], 1)[:, 0])
