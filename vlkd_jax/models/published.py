"""Sizes of the models that were published, for plans without their directories."""

from __future__ import annotations

from vlkd_jax.models.configs import BartConfig, ClipConfig, ClipTextConfig, ClipVisionConfig


def vit(width: int, layers: int, heads: int, patch: int, text: int, joint: int) -> ClipConfig:
    """OpenAI's CLIP with a vision transformer of these sizes, pictures of 224 pixels, `text` wide on the other side."""
    vision = ClipVisionConfig(width, 4 * width, layers, heads, image_size=224, patch_size=patch)
    return ClipConfig(vision, ClipTextConfig(49408, text, 4 * text, 12, text // 64), joint)


CLIPS = {
    "vit_b32": vit(768, 12, 12, 32, 512, 512),
    "vit_b16": vit(768, 12, 12, 16, 512, 512),
    "vit_l14": vit(1024, 24, 16, 14, 768, 768),
}
"""OpenAI's."""
BARTS = {
    "base": BartConfig(50265, 768, 6, 6, 12, 12, 3072, 3072),
    "large": BartConfig(50265, 1024, 12, 12, 16, 16, 4096, 4096),
}
"""Meta's."""
