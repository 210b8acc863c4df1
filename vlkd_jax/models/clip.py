"""CLIP's two towers (Radford et al. 2021), forward only in this project: the frozen teacher."""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from vlkd_jax.errors import UserError
from vlkd_jax.models.attention import Attention, causal_mask
from vlkd_jax.models.configs import ClipConfig, ClipResNetConfig, ClipTextConfig, ClipVisionConfig
from vlkd_jax.models.layers import ACTIVATION_FUNCTIONS, Dense, embed_ids, l2_normalize, layer_norm, remat
from vlkd_jax.models.preprocessing import Preprocessing
from vlkd_jax.models.resnet import ClipResNet
from vlkd_jax.sharding import BATCH, constrain
from vlkd_jax.types import Array, ArrayLike, Bool, DTypeLike, Float, Float32, Int, UInt8

# Checkpoints saved before transformers 4.31 carry this wrong end token; there the sentence is pooled at the largest id.
LEGACY_EOS_TOKEN_ID = 2


def normalize_pixels(
    pixels: UInt8[ArrayLike, "*B height width 3"], preprocessing: Preprocessing
) -> Float32[Array, "*B height width 3"]:
    """Pixels of 0 to 255 as the model reads them: scaled, and normalised with its own mean and standard deviation.

    Args:
      preprocessing: static; `Clip.config.preprocessing`.
    """
    mean, std = np.float32(preprocessing.mean), np.float32(preprocessing.std)
    return pixels * jnp.asarray(preprocessing.rescale / std) - jnp.asarray(mean / std)


def example_inputs(
    config: ClipConfig,
) -> tuple[Float[Array, "1 height width 3"], Int[Array, "1 T"], Bool[Array, "1 T"]]:
    """Inputs of the right shapes for `Clip(config).init`."""
    ids = jnp.zeros((1, 2), jnp.int32)
    return jnp.zeros((1, config.vision.image_size, config.vision.image_size, 3)), ids, ids == 0


class ClipImageOutput(NamedTuple):
    """What the image tower gives; index 0 of N is the class token."""

    last_hidden_state: Float[Array, "B N Dv"]  # before the post layer norm
    penultimate: Float[Array, "B N Dv"]  # what the last layer reads
    tokens: Float[Array, "B N E"]  # every token through post layer norm and visual projection
    embedding: Float32[Array, "B E"]  # L2-normalised projection of the class token


class ClipMlp(nn.Module):
    """fc1, activation, fc2."""

    config: ClipVisionConfig | ClipTextConfig
    dtype: DTypeLike

    def setup(self) -> None:
        width, depth = self.config.hidden_size, self.config.num_hidden_layers
        normal = nn.initializers.normal
        self.fc1 = Dense(self.config.intermediate_size, dtype=self.dtype, kernel_init=normal((2 * width) ** -0.5))
        self.fc2 = Dense(width, dtype=self.dtype, kernel_init=normal(width**-0.5 * (2 * depth) ** -0.5))

    def __call__(self, x: Float[ArrayLike, "B T D"]) -> Float[Array, "B T D"]:
        return self.fc2(ACTIVATION_FUNCTIONS[self.config.hidden_act](self.fc1(x)))


class ClipLayer(nn.Module):
    """One pre-norm transformer layer: ((x, anything), mask) -> ((new x, x), None), the form `nn.scan` wants."""

    config: ClipVisionConfig | ClipTextConfig
    dtype: DTypeLike

    def setup(self) -> None:
        width, depth = self.config.hidden_size, self.config.num_hidden_layers
        self.self_attn = Attention(
            width,
            self.config.num_attention_heads,
            dtype=self.dtype,
            in_init=nn.initializers.normal(width**-0.5 * (2 * depth) ** -0.5),
            out_init=nn.initializers.normal(width**-0.5),
        )
        self.layer_norm1 = layer_norm(self.config.layer_norm_eps, self.dtype)
        self.mlp = ClipMlp(self.config, self.dtype)
        self.layer_norm2 = layer_norm(self.config.layer_norm_eps, self.dtype)

    def __call__(
        self, carry: tuple[Float[ArrayLike, "B T D"], Any], mask: Bool[ArrayLike, "#B 1 T T"] | None
    ) -> tuple[tuple[Float[Array, "B T D"], Float[ArrayLike, "B T D"]], None]:
        before = carry[0]
        normed = self.layer_norm1(before)
        x = before + self.self_attn(normed, normed, mask)
        return (constrain(x + self.mlp(self.layer_norm2(x)), BATCH), before), None


