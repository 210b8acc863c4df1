"""Zero-shot evaluation of a run's newest checkpoint, or of the student that a CLIP and a BART are before distillation.

`python -m vlkd_jax.evaluate --config=suites:NAME[,NAME] --checkpoint=DIR --workdir=OUT`, DIR being the
workdir of a training run. Writes OUT/NAME/predictions.jsonl as batches are done, and OUT/metrics.json with each suite;
for suites of published benchmarks also OUT/NAME/results.json in their servers' form. The same command again goes on
where one was cut off.
"""

from __future__ import annotations

import json
import os
import platform
import re
import time
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from vlkd_jax import entry, processes
from vlkd_jax.commands import COMMANDS
from vlkd_jax.config import BUILTIN, HUB, model_directory
from vlkd_jax.console import say
from vlkd_jax.data.builder import MANIFEST as RECORDS_MANIFEST
from vlkd_jax.data.files import read_json
from vlkd_jax.data.sources import counted
from vlkd_jax.data.text import PROMPT_FIELDS, check_template
from vlkd_jax.errors import UserError
from vlkd_jax.evals.files import NONE, place
from vlkd_jax.evals.runner import run_suite
from vlkd_jax.evals.suite import Item
from vlkd_jax.evals.suites import SUITES
from vlkd_jax.evals.vqa_files import version_of
from vlkd_jax.hf.student import is_student
from vlkd_jax.manifest import file_sha256
from vlkd_jax.metrics import peak_memory
from vlkd_jax.runs import run_config
from vlkd_jax.sharding import make_mesh
from vlkd_jax.storage import AnyPath, locate, make_directory, write_atomic
from vlkd_jax.vlkd import VLKD

METRICS = "metrics.json"

TEMPLATES = {
    **PROMPT_FIELDS,
    "summary_encoder": ("document",),
    "summary_decoder": (),
    "text_template": ("caption",),
    "templates": ("name",),
    "image_name": ("image_id", "split"),
}
"""Fields of suites that are templates, or several of them, and what is filled in."""
FILES = ("questions", "annotations", "answers", "captions", "labels", "classes", "documents", "summaries", "rows")
"""Fields of suites that name a file."""
TOWERS = ("student", "clip")


def check_suites(suites: ConfigDict) -> None:
    """Raises UserError naming fields of the chosen suites that no evaluation can use.

    These are templates with a field that is not filled in, numbers that are too small, and a tower that says nothing.
    """
    for name in suites.suites:
        if name not in suites or suites[name].get("kind") not in SUITES:
            kinds = ", ".join(SUITES)
            raise UserError(f"config.{name} is no suite; a suite is a group of fields with a kind, one of {kinds}")
    if suites.batch_size < 1:
        raise UserError(f"config.batch_size is {suites.batch_size}; it must be at least 1")
    if suites.tower not in TOWERS:
        raise UserError(f"config.tower is {suites.tower!r}; it is one of {', '.join(TOWERS)}")
    for name in suites.suites:
        if suites.tower == "clip" and SUITES[suites[name].kind].predict is None:
            raise UserError(f"config.tower is clip, and {name} is answered in words, which CLIP has not; leave it out")
        for field, value in suites[name].items():
            for template in (value,) if isinstance(value, str) else value if field == "templates" else ():
                if field in TEMPLATES:
                    check_template(f"--config.{name}.{field}", template, TEMPLATES[field])
            if field.endswith("_tokens") and value < 1:
                raise UserError(f"config.{name}.{field} is {value}; it must be at least 1")


def read_items(suites: ConfigDict) -> dict[str, list[Item]]:
    """What each of `variants` asks. All of it is read and checked here, before anything is computed.

    Raises:
      UserError: a suite that has fields without a value, or files that cannot be used.
    """
    check_suites(suites)
    return {name: list(SUITES[suite.kind].items(suite)) for name, suite in variants(suites)}


