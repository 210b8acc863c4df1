"""Makes the tiny CLIP and BART directories of the built-in world; `launch/shapes_models.sh` is the whole recipe.

`python -m vlkd_jax.shapes_models --output=DIR` trains the two byte-level BPE tokenizers on the world's texts and writes
randomly initialised models beside them. After pre-training with `vlkd_jax.train`,
`python -m vlkd_jax.shapes_models --output=assets/shapes --runs=DIR` writes the trained models of DIR/clip and DIR/bart.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from vlkd_jax.data import shapes
from vlkd_jax.data.sources import ShapesTexts
from vlkd_jax.entry import run
from vlkd_jax.evaluate import load_run
from vlkd_jax.hf.save import save_bart, save_clip
from vlkd_jax.metrics import say
from vlkd_jax.models.bart import Bart
from vlkd_jax.models.clip import Clip
from vlkd_jax.models.configs import BartConfig, ClipConfig, ClipTextConfig, ClipVisionConfig

CLIP_POSITIONS = 32
BART_POSITIONS = 64
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt")


def corpus(seed: int, count: int) -> list[str]:
    """Texts of the training split that the tokenizers are trained on."""
    texts = ShapesTexts(seed, "train")
    return [text for i in range(count) for text in (texts[i].text, texts[i].context) if text]


def train_bart_tokenizer(texts: list[str], directory: Path, vocab_size: int = 700) -> int:
    """Byte-level BPE with BART's special tokens at BART's ids. Writes it; returns the vocabulary size."""
    from tokenizers import AddedToken, ByteLevelBPETokenizer
    from transformers import BartTokenizer

    trainer = ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trainer.train_from_iterator(texts, vocab_size=vocab_size, special_tokens=special, show_progress=False)
    model = json.loads(trainer.to_str())["model"]
    mask = AddedToken("<mask>", lstrip=True, normalized=False, special=True)
    merges = [tuple(m) for m in model["merges"]]
    tokenizer = BartTokenizer(vocab=model["vocab"], merges=merges, mask_token=mask)
    tokenizer.save_pretrained(directory)
    _write_classic(directory, model["vocab"], merges)
    return len(tokenizer)


def train_clip_tokenizer(texts: list[str], directory: Path, vocab_size: int = 900) -> tuple[int, int, int]:
    """Byte-level BPE with CLIP's word ends. Writes it; returns the vocabulary size and the ids of start and end."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Punctuation(),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(m) for m in model["merges"]]
    words = [*alphabet, *(c + "</w>" for c in alphabet), *("".join(m) for m in merges)]
    words = [*dict.fromkeys(words), "<|startoftext|>", "<|endoftext|>"]
    vocab = {word: i for i, word in enumerate(words)}
    real = CLIPTokenizer(vocab=vocab, merges=merges)
    real.save_pretrained(directory)
    _write_classic(directory, vocab, merges)
    return len(real), vocab["<|startoftext|>"], vocab["<|endoftext|>"]


def _write_classic(directory: Path, vocab: dict[str, int], merges: list[tuple[str, str]]) -> None:
    """vocab.json and merges.txt, which every release of transformers reads."""
    (directory / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(m) for m in merges)]
    (directory / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def init_models(output: Path, seed: int) -> None:
    """Writes `output/clip` and `output/bart`: tokenizers, configs and random weights."""
    texts = corpus(seed, 6000)
    for name in ("clip", "bart"):
        (output / name).mkdir(parents=True, exist_ok=True)
    size, start, end = train_clip_tokenizer(texts, output / "clip")
    vision = ClipVisionConfig(128, 512, 4, 4, shapes.IMAGE_SIZE, 12)
    text = ClipTextConfig(size, 96, 192, 3, 4, CLIP_POSITIONS, bos_token_id=start, eos_token_id=end, pad_token_id=end)
    clip = ClipConfig(vision, text, 128)
    key = jax.random.key(seed)
    pixels, ids = jnp.zeros((1, shapes.IMAGE_SIZE, shapes.IMAGE_SIZE, 3)), jnp.zeros((1, 4), jnp.int32)
    save_clip(output / "clip", clip, Clip(clip).init(key, pixels, ids, ids == 0)["params"])
    bart = BartConfig(train_bart_tokenizer(texts, output / "bart"), 128, 2, 3, 4, 4, 256, 256, BART_POSITIONS)
    params = Bart(bart).init(key, ids, ids == 0, ids)["params"]
    params = flax.traverse_util.path_aware_map(widen, params)
    for name in ("self_attn", "encoder_attn"):
        for layers in (params["encoder"]["layers"], params["decoder"]["layers"]):
            if name in layers:  # like attends to like at the start: the same word, and its neighbours
                layers[name]["k_proj"]["kernel"] = layers[name]["q_proj"]["kernel"]
    for side in ("encoder", "decoder"):
        params[side]["embed_positions"] = {"embedding": sinusoids(BART_POSITIONS + 2, bart.d_model)}
    save_bart(output / "bart", bart, params)


def widen(path: tuple[str, ...], value: jax.Array) -> jax.Array:
    """Kernels with variance 1 / fan-in: BART's 0.02 is meant for widths near 1,000 and is slow to leave at 128."""
    return value / 0.02 * value.shape[-2] ** -0.5 if path[-1] == "kernel" else value


def sinusoids(length: int, width: int) -> np.ndarray:
    """Vaswani et al. 2017's position table, float32 [length, width], at the embeddings' scale (0.02).

    Only a start for the learned positions: "the token before" is then the same rotation everywhere, which a model
    this small is otherwise slow to find.
    """
    angle = np.arange(length)[:, None] * 10000.0 ** (-np.arange(width // 2) / (width // 2))
    return (0.02 * np.sqrt(2) * np.concatenate([np.sin(angle), np.cos(angle)], 1)).astype(np.float32)


def export_models(output: Path, runs: Path) -> None:
    """Writes the models trained in `runs/clip` and `runs/bart`, with their tokenizers, to `output`."""
    for name, save in (("clip", save_clip), ("bart", save_bart)):
        config, objective, params, _ = load_run(runs / name)
        (output / name).mkdir(parents=True, exist_ok=True)
        save(output / name, objective.configs[name], jax.device_get(params))
        for file in TOKENIZER_FILES:
            shutil.copy(Path(config[name]) / file, output / name / file)


def define_flags() -> None:
    """The flags of this entry point."""
    flags.DEFINE_string("output", None, "directory that receives clip/ and bart/")
    flags.DEFINE_string("runs", None, "directory of the training runs clip/ and bart/; empty: random weights")
    flags.DEFINE_integer("seed", 0, "seed of the corpus and of the random weights")


def main() -> None:
    """Entry point."""
    output = Path(flags.FLAGS.output)
    if flags.FLAGS.runs:
        export_models(output, Path(flags.FLAGS.runs))
    else:
        init_models(output, flags.FLAGS.seed)
    say(f"wrote {output}/clip and {output}/bart")


if __name__ == "__main__":
    run(main, define_flags, required=("output",))