def _stack(config: ClipVisionConfig | ClipTextConfig, dtype: DTypeLike, policy: str | None) -> nn.Module:
    """All layers of a tower as one scanned module; parameters get a leading layer axis."""
    scanned = nn.scan(
        remat(ClipLayer, policy),
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=nn.broadcast,
        length=config.num_hidden_layers,
    )
    return scanned(config, dtype)


class ClipVisionTower(nn.Module):
    """Vision transformer: pixels -> what its last layer gives and reads."""

    config: ClipVisionConfig
    dtype: DTypeLike
    remat: str | None

    def setup(self) -> None:
        width, normal = self.config.hidden_size, nn.initializers.normal
        self.class_embedding = self.param("class_embedding", normal(width**-0.5), (width,))
        self.patch_embedding = Dense(width, use_bias=False, dtype=self.dtype, kernel_init=normal(0.02))
        self.position_embedding = nn.Embed(self.config.num_tokens, width, dtype=self.dtype, embedding_init=normal(0.02))
        self.pre_layrnorm = layer_norm(self.config.layer_norm_eps, self.dtype)
        self.layers = _stack(self.config, self.dtype, self.remat)
        self.post_layernorm = layer_norm(self.config.layer_norm_eps, self.dtype)

    def embed(self, pixel_values: Float[ArrayLike, "B height width 3"]) -> Float[Array, "B N Dv"]:
        """Patches in row-major order behind the class token, positions added.

        Raises UserError when the images are not `image_size` square.
        """
        size, patch, batch = self.config.image_size, self.config.patch_size, pixel_values.shape[0]
        if pixel_values.shape[1:] != (size, size, 3):
            raise UserError(f"images of shape {pixel_values.shape[1:]} given; this CLIP reads ({size}, {size}, 3)")
        grid = size // patch
        # A size that is no multiple of the patch loses its last rows and columns, as in a strided convolution.
        patches = pixel_values[:, : grid * patch, : grid * patch].reshape(batch, grid, patch, grid, patch, 3)
        patches = patches.transpose(0, 1, 3, 2, 4, 5).reshape(batch, grid * grid, patch * patch * 3)
        tokens = self.patch_embedding(patches.astype(self.dtype))
        first = jnp.broadcast_to(self.class_embedding.astype(self.dtype), (batch, 1, tokens.shape[-1]))
        tokens = jnp.concatenate([first, tokens], axis=1) + embed_ids(
            self.position_embedding, jnp.arange(grid * grid + 1)
        )
        return constrain(tokens, BATCH)

    def __call__(
        self, pixel_values: Float[ArrayLike, "B height width 3"]
    ) -> tuple[Float[Array, "B N Dv"], Float[Array, "B N Dv"]]:
        x = self.pre_layrnorm(self.embed(pixel_values))
        return self.layers((x, x), None)[0]


