"""What became of the text abilities: a BART as it was and the student that it became, by the same code and data.

`python -m vlkd_jax.retention --before=BART --after=RUN --output=OUT --tasks=denoise,shapes`. Two tasks need no
training, two fine-tune both sides. OUT receives retention.json, retention.png and every row.
"""

from __future__ import annotations

import json
import string
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ml_collections import ConfigDict

from vlkd_jax import console, entry
from vlkd_jax.commands import COMMANDS
from vlkd_jax.compare import compare, figure_rows
from vlkd_jax.config import BUILTIN, HUB, model_directory, with_defaults
from vlkd_jax.configs import glue, suites, xsum
from vlkd_jax.console import say
from vlkd_jax.data.documents import LINES, document_files
from vlkd_jax.data.glue import ENDINGS, GLUE
from vlkd_jax.data.pipeline import batches
from vlkd_jax.data.sources import TextLines
from vlkd_jax.data.text import BartText
from vlkd_jax.errors import UserError
from vlkd_jax.evals.retention import answer_texts, without_dropout
from vlkd_jax.evals.runner import read_rows
from vlkd_jax.evals.suite import Row
from vlkd_jax.evals.vqa import exact_match
from vlkd_jax.evaluate import circumstances, evaluate, read_items
from vlkd_jax.hf.export import write_bart
from vlkd_jax.hf.load import read_bart_config
from vlkd_jax.hf.student import is_student
from vlkd_jax.manifest import CHECKPOINTS
from vlkd_jax.runtime import tell
from vlkd_jax.shapes.sources import text_questions
from vlkd_jax.storage import locate, write_atomic
from vlkd_jax.tasks import make_task
from vlkd_jax.train import train
from vlkd_jax.vlkd import VLKD
from vlkd_jax.workdir import output_directory

SIDES = ("before", "after")
LENGTH = 64
"""Tokens of a text that is restored; what is longer is cut."""


def bart_of(name: str, output: Path) -> Path:
    """The Hugging Face directory of a side's BART; of an export or a training run it is written to `output`.

    Args:
      name: a BART, an export of a student, or the workdir of a run; hf:OWNER/NAME, builtin:shapes/bart.

    Raises:
      UserError: nothing of these there.
    """
    place = model_directory(name) if name.startswith((HUB, BUILTIN)) else Path(name)
    if not is_student(place) and not (locate(place) / CHECKPOINTS).exists():
        read_bart_config(place)
        return place
    write_bart(output, VLKD.from_pretrained(place))
    return output


def denoise_rows(values: SimpleNamespace, bart: Path, place: Path) -> list[Row]:
    """Each text restored from its corruption, teacher-forced: the summed loss, and how many tokens are right."""
    config = denoise_config(values, bart)
    task, source = make_task(config), TextLines(values.texts)
    params, terms, rows = task.load_params(), without_dropout(task.denoise_terms), []
    stream = batches(source, task.encoder, batch_size=1, seed=values.seed, shuffle=False, threads=1)
    count = min(values.limit, len(source))
    with console.progress("restore", count, "texts") as told:
        for number, batch in zip(range(count), stream):
            sums = terms(params, {}, batch.replace(index=None))
            (loss, tokens), (right, _) = (map(float, sums[name]) for name in ("denoise", "token_accuracy"))
            row = {"task": "denoise", "id": number, "image": None, "answers": [source.key(number)]}
            rows.append(row | {"loss": loss, "tokens": tokens, "right": right, "score": right / max(tokens, 1)})
            told(number + 1)
    return rows


def denoise_config(values: SimpleNamespace, bart: Path) -> ConfigDict:
    """Of a run that restores texts, with the lengths that this BART has positions for."""
    config = ConfigDict(with_defaults({"objective": "bart_denoise", "bart": str(bart), "seed": values.seed}))
    room = min(LENGTH, read_bart_config(bart).max_position_embeddings)
    config.data.text_length = config.data.source_length = config.data.replay_length = room
    config.data.truncate = True
    return config


def shapes_rows(values: SimpleNamespace, bart: Path, place: Path) -> list[Row]:
    """Questions of the built-in world, answered from a description, without a picture."""
    questions = text_questions(values.limit, values.seed, "test")
    answers = answer_texts(VLKD.from_bart(bart), questions)
    return [
        {
            "task": "text_qa",
            "id": number,
            "image": question.scene,
            "answers": [question.answer],
            "raw": answer,
            "score": float(exact_match(answer, question.answer)),
        }
        for number, (question, answer) in enumerate(zip(questions, answers, strict=True))
    ]


def glue_rows(values: SimpleNamespace, bart: Path, place: Path) -> list[Row]:
    """Each of GLUE's tasks that has a folder in `--glue`: fine-tuned on, and its validation split classified."""
    root, rows = Path(values.glue), []
    chosen = {
        name: root / task.folder
        for name, task in GLUE.items()
        if any((root / task.folder / f"train{ending}").is_file() for ending in ENDINGS)
    }
    if not chosen:
        raise UserError(f"{root} (--glue): no train.tsv in it; give the folder of GLUE's tasks, such as RTE/train.tsv")
    for name, folder in chosen.items():
        config = _fine_tuned(values, glue.get_config(), bart)
        config.data.task, config.data.directory = name, str(folder)
        suite = suites.get_config(f"glue_{name}")
        suite.root = str(root)
        rows += _trained_and_asked(values, config, suite, place / name)
    return rows


