"""`VLKD`, the student as its users hold it: pictures in any form, questions, captions, embeddings; and its refusals."""

import re

import jax
import numpy as np
import pytest
from PIL import Image
from tiny import IMAGE_SIZE, ROOT, tiny_config, write_pictures

from configs import suites
from vlkd_jax.data.sources import RecordError
from vlkd_jax.errors import UserError
from vlkd_jax.evals.runner import read_rows
from vlkd_jax.evaluate import evaluate, read_items
from vlkd_jax.train import train
from vlkd_jax.vlkd import VLKD

QUESTIONS = ["what color is the circle?", "is there a square?", "how many objects are there?"]


@pytest.fixture(scope="module")
def run(assets, tmp_path_factory):
    """A folder with runs/mine, a short run at a high rate, and images/."""
    place = tmp_path_factory.mktemp("vlkd")
    lines = write_pictures(place / "images", 3)
    for name, line in zip("abc", lines, strict=True):
        (place / "images" / line.split("\t")[0]).rename(place / "images" / f"{name}.png")
    train(tiny_config(assets, steps=3, optim__lr=1e-2), place / "runs" / "mine")
    return place


@pytest.fixture(scope="module")
def model(run):
    return VLKD.from_run(run / "runs" / "mine")


def test_a_picture_is_the_same_in_every_form(run, model):
    paths = [run / "images" / f"{name}.png" for name in "abc"]
    opened = [Image.open(path) for path in paths]
    arrays = [np.asarray(image.convert("RGB")) for image in opened]
    answers = model.answer(paths, QUESTIONS)
    assert len(answers) == 3 and all(isinstance(answer, str) for answer in answers)
    vectors = model.embed_images(paths)
    for images in ([*map(str, paths)], opened, arrays):
        assert model.answer(images, QUESTIONS) == answers
        assert model.caption(images) == model.caption(paths)
        np.testing.assert_array_equal(model.embed_images(images), vectors)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert model.answer([], []) == model.caption([]) == []


def test_transparency_lies_on_white_in_every_form(rng, model, tmp_path):
    picture = Image.fromarray(rng.integers(0, 255, (30, 30, 4), np.uint8), "RGBA")
    picture.save(tmp_path / "clear.png")
    np.testing.assert_array_equal(model.embed_images([picture]), model.embed_images([tmp_path / "clear.png"]))


def test_it_is_the_trained_one_and_says_so(run, model):
    start = VLKD.from_run(run / "runs" / "mine", at_start=True)
    assert model.identity["step"] == 3 and start.identity["step"] == 0
    assert model.identity["inputs"] == start.identity["inputs"]
    same = jax.tree.map(lambda a, b: bool((a == b).all()), model.params["bart"], start.params["bart"])
    assert same.pop("final_logits_bias") and not any(jax.tree.leaves(same))
    same = jax.tree.map(lambda a, b: bool((a == b).all()), model.clip_params, start.clip_params)
    assert all(jax.tree.leaves(same))


def test_refusals(assets, run, model, tmp_path):
    picture = np.zeros((IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    with pytest.raises(UserError, match=r"a prompt has .* tokens, there is room for"):
        model.answer([picture], ["is there a circle " * 40])
    (tmp_path / "broken.png").write_bytes(b"no picture")
    for path in (tmp_path / "broken.png", tmp_path / "missing.png"):
        with pytest.raises(RecordError, match=path.name):
            model.caption([path])
    with pytest.raises(UserError, match=r"no config.json there; it is no --workdir of a training run"):
        VLKD.from_run(tmp_path / "nothing")
    for objective, source in (("clip_contrastive", "shapes"), ("bart_denoise", "shapes_texts")):
        train(tiny_config(assets, steps=1, objective=objective, data__source=source), tmp_path / objective)
        with pytest.raises(UserError, match="trains no student; give a run of objective vlkd"):
            VLKD.from_run(tmp_path / objective)


def test_before_is_an_evaluation_of_the_start(run, model, tmp_path):
    """The same items, its own rows on disk, and the figures that those rows alone give."""
    start = VLKD.from_run(run / "runs" / "mine", at_start=True)
    config = suites.get_config("shapes")
    config.shapes.update({"questions": 14, "captions": 4, "retrieval": 4, "text_questions": 7, "baselines": True})
    results = dict(evaluate(config, read_items(config), model, tmp_path / "both", start))["shapes"]
    config.shapes.baselines = False
    alone = dict(evaluate(config, read_items(config), start, tmp_path / "start"))["shapes"]
    told = results["before"].keys() - {"seconds", "programs"}
    assert {name: results["before"][name] for name in told} == {name: alone[name] for name in told}
    before, after = read_rows(tmp_path / "both" / "before" / "shapes"), read_rows(tmp_path / "both" / "shapes")
    assert before == read_rows(tmp_path / "start" / "shapes")
    asked = [(row["task"], row["id"]) for row in after if row["task"] != "vqa_blind"]
    assert asked == [(row["task"], row["id"]) for row in before] and len(after) == len(before) + 14


def test_what_the_readme_shows(run, monkeypatch):
    code = re.search(r"In Python the student is one object.*?\n\n(.*?)\n\n[^ ]", (ROOT / "README.md").read_text(), re.S)
    for name in "ab":
        Image.open(run / "images" / f"{name}.png").convert("RGB").save(run / "images" / f"{name}.jpg")
    monkeypatch.chdir(run)
    exec("\n".join(line[4:] for line in code[1].splitlines()), {})
