"""`vlkd retention`: both sides by the same code; a side against itself differs by nothing."""

import json
import types
from itertools import pairwise

import jax
import numpy as np
import pytest
from tiny import command_line

from vlkd_jax import retention
from vlkd_jax.data.pipeline import batches
from vlkd_jax.data.sources import TextLines
from vlkd_jax.errors import UserError
from vlkd_jax.hf.load import load_bart
from vlkd_jax.hf.save import copy_tokenizer, save_bart
from vlkd_jax.shapes.sources import ShapesTexts
from vlkd_jax.tasks import make_task
from vlkd_jax.vlkd import VLKD


@pytest.fixture(scope="module")
def files(assets, tmp_path_factory):
    """Texts, a task of GLUE, documents; and a BART whose parameters were moved a little."""
    folder = tmp_path_factory.mktemp("retention")
    source = ShapesTexts(3, "validation")
    texts = [source[k].text for k in range(30)]
    (folder / "texts.txt").write_text("\n".join(texts) + "\n")
    (folder / "glue" / "SST-2").mkdir(parents=True)
    rows = "\n".join(["sentence\tlabel", *(f"{text}\t{k % 2}" for k, text in enumerate(texts))]) + "\n"
    for name in ("train", "dev"):
        (folder / "glue" / "SST-2" / f"{name}.tsv").write_text(rows)
    (folder / "xsum").mkdir()
    lines = "\n".join(json.dumps({"document": f"{a} {b}", "summary": a}) for a, b in pairwise(texts))
    for name in ("train", "validation"):
        (folder / "xsum" / f"{name}.jsonl").write_text(lines + "\n")
    config, params = load_bart(assets / "bart")
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: x + 0.05 * rng.normal(size=np.shape(x)).astype(np.float32), params)
    save_bart(folder / "moved", config, params)
    copy_tokenizer(assets / "bart", folder / "moved")
    return folder


def arguments(files, assets, output, tasks, after):
    return [
        f"--before={assets / 'bart'}",
        f"--after={after}",
        f"--output={output}",
        f"--tasks={tasks}",
        f"--texts={files / 'texts.txt'}",
        f"--glue={files / 'glue'}",
        f"--xsum={files / 'xsum'}",
        *("--limit=12", "--steps=3", "--batch-size=8", "--lr=1e-3"),
    ]


def test_all_tasks(files, assets, tmp_path):
    """The moved BART is worse at restoring; every figure is there, with its interval, and the picture."""
    tasks = "denoise,shapes,glue,xsum"
    run = command_line("retention", arguments(files, assets, tmp_path, tasks, files / "moved"))
    assert run.returncode == 0, run.stderr
    result = json.loads((tmp_path / "retention.json").read_text())
    figures = result["figures"]
    names = ["denoise/denoise_loss", "denoise/token_accuracy", "text_qa/score", "glue_sst2/accuracy", "summary/rougeL"]
    assert set(names) < set(figures) and all(figures[name]["n"] == 12 for name in names)
    for name, figure in figures.items():
        low, high = figure["interval"]
        assert low <= figure["difference"] <= high, name
    assert figures["denoise/denoise_loss"]["difference"] > 0
    assert (tmp_path / "retention.png").read_bytes().startswith(b"\x89PNG")
    assert result["settings"]["before"] == str(assets / "bart") and "versions" in result
    again = command_line("retention", [*arguments(files, assets, tmp_path, tasks, files / "moved"), "--json"])
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["figures"] == figures
    assert again.stderr.count("nothing to do: this run is complete at step 3") == 4


def test_a_bart_against_itself_differs_by_nothing(files, assets, tmp_path):
    """Also through an export of a student that learned nothing, whose BART it is."""
    VLKD.from_pair(assets / "clip", assets / "bart").save_pretrained(tmp_path / "hf")
    run = command_line("retention", [*arguments(files, assets, tmp_path / "out", "denoise", tmp_path / "hf"), "--json"])
    assert run.returncode == 0, run.stderr
    for figure in json.loads(run.stdout)["figures"].values():
        assert figure["difference"] == 0 and figure["interval"] == [0, 0]


def test_losses_of_texts_add_up_to_that_of_a_batch(files, assets):
    values = types.SimpleNamespace(texts=str(files / "texts.txt"), seed=4, limit=8)
    rows = retention.denoise_rows(values, assets / "bart", None)
    config = retention.denoise_config(values, assets / "bart")
    task = make_task(config)
    stream = batches(TextLines(values.texts), task.encoder, batch_size=8, seed=4, shuffle=False, threads=1)
    terms = task.terms(task.load_params(), {}, next(iter(stream)).replace(index=None), None)
    loss, tokens = map(float, terms["denoise"])
    assert sum(row["loss"] for row in rows) == pytest.approx(loss, rel=1e-5)
    assert sum(row["tokens"] for row in rows) == tokens
    assert sum(row["right"] for row in rows) == float(terms["token_accuracy"][0])


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"tasks": "denoise,glue2"}, "glue2 is none of denoise, shapes, glue, xsum"),
        ({"tasks": "denoise", "texts": None}, "--tasks has denoise, which needs --texts"),
        ({"tasks": "glue", "glue": "."}, r"\(--glue\): no train.tsv in it"),
        ({"tasks": "xsum", "xsum": "."}, r"\(--xsum\): 0 files of the split validation"),
        ({"after": "nowhere"}, "nowhere: not a directory"),
    ],
)
def test_mistakes_are_one_line(files, assets, tmp_path, monkeypatch, changes, told):
    monkeypatch.chdir(tmp_path)
    given = {"before": str(assets / "bart"), "after": str(files / "moved"), "output": str(tmp_path / "out")}
    given |= {"tasks": "denoise", "texts": str(files / "texts.txt"), "glue": None, "xsum": None, "json": False}
    given |= {"limit": 4, "steps": 2, "batch_size": 2, "lr": 1e-3, "examples": 0, "seed": 0}
    with pytest.raises(UserError, match=told):
        retention.main(types.SimpleNamespace(**given | changes))
