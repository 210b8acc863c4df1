"""Multi-head attention shared by CLIP and BART."""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlkd_jax.models.layers import Dense
from vlkd_jax.types import Array, ArrayLike, Bool, DTypeLike, Float


class KeyValue(NamedTuple):
    """Projected keys and values of M positions, H heads of width K."""

    key: Float[Array, "B H M K"]
    value: Float[Array, "B H M K"]


def causal_mask(length: int) -> Bool[Array, "1 1 {length} {length}"]:
    """True where a query (row) may read a key (column)."""
    return jnp.tril(jnp.ones((length, length), bool))[None, None]


class Attention(nn.Module):
    """Multi-head scaled dot-product attention with Hugging Face's parameter names.

    Weights and their softmax are float32; projections run in `dtype`. A query that may read nothing attends evenly
    (finite, never NaN). The weights are sown in "intermediates" for whoever makes that collection mutable. Source:
    Vaswani et al. 2017, section 3.2.

    Attributes:
      out_width: of the result where it is not `width`.
    """

    width: int
    num_heads: int
    dropout: float = 0.0
    dtype: DTypeLike = jnp.float32
    in_init: nn.initializers.Initializer = nn.initializers.normal(0.02)
    out_init: nn.initializers.Initializer = nn.initializers.normal(0.02)
    out_width: int | None = None

    def setup(self) -> None:
        self.q_proj = Dense(self.width, dtype=self.dtype, kernel_init=self.in_init)
        self.k_proj = Dense(self.width, dtype=self.dtype, kernel_init=self.in_init)
        self.v_proj = Dense(self.width, dtype=self.dtype, kernel_init=self.in_init)
        self.out_proj = Dense(self.out_width or self.width, dtype=self.dtype, kernel_init=self.out_init)
        self.weight_dropout = nn.Dropout(self.dropout)

    def _heads(self, x: Float[ArrayLike, "B T D"]) -> Float[Array, "B T H K"]:
        return x.reshape(*x.shape[:-1], self.num_heads, -1)

    def keys_values(self, memory: Float[ArrayLike, "B M D"]) -> KeyValue:
        """Keys and values of memory: heads in front of positions, so that a cache is read as it lies."""
        keys, values = self._heads(self.k_proj(memory)), self._heads(self.v_proj(memory))
        return KeyValue(jnp.swapaxes(keys, 1, 2), jnp.swapaxes(values, 1, 2))

    def attend(
        self,
        x: Float[ArrayLike, "B T D"],
        kv: KeyValue,
        mask: Bool[ArrayLike, "#B #H #T #M"] | None,
        deterministic: bool = True,
    ) -> Float[Array, "B T F"]:
        """x reads kv where mask, broadcast to [B, H, T, M], is True."""
        query = self._heads(self.q_proj(x)) * (self.width // self.num_heads) ** -0.5
        scores = jnp.einsum("bthk,bhmk->bhtm", query, kv.key, preferred_element_type=jnp.float32)
        if mask is not None:
            scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(scores, axis=-1).astype(self.dtype)
        self.sow("intermediates", "weights", weights)
        weights = self.weight_dropout(weights, deterministic=deterministic)
        mixed = jnp.einsum("bhtm,bhmk->bthk", weights, kv.value)
        return self.out_proj(mixed.reshape(*x.shape[:-1], self.width))

    def __call__(
        self,
        x: Float[ArrayLike, "B T D"],
        memory: Float[ArrayLike, "B M D"],
        mask: Bool[ArrayLike, "#B #H #T #M"] | None,
        deterministic: bool = True,
    ) -> Float[Array, "B T F"]:
        """x reads memory under mask. Self-attention: memory is x."""
        return self.attend(x, self.keys_values(memory), mask, deterministic)
