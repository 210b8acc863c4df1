"""Writes random CLIP and BART directories of real or tiny size around given tokenizers, to try things without weights.

`python -m vlkd_jax.hf.random --clip_tokenizer=DIR --bart_tokenizer=DIR --output=DIR [--size=SIZE] [--seed=0]`
writes DIR/clip and DIR/bart: ViT-L/14 and BART-large (`large`), ViT-B/32 and BART-base (`base`), or `tiny` ones.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp

from vlkd_jax.console import say
from vlkd_jax.data.text import BartText, ClipText
from vlkd_jax.errors import UserError
from vlkd_jax.hf.files import WEIGHTS
from vlkd_jax.hf.save import copy_tokenizer, save_bart, save_clip
from vlkd_jax.models.bart import Bart
from vlkd_jax.models.clip import Clip
from vlkd_jax.models.configs import BartConfig, ClipConfig, ClipTextConfig, ClipVisionConfig
from vlkd_jax.models.published import BARTS, CLIPS
from vlkd_jax.options import Command, choice, integer, text
from vlkd_jax.workdir import output_directory

PUBLISHED = {"large": "vit_l14", "base": "vit_b32"}
"""Sizes of published models -> the CLIP that goes with that BART."""
SIZES = (*PUBLISHED, "tiny")


def clip_config(text: ClipText, size: str) -> ClipConfig:
    """ViT-L/14's sizes, ViT-B/32's, or tiny ones, with the tokenizer's vocabulary."""
    ids = {"bos_token_id": text.bos, "eos_token_id": text.eos, "pad_token_id": text.pad}
    if size in PUBLISHED:
        model = CLIPS[PUBLISHED[size]]
        return dataclasses.replace(model, text=dataclasses.replace(model.text, vocab_size=text.vocab_size, **ids))
    vision = ClipVisionConfig(48, 96, 2, 4, image_size=48, patch_size=16)
    return ClipConfig(vision, ClipTextConfig(text.vocab_size, 32, 64, 2, 4, **ids), 32)


def bart_config(text: BartText, size: str) -> BartConfig:
    """BART-large's sizes, BART-base's, or tiny ones, with the tokenizer's vocabulary and special tokens."""
    ids = {"bos_token_id": text.bos, "pad_token_id": text.pad, "eos_token_id": text.eos}
    ids |= {"decoder_start_token_id": text.eos, "forced_bos_token_id": text.bos, "forced_eos_token_id": text.eos}
    if size in PUBLISHED:
        return dataclasses.replace(BARTS[size], vocab_size=text.vocab_size, **ids)
    return BartConfig(text.vocab_size, 48, 2, 2, 4, 4, 96, 96, max_position_embeddings=256, **ids)


def write_random(clip_tokenizer: Path, bart_tokenizer: Path, output: Path, size: str, seed: int) -> None:
    """Writes `output/clip` and `output/bart`: tokenizer files as given, configs and random weights.

    Raises:
      UserError: a tokenizer cannot be read, or a model lies there already.
    """
    clip_text, bart_text = ClipText(clip_tokenizer), BartText(bart_tokenizer)
    for name, source in (("clip", clip_tokenizer), ("bart", bart_tokenizer)):
        if (output / name / WEIGHTS).exists():
            raise UserError(f"{output / name / WEIGHTS}: exists already; choose another --output")
        copy_tokenizer(source, output / name)
    ids = jnp.zeros((1, 2), jnp.int32)
    clip = clip_config(clip_text, size)
    pixels = jnp.zeros((1, clip.vision.image_size, clip.vision.image_size, 3))
    save_clip(output / "clip", clip, _draw(Clip(clip), seed, pixels, ids, ids == 0))
    bart = bart_config(bart_text, size)
    save_bart(output / "bart", bart, _draw(Bart(bart), seed + 1, ids, ids == 0, ids))


def _draw(module: Any, seed: int, *inputs: jax.Array) -> Any:
    return jax.jit(module.init)(jax.random.key(seed), *inputs)["params"]


COMMAND = Command(
    "random",
    module="vlkd_jax.hf.random",
    summary="write random models around given tokenizers",
    description="Writes random CLIP and BART directories of real or tiny size around given tokenizers, to try things "
    "without weights. OUT receives clip/ and bart/.",
    options=(
        text(
            "clip_tokenizer", "DIR", "directory with CLIP's vocab.json and merges.txt, or tokenizer.json", required=True
        ),
        text(
            "bart_tokenizer", "DIR", "directory with BART's vocab.json and merges.txt, or tokenizer.json", required=True
        ),
        text("output", "OUT", "directory that receives clip/ and bart/", required=True),
        choice("size", "ViT-L/14 and BART-large, ViT-B/32 and BART-base, or tiny ones", tuple(SIZES), default="base"),
        integer("seed", "N", "of the weights", default=0, minimum=0),
    ),
    example="--clip_tokenizer=clip-vit-base-patch32 --bart_tokenizer=bart-base --output=models",
)


def main(values: SimpleNamespace) -> None:
    """Entry point."""
    output = output_directory(values.output, "--output")
    write_random(Path(values.clip_tokenizer), Path(values.bart_tokenizer), output, values.size, values.seed)
    say(f"wrote {output / 'clip'} and {output / 'bart'}")


if __name__ == "__main__":
    from vlkd_jax import entry

    entry.run(main, COMMAND)
