"""The paper's smaller pair on CC3M: `vlkd train --config=cc3m_vitb16_bartlarge --workdir=DIR --config.clip=...`

OpenAI's CLIP ViT-B/16 teaches BART-large; parameters are split over every device there is. Batch, rates and length of
the run are ours: the paper's are not known.
"""

from ml_collections import ConfigDict

from vlkd_jax.configs import folder


def get_config() -> ConfigDict:
    config = folder.get_config()
    # --config.clip=DIR openai/clip-vit-base-patch16, --config.bart=DIR facebook/bart-large
    # --config.data.captions=FILE.tsv (image<TAB>caption), --config.data.images=DIR
    # recommended: --config.loss.denoise=0.1 --config.data.replay=FILE.txt (a text a line, such as BART learned)
    config.plan.clip, config.plan.bart = "vit_b16", "large"
    config.dtype = "bfloat16"
    config.batch_size = 2048
    config.steps = 14_000  # about ten times 2.8 million pairs
    config.data.text_length = 64
    config.data.truncate = True
    config.data.max_unusable = 0.05
    config.data.validation_every = 500
    config.optim.warmup = 500
    config.eval.every = 1000
    config.save_every = 1000
    config.mesh.data = 1
    config.mesh.fsdp = -1
    return config
