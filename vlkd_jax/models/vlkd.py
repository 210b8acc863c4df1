"""The student: BART plus two bias-free linears, into CLIP's joint space and out of it."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vlkd_jax.models.bart import Bart, join_memory, shift_right
from vlkd_jax.models.configs import BartConfig, ClipConfig
from vlkd_jax.models.layers import Dense, l2_normalize
from vlkd_jax.types import Array, ArrayLike, Bool, DTypeLike, Float, Float32, Int

NEW = ("sentence_projection", "image_projection", "logit_scale")
"""The student's parameters that BART does not have; they start from nothing and take a larger learning rate."""


HIDDEN = {"hidden": "last_hidden_state", "penultimate": "penultimate"}
"""Kinds of image tokens that are states of CLIP's vision tower -> their name in `ClipImageOutput`."""


class Whitening(nn.Module):
    """A fixed affine map, float32; `vlkd_jax.whitening` gives its values, until then it is the identity."""

    @nn.compact
    def __call__(self, x: Float[ArrayLike, "... D"]) -> Float32[Array, "... D"]:
        width = x.shape[-1]
        mean = self.param("mean", nn.initializers.zeros, (width,))
        matrix = self.param("matrix", lambda _: jnp.eye(width))
        centred = x.astype(jnp.float32) - jax.lax.stop_gradient(mean)
        # rounded to TF32 or bfloat16, the strong directions would drown the weak ones that this is to bring up
        return jnp.matmul(centred, jax.lax.stop_gradient(matrix), precision="highest")