def xsum_rows(values: SimpleNamespace, bart: Path, place: Path) -> list[Row]:
    """Summaries, fine-tuned on the documents in `--xsum` and written for its validation split."""
    folder = Path(values.xsum)
    files = document_files(folder, "validation")
    if len(files) != 1:
        raise UserError(f"{folder} (--xsum): {len(files)} files of the split validation; give validation.jsonl alone")
    config = _fine_tuned(values, xsum.get_config(), bart)
    config.data.directory, config.accumulate = str(folder), 1
    suite = suites.get_config("xsum")
    lines = files[0].suffix == LINES[0]
    suite.root, suite.xsum.documents = str(folder), files[0].name
    suite.xsum.summaries = files[0].with_suffix(LINES[1]).name if lines else files[0].name
    positions = read_bart_config(bart).max_position_embeddings
    suite.xsum.summary_tokens = min(suite.xsum.summary_tokens, positions - 2)
    return _trained_and_asked(values, config, suite, place / "xsum")


TASKS: dict[str, Callable[[SimpleNamespace, Path, Path], list[Row]]] = {
    "denoise": denoise_rows,
    "shapes": shapes_rows,
    "glue": glue_rows,
    "xsum": xsum_rows,
}
NEEDS = {"denoise": "texts", "glue": "glue", "xsum": "xsum"}
"""Tasks -> the option that names their files."""


def _fine_tuned(values: SimpleNamespace, config: ConfigDict, bart: Path) -> ConfigDict:
    """A config of fine-tuning with what the command was told, and lengths that this BART has positions for."""
    positions = read_bart_config(bart).max_position_embeddings
    config.bart, config.seed, config.steps, config.batch_size = str(bart), values.seed, values.steps, values.batch_size
    config.optim.lr = config.optim.lr_linears = values.lr
    config.optim.warmup = values.steps // 10
    config.data.examples = values.examples
    config.eval.every, config.save_every = 0, values.steps
    for field in ("text_length", "source_length", "replay_length"):
        config.data[field] = min(config.data[field], positions)
    return config


def _trained_and_asked(values: SimpleNamespace, config: ConfigDict, suite: ConfigDict, place: Path) -> list[Row]:
    suite.batch_size = values.batch_size
    items = {name: asked[: values.limit] for name, asked in read_items(suite).items()}
    train(config, place)
    ((name, _),) = evaluate(suite, items, VLKD.from_run(place), locate(place / "asked"))
    return read_rows(place / "asked" / name)


def draw(figures: dict[str, dict[str, Any]], path: Path) -> None:
    """Differences with their intervals: shares in points, losses in nats."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups = {
        "after - before, points (right: better)": {k: v for k, v in figures.items() if not k.endswith("loss")},
        "after - before, nats (left: better)": {k: v for k, v in figures.items() if k.endswith("loss")},
    }
    groups = {title: group for title, group in groups.items() if group}
    sizes = [len(group) for group in groups.values()]
    _, axes = plt.subplots(
        len(groups),
        1,
        figsize=(7, 1.1 * len(groups) + 0.4 * sum(sizes)),
        gridspec_kw={"height_ratios": sizes},
        squeeze=False,
    )
    for axis, (title, group) in zip(axes[:, 0], groups.items(), strict=True):
        scale = 100 if "points" in title else 1
        for place, figure in enumerate(group.values()):
            low, high = (scale * bound for bound in figure["interval"])
            middle = scale * figure["difference"]
            axis.plot([low, high], [place, place], color="#0072B2")
            axis.plot([middle], [place], "o", color="#0072B2")
        axis.axvline(0, color="0.6", linewidth=1)
        axis.set_yticks(range(len(group)), list(group))
        axis.set_ylim(len(group) - 0.5, -0.5)
        axis.set_xlabel(title)
    plt.tight_layout()
    plt.savefig(path, dpi=110)
    plt.close()


def main(values: SimpleNamespace) -> None:
    """Entry point."""
    tasks = values.tasks.split(",")
    if unknown := [name for name in tasks if name not in TASKS]:
        raise UserError(f"--tasks={values.tasks}: {unknown[0]} is none of {', '.join(TASKS)}")
    for name, option in NEEDS.items():
        if name in tasks and not getattr(values, option):
            raise UserError(f"--tasks has {name}, which needs --{option} (vlkd retention --help)")
    output = output_directory(values.output, "--output")
    barts = {side: bart_of(getattr(values, side), output / side / "bart") for side in SIDES}
    before, after = (BartText(place) for place in barts.values())
    if before.encode(string.printable) != after.encode(string.printable):
        told = f"{before.directory} and {after.directory}"
        raise UserError(f"{told}: their tokenizers differ; give a BART and the student that began with it")
    rows: dict[str, list[Row]] = {side: [] for side in SIDES}
    with console.aside(values.json):
        for name in tasks:
            for side, bart in barts.items():
                say(f"== {name}, {side}: {getattr(values, side)}")
                rows[side] += TASKS[name](values, bart, output / side)
    for side in SIDES:
        lines = "".join(json.dumps(row) + "\n" for row in rows[side])
        write_atomic(output_directory(output / side) / "rows.jsonl", lines.encode())
    kinds = {row["task"] for row in rows["before"]}
    figures = compare(rows["before"], rows["after"])
    if len(kinds) == 1:  # then they carry no name
        figures = {f"{kind}/{name}": figure for kind in kinds for name, figure in figures.items()}
    settings = {name: value for name, value in vars(values).items() if name not in ("output", "json")}
    result = {"figures": figures, "settings": settings, **circumstances(values.seed)}
    text = json.dumps(result, indent=1)
    write_atomic(output / "retention.json", (text + "\n").encode())
    draw(figures, output / "retention.png")
    table = console.table(figure_rows(figures), ("", *SIDES, "after - before", "95%", "n"))
    tell(text if values.json else f"{table}\n* 0 is left out\n{output / 'retention.png'}")


if __name__ == "__main__":
    entry.run(main, COMMANDS["retention"])
