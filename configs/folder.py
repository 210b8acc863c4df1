"""Distillation on your own pictures: `vlkd train --config=folder --workdir=DIR`."""

from ml_collections import ConfigDict

from vlkd_jax.configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    # Set these four, here or as --config.clip=... and so on:
    config.clip = ""  # a Hugging Face CLIP directory (config.json, model.safetensors, tokenizer), the teacher
    config.bart = ""  # a Hugging Face BART directory, the student's start
    config.data.captions = ""  # COCO captions .json, or .jsonl (image, caption), or .tsv (image<TAB>caption)
    config.data.images = ""  # the folder that the image paths in it are relative to
    config.data.source = "folder"
    config.data.text_length = 64  # captions with more tokens cannot be used, unless:
    config.data.source_length = 64
    config.data.replay_length = 64
    config.data.truncate = False  # True cuts them
    # Try these first: length of the run, and how much memory a step takes.
    config.steps = 1000
    config.batch_size = 64
    # A small rate keeps what BART can do on texts; the two new linears learn faster.
    config.optim.lr = 3e-5
    config.optim.lr_linears = 1e-3
    config.optim.warmup = 100
    config.eval.every = 200
    config.eval.questions = 0  # those are about the built-in world
    config.save_every = 200
    return config
