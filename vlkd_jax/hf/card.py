"""The model card of an export: README.md with what a stranger has to know before using it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vlkd_jax.config import BUILTIN
from vlkd_jax.models.vlkd import StudentConfig

INTENDED = (
    "Answers to questions about pictures, captions and retrieval, and research on what distillation keeps of a "
    "language model."
)
TRAINED = {
    "answer": "It was fine-tuned on questions about pictures: its answers are not zero-shot.",
    "caption": "It was fine-tuned on captions: those that it gives are not zero-shot.",
}
"""What is said of a fine-tuned student, by its run's objective."""
ZERO_SHOT = "It was not trained on questions about pictures: its answers are zero-shot."
LIMITS = (
    "It inherits the mistakes and the biases of both parents and of the captions it was trained on. It says something "
    "about every picture, also where it cannot tell, and was not checked for any use in which a wrong answer does harm."
)
PARITY = "## Parity of this file with the JAX model"


def model_card(
    config: StudentConfig,
    run: dict[str, Any],
    parents: dict[str, Path],
    command: str,
    evaluation: dict[str, Any] | None,
) -> str:
    """The text of README.md.

    Args:
      run: the training run's configuration as JSON values; {}: unknown.
      parents: "clip" and "bart" -> the directory that is read for its licence.
      command: that wrote the export.
      evaluation: metrics.json of `vlkd evaluate`; None: no figures.
    """
    parts = [
        "---\nlibrary_name: transformers\npipeline_tag: image-text-to-text\ntags: [vlkd, clip, bart]\n---",
        "# A BART that a CLIP taught to see",
        "Vision-language knowledge distillation (Dai et al. 2022, arXiv 2203.06386): BART reads the image tokens of a "
        "frozen CLIP. Written by vlkd_jax.",
        "## Use\n\n" + _usage(),
        f"## Intended use\n\n{INTENDED} {TRAINED.get(run.get('objective', ''), ZERO_SHOT)}",
        f"## Limits\n\n{LIMITS}",
        "## Parents and their licences\n\n" + _parents(run, parents),
        "## Data\n\n" + _data(run),
        "## Figures\n\n" + _figures(evaluation),
        "## What travels\n\n"
        + _table(
            ("choice", "value"),
            (
                (name, str(getattr(config, name)))
                for name in ("image_tokens", "whiten", "sentence_position", "contrastive_scale", "ttdm")
            ),
        ),
        f"{PARITY}\n\n{_parity(None)}",
        f"## Made by\n\n    {command}",
    ]
    return "\n\n".join(parts) + "\n"


def with_parity(card: str, parity: dict[str, Any]) -> str:
    """A model card's text that tells what parity.json holds, in the place that `model_card` made for it."""
    section = re.compile(rf"({re.escape(PARITY)}\n\n).*?(?=\n\n## |\Z)", re.DOTALL)
    return section.sub(lambda match: match[1] + _parity(parity), card)


def _usage() -> str:
    lines = (
        "from transformers import AutoModel, AutoProcessor",
        "",
        "model = AutoModel.from_pretrained(DIR, trust_remote_code=True)  # modeling_vlkd.py of this directory",
        "processor = AutoProcessor.from_pretrained(DIR, trust_remote_code=True)",
        'inputs = processor(images=[picture], questions=["what color is the car?"])',
        "processor.decode_answers(model.generate(**inputs, max_new_tokens=10))",
    )
    code = "\n".join(f"    {line}".rstrip() for line in lines)
    return (
        f"{code}\n\nWithout code from this directory: `from vlkd_jax.hf.modeling_vlkd import "
        "VLKDForConditionalGeneration, VLKDProcessor`. The language model alone is a stock BART in `bart/`."
    )


def text_card(
    what: str, model_class: str, run: dict[str, Any], bart: Path, command: str, evaluation: dict[str, Any] | None
) -> str:
    """The text of README.md of a text model, in the form of `model_card`.

    Args:
      what: a title; model_class: of transformers, which reads it.
      bart: the directory that is read for its licence.
    """
    parts = [
        "---\nlibrary_name: transformers\ntags: [vlkd, bart]\n---",
        f"# {what}",
        f"A stock BART, fine-tuned by vlkd_jax: `transformers.{model_class}.from_pretrained(DIR)`.",
        "## Parent and its licence\n\n" + _parents(run, {"bart": bart}),
        "## Data\n\n" + _data(run),
        "## Figures\n\n" + _figures(evaluation),
        f"## Made by\n\n    {command}",
    ]
    return "\n\n".join(parts) + "\n"


def _parents(run: dict[str, Any], parents: dict[str, Path]) -> str:
    """A row for each model that a run began with: of one that fine-tunes a student that one alone."""
    if start := run.get("start"):
        parents, run = {"student": Path(start)}, {"student": start}
    rows = ((kind, *_parent(run.get(kind) or str(path), path)) for kind, path in parents.items())
    return _table(("parent", "name", "licence"), rows)


def _parent(name: str, directory: Path) -> tuple[str, str]:
    """A parent's name, without the place on somebody's disk, and its licence."""
    if name.startswith(BUILTIN):
        return name, "Apache-2.0, as vlkd_jax"
    return Path(name).name if Path(name).is_absolute() else name, _licence(directory)


def _licence(directory: Path) -> str:
    """What the parent's own card states."""
    card = directory / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    stated = re.search(r"\A---\n(?:.*\n)*?license: *(\S.*)\n(?:.*\n)*?---", text)
    return stated[1].strip() if stated else "not stated there; look it up before passing this on"


def _data(run: dict[str, Any]) -> str:
    data = run.get("data", {})
    if not data:
        return "Not known."
    source = {
        "folder": f"captions `{Path(data.get('captions', '')).name}`",
        "questions": f"questions `{Path(data.get('questions', '')).name}`",
        "glue": f"GLUE's task {data.get('task')}",
        "shapes": "the built-in world of shapes",
    }
    few = f" ({data['examples']} examples, of classes so many of each)" if data.get("examples") else ""
    return (
        f"Trained on {source.get(data.get('source'), data.get('source'))}{few}, {run.get('steps'):,} steps of "
        f"{run.get('batch_size')} records, seed {run.get('seed')}."
    )


def _figures(evaluation: dict[str, Any] | None) -> str:
    if not evaluation:
        return "None was given when this was written."
    rows = []
    for suite, metrics in evaluation.get("suites", {}).items():
        groups = {"": metrics} | {
            k: v for k, v in metrics.items() if isinstance(v, dict) and "n" in v and k != "before"
        }
        for group, values in groups.items():
            for name, value in values.items():
                bounds = values.get(f"{name}_interval")
                if isinstance(value, float) and bounds:
                    label = f"{suite} {group} {name}".replace("  ", " ")
                    rows.append((label, f"{value:.4f}", f"{bounds[0]:.4f} to {bounds[1]:.4f}", f"{values['n']:,}"))
    about = f"{evaluation.get('date')}, {', '.join(evaluation.get('devices', []))}, seed {evaluation.get('seed')}"
    return _table(("figure", "value", "95% interval", "n"), rows) + f"\n\nMeasured {about}."


def _parity(parity: dict[str, Any] | None) -> str:
    if parity is None:
        return "Not checked yet: `vlkd parity DIR` does it and writes parity.json."
    return (
        f"Of {parity['prompts']} prompts {parity['greedy_equal']} gave the same tokens greedily and "
        f"{parity['beam_equal']} with beam search; the largest difference of any number compared is "
        f"{parity['max_abs_difference']:.2g} (parity.json)."
    )


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