class ClipTextTower(nn.Module):
    """Causal text transformer: ids and mask -> final-normed states."""

    config: ClipTextConfig
    dtype: DTypeLike
    remat: str | None

    def setup(self) -> None:
        config, normal = self.config, nn.initializers.normal(0.02)
        self.token_embedding = nn.Embed(config.vocab_size, config.hidden_size, dtype=self.dtype, embedding_init=normal)
        self.position_embedding = nn.Embed(
            config.max_position_embeddings, config.hidden_size, dtype=self.dtype, embedding_init=normal
        )
        self.layers = _stack(config, self.dtype, self.remat)
        self.final_layer_norm = layer_norm(config.layer_norm_eps, self.dtype)

    def embed(self, input_ids: Int[ArrayLike, "B L"]) -> Float[Array, "B L Dt"]:
        """Token plus position embeddings. Raises UserError when L exceeds the position table."""
        length, limit = input_ids.shape[1], self.config.max_position_embeddings
        if length > limit:
            raise UserError(f"a caption of {length} CLIP tokens given; max_position_embeddings is {limit}: shorten it")
        positions = embed_ids(self.position_embedding, jnp.arange(length))
        return constrain(embed_ids(self.token_embedding, input_ids) + positions, BATCH)

    def __call__(self, input_ids: Int[ArrayLike, "B L"], mask: Bool[ArrayLike, "B L"]) -> Float[Array, "B L Dt"]:
        attention_mask = causal_mask(input_ids.shape[1]) & mask[:, None, None, :]
        x = self.embed(input_ids)
        return self.final_layer_norm(self.layers((x, x), attention_mask)[0][0])

    def pool(self, states: Float[ArrayLike, "B L Dt"], input_ids: Int[ArrayLike, "B L"]) -> Float[Array, "B Dt"]:
        """The end-of-text token's state.

        The first `eos_token_id`, which may also be the padding id; with the legacy value 2, the largest id.
        Source: transformers, CLIPTextModel.forward.
        """
        legacy = self.config.eos_token_id == LEGACY_EOS_TOKEN_ID
        end = jnp.argmax(input_ids if legacy else input_ids == self.config.eos_token_id, axis=-1)
        return jnp.take_along_axis(states, end[:, None, None], axis=1)[:, 0]


class Clip(nn.Module):
    """CLIP. Parameters float32, activations `dtype`, embeddings float32; call methods through `apply(..., method=)`."""

    config: ClipConfig
    dtype: DTypeLike = jnp.float32
    remat: str | None = None

    def setup(self) -> None:
        config, normal = self.config, nn.initializers.normal
        self.logit_scale = self.param("logit_scale", nn.initializers.constant(config.logit_scale_init_value), ())
        self.is_resnet = isinstance(config.vision, ClipResNetConfig)
        if self.is_resnet:
            self.vision_model = ClipResNet(config.vision, config.projection_dim, self.dtype)
        else:
            self.vision_model = ClipVisionTower(config.vision, self.dtype, self.remat)
            self.visual_projection = Dense(
                config.projection_dim,
                use_bias=False,
                dtype=self.dtype,
                kernel_init=normal(config.vision.hidden_size**-0.5),
            )
        self.text_model = ClipTextTower(config.text, self.dtype, self.remat)
        self.text_projection = Dense(
            config.projection_dim, use_bias=False, dtype=self.dtype, kernel_init=normal(config.text.hidden_size**-0.5)
        )

    def encode_images(self, pixel_values: Float[ArrayLike, "B height width 3"]) -> ClipImageOutput:
        """What the image tower gives for images as `normalize_pixels` gives them.

        Raises UserError when the images are not `image_size` square.
        """
        if self.is_resnet:  # its attention pooling is what projects; there is no layer before that of this width
            states, tokens = self.vision_model(pixel_values)
            return ClipImageOutput(states, states, tokens, l2_normalize(tokens[:, 0]))
        last, penultimate = self.vision_model(pixel_values)
        tokens = self.visual_projection(self.vision_model.post_layernorm(last))
        return ClipImageOutput(last, penultimate, tokens, l2_normalize(tokens[:, 0]))

    def encode_texts(self, input_ids: Int[ArrayLike, "B L"], mask: Bool[ArrayLike, "B L"]) -> Float32[Array, "B E"]:
        """Text embeddings, L2-normalised. Raises UserError when L is too long."""
        return l2_normalize(self.project_texts(input_ids, mask))

    def project_texts(self, input_ids: Int[ArrayLike, "B L"], mask: Bool[ArrayLike, "B L"]) -> Float[Array, "B E"]:
        """Text embeddings before their normalisation. Raises UserError when L is too long."""
        states = self.text_model(input_ids, mask)
        return self.text_projection(self.text_model.pool(states, input_ids))

    def __call__(
        self,
        pixel_values: Float[ArrayLike, "B height width 3"],
        input_ids: Int[ArrayLike, "B L"],
        mask: Bool[ArrayLike, "B L"],
    ) -> tuple[Float32[Array, "B E"], Float32[Array, "B E"], Float32[Array, ""]]:
        """(image embedding, text embedding, scale), scale being exp(logit_scale)."""
        image = self.encode_images(pixel_values).embedding
        return image, self.encode_texts(input_ids, mask), jnp.exp(self.logit_scale)
