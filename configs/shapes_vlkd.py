"""Distillation on the built-in world: what the demo runs."""

from ml_collections import ConfigDict

from vlkd_jax.configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.clip = "builtin:shapes/clip"
    config.bart = "builtin:shapes/bart"
    config.steps = 850
    config.batch_size = 64
    config.student.image_tokens = "penultimate"  # this small CLIP's last layer keeps little of a patch's own content
    config.student.whiten = 2048
    config.data.complete = 1.0
    config.corruption.mask_all = 0.7  # captioning starts from one mask: most of what there is to read is in the picture
    config.data.text_length = 30
    config.data.source_length = 32
    config.data.context_length = 30
    config.data.replay_length = 32
    config.loss.denoise = 0.3
    config.data.replay = "shapes_texts"  # the world's texts, without pictures: what was learned of them stays
    config.optim.lr = 3e-4
    config.optim.lr_linears = 5e-3
    config.eval.every = 170
    config.save_every = 425
    config.prompts.caption_encoder = "<mask>"  # behind words one mask stands for a short span: captions would end early
    return config
