"""Evaluation as a whole: every suite on its official file names, cut off and gone on, several prompts, a plain pair."""

import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest
from PIL import Image
from tiny import command_line, make_mesh

from vlkd_jax import evaluate as command
from vlkd_jax import predict
from vlkd_jax.configs import suites
from vlkd_jax.errors import UserError
from vlkd_jax.evals import runner, statistics
from vlkd_jax.evals.runner import read_rows
from vlkd_jax.evaluate import check_suites, evaluate, read_items, variants
from vlkd_jax.vlkd import VLKD

NAMES = "vqav2,vqav2_test_dev,okvqa,coco_caption,nocaps,flickr30k_caption,flickr30k_retrieval,coco_retrieval"
NAMES += ",imagenet_zeroshot,xsum"
PICTURES = 5


@pytest.fixture(autouse=True)
def quick_intervals(monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 20)


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The official files of every suite, with five pictures each."""
    root, rng = tmp_path_factory.mktemp("root"), np.random.default_rng(0)

    def picture(name):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), np.uint8)).save(path, format="PNG")

    questions = [
        {"question_id": 10 * k + n, "image_id": k, "question": f"is it {n}?"} for k in range(PICTURES) for n in range(3)
    ]
    annotations = [
        {"question_id": q["question_id"], "image_id": q["image_id"], "answers": [{"answer": "red"}] * 10}
        for q in questions
    ]
    for split, prefix in (("val2014", "v2_"), ("test-dev2015", "v2_"), ("val2014", "")):
        write(
            root / f"{prefix}OpenEnded_mscoco_{split}_questions.json", {"questions": questions, "data_subtype": split}
        )
        write(root / f"{prefix}mscoco_{split}_annotations.json", {"annotations": annotations, "data_subtype": split})
    for k in range(PICTURES):
        for name in (
            f"val2014/COCO_val2014_{k:012d}.jpg",
            f"test2015/COCO_test2015_{k:012d}.jpg",
            f"flickr30k-images/{k}.jpg",
            f"nocaps_val/{k}.jpg",
            f"val/P_{k}.JPEG",
        ):
            picture(name)
    sentences = [{"raw": f"a red circle {n}"} for n in range(5)]
    for file, folder, name in (("coco", "val2014", "COCO_val2014_{:012d}.jpg"), ("flickr30k", None, "{}.jpg")):
        images = [{"filename": name.format(k), "split": "test", "sentences": sentences} for k in range(PICTURES)]
        images = [image | ({"filepath": folder, "cocoid": k} if folder else {}) for k, image in enumerate(images)]
        write(root / f"dataset_{file}.json", {"images": images})
    domains = itertools.cycle(("in-domain", "near-domain", "out-domain"))
    images = [{"id": k, "file_name": f"{k}.jpg", "domain": next(domains)} for k in range(PICTURES)]
    captions = [{"image_id": k, "caption": "a red circle"} for k in range(PICTURES)]
    write(root / "nocaps_val_4500_captions.json", {"images": images, "annotations": captions})
    write(root / "LOC_synset_mapping.txt", "n1 circle, disc\nn2 square\n")
    labels = "".join(f"P_{k},n{1 + k % 2} 1 2 3 4 \n" for k in range(PICTURES))
    write(root / "LOC_val_solution.csv", f"ImageId,PredictionString\n{labels}")
    write(root / "test.source", "a red circle is there . " * 3 + "\n" + "two blue squares\n")
    write(root / "test.target", "red\nblue\n")
    return root


def make_pair(assets, mesh=None):
    """A student before distillation, blown up until what it says depends on what it reads."""

    def blow_up(path, x):
        name = jax.tree_util.keystr(path)
        return x * (100 if "image_projection" in name else 64 if "encoder_attn" in name and "out_proj" in name else 8)

    model = VLKD.from_pair(assets / "clip", assets / "bart", mesh)
    params = jax.tree_util.tree_map_with_path(lambda path, x: blow_up(path, x) if x.ndim > 1 else x, model.params)
    return dataclasses.replace(model, bart_params=params["bart"], params=params)


@pytest.fixture(scope="module")
def pair(assets):
    return make_pair(assets)


def config_of(root, names=NAMES, **fields):
    config = suites.get_config(names)
    config.root = str(root)
    for name in config.suites:
        for field in ("answer_tokens", "caption_tokens", "summary_tokens"):
            if field in config[name]:
                config[name][field] = 4
        if "decoding" in config[name]:
            config[name].decoding.update({"beams": 2, "min_new_tokens": 0})
    for field, value in fields.items():
        config[field] = value
    return config


def run(config, model, workdir):
    return dict(evaluate(config, read_items(config), model, workdir))


def test_every_suite_by_its_official_names(root, pair, tmp_path):
    jax.clear_caches()
    config = config_of(root, batch_size=4)
    metrics = run(config, pair, tmp_path)
    assert list(metrics) == NAMES.split(",")
    counts = {"vqav2": 15, "vqav2_test_dev": 0, "xsum": 2}
    assert {name: values["n"] for name, values in metrics.items()} == {n: counts.get(n, 5) for n in metrics} | {
        "okvqa": 15
    }
    assert metrics["vqav2_test_dev"]["unscored"] == 15
    assert set(metrics["nocaps"]["by_domain"]) == {"in", "near", "out", "entire"}
    assert metrics["coco_retrieval"]["texts"] == 25 and metrics["imagenet_zeroshot"]["classes"] == 2
    assert all(values["kept"] == 0 for values in metrics.values())
    assert min(metrics[name]["programs"] for name in ("vqav2", "coco_caption", "xsum", "flickr30k_retrieval")) > 0
    for name in ("vqav2", "vqav2_test_dev", "nocaps", "xsum"):
        assert len(json.loads((tmp_path / name / "results.json").read_text())) == len(read_rows(tmp_path / name))
    again = run(config, pair, tmp_path)  # nothing is computed again, all is scored again
    volatile = {"seconds", "programs", "kept"}
    for name, values in again.items():
        assert values["kept"] == len(read_rows(tmp_path / name)) and values["programs"] == 0
        assert {k: v for k, v in values.items() if k not in volatile} == {
            k: v for k, v in metrics[name].items() if k not in volatile
        }
    config.tower = "clip"
    with pytest.raises(UserError, match=r"config\.tower is clip, and vqav2 is answered in words"):
        check_suites(config)
    towers = run(config_of(root, "coco_retrieval,imagenet_zeroshot", tower="clip"), pair, tmp_path)
    assert all(values["kept"] == 0 for values in towers.values())


@pytest.mark.parametrize("sizes", [{"batch_size": 1}, {"batch_size": 7}, {"mesh": make_mesh(2, 2, 2)}], ids=str)
def test_predictions_do_not_depend_on_batches_and_devices(root, assets, pair, tmp_path, sizes):
    names, mesh = "vqav2,coco_caption,xsum", sizes.pop("mesh", None)
    model = make_pair(assets, mesh) if mesh else pair
    run(config_of(root, names, **sizes), model, tmp_path / "other")
    run(config_of(root, names, batch_size=64), pair, tmp_path / "plain")
    said = set()
    for name in names.split(","):
        rows = [[(row["id"], row["raw"]) for row in read_rows(tmp_path / place / name)] for place in ("other", "plain")]
        assert rows[0] == rows[1]
        said |= {raw for _, raw in rows[0]}
    assert len(said) > 4


def test_it_goes_on_where_it_was_cut_off(root, pair, tmp_path, monkeypatch):
    """With an uninterrupted run's file, byte for byte; whole batches are kept, and a torn line is not."""
    config = config_of(root, "vqav2", batch_size=4)
    whole = run(config, pair, tmp_path / "whole")["vqav2"]
    generate, asked = predict.generate, []

    def interrupted(model, requests, *options):
        for count, texts in enumerate(generate(model, requests, *options)):
            if count == 10:
                raise KeyboardInterrupt
            yield texts

    def counted(model, requests, *options):
        def each():
            for request in requests:
                asked.append(request)
                yield request

        yield from generate(model, each(), *options)

    monkeypatch.setattr(predict, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(config, pair, tmp_path)
    with open(tmp_path / "vqav2" / runner.PART, "a") as part:
        part.write('{"task": "vq')
    monkeypatch.setattr(predict, "generate", counted)
    metrics = run(config, pair, tmp_path)["vqav2"]
    assert metrics["kept"] == 8 and len(asked) == 7 and metrics["overall"] == whole["overall"]
    files = [(folder / "vqav2" / runner.PREDICTIONS).read_bytes() for folder in (tmp_path, tmp_path / "whole")]
    assert files[0] == files[1] and not (tmp_path / "vqav2" / runner.PART).exists()


def test_other_settings_and_other_questions_start_anew(root, pair, tmp_path, capsys):
    config = config_of(root, "okvqa", batch_size=4)
    run(config, pair, tmp_path)
    config.okvqa.answer_tokens = 3
    assert run(config, pair, tmp_path)["okvqa"]["kept"] == 0
    assert "predictions.jsonl: replaced, it holds no whole batch of these settings and items" in capsys.readouterr().out
    items = read_items(config)
    items["okvqa"][3].row["answers"] = ["blue"] * 10
    assert dict(evaluate(config, items, pair, tmp_path))["okvqa"]["kept"] == 0


def test_several_prompts_are_each_reported(root, pair, tmp_path):
    prompts = [{"name": "plain"}, {"name": "short", "question_decoder": "{question}", "question_encoder": "<mask>"}]
    write(tmp_path / "prompts.json", prompts)
    config = config_of(root, "vqav2", batch_size=4)
    config.vqav2.prompts = str(tmp_path / "prompts.json")
    metrics = run(config, pair, tmp_path)
    assert list(metrics) == ["vqav2/plain", "vqav2/short"]
    assert metrics["vqav2/short"]["suite"]["question_encoder"] == "<mask>"
    assert read_rows(tmp_path / "vqav2/short")[0]["prompt"] == "is it 0?"
    for wrong, told in (
        ({}, "a JSON list of objects"),
        ([{"name": "a/b"}], "the name 'a/b' must be"),
        ([{"name": "a", "question": "x"}], "a has question"),
        ([{"name": "a"}, {"name": "a"}], "two are called a"),
        ([{"name": "a", "question_decoder": "{x}"}], r"only \{question\} is filled in"),
        ([{"question_decoder": "x"}], "the name None"),
    ):
        write(tmp_path / "prompts.json", wrong)
        with pytest.raises(UserError, match=rf"prompts\.json.*{told}"):
            list(variants(config))


def test_candidates_are_ranked(root, pair, tmp_path):
    write(root / "answers.txt", "red\nblue\nred\ngreen\n")
    config = config_of(root, "vqav2", batch_size=4)
    config.vqav2.answers = "answers.txt"
    run(config, pair, tmp_path)
    rows = read_rows(tmp_path / "vqav2")
    assert {row["raw"] for row in rows} <= {"red", "blue", "green"} and all(row["log_likelihood"] < 0 for row in rows)


def test_a_prompt_that_is_too_long_is_told_before_anything_is_asked(root, pair, tmp_path, monkeypatch):
    monkeypatch.setattr(predict, "generate", None)
    config = config_of(root, "okvqa", batch_size=4)
    config.okvqa.question_decoder = "{question}" + " why" * 400
    with pytest.raises(UserError, match=r"okvqa: vqa 0: a prompt has \d+ BART tokens, there is room for"):
        run(config, pair, tmp_path)
    assert not (tmp_path / "okvqa").exists()


def test_progress_is_told_with_its_end(monkeypatch, capsys):
    clock = iter(range(0, 1000, 4))
    monkeypatch.setattr(runner.time, "monotonic", lambda: next(clock))
    assert len(list(runner._told("vqav2", range(10), 90, 100))) == 10
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "vqav2  93/100  eta 0:28  0.25 rows/s" and len(lines) == 4


def test_a_plain_pair_from_the_command_line(root, assets, tmp_path):
    argv = ["--config=suites:okvqa", f"--config.root={root}", f"--workdir={tmp_path}", "--config.mesh.data=1"]
    done = command_line("evaluate", [*argv, f"--clip={assets / 'clip'}", f"--bart={assets / 'bart'}"])
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / command.METRICS).read_text())
    assert result["checkpoint"]["clip"] == str(assets / "clip") and result["suites"]["okvqa"]["n"] == 15
    assert len(result["checkpoint"]["inputs"]["bart"]) > 2 and result["unfinished"] == []
    assert result["tower"] == "student"
