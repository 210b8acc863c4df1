"""BART (Lewis et al. 2020): encoder, decoder over any memory, and the decoder's cached step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlkd_jax.errors import UserError
from vlkd_jax.models.attention import Attention, KeyValue, causal_mask
from vlkd_jax.models.configs import BartConfig
from vlkd_jax.models.layers import ACTIVATION_FUNCTIONS, Dense, embed_ids, layer_norm, remat
from vlkd_jax.sharding import BATCH, constrain
from vlkd_jax.types import Array, ArrayLike, Bool, DTypeLike, Float, Float32, Int

POSITION_OFFSET = 2  # BART's position tables keep two unused rows in front
LAYER_NORM_EPS = 1e-5
INIT_STD = 0.02


def shift_right(ids: Int[ArrayLike, "B T"], start_id: int) -> Int[Array, "B T"]:
    """Decoder inputs for targets `ids`: `start_id`, then all but the last. Right padding stays harmless."""
    return jnp.concatenate([jnp.full_like(ids[:, :1], start_id), ids[:, :-1]], axis=1)


def join_memory(
    *parts: tuple[Float[ArrayLike, "B _ D"], Bool[ArrayLike, "B _"]],
) -> tuple[Float[Array, "B M D"], Bool[Array, "B M"]]:
    """What a decoder reads: parts of (states, mask), each of its own length, one behind the other."""
    states, masks = zip(*parts, strict=True)
    return jnp.concatenate(states, 1), jnp.concatenate(masks, 1)


def _dense(features: int, dtype: DTypeLike) -> nn.Dense:
    return Dense(features, dtype=dtype, kernel_init=nn.initializers.normal(INIT_STD))


class BartLayer(nn.Module):
    """What encoder and decoder layers share; inherited, not nested, so that parameter names stay Hugging Face's."""

    config: BartConfig
    dtype: DTypeLike

    def _setup_feed_forward(self, width: int):
        self.fc1 = _dense(width, self.dtype)
        self.fc2 = _dense(self.config.d_model, self.dtype)
        self.final_layer_norm = layer_norm(LAYER_NORM_EPS, self.dtype)
        self.dropout = nn.Dropout(self.config.dropout)
        self.activation_dropout = nn.Dropout(self.config.activation_dropout)

    def _attention(self, num_heads: int) -> Attention:
        config = self.config
        return Attention(config.d_model, num_heads, config.attention_dropout, self.dtype)

    def _feed_forward(self, x: Float[Array, "B T D"], deterministic: bool) -> Float[Array, "B T D"]:
        hidden = ACTIVATION_FUNCTIONS[self.config.activation_function](self.fc1(x))
        hidden = self.fc2(self.activation_dropout(hidden, deterministic=deterministic))
        return constrain(self.final_layer_norm(x + self.dropout(hidden, deterministic=deterministic)), BATCH)


class EncoderLayer(BartLayer):
    """Post-norm encoder layer: (x, mask) -> (x, None), the form `nn.scan` wants."""

    def setup(self) -> None:
        self.self_attn = self._attention(self.config.encoder_attention_heads)
        self.self_attn_layer_norm = layer_norm(LAYER_NORM_EPS, self.dtype)
        self._setup_feed_forward(self.config.encoder_ffn_dim)

    def __call__(
        self, x: Float[ArrayLike, "B S D"], mask: Bool[ArrayLike, "B 1 1 S"], deterministic: bool
    ) -> tuple[Float[Array, "B S D"], None]:
        attended = self.self_attn(x, x, mask, deterministic)
        x = self.self_attn_layer_norm(x + self.dropout(attended, deterministic=deterministic))
        return self._feed_forward(x, deterministic), None


