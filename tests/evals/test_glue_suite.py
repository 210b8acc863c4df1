"""GLUE: its files in their official forms, its metrics against other formulas, and what a classifier is asked."""

import gzip
import json

import numpy as np
import pytest
from scipy import stats
from tiny import command_line, tiny_config

from vlkd_jax.configs import suites
from vlkd_jax.data.glue import GLUE, GlueRows, glue_file
from vlkd_jax.errors import UserError
from vlkd_jax.evals import glue_suite
from vlkd_jax.evaluate import evaluate, read_items
from vlkd_jax.storage import locate
from vlkd_jax.train import train
from vlkd_jax.vlkd import VLKD

OFFICIAL = {  # a line of each task's train or dev file, with the first line where it has one
    "cola": (None, "gj04\t1\t\tOur friends won't buy this.", ("Our friends won't buy this.", "", 1)),
    "sst2": ("sentence\tlabel", "a smile \t1", ("a smile ", "", 1)),
    "mrpc": (
        "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String",
        '1\t7\t8\tHe said "a\tHe said b',
        ('He said "a', "He said b", 1),
    ),
    "stsb": (
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
        "0\tx\ty\t2012\t1\tnone\tnone\tA plane.\tAn air plane.\t4.750",
        ("A plane.", "An air plane.", 4.75),
    ),
    "qqp": (
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
        "1\t2\t3\tHow?\tIn what way?\t1",
        ("How?", "In what way?", 1),
    ),
    "mnli": (
        "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\t"
        "sentence2_parse\tsentence1\tsentence2\tlabel1\tlabel2\tgold_label",
        "0\t1\t2\tg\tp\tp\tp\tp\tA b.\tC d.\tneutral\tneutral\tcontradiction",
        ("A b.", "C d.", 2),
    ),
    "qnli": ("index\tquestion\tsentence\tlabel", "0\tWhen?\tIn May.\tentailment", ("When?", "In May.", 0)),
    "rte": ("index\tsentence1\tsentence2\tlabel", "0\tA.\tB.\tnot_entailment", ("A.", "B.", 1)),
    "wnli": ("index\tsentence1\tsentence2\tlabel", "0\tA.\tB.\t1", ("A.", "B.", 1)),
}


@pytest.mark.parametrize("task", GLUE)
def test_official_files_are_read(tmp_path, task):
    head, line, expected = OFFICIAL[task]
    lines = [*([head] if head else []), line, line]
    (tmp_path / "train.tsv.gz").write_bytes(gzip.compress("\r\n".join([*lines, ""]).encode()))
    rows = GlueRows(glue_file(tmp_path, "train"), task)
    assert len(rows) == 2
    record = rows[1]
    assert (record.text, record.second, record.label) == expected
    assert record.name.endswith(f"line {len(lines)}")


@pytest.mark.shared_data
def test_real_files_are_read():
    from tiny import SHARED_DATA

    folder = SHARED_DATA / "glue"
    train, dev = (GlueRows(glue_file(folder / "RTE", name), "rte") for name in ("train", "dev"))
    assert (len(train), len(dev)) == (2490, 277)
    assert np.bincount(dev.labels).tolist() == [146, 131]
    assert len(GlueRows(glue_file(folder / "SST-2", "dev"), "sst2")) == 872


@pytest.mark.parametrize(
    ("task", "lines", "told"),
    [
        ("rte", ["index\tsentence1\tlabel", "0\ta\t1"], "no column sentence2"),
        ("rte", ["sentence1\tsentence2\tlabel", "a\tb\tmaybe"], "line 2: the label is 'maybe'"),
        ("rte", ["sentence1\tsentence2\tlabel", "a\tb\t2"], "line 2: the label is '2'"),
        ("rte", ["sentence1\tsentence2\tlabel", "a\tb"], "line 2: 2 columns, and the first line 3"),
        ("stsb", ["sentence1\tsentence2\tscore", "a\tb\tnan"], "line 2: score is 'nan'; it must be a number"),
        ("rte", ["sentence1\tsentence2\tlabel"], "no lines in it"),
    ],
)
def test_rows_that_are_none_are_named(tmp_path, task, lines, told):
    path = tmp_path / "train.tsv"
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match=told) as caught:
        GlueRows(path, task)
    assert str(path) in str(caught.value)


def rows_of(task, said, true):
    return [
        glue_suite.judge_class({"raw": a, "answers": [b], "task": f"glue_{task}"})
        | {"raw": a, "answers": [b], "task": f"glue_{task}"}
        for a, b in zip(said, true, strict=True)
    ]


