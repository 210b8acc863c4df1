"""CLIP's residual networks (RN50, RN101, RN50x4, x16, x64): three stem convolutions, anti-aliased strides, attention
pooling instead of the mean.

Source: the modified ResNet of Radford et al. 2021 (arXiv 2103.00020, section 2.4) as its authors released it. Batch
normalisation uses the statistics of training: as a teacher the network is frozen.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlkd_jax.errors import UserError
from vlkd_jax.models.attention import Attention
from vlkd_jax.models.configs import ClipResNetConfig
from vlkd_jax.models.layers import embed_ids
from vlkd_jax.sharding import BATCH, constrain
from vlkd_jax.types import Array, ArrayLike, DTypeLike, Float

BATCH_NORM_EPS = 1e-5


class Convolution(nn.Module):
    """A square convolution without bias. The kernel is a matrix [size * size * channels, features], rows as in HWIO."""

    features: int
    size: int
    dtype: DTypeLike
    stride: int = 1

    @nn.compact
    def __call__(self, x: Float[ArrayLike, "B H W C"]) -> Float[Array, "B h w features"]:
        channels = x.shape[-1]
        shape = (self.size * self.size * channels, self.features)
        kernel = self.param("kernel", nn.initializers.he_normal(), shape)
        return jax.lax.conv_general_dilated(
            x.astype(self.dtype),
            kernel.astype(self.dtype).reshape(self.size, self.size, channels, self.features),
            (self.stride, self.stride),
            [(self.size // 2, self.size // 2)] * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )


class FrozenBatchNorm(nn.Module):
    """Normalisation by the statistics of training, float32; result in `dtype`."""

    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[ArrayLike, "B H W C"]) -> Float[Array, "B H W C"]:
        ones, zeros, width = nn.initializers.ones, nn.initializers.zeros, (x.shape[-1],)
        scale, bias = self.param("scale", ones, width), self.param("bias", zeros, width)
        mean, var = self.param("mean", zeros, width), self.param("var", ones, width)
        factor = scale * jax.lax.rsqrt(var + BATCH_NORM_EPS)
        return ((x.astype(jnp.float32) - mean) * factor + bias).astype(self.dtype)


def _shrink(x: Float[ArrayLike, "B H W C"], stride: int) -> Float[Array, "B h w C"]:
    """The mean of each square of `stride` by `stride`, which is what stands for a strided convolution."""
    return x if stride == 1 else nn.avg_pool(x, (stride, stride), (stride, stride))


class Bottleneck(nn.Module):
    """One residual block: 1x1, 3x3, the stride's mean, 1x1 to four times `planes`."""

    planes: int
    stride: int
    dtype: DTypeLike

    def setup(self) -> None:
        planes, dtype = self.planes, self.dtype
        self.conv1, self.bn1 = Convolution(planes, 1, dtype), FrozenBatchNorm(dtype)
        self.conv2, self.bn2 = Convolution(planes, 3, dtype), FrozenBatchNorm(dtype)
        self.conv3, self.bn3 = Convolution(4 * planes, 1, dtype), FrozenBatchNorm(dtype)
        self.downsample_conv, self.downsample_bn = Convolution(4 * planes, 1, dtype), FrozenBatchNorm(dtype)

    def __call__(self, x: Float[ArrayLike, "B H W C"]) -> Float[Array, "B h w P"]:
        out = nn.relu(self.bn1(self.conv1(x)))
        out = _shrink(nn.relu(self.bn2(self.conv2(out))), self.stride)
        out = self.bn3(self.conv3(out))
        if self.stride > 1 or x.shape[-1] != 4 * self.planes:
            x = self.downsample_bn(self.downsample_conv(_shrink(x, self.stride)))
        return nn.relu(out + x)


class AttentionPool(nn.Module):
    """Attention over the grid's cells and their mean, with every one of them as a query: index 0 is the pooled one."""

    config: ClipResNetConfig
    projection_dim: int
    dtype: DTypeLike

    def setup(self) -> None:
        config, normal = self.config, nn.initializers.normal(self.config.hidden_size**-0.5)
        self.position_embedding = nn.Embed(
            config.num_tokens, config.hidden_size, dtype=self.dtype, embedding_init=normal
        )
        self.attention = Attention(
            config.hidden_size,
            config.num_attention_heads,
            dtype=self.dtype,
            in_init=normal,
            out_init=normal,
            out_width=self.projection_dim,
        )

    def __call__(self, states: Float[ArrayLike, "B N Dv"]) -> Float[Array, "B N E"]:
        x = states + embed_ids(self.position_embedding, jnp.arange(self.config.num_tokens))
        return self.attention(x, x, None)


class ClipResNet(nn.Module):
    """The image tower: pixels -> states and tokens; index 0 of N is the mean of the grid's cells, and what it reads."""

    config: ClipResNetConfig
    projection_dim: int
    dtype: DTypeLike

    def setup(self) -> None:
        width, dtype = self.config.width, self.dtype
        self.conv1, self.bn1 = Convolution(width // 2, 3, dtype, stride=2), FrozenBatchNorm(dtype)
        self.conv2, self.bn2 = Convolution(width // 2, 3, dtype), FrozenBatchNorm(dtype)
        self.conv3, self.bn3 = Convolution(width, 3, dtype), FrozenBatchNorm(dtype)
        self.layer1, self.layer2, self.layer3, self.layer4 = (
            [Bottleneck(width << stage, 2 if stage and not block else 1, dtype) for block in range(blocks)]
            for stage, blocks in enumerate(self.config.layers)
        )
        self.attention_pool = AttentionPool(self.config, self.projection_dim, dtype)

    def __call__(
        self, pixel_values: Float[ArrayLike, "B height width 3"]
    ) -> tuple[Float[Array, "B N Dv"], Float[Array, "B N E"]]:
        """(states, tokens), row-major. Raises UserError when the images are not `image_size` square."""
        size = self.config.image_size
        if pixel_values.shape[1:] != (size, size, 3):
            raise UserError(f"images of shape {pixel_values.shape[1:]} given; this CLIP reads ({size}, {size}, 3)")
        x = constrain(jnp.asarray(pixel_values), BATCH)
        for convolution, norm in ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)):
            x = nn.relu(norm(convolution(x)))
        x = _shrink(x, 2)
        for block in (*self.layer1, *self.layer2, *self.layer3, *self.layer4):
            x = constrain(block(x), BATCH)
        cells = x.reshape(x.shape[0], -1, x.shape[-1])
        states = jnp.concatenate([cells.mean(1, keepdims=True), cells], 1)
        return states, self.attention_pool(states)