class DecoderLayer(BartLayer):
    """Post-norm decoder layer with three entries: whole sequence, memory projection, cached tokens."""

    def setup(self) -> None:
        self.self_attn = self._attention(self.config.decoder_attention_heads)
        self.self_attn_layer_norm = layer_norm(LAYER_NORM_EPS, self.dtype)
        self.encoder_attn = self._attention(self.config.decoder_attention_heads)
        self.encoder_attn_layer_norm = layer_norm(LAYER_NORM_EPS, self.dtype)
        self._setup_feed_forward(self.config.decoder_ffn_dim)

    def __call__(
        self,
        x: Float[ArrayLike, "B T D"],
        memory: Float[ArrayLike, "B M D"],
        mask: Bool[ArrayLike, "1 1 T T"],
        memory_mask: Bool[ArrayLike, "B 1 1 M"],
        deterministic: bool,
    ) -> tuple[Float[Array, "B T D"], None]:
        """A whole sequence: (x, None)."""
        attended = self.self_attn(x, x, mask, deterministic)
        x = self.self_attn_layer_norm(x + self.dropout(attended, deterministic=deterministic))
        attended = self.encoder_attn(x, memory, memory_mask, deterministic)
        x = self.encoder_attn_layer_norm(x + self.dropout(attended, deterministic=deterministic))
        return self._feed_forward(x, deterministic), None

    def project_memory(self, memory: Float[ArrayLike, "B M D"]) -> KeyValue:
        """This layer's cross-attention keys and values."""
        return self.encoder_attn.keys_values(memory.astype(self.dtype))

    def extend(
        self,
        x: Float[ArrayLike, "B Q D"],
        cache: KeyValue,
        cross: KeyValue,
        at: Int[ArrayLike, ""],
        cache_mask: Bool[ArrayLike, "B Q L"],
        memory_mask: Bool[ArrayLike, "B M"],
    ) -> tuple[Float[Array, "B Q D"], KeyValue]:
        """Q tokens read a cache of L slots, their own from slot `at` on included, and the memory: (x, cache)."""
        new = self.self_attn.keys_values(x)
        cache = jax.tree.map(lambda old, item: jax.lax.dynamic_update_slice_in_dim(old, item, at, 2), cache, new)
        x = self.self_attn_layer_norm(x + self.self_attn.attend(x, cache, cache_mask[:, None]))
        attended = self.encoder_attn.attend(x, cross, memory_mask[:, None, None, :])
        x = self.encoder_attn_layer_norm(x + attended)
        return self._feed_forward(x, True), cache


def _scan(layers: int) -> dict:
    return {
        "variable_axes": {"params": 0, "intermediates": 0},
        "split_rngs": {"params": True, "dropout": True},
        "in_axes": nn.broadcast,
        "length": layers,
    }


class BartSide(nn.Module):
    """What encoder and decoder share in front of their layers; the token embedding belongs to `Bart`."""

    config: BartConfig
    dtype: DTypeLike
    remat: str | None

    def _setup_embedding(self):
        config, normal = self.config, nn.initializers.normal(INIT_STD)
        rows = config.max_position_embeddings + POSITION_OFFSET
        self.embed_positions = nn.Embed(rows, config.d_model, dtype=self.dtype, embedding_init=normal)
        self.layernorm_embedding = layer_norm(LAYER_NORM_EPS, self.dtype)
        self.dropout = nn.Dropout(config.dropout)

    def embed(
        self, embedded: Float[ArrayLike, "B T D"], positions: Int[ArrayLike, "*rows T"], deterministic: bool = True
    ) -> Float[Array, "B T D"]:
        """Token embeddings plus those of positions, all rows' [T] or each row's [B, T], normed and dropped out."""
        x = self.layernorm_embedding(embedded + embed_ids(self.embed_positions, positions + POSITION_OFFSET))
        return self.dropout(x, deterministic=deterministic)

    def _positions(self, length: int) -> Int[Array, " {length}"]:
        limit = self.config.max_position_embeddings
        if length > limit:
            raise UserError(f"a text of {length} BART tokens given; max_position_embeddings is {limit}: shorten it")
        return jnp.arange(length)


class BartEncoder(BartSide):
    """Encoder layers: embedded tokens to the last hidden state."""

    def setup(self) -> None:
        self._setup_embedding()
        layer = remat(EncoderLayer, self.remat, static_argnums=(3,))
        self.layers = nn.scan(layer, **_scan(self.config.encoder_layers))(self.config, self.dtype)

    def __call__(
        self, embedded: Float[ArrayLike, "B S D"], mask: Bool[ArrayLike, "B S"], deterministic: bool
    ) -> Float[Array, "B S D"]:
        x = self.embed(embedded, self._positions(embedded.shape[1]), deterministic)
        return self.layers(x, mask[:, None, None, :], deterministic)[0]


class BartDecoder(BartSide):
    """Decoder layers over whole sequences; `vlkd_jax.decoding` runs the same layers over a cache."""

    def setup(self) -> None:
        self._setup_embedding()
        layer = remat(DecoderLayer, self.remat, static_argnums=(5,))
        self.layers = nn.scan(layer, **_scan(self.config.decoder_layers))(self.config, self.dtype)

    def __call__(
        self,
        embedded: Float[ArrayLike, "B T D"],
        memory: Float[ArrayLike, "B M D"],
        memory_mask: Bool[ArrayLike, "B M"],
        deterministic: bool,
    ) -> Float[Array, "B T D"]:
        length = embedded.shape[1]
        x = self.embed(embedded, self._positions(length), deterministic)
        memory = memory.astype(self.dtype)
        return self.layers(x, memory, causal_mask(length), memory_mask[:, None, None, :], deterministic)[0]


