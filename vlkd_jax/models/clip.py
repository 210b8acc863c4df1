"""CLIP's two towers (Radford et al. 2021), forward only in this project: the frozen teacher."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlkd_jax.errors import UserError
from vlkd_jax.models.attention import Attention, causal_mask
from vlkd_jax.models.configs import ClipConfig, ClipTextConfig, ClipVisionConfig
from vlkd_jax.models.layers import ACTIVATION_FUNCTIONS, Dense, l2_normalize, layer_norm

# Checkpoints saved before transformers 4.31 carry this wrong end token; there the sentence is pooled at the largest id.
LEGACY_EOS_TOKEN_ID = 2


class ClipImageOutput(NamedTuple):
    """What the image tower gives; index 0 of N is the class token."""

    last_hidden_state: jax.Array  # [B, N, Dv], before the post layer norm
    penultimate: jax.Array  # [B, N, Dv], what the last layer reads
    tokens: jax.Array  # [B, N, E], every token through post layer norm and visual projection
    embedding: jax.Array  # [B, E] float32, L2-normalised projection of the class token


class ClipMlp(nn.Module):
    """fc1, activation, fc2: [B, T, D] -> [B, T, D]."""

    config: ClipVisionConfig | ClipTextConfig
    dtype: jnp.dtype

    def setup(self):
        width, depth = self.config.hidden_size, self.config.num_hidden_layers
        normal = nn.initializers.normal
        self.fc1 = Dense(self.config.intermediate_size, dtype=self.dtype, kernel_init=normal((2 * width) ** -0.5))
        self.fc2 = Dense(width, dtype=self.dtype, kernel_init=normal(width**-0.5 * (2 * depth) ** -0.5))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(ACTIVATION_FUNCTIONS[self.config.hidden_act](self.fc1(x)))


class ClipLayer(nn.Module):
    """One pre-norm transformer layer: ((x, anything), mask) -> ((new x, x), None), the form `nn.scan` wants."""

    config: ClipVisionConfig | ClipTextConfig
    dtype: jnp.dtype

    def setup(self):
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

    def __call__(self, carry: tuple[jax.Array, jax.Array], mask: jax.Array | None):
        before = carry[0]
        normed = self.layer_norm1(before)
        x = before + self.self_attn(normed, normed, mask)
        return (x + self.mlp(self.layer_norm2(x)), before), None


def _stack(config: ClipVisionConfig | ClipTextConfig, dtype, remat: bool) -> nn.Module:
    """All layers of a tower as one scanned module; parameters get a leading layer axis."""
    layer = nn.remat(ClipLayer, prevent_cse=False) if remat else ClipLayer
    scanned = nn.scan(
        layer,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=nn.broadcast,
        length=config.num_hidden_layers,
    )
    return scanned(config, dtype)


class ClipVisionTower(nn.Module):
    """Vision transformer: pixels [B, Hpx, Wpx, 3] -> what its last layer gives and reads, both [B, N, Dv]."""

    config: ClipVisionConfig
    dtype: jnp.dtype
    remat: bool

    def setup(self):
        width, normal = self.config.hidden_size, nn.initializers.normal
        self.class_embedding = self.param("class_embedding", normal(width**-0.5), (width,))
        self.patch_embedding = Dense(width, use_bias=False, dtype=self.dtype, kernel_init=normal(0.02))
        self.position_embedding = nn.Embed(self.config.num_tokens, width, dtype=self.dtype, embedding_init=normal(0.02))
        self.pre_layrnorm = layer_norm(self.config.layer_norm_eps, self.dtype)
        self.layers = _stack(self.config, self.dtype, self.remat)
        self.post_layernorm = layer_norm(self.config.layer_norm_eps, self.dtype)

    def embed(self, pixel_values: jax.Array) -> jax.Array:
        """Patches in row-major order behind the class token, positions added: [B, N, Dv]."""
        size, patch, batch = self.config.image_size, self.config.patch_size, pixel_values.shape[0]
        if pixel_values.shape[1:] != (size, size, 3):
            raise UserError(f"images of shape {pixel_values.shape[1:]} given; this CLIP reads ({size}, {size}, 3)")
        grid = size // patch
        # A size that is no multiple of the patch loses its last rows and columns, as in a strided convolution.
        patches = pixel_values[:, : grid * patch, : grid * patch].reshape(batch, grid, patch, grid, patch, 3)
        patches = patches.transpose(0, 1, 3, 2, 4, 5).reshape(batch, grid * grid, patch * patch * 3)
        tokens = self.patch_embedding(patches.astype(self.dtype))
        first = jnp.broadcast_to(self.class_embedding.astype(self.dtype), (batch, 1, tokens.shape[-1]))
        return jnp.concatenate([first, tokens], axis=1) + self.position_embedding(jnp.arange(grid * grid + 1))

    def __call__(self, pixel_values: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = self.pre_layrnorm(self.embed(pixel_values))
        return self.layers((x, x), None)[0]


class ClipTextTower(nn.Module):
    """Causal text transformer: ids [B, L], mask [B, L] -> final-normed states [B, L, Dt]."""

    config: ClipTextConfig
    dtype: jnp.dtype
    remat: bool

    def setup(self):
        config, normal = self.config, nn.initializers.normal(0.02)
        self.token_embedding = nn.Embed(config.vocab_size, config.hidden_size, dtype=self.dtype, embedding_init=normal)
        self.position_embedding = nn.Embed(
            config.max_position_embeddings, config.hidden_size, dtype=self.dtype, embedding_init=normal
        )
        self.layers = _stack(config, self.dtype, self.remat)
        self.final_layer_norm = layer_norm(config.layer_norm_eps, self.dtype)

    def embed(self, input_ids: jax.Array) -> jax.Array:
        """Token plus position embeddings: [B, L, Dt]. Raises UserError when L exceeds the position table."""
        length, limit = input_ids.shape[1], self.config.max_position_embeddings
        if length > limit:
            raise UserError(f"a caption of {length} CLIP tokens given; max_position_embeddings is {limit}: shorten it")
        return self.token_embedding(input_ids) + self.position_embedding(jnp.arange(length))

    def __call__(self, input_ids: jax.Array, mask: jax.Array) -> jax.Array:
        attention_mask = causal_mask(input_ids.shape[1]) & mask[:, None, None, :]
        x = self.embed(input_ids)
        return self.final_layer_norm(self.layers((x, x), attention_mask)[0][0])

    def pool(self, states: jax.Array, input_ids: jax.Array) -> jax.Array:
        """The end-of-text token's state: states [B, L, Dt], ids [B, L] -> [B, Dt].

        The first `eos_token_id`, which may also be the padding id; with the legacy value 2, the largest id.
        Source: transformers, CLIPTextModel.forward.
        """
        legacy = self.config.eos_token_id == LEGACY_EOS_TOKEN_ID
        end = jnp.argmax(input_ids if legacy else input_ids == self.config.eos_token_id, axis=-1)
        return jnp.take_along_axis(states, end[:, None, None], axis=1)[:, 0]


class Clip(nn.Module):
    """CLIP. Parameters float32, activations `dtype`, embeddings float32; call methods through `apply(..., method=)`."""

    config: ClipConfig
    dtype: jnp.dtype = jnp.float32
    remat: bool = False

    def setup(self):
        config, normal = self.config, nn.initializers.normal
        self.logit_scale = self.param("logit_scale", nn.initializers.constant(config.logit_scale_init_value), ())
        self.vision_model = ClipVisionTower(config.vision, self.dtype, self.remat)
        self.text_model = ClipTextTower(config.text, self.dtype, self.remat)
        self.visual_projection = Dense(
            config.projection_dim,
            use_bias=False,
            dtype=self.dtype,
            kernel_init=normal(config.vision.hidden_size**-0.5),
        )
        self.text_projection = Dense(
            config.projection_dim, use_bias=False, dtype=self.dtype, kernel_init=normal(config.text.hidden_size**-0.5)
        )

    def encode_images(self, pixel_values: jax.Array) -> ClipImageOutput:
        """pixel_values [B, Hpx, Wpx, 3] float32, normalised -> ClipImageOutput.

        Raises UserError when the images are not `image_size` square.
        """
        last, penultimate = self.vision_model(pixel_values)
        tokens = self.visual_projection(self.vision_model.post_layernorm(last))
        return ClipImageOutput(last, penultimate, tokens, l2_normalize(tokens[:, 0]))

    def encode_texts(self, input_ids: jax.Array, mask: jax.Array) -> jax.Array:
        """input_ids [B, L] int32, mask [B, L] bool (True = keep) -> [B, E] float32, L2-normalised."""
        states = self.text_model(input_ids, mask)
        return l2_normalize(self.text_projection(self.text_model.pool(states, input_ids)))

    def __call__(self, pixel_values: jax.Array, input_ids: jax.Array, mask: jax.Array):
        """(image embedding [B, E], text embedding [B, E], scale []), scale being exp(logit_scale), float32."""
        image = self.encode_images(pixel_values).embedding
        return image, self.encode_texts(input_ids, mask), jnp.exp(self.logit_scale)