class Student(nn.Module):
    """BART [D wide], `sentence_projection` [D, E], `image_projection` [E or CLIP's width, D] and the logit scale.

    Attributes:
      config: BART's.
      joint_width: E of the CLIP it learns from.
      token_width: of the image tokens it reads, E or CLIP's width.
      sentence_position: "eos" or "bos", the encoder state that stands for the sentence.
      whiten: whether `image_whitening`, which no gradient reaches, stands before `image_projection`.
    """

    config: BartConfig
    joint_width: int
    token_width: int
    sentence_position: str = "eos"
    whiten: bool = False
    dtype: DTypeLike = jnp.float32
    remat: str | None = None

    def setup(self) -> None:
        self.bart = Bart(self.config, dtype=self.dtype, remat=self.remat)
        init = nn.initializers.normal(0.02)
        self.sentence_projection = Dense(self.joint_width, use_bias=False, dtype=jnp.float32, kernel_init=init)
        self.image_projection = Dense(self.config.d_model, use_bias=False, dtype=self.dtype, kernel_init=init)
        self.image_whitening = Whitening() if self.whiten else None
        self.logit_scale = self.param("logit_scale", nn.initializers.constant(np.log(1 / 0.07)), ())

    def example_inputs(
        self,
    ) -> tuple[Float[Array, "1 1 W"], Int[Array, "1 T"], Bool[Array, "1 T"], Int[Array, "1 T"]]:
        """Inputs of the right shapes for `init`."""
        ids = jnp.zeros((1, 2), jnp.int32)
        return jnp.zeros((1, 1, self.token_width)), ids, ids == 0, ids

    def __call__(
        self,
        image_tokens: Float[ArrayLike, "B N E"],
        source_ids: Int[ArrayLike, "B S"],
        source_mask: Bool[ArrayLike, "B S"],
        target_ids: Int[ArrayLike, "B T"],
    ) -> Float32[Array, "B T V"]:
        """Teacher-forced logits; also what initialises every parameter.

        Args:
          image_tokens: the teacher's, E wide or as wide as its image tower.
          source_ids, source_mask: the corrupted caption.
          target_ids: the clean caption from `<s>` on.
        """
        hidden = self.encode(source_ids, source_mask)
        self.embed_sentence(hidden, source_mask)
        memory, mask = self.memory(self.image_prefix(image_tokens), hidden, source_mask)
        return self.decode_logits(target_ids, memory, mask)

    def encode(
        self, ids: Int[ArrayLike, "B S"], mask: Bool[ArrayLike, "B S"], deterministic: bool = True
    ) -> Float[Array, "B S D"]:
        """BART's encoder states. Raises UserError when S is too long."""
        return self.bart.encode(ids, mask, deterministic=deterministic)

    def embed_sentence(
        self, hidden: Float[ArrayLike, "B S D"], mask: Bool[ArrayLike, "B S"], unit: bool = True
    ) -> Float32[Array, "B E"]:
        """Sentence embedding of encoder states: the state at `</s>` (or `<s>`), projected, L2-normalised if `unit`."""
        position = jnp.sum(mask, -1) - 1 if self.sentence_position == "eos" else jnp.zeros(mask.shape[0], jnp.int32)
        state = jnp.take_along_axis(hidden, position[:, None, None], 1)[:, 0]
        projected = self.sentence_projection(state.astype(jnp.float32))
        return l2_normalize(projected) if unit else projected

    def image_prefix(self, tokens: Float[ArrayLike, "B N E"]) -> Float[Array, "B N D"]:
        """Decoder memory of the teacher's image tokens."""
        return self.image_projection(self.image_whitening(tokens) if self.whiten else tokens)

    def memory(
        self, prefix: Float[ArrayLike, "B N D"], hidden: Float[ArrayLike, "B S D"], mask: Bool[ArrayLike, "B S"]
    ) -> tuple[Float[Array, "B M D"], Bool[Array, "B M"]]:
        """What the decoder reads, prefix before hidden, and its mask."""
        keep = jnp.ones(prefix.shape[:2], bool)
        return join_memory((prefix.astype(hidden.dtype), keep), (hidden, mask))

    def decode(
        self,
        target_ids: Int[ArrayLike, "B T"],
        memory: Float[ArrayLike, "B M D"],
        mask: Bool[ArrayLike, "B M"],
        deterministic: bool = True,
    ) -> Float[Array, "B T D"]:
        """Teacher-forced decoder states for target ids (shifted right inside). Raises UserError when T is too long."""
        inputs = shift_right(target_ids, self.config.decoder_start_token_id)
        return self.bart.decode(inputs, memory, mask, deterministic=deterministic)

    def decode_logits(
        self, target_ids: Int[ArrayLike, "B T"], memory: Float[ArrayLike, "B M D"], mask: Bool[ArrayLike, "B M"]
    ) -> Float32[Array, "B T V"]:
        """Teacher-forced logits, which the losses take in parts: see `vlkd_jax.losses.icti`."""
        return self.bart.logits(self.decode(target_ids, memory, mask))

    def scale(self) -> Float32[Array, ""]:
        """The inverse temperature of the contrastive loss; the train step keeps it at 100 or less, as CLIP's."""
        return jnp.exp(self.logit_scale)


@dataclasses.dataclass(frozen=True)
class StudentConfig:
    """What a student is, whole: both models and every choice that changes what it computes.

    Attributes:
      bart, clip: as their directories have them.
      image_tokens: which of the teacher's tokens it reads: "projected", "hidden", "penultimate" or "pooled".
      whiten, sentence_position: see `Student`.
      contrastive_scale: "learned" or "clip", whose logit scale the contrastive loss took.
      ttdm: "normalised" or "raw", the vectors whose distance the text-text loss took.
    """

    bart: BartConfig
    clip: ClipConfig
    image_tokens: str = "projected"
    whiten: bool = False
    sentence_position: str = "eos"
    contrastive_scale: str = "learned"
    ttdm: str = "normalised"

    def module(self, dtype: DTypeLike = jnp.float32) -> Student:
        """The student's module, without dropout."""
        hidden = self.image_tokens in HIDDEN
        rates = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
        return Student(
            dataclasses.replace(self.bart, **rates),
            self.clip.projection_dim,
            self.clip.vision.hidden_size if hidden else self.clip.projection_dim,
            sentence_position=self.sentence_position,
            whiten=self.whiten,
            dtype=dtype,
        )
