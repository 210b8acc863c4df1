"""Distillation on the built-in world: what the demo runs."""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.clip = "assets/shapes/clip"
    config.bart = "assets/shapes/bart"
    config.steps = 600
    config.batch_size = 64
    config.corruption.mask_all = 0.7  # captioning starts from one mask: most of what there is to read is in the picture
    config.data.text_length = 30
    config.data.source_length = 32
    config.data.context_length = 30
    config.data.replay_length = 32
    config.eval.every = 150
    config.save_every = 300
    return config