@pytest.mark.parametrize("task", ["cola", "mrpc", "mnli"])
def test_metrics_of_classes(rng, task):
    """Against counts of a confusion matrix; Matthews' coefficient by its own formula."""
    labels = GLUE[task].labels
    true = rng.integers(len(labels), size=200)
    said = np.where(rng.random(200) < 0.6, true, rng.integers(len(labels), size=200))
    metrics = glue_suite.score_classes(rows_of(task, [labels[k] for k in said], [labels[k] for k in true]))
    tp, fp, fn, tn = (np.sum((said == a) & (true == b)) for a, b in ((1, 1), (1, 0), (0, 1), (0, 0)))
    expected = {"accuracy": np.mean(said == true)}
    if task != "mnli":
        expected["f1"] = 2 * tp / (2 * tp + fp + fn)
        expected["matthews"] = (tp * tn - fp * fn) / np.sqrt(float((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)))
    for name in GLUE[task].metrics:
        assert metrics[name] == pytest.approx(expected[name])
        low, high = metrics[f"{name}_interval"]
        assert low < expected[name] < high
    assert metrics["majority"] == np.bincount(true).max() / 200


def test_metrics_of_scores(rng):
    true = np.round(rng.uniform(0, 5, 150), 2)
    said = true + rng.normal(size=150)
    metrics = glue_suite.score_classes(rows_of("stsb", [f"{x:.6g}" for x in said], [f"{x:g}" for x in true]))
    assert metrics["pearson"] == pytest.approx(stats.pearsonr(said, true)[0], abs=1e-4)
    assert metrics["spearman"] == pytest.approx(stats.spearmanr(said, true)[0], abs=1e-6)
    assert metrics["pearson_interval"][0] < metrics["pearson"] < metrics["pearson_interval"][1]


def test_what_is_constant_has_no_correlation():
    assert (
        glue_suite.score_classes(rows_of("cola", ["acceptable"] * 4, ["acceptable", "unacceptable"] * 2))["matthews"]
        == 0
    )


@pytest.fixture(scope="module")
def classifier(assets, tmp_path_factory):
    """A workdir, and the folder of its task: which of two words comes first decides."""
    folder = tmp_path_factory.mktemp("glue")
    (folder / "RTE").mkdir()
    pairs = [("a red circle", "entailment"), ("a blue square", "not_entailment")] * 20
    lines = [f"{text}\t{text} at top left\t{label}" for text, label in pairs]
    for name in ("train", "dev"):
        (folder / "RTE" / f"{name}.tsv").write_text("\n".join(["sentence1\tsentence2\tlabel", *lines]) + "\n")
    (folder / "RTE" / "test.tsv").write_text("index\tsentence1\tsentence2\n0\ta red circle\ta red circle at top left\n")
    changes = {"data__source": "glue", "data__directory": str(folder / "RTE"), "data__task": "rte", "steps": 30}
    rates = {"optim__lr": 3e-3, "optim__lr_linears": 1e-2, "save_every": 30, "eval__every": 15, "log_every": 10}
    train(tiny_config(assets, objective="classify", **changes, **rates), folder / "run")
    return folder


def test_a_classifier_learns_and_is_scored(classifier, tmp_path):
    config = suites.get_config("glue_rte")
    config.root = str(classifier)
    model = VLKD.from_run(classifier / "run")
    ((_, metrics),) = evaluate(config, read_items(config), model, locate(tmp_path))
    assert metrics["accuracy"] == 1.0 and metrics["majority"] == 0.5 and metrics["n"] == 40
    assert "rows" in metrics["files"]
    assert evaluated(classifier)["held_out/accuracy"] == 1.0
    config.glue_rte.split, config.glue_rte.labelled = "test", False
    ((_, metrics),) = evaluate(config, read_items(config), model, locate(tmp_path / "test"))
    assert metrics["n"] == 0 and metrics["unscored"] == 1


def evaluated(workdir):
    lines = map(json.loads, (workdir / "run" / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == "eval"][-1]


def test_models_and_suites_that_do_not_fit(classifier, assets, tmp_path):
    """One line, before anything is computed."""
    tuned, bart = VLKD.from_run(classifier / "run"), VLKD.from_bart(assets / "bart")
    for name, model, told in (
        ("glue_rte", bart, "this model is no classifier; give a run of objective classify"),
        ("glue_wnli", tuned, "its classes are not_entailment, entailment, and this model's entailment, not_entailment"),
        ("shapes", bart, "a text model, which reads no pictures"),
    ):
        config = suites.get_config(name)
        config.root = str(classifier)
        if name == "glue_wnli":
            config.glue_wnli.rows = "RTE/{split}.tsv"
        with pytest.raises(UserError, match=told):
            list(evaluate(config, read_items(config), model, locate(tmp_path)))
    with pytest.raises(UserError, match="a text model, which reads no pictures; give a student"):
        bart.caption(np.zeros((8, 8, 3), np.uint8))
    assert isinstance(bart.generate_text("a red circle"), str)


def test_the_commands(classifier, tmp_path):
    run = command_line(
        "evaluate",
        [
            "--config=suites:glue_rte",
            f"--config.root={classifier}",
            f"--checkpoint={classifier / 'run'}",
            f"--workdir={tmp_path}",
        ],
    )
    assert run.returncode == 0, run.stderr
    assert "accuracy 1.000  majority 0.500  n 40" in run.stdout
