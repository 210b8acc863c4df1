"""Writes a trained student as Hugging Face directories, and reads them back.

`python -m vlkd_jax.hf.export --checkpoint=RUN --output=DIR`: DIR holds the whole student for PyTorch, with its code,
tokenizers and processor, and in DIR/bart a stock BART. No torch is needed to write them.
"""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax

from vlkd_jax import entry
from vlkd_jax.commands import COMMANDS
from vlkd_jax.console import say
from vlkd_jax.data.files import read_json
from vlkd_jax.data.text import BartText, ClipText
from vlkd_jax.hf.card import model_card, text_card
from vlkd_jax.hf.files import CLIP_TOKENIZER, PROCESSOR
from vlkd_jax.hf.save import copy_tokenizer, save_bart, save_classifier, write_json
from vlkd_jax.hf.student import MODELING, processor_values, save_student
from vlkd_jax.runs import run_config
from vlkd_jax.storage import write_atomic
from vlkd_jax.vlkd import VLKD
from vlkd_jax.workdir import new_directory

RUN = "vlkd_run.json"
"""What an export says of the run it came from: {"config", "identity", "command"}."""


def export(
    model: VLKD,
    output: Path,
    dtype: str = "float32",
    run: dict[str, Any] | None = None,
    command: str = "",
    evaluation: dict[str, Any] | None = None,
) -> None:
    """Writes `output`; config.json comes last, so that a directory that has one is whole.

    A text model becomes what Hugging Face has for it: a stock BART, or one for sequence classification.

    Args:
      dtype: of the weights: float32, bfloat16 or float16.
      run: the training run's configuration, for the card and for `vlkd import`.
      command, evaluation: see `card.model_card`.

    Raises:
      UserError: something lies there already.
    """
    new_directory(output)
    if model.student is None:
        _export_text_model(model, output, dtype, run or {}, command, evaluation)
        return
    parents = {"clip": model.clip_text.directory, "bart": model.bart_text.directory}
    _write_tokenizer(model.bart_text, output)
    _write_tokenizer(model.clip_text, output / CLIP_TOKENIZER)
    params = jax.device_get({"student": model.params, "clip": model.clip_params})
    write_bart(output / "bart", model, dtype)
    shutil.copyfile(Path(__file__).with_name(f"{MODELING}.py"), output / f"{MODELING}.py")
    write_json(output / PROCESSOR, processor_values(model.prompts))
    write_json(output / RUN, {"config": run or {}, "identity": model.identity, "command": command})
    card = model_card(model.config, run or {}, parents, command, evaluation)
    write_atomic(output / "README.md", card.encode())
    save_student(output, model.config, params, model.bart_text.vocab_size, dtype)


def _export_text_model(
    model: VLKD, output: Path, dtype: str, run: dict[str, Any], command: str, evaluation: dict[str, Any] | None
) -> None:
    classes = model.classifier_config
    what, model_class = ("A BART", "BartForConditionalGeneration")
    if classes is not None:
        what, model_class = "A BART that classifies texts", "BartForSequenceClassification"
    write_json(output / RUN, {"config": run, "identity": model.identity, "command": command})
    card = text_card(what, model_class, run, model.bart_text.directory, command, evaluation)
    write_atomic(output / "README.md", card.encode())
    if classes is None:
        write_bart(output, model, dtype)
    else:
        _write_tokenizer(model.bart_text, output)
        save_classifier(output, classes, jax.device_get(model.params), dtype)


def write_bart(directory: Path, model: VLKD, dtype: str = "float32") -> None:
    """Writes the model's BART and its tokenizer as a stock directory of Hugging Face's (created if absent)."""
    _write_tokenizer(model.bart_text, directory)
    save_bart(directory, model.configs["bart"], jax.device_get(model.bart_params), dtype)


def _write_tokenizer(text: BartText | ClipText, directory: Path) -> None:
    """Its files as they are; of one that lies in vocab.json and merges.txt alone also what PyTorch's side reads."""
    copy_tokenizer(text.directory, directory)
    if not (directory / "tokenizer.json").is_file():
        text.save(directory)


def main(values: SimpleNamespace) -> None:
    """Entry point."""
    evaluation = read_json(values.evaluation) if values.evaluation else None
    model = VLKD.from_run(values.checkpoint, clip=values.clip, bart=values.bart)
    run = json.loads(run_config(values.checkpoint).to_json_best_effort())
    options = [f"--{name}={value}" for name, value in vars(values).items() if value is not None]
    command = shlex.join(["vlkd", "export", *options])
    export(model, Path(values.output), values.dtype, run, command, evaluation)
    if model.student is None:
        say(f"wrote {values.output}, which transformers reads")
        return
    stock = Path(values.output) / "bart"
    say(f"wrote {values.output}, and {stock}, a stock BART; vlkd parity {values.output} compares it with this model")


if __name__ == "__main__":
    entry.run(main, COMMANDS["export"])
