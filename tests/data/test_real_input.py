"""Real photos, captions, questions and tokenizers, tiny random models: train, stop, resume, evaluate."""

import json
import resource
import sys

import jax
import numpy as np
import pytest
from tiny import ROOT, SHARED_DATA, command_line

from vlkd_jax.hf.random import write_random
from vlkd_jax.runs import load_run

pytestmark = pytest.mark.shared_data
PHOTOS = SHARED_DATA / "coco_open"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The workdir of a run that was trained to step 2, and by a second process to step 4."""
    directory = tmp_path_factory.mktemp("real")
    write_random(SHARED_DATA / "tokenizers/clip", SHARED_DATA / "tokenizers/bart", directory / "models", "tiny", 0)
    for steps in (2, 4):
        done = command_line(
            "train",
            [
                f"--config={ROOT / 'configs/folder.py'}",
                f"--workdir={directory / 'run'}",
                f"--config.clip={directory / 'models/clip'}",
                f"--config.bart={directory / 'models/bart'}",
                f"--config.data.captions={PHOTOS / 'captions.json'}",
                f"--config.data.images={PHOTOS / 'images'}",
                f"--config.steps={steps}",
                "--config.batch_size=8",
                "--config.eval.every=2",
                "--config.eval.batches=1",
                "--config.log_every=1",
                "--config.mesh.data=1",
            ],
        )
        assert done.returncode == 0, done.stderr
        assert f"step {steps - 2} of {steps}" in done.stdout
    return directory / "run"


def plausible(host_gib):
    """As much as any process that this one has waited for had, at most; and more than nothing."""
    unit = 1 if sys.platform == "darwin" else 1024
    return 0 < host_gib <= resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit / 2**30


def test_training_moves_the_student_and_measures_retention(run):
    task, params, step = load_run(run)
    assert step == 4
    before, after = jax.tree.leaves(task.load_params()), jax.tree.leaves(params)
    assert any(np.abs(np.asarray(a) - b).max() > 0 for a, b in zip(after, before, strict=True))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    evaluated = {line["step"]: line for line in lines if line["kind"] == "eval"}
    assert {0, 2, 4} <= set(evaluated) and "retention/token_accuracy" in evaluated[4]
    sizes = [line["host_gib"] for line in lines if line["kind"] == "memory"]
    assert len(sizes) == 2 and all(map(plausible, sizes))


def test_questions_and_captions(run, tmp_path):
    done = command_line(
        "evaluate",
        [
            f"--config={ROOT / 'configs/suites.py'}:vqav2,coco_caption",
            f"--checkpoint={run}",
            f"--workdir={tmp_path}",
            f"--config.vqav2.questions={PHOTOS / 'vqa_questions.json'}",
            f"--config.vqav2.annotations={PHOTOS / 'vqa_annotations.json'}",
            f"--config.vqav2.images={PHOTOS / 'images'}",
            f"--config.coco_caption.captions={PHOTOS / 'captions.json'}",
            f"--config.coco_caption.images={PHOTOS / 'images'}",
            "--config.batch_size=16",
        ],
    )
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert plausible(metrics["peak_memory"]["host_gib"])
    assert (metrics["suites"]["vqav2"]["n"], metrics["suites"]["coco_caption"]["n"]) == (8, 110)
    for name, count in (("vqav2", 8), ("coco_caption", 110)):
        rows = [json.loads(line) for line in (tmp_path / name / "predictions.jsonl").read_text().splitlines()]
        assert len({row["id"] for row in rows}) == count
        assert all({"id", "prompt", "raw", "normalised", "answers", "score"} <= set(row) for row in rows)
