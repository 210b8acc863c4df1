"""Makes the tiny CLIP and BART directories of the built-in world; `launch/shapes_models.sh` is the whole recipe.

`python -m vlkd_jax.shapes.make_models --output=DIR` trains the two byte-level BPE tokenizers on the world's texts and
writes randomly initialised models beside them. After pre-training with `vlkd_jax.train`, `python -m
vlkd_jax.shapes.make_models --output=vlkd_jax/shapes/models --runs=DIR` writes the trained models of DIR/clip and
DIR/bart.
"""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from vlkd_jax.config import model_directory
from vlkd_jax.console import say
from vlkd_jax.entry import run
from vlkd_jax.hf.export import RUN
from vlkd_jax.hf.save import copy_tokenizer, save_bart, save_clip
from vlkd_jax.models.bart import Bart
from vlkd_jax.models.clip import Clip
from vlkd_jax.models.configs import BartConfig, ClipConfig, ClipTextConfig, ClipVisionConfig
from vlkd_jax.options import Command, integer, text
from vlkd_jax.runs import load_run, run_config
from vlkd_jax.shapes import world
from vlkd_jax.shapes.sources import ShapesTexts
from vlkd_jax.types import Params
from vlkd_jax.vlkd import VLKD
from vlkd_jax.workdir import output_directory

CLIP_POSITIONS = 32
BART_POSITIONS = 64


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
    vision = ClipVisionConfig(128, 512, 4, 4, world.IMAGE_SIZE, 12)
    text = ClipTextConfig(size, 96, 192, 3, 4, CLIP_POSITIONS, bos_token_id=start, eos_token_id=end, pad_token_id=end)
    clip = ClipConfig(vision, text, 128)
    key = jax.random.key(seed)
    pixels, ids = jnp.zeros((1, world.IMAGE_SIZE, world.IMAGE_SIZE, 3)), jnp.zeros((1, 4), jnp.int32)
    params = jax.jit(Clip(clip).init)(key, pixels, ids, ids == 0)["params"]
    save_clip(output / "clip", clip, with_positions(clip, params))
    size = train_bart_tokenizer(texts, output / "bart")
    bart = BartConfig(size, 128, 2, 3, 4, 4, 256, 256, BART_POSITIONS, scale_embedding=True, dropout=0.0)
    params = jax.jit(Bart(bart).init)(key, ids, ids == 0, ids)["params"]
    params = flax.traverse_util.path_aware_map(functools.partial(widen, width=bart.d_model), params)
    for side in ("encoder", "decoder"):
        params[side]["embed_positions"] = {"embedding": sinusoids(np.arange(BART_POSITIONS + 2), bart.d_model)}
    save_bart(output / "bart", bart, like_to_like(params))


def with_positions(config: ClipConfig, params: Params) -> Params:
    """A CLIP's parameters with positions as strong as what stands there.

    CLIP's own start is weak beside patches of mostly one colour; a tower this small then never says where things are.
    """
    grid = config.vision.image_size // config.vision.patch_size
    rows_and_columns = np.indices((grid, grid)).reshape(2, -1)
    table = np.concatenate([sinusoids(side, config.vision.hidden_size // 2, 10) for side in rows_and_columns], 1)
    vision, text = params["vision_model"], params["text_model"]
    vision["position_embedding"]["embedding"] = 0.3 * np.pad(table, ((1, 0), (0, 0)))  # none for the class token
    text["token_embedding"]["embedding"] *= 5  # from standard deviation 0.02
    text["position_embedding"]["embedding"] = 0.1 * sinusoids(np.arange(CLIP_POSITIONS), config.text.hidden_size)
    return params


def widen(path: tuple[str, ...], value: jax.Array, width: int) -> jax.Array:
    """Kernels with variance 1 / fan-in, embeddings with 1 / D: BART's 0.02 is meant for widths D near 1,000."""
    if path[-1] not in ("kernel", "embedding"):
        return value
    return value / 0.02 * (value.shape[-2] if path[-1] == "kernel" else width) ** -0.5


def like_to_like(params: Params) -> Params:
    """The parameters with attention that starts by matching like with like and handing on what it found.

    In every attention module the keys' kernel is the queries' and the output's is the values' transposed, all
    orthogonal: Trockman and Kolter 2023's mimetic initialisation, here with a positive sign for the values too. What
    belongs to a word then lies in reach of a question that names it from the first step; from a random start a model
    this small stays for thousands of steps at knowing which attributes occur, but not on which object.
    """
    params = flax.traverse_util.flatten_dict(params)
    for path in [path[:-2] for path in params if path[-2:] == ("q_proj", "kernel")]:
        queries, values = (jnp.linalg.qr(params[(*path, name, "kernel")])[0] for name in ("q_proj", "v_proj"))
        kernels = {"q_proj": queries, "k_proj": queries, "v_proj": values, "out_proj": jnp.swapaxes(values, -1, -2)}
        params |= {(*path, name, "kernel"): kernel for name, kernel in kernels.items()}
    return flax.traverse_util.unflatten_dict(params)


def sinusoids(positions: np.ndarray, width: int, longest: float = 100.0) -> np.ndarray:
    """Vaswani et al. 2017's table at positions [P], float32 [P, width], wave lengths from 2 pi to `longest` times that.

    Only a start for the learned positions: neighbours are alike, and where a token stands is not lost among the rest.
    """
    angle = positions[:, None] * longest ** (-np.arange(width // 2) / (width // 2))
    return (np.sqrt(2) * np.concatenate([np.sin(angle), np.cos(angle)], 1)).astype(np.float32)


def export_models(output: Path, runs: Path) -> None:
    """Writes the models trained in `runs/clip` and `runs/bart`, with their tokenizers, to `output`."""
    for name, save in (("clip", save_clip), ("bart", save_bart)):
        config, (task, params, _) = run_config(runs / name), load_run(runs / name)
        save(output / name, task.configs[name], jax.device_get(params))
        copy_tokenizer(model_directory(config[name]), output / name)


def export_student(output: Path, run: Path) -> None:
    """Writes the student of a training run in float16, without what only PyTorch and people read, to `output`."""
    with tempfile.TemporaryDirectory() as folder:
        VLKD.from_run(run).save_pretrained(Path(folder) / "whole", "float16")
        others = shutil.ignore_patterns("bart", "*.py", "*.md", RUN)
        shutil.copytree(Path(folder) / "whole", output, ignore=others, dirs_exist_ok=True)


COMMAND = Command(
    "make_models",
    module="vlkd_jax.shapes.make_models",
    summary="make the models of the built-in world",
    description="Makes the tiny CLIP and BART directories of the built-in world: tokenizers trained on its texts and "
    "random weights, or, with --runs, the models pre-trained from those. launch/shapes_models.sh is the whole recipe.",
    options=(
        text("output", "DIR", "directory that receives clip/ and bart/", required=True),
        text("runs", "RUNS", "directory of the training runs clip/ and bart/; without it, random weights"),
        text("student", "RUN", "a demo's training run: the student that the package brings is made of it instead"),
        integer("seed", "N", "of the corpus and of the random weights", default=0, minimum=0),
    ),
    example="--output=runs/shapes_models/init",
)


def main(values: SimpleNamespace) -> None:
    """Entry point."""
    output = output_directory(values.output, "--output")
    if values.student:
        export_student(output / "student", Path(values.student))
        say(f"wrote {output}/student")
        return
    if values.runs:
        export_models(output, Path(values.runs))
    else:
        init_models(output, values.seed)
    say(f"wrote {output}/clip and {output}/bart")


if __name__ == "__main__":
    run(main, COMMAND)
