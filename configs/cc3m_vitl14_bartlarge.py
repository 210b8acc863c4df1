"""The paper's larger pair on CC3M: `vlkd train --config=cc3m_vitl14_bartlarge --workdir=DIR --config.clip=...`

OpenAI's CLIP ViT-L/14 teaches BART-large.
"""

from ml_collections import ConfigDict

from vlkd_jax.configs import cc3m_vitb16_bartlarge


def get_config() -> ConfigDict:
    config = cc3m_vitb16_bartlarge.get_config()
    # --config.clip=DIR openai/clip-vit-large-patch14
    config.plan.clip = "vit_l14"
    config.batch_size = 4096
    config.steps = 7_000
    config.remat = True  # the decoder reads 257 image tokens in each of its layers
    config.remat_policy = "dots"
    return config