def evaluate(
    suites: ConfigDict,
    items: dict[str, list[Item]],
    model: VLKD,
    workdir: AnyPath,
    start: VLKD | None = None,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Runs each of `variants` and gives (name, metrics) when it is done, its predictions on disk.

    Args:
      items: of `read_items`.
      start: the student before distillation; suites with `baselines` set are run for it too, as `before`, with its
        predictions below `workdir/before`.

    Raises:
      UserError: a prompt that is too long for the model, or what it cannot read.
    """
    for name, suite in variants(suites):
        for item in items[name]:
            SUITES[suite.kind].check(name, model, item)
    for name, suite in variants(suites):
        kind, place = SUITES[suite.kind], workdir / name
        settings = settings_of(suites, suite, model)
        metrics = run_suite(name, kind, items[name], model, place, settings)
        if start is not None and suite.get("baselines"):
            plain = suite.copy_and_resolve_references()
            with plain.unlocked():
                plain.baselines = False
            settings, place = settings_of(suites, plain, start), workdir / "before" / name
            asked = list(kind.items(plain))
            metrics["before"] = run_suite(f"before/{name}", kind, asked, start, place, settings)
        yield name, metrics | {"suite": suite.to_dict(), "files": processes.on_first(lambda s=suite: hash_files(s))}


def hash_files(suite: ConfigDict) -> dict[str, dict[str, str]]:
    """{field: {"path", "sha256"}} of each file that the suite reads but its pictures, `version` of annotations."""
    files = {}
    if suite.get("records", NONE) != NONE:
        path = place(suite, "records") / RECORDS_MANIFEST
        files["records"] = {"path": os.fspath(path), "sha256": file_sha256(path)}
    for field in FILES if not files else ("answers",):
        value = suite.get(field)
        if isinstance(value, str) and value != NONE and (path := place(suite, field)).is_file():
            files[field] = {"path": os.fspath(path), "sha256": file_sha256(path)}
    if suite.kind == "vqa" and "annotations" in files:
        files["annotations"]["version"] = version_of(read_json(place(suite, "annotations")))
    return files


def variants(suites: ConfigDict) -> Iterator[tuple[str, ConfigDict]]:
    """The chosen suites by name; where one has several `prompts`, each of them as SUITE/PROMPT.

    Raises:
      UserError: a file of prompts that cannot be used.
    """
    for name in suites.suites:
        if suites[name].get("prompts", NONE) == NONE:
            yield name, suites[name]
            continue
        for prompt in _read_prompts(f"config.{name}.prompts", suites[name]):
            suite = suites[name].copy_and_resolve_references()
            suite.update({field: text for field, text in prompt.items() if field != "name"})
            yield f"{name}/{prompt['name']}", suite


def _read_prompts(field: str, suite: ConfigDict) -> list[dict[str, str]]:
    path = Path(suite.prompts)
    prompts = read_json(path)
    fields = [name for name in TEMPLATES if isinstance(suite.get(name), str) and name != "image_name"]
    told = f"{path} ({field}): it must be a JSON list of objects, each with a name and any of {', '.join(fields)}"
    if not isinstance(prompts, list) or not prompts:
        raise UserError(told)
    for prompt in prompts:
        if not isinstance(prompt, dict) or not all(isinstance(text, str) for text in prompt.values()):
            raise UserError(f"{told}; {str(prompt)[:80]} is none")
        if not re.fullmatch(r"[\w.-]*\w[\w.-]*", prompt.get("name", "")):
            raise UserError(f"{told}; the name {prompt.get('name')!r} must be letters, digits, ., _ and -")
        if unknown := prompt.keys() - {"name", *fields}:
            raise UserError(f"{told}; {prompt['name']} has {min(unknown)}")
        for name in fields:
            check_template(f"{path}: {prompt['name']}: {name}", prompt.get(name, suite[name]), TEMPLATES[name])
    names = [prompt["name"] for prompt in prompts]
    if len(set(names)) < len(names):
        raise UserError(f"{told}; two are called {max(names, key=names.count)}")
    return prompts


def settings_of(suites: ConfigDict, suite: ConfigDict, model: VLKD) -> dict[str, Any]:
    """What a suite's rows depend on beside its items."""
    return {
        "suite": suite.to_dict(),
        "model": model.identity,
        "dtype": np.dtype(model.bart.dtype).name,
        "tower": suites.tower,
        "batch_size": suites.batch_size,
        "device": jax.devices()[0].device_kind,
        "versions": {name: version(name) for name in ("vlkd_jax", "jax", "transformers", "pillow")},
    }


def circumstances(seed: int) -> dict[str, Any]:
    """What a figure depends on beside the model: versions, devices, seed, date."""
    packages = ("jax", "flax", "optax", "orbax-checkpoint", "transformers", "numpy", "pillow")
    return {
        "seed": seed,
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
        "devices": [f"{d.platform} {d.device_kind}" for d in jax.devices()],
        "machine": platform.machine(),
    }


def main(values: SimpleNamespace) -> None:
    """Entry point."""
    suites = values.config
    if "suites" not in suites:
        raise UserError("--config is not one of suites; give --config=suites:NAME[,NAME], such as suites:shapes")
    checkpoint, pair = values.checkpoint, {"clip": values.clip, "bart": values.bart}
    if not checkpoint and not all(pair.values()):
        raise UserError("give --checkpoint=DIR, or --clip=DIR and --bart=DIR for a student before distillation")
    check_suites(suites)
    if checkpoint and checkpoint.startswith((HUB, BUILTIN)):
        checkpoint = model_directory(checkpoint)
    exported = bool(checkpoint) and is_student(checkpoint)
    if exported and any(pair.values()):
        raise UserError(f"{checkpoint}: an export, which holds its models; leave --clip and --bart out")
    seed = run_config(checkpoint).seed if checkpoint and not exported else 0
    items, results = read_items(suites), {}
    workdir, mesh = locate(values.workdir), make_mesh(suites.mesh)
    processes.on_first(lambda: os.fspath(make_directory(workdir)))
    if exported:
        model = VLKD.from_export(checkpoint, mesh)
    else:
        model = VLKD.from_run(checkpoint, **pair, mesh=mesh) if checkpoint else VLKD.from_pair(**pair, mesh=mesh)
    wants_start = checkpoint and not exported and any(suites[name].get("baselines") for name in suites.suites)
    start = VLKD.from_run(checkpoint, at_start=True, **pair, mesh=mesh) if wants_start else None
    about = {"checkpoint": model.identity, **circumstances(seed), "dtype": np.dtype(model.bart.dtype).name}
    about |= {"batch_size": suites.batch_size, "tower": suites.tower, "mesh": dict(mesh.shape)}
    for name, metrics in evaluate(suites, items, model, workdir, start):
        results[name] = metrics
        unfinished = [other for other in items if other not in results]
        result = {"suites": results, "unfinished": unfinished, **about, "peak_memory": peak_memory()}
        if processes.is_first():
            write_atomic(workdir / METRICS, (json.dumps(result, indent=1) + "\n").encode())
    say(f"wrote {workdir / METRICS}")
    for name, metrics in results.items():
        say(f"{name}: " + "  ".join(_headlines(metrics)))
    check_left_out(results)


def check_left_out(results: dict[str, Any]) -> None:
    """Raises UserError when pictures that proved damaged on decoding are more than a suite allows."""
    for name, metrics in results.items():
        left_out = Counter(metrics.get("left_out", {}))
        limit = metrics["suite"].get("max_unusable", 0.0)
        if left_out and left_out.total() > limit * (left_out.total() + metrics["n"] + metrics.get("unscored", 0)):
            raise UserError(
                f"{name}: {left_out.total()} items are left out of the score ({counted(left_out)}), "
                f"config.{metrics['suite']['name']}.max_unusable is {limit:g}; mend their pictures or raise it"
            )


def _headlines(metrics: dict[str, Any], prefix: str = "") -> list[str]:
    names = ("overall", "exact_match", "attribute_f1", "word_f1", "r_at_1", "clip_r_at_1", "text_to_image_r_at_1")
    names += ("CIDEr", "Bleu_4", "ROUGE_L", "image_to_text_r_at_1", "top_1", "top_5", "rouge1", "rouge2", "rougeL")
    names += ("accuracy", "f1", "matthews", "pearson", "spearman", "majority")
    lines = [f"{prefix}{name} {metrics[name]:.3f}" for name in names if name in metrics]
    lines += [f"{prefix}{name} {metrics[name]}" for name in ("n", "unscored", "escaped", "cut") if name in metrics]
    for name in ("vqa", "vqa_blind", "vqa_majority", "caption", "text_qa", "retrieval"):
        if name in metrics:
            lines += _headlines(metrics[name], f"{name}/")
    return lines


if __name__ == "__main__":
    entry.run(main, COMMANDS["evaluate"])