class Bart(nn.Module):
    """BART. Parameters float32, activations `dtype`, logits float32; call methods through `apply(..., method=)`.

    With `deterministic=False` dropout draws from the "dropout" rng, at Hugging Face BART's places and rates.
    """

    config: BartConfig
    dtype: DTypeLike = jnp.float32
    remat: str | None = None

    def setup(self) -> None:
        config = self.config
        self.shared = nn.Embed(
            config.vocab_size, config.d_model, dtype=self.dtype, embedding_init=nn.initializers.normal(INIT_STD)
        )
        self.final_logits_bias = self.param("final_logits_bias", nn.initializers.zeros, (1, config.vocab_size))
        self.encoder = BartEncoder(config, self.dtype, self.remat)
        self.decoder = BartDecoder(config, self.dtype, self.remat)

    def _embed(self, ids: Int[ArrayLike, "B T"]) -> Float[Array, "B T D"]:
        embedded = constrain(embed_ids(self.shared, ids), BATCH)
        return embedded * self.config.d_model**0.5 if self.config.scale_embedding else embedded

    def encode(
        self, input_ids: Int[ArrayLike, "B S"], mask: Bool[ArrayLike, "B S"], deterministic: bool = True
    ) -> Float[Array, "B S D"]:
        """The encoder's last hidden state. Raises UserError when S is too long."""
        return self.encoder(self._embed(input_ids), mask, deterministic)

    def encode_all(
        self, texts: Sequence[tuple[Int[ArrayLike, "B _"], Bool[ArrayLike, "B _"]]], deterministic: bool = True
    ) -> list[Float[Array, "B _ D"]]:
        """`encode` of several texts (ids, mask) for each of B rows, in one pass.

        The weights are read once, and their gradient is summed, over devices too, once. A row's texts stand beside one
        another, so that rows stay on the devices that hold them.
        """
        widths = [ids.shape[1] for ids, _ in texts]

        def beside(parts: Iterable[ArrayLike], filling: int) -> Array:
            widened = (jnp.pad(x, ((0, 0), (0, max(widths) - x.shape[1])), constant_values=filling) for x in parts)
            return jnp.stack(list(widened), 1).reshape(-1, max(widths))

        ids, masks = zip(*texts)
        hidden = self.encode(beside(ids, self.config.pad_token_id), beside(masks, False), deterministic)
        hidden = hidden.reshape(-1, len(texts), *hidden.shape[1:])
        return [hidden[:, k, :width] for k, width in enumerate(widths)]

    def decode(
        self,
        decoder_input_ids: Int[ArrayLike, "B T"],
        memory: Float[ArrayLike, "B M D"],
        memory_mask: Bool[ArrayLike, "B M"],
        deterministic: bool = True,
    ) -> Float[Array, "B T D"]:
        """The decoder's last hidden state.

        Causal, so right padding needs no decoder mask. `memory` is whatever the decoder shall read: here the image
        prefix and the encoded text, concatenated. Raises UserError when T is too long.
        """
        return self.decoder(self._embed(decoder_input_ids), memory, memory_mask, deterministic)

    def output_table(self) -> tuple[Float32[ArrayLike, "V D"], Float32[ArrayLike, " V"]]:
        """What scores the next token: the tied, unscaled embedding, and `final_logits_bias`, never trained."""
        return self.shared.embedding, jax.lax.stop_gradient(self.final_logits_bias[0])  # a buffer in Hugging Face

    def logits(self, hidden: Float[ArrayLike, "... D"]) -> Float32[Array, "... V"]:
        """Every token's score after each hidden state. The losses take `output_table`, and never hold all scores."""
        table, bias = self.output_table()
        table, hidden = table.astype(self.dtype), hidden.astype(self.dtype)
        return jnp.einsum("...d,vd->...v", hidden, table, preferred_element_type=jnp.float32) + bias

    def embed_decoder(self, ids: Int[ArrayLike, "B Q"], positions: Int[ArrayLike, "B Q"]) -> Float[Array, "B Q D"]:
        """What the decoder's first layer reads for tokens at 0-based positions; one past the end counts as the last."""
        last = self.config.max_position_embeddings - 1
        return self.decoder.embed(self._embed(ids), jnp.minimum(positions, last))

    def __call__(
        self,
        input_ids: Int[ArrayLike, "B S"],
        mask: Bool[ArrayLike, "B S"],
        decoder_input_ids: Int[ArrayLike, "B T"],
    ) -> Float32[Array, "B T V"]:
        """Teacher-forced logits of the tokens after each of `decoder_input_ids`."""
        memory = self.encode(input_ids, mask)
        return self.logits(self.decode(decoder_input_ids, memory, mask))
