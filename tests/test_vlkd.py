"""`VLKD`, the student as its users hold it: pictures in any form, questions, captions, embeddings; and its refusals."""

import dataclasses
import functools
import http.server
import pydoc
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import jax
import numpy as np
import pytest
from PIL import Image
from tiny import IMAGE_SIZE, ROOT, environment, tiny_config, write_pictures

import vlkd_jax
from configs import suites
from vlkd_jax import predict
from vlkd_jax.data.sources import RecordError
from vlkd_jax.decoding import Decoding
from vlkd_jax.errors import UserError
from vlkd_jax.evals.runner import read_rows
from vlkd_jax.evaluate import evaluate, read_items
from vlkd_jax.train import train
from vlkd_jax.use.prompts import with_masks
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


def test_one_or_many(run, model):
    """One picture is a text, several are a list; one question is asked about all, one picture has all questions."""
    paths = [run / "images" / f"{name}.png" for name in "abc"]
    each = [model.answer(path, question) for path, question in zip(paths, QUESTIONS, strict=True)]
    assert model.answer(paths, QUESTIONS) == each and all(isinstance(answer, str) for answer in each)
    assert model.answer(paths[0], QUESTIONS) == [model.answer(paths[0], question) for question in QUESTIONS]
    assert model.answer(paths, QUESTIONS[0]) == [model.answer(path, QUESTIONS[0]) for path in paths]
    assert model.caption(paths) == [model.caption(path) for path in paths]
    array = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths])
    assert model.caption(array) == model.caption(paths)  # a batch of pictures
    assert model.embed_images(paths[0]).shape == model.embed_texts("a circle").shape == (1, 24)
    assert model.embed_images([]).shape == model.embed_texts([]).shape == (0, 24)
    with pytest.raises(UserError, match="3 pictures and 2 questions; give a question for each, or one of either"):
        model.answer(paths, QUESTIONS[:2])


def test_scores_and_options_by_name(run, model):
    """A text's score is the log-likelihood that it has among texts to choose from."""
    path = run / "images" / "a.png"
    best = model.answer(path, QUESTIONS[0], scores=True, method="beam", beams=3, returns=3, max_new_tokens=5)
    assert len(best) == 3 and all(score < 0 for _, score in best)
    texts = [text for text, _ in best if text]
    ranked = model.rank(path, texts, QUESTIONS[0])
    assert [score for _, score in ranked] == sorted((score for _, score in ranked), reverse=True)
    assert [text for text, _ in model.rank([path], texts, QUESTIONS)[0]] == [text for text, _ in ranked]
    plain = model.answer(path, QUESTIONS[0], method="beam", beams=3, returns=3, max_new_tokens=5)
    assert plain == [text for text, _ in best]
    drawn = [model.caption(path, method="sample", seed=seed, top_k=50) for seed in (0, 0, 1, 2, 3)]
    assert drawn[0] == drawn[1] and len(set(drawn)) > 1
    for options, told in (
        ({"beems": 3}, "no decoding option beems; did you mean beams"),
        ({"beams": 3}, "decoding option beams is not used by method='greedy'"),
        ({"method": "bream"}, "decoding.method is 'bream'"),
        ({"max_new_tokens": 0}, "decoding.max_new_tokens is 0"),
    ):
        with pytest.raises(UserError, match=told):
            model.caption(path, **options)


def test_ranking_by_cosine_and_texts_alone(run, model):
    path, texts = run / "images" / "a.png", ["a circle", "two squares", "nothing"]
    cosines = (model.embed_images(path) @ model.embed_texts(texts).T)[0]
    for ranked in (model.rank(path, texts), *model.rank([path, path], texts)):
        assert [text for text, _ in ranked] == [texts[k] for k in np.argsort(-cosines)]
        np.testing.assert_allclose([score for _, score in ranked], -np.sort(-cosines), atol=1e-5)
    for wrong in ([], ["", "a"]):
        with pytest.raises(UserError):
            model.rank(path, wrong, QUESTIONS[0])
    written = model.generate_text(["a red <mask>", "a {brace} </s> circle"], max_new_tokens=5)
    assert written == [
        model.generate_text(text, max_new_tokens=5) for text in ("a red <mask>", "a {brace} </s> circle")
    ]
    text = model.bart_text
    assert with_masks(text, "a <mask> b <mask>") == text.encode_template("a <mask> b <mask>")
    assert with_masks(text, "{x} </s>") == text.encode("{x} </s>") and text.eos not in with_masks(text, "</s>")


def test_where_an_answer_looked(run, model):
    """Every token's reading of the picture and of the text adds up to one; another picture, another map."""
    path, question = run / "images" / "a.png", QUESTIONS[0]
    answer = model.answer(path, question, max_new_tokens=4)
    told = model.attention(path, question, answer)
    side = model.teacher.config.vision.image_size // model.teacher.config.vision.patch_size
    assert told.patches.shape == (len(told.tokens), side, side) and told.tokens[-1] == "</s>"
    assert "".join(told.tokens[:-1]).replace(" ", "") == answer.replace(" ", "") != ""
    read = told.patches.sum((1, 2)) + told.whole
    assert (read > 0).all() and (read < 1).all() and (told.patches >= 0).all()
    assert told.seen.shape == (IMAGE_SIZE, IMAGE_SIZE, 3)
    other = model.attention(run / "images" / "b.png", question, answer)
    assert np.abs(other.patches - told.patches).max() > 1e-6
    assert len(model.attention(path, question, "").tokens) == 1


def test_a_lone_picture_is_a_batch_of_one(run, model, monkeypatch):
    """Not filled up to sixty-four: sizes are powers of two."""
    sizes = []
    batches = predict._batches

    def noted(model, requests, new_tokens, batch_size):
        sizes.append(batch_size)
        return batches(model, requests, new_tokens, batch_size)

    monkeypatch.setattr(predict, "_batches", noted)
    path = run / "images" / "a.png"
    for count in (1, 2, 3, 5, 0):
        assert len(model.caption([path] * count)) == count
    assert sizes == [1, 2, 4, 8, 1]


def test_threads_share_a_model(run, model):
    paths = [run / "images" / f"{name}.png" for name in "abc"]
    expected = [model.answer(path, question) for path in paths for question in QUESTIONS]
    asked = [(path, question) for path in paths for question in QUESTIONS]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            assert list(pool.map(lambda pair: model.answer(*pair), asked)) == expected


def test_saved_and_read_from_wherever_it_lies(run, model, tmp_path, monkeypatch):
    path = run / "images" / "a.png"
    model.save_pretrained(tmp_path / "export")
    for name in (tmp_path / "export", run / "runs" / "mine", str(run / "runs" / "mine")):
        other = VLKD.from_pretrained(name)
        assert other.answer(path, QUESTIONS) == model.answer(path, QUESTIONS)
    with pytest.raises(UserError, match="no export and no run of training there"):
        VLKD.from_pretrained(tmp_path)
    monkeypatch.setattr("vlkd_jax.hf.hub.snapshot", {"hf:me/mine": tmp_path / "export"}.__getitem__)
    assert VLKD.from_pretrained("hf:me/mine").caption(path) == model.caption(path)


def test_it_uploads_what_it_saves(model, monkeypatch):
    uploaded = {}

    class Api:
        def create_repo(self, name, private, exist_ok):
            uploaded["repository"] = (name, private, exist_ok)

        def upload_folder(self, repo_id, folder_path):
            uploaded["files"] = {path.name for path in Path(folder_path).iterdir()}
            return SimpleNamespace(repo_url=f"hub/{repo_id}")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert model.push_to_hub("me/mine") == "hub/me/mine"
    assert uploaded["repository"] == ("me/mine", True, True) and {"config.json", "bart"} <= uploaded["files"]

    def refused(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(Api, "create_repo", refused)
    with pytest.raises(UserError, match=r"me/mine: cannot be uploaded \(no network\); hf auth login"):
        model.push_to_hub("me/mine")


def test_pictures_from_the_network_only_where_asked(model, tmp_path, rng):
    """From a server here; what is no picture, too large, or not there is one line."""
    picture = rng.integers(0, 255, (20, 20, 3), np.uint8)
    Image.fromarray(picture).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("<html>")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        assert np.array_equal(np.asarray(vlkd_jax.fetch(f"{address}/a.png")), picture)
        with pytest.raises(RecordError, match=r"URLs are opened where asked only: vlkd_jax.fetch\(URL\)"):
            model.caption(f"{address}/a.png")
        for name, options, told in (
            ("b.png", {}, "does not decode"),
            ("c.png", {}, "File not found"),
            ("a.png", {"max_bytes": 100}, "more than 100 bytes"),
        ):
            with pytest.raises(RecordError, match=told):
                vlkd_jax.fetch(f"{address}/{name}", **options)
        server.shutdown()
    for url in ("file:///etc/passwd", "ftp://x/a.png", f"{address}/a.png"):
        with pytest.raises(RecordError):
            vlkd_jax.fetch(url, seconds=2)


def test_arrays_that_are_no_pictures(model):
    for array in (np.zeros((4, 4, 3)), np.zeros((4, 4, 4), np.uint8), np.zeros((0, 4, 3), np.uint8)):
        with pytest.raises(RecordError, match="is no picture; give uint8"):
            model.caption(array)


def test_help_and_a_quick_import():
    told = pydoc.render_doc(VLKD.answer, renderer=pydoc.plaintext)
    assert all(f.name in told for f in dataclasses.fields(Decoding))
    code = "import sys, vlkd_jax; assert 'jax' not in sys.modules; from vlkd_jax import VLKD, fetch; print(VLKD, fetch)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment()).returncode == 0


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
    with pytest.raises(UserError, match="this run trains a CLIP"):
        VLKD.from_run(tmp_path / "clip_contrastive")
    bart = VLKD.from_run(tmp_path / "bart_denoise")
    for use in (
        lambda: bart.answer([picture], ["what?"]),
        lambda: bart.embed_texts("a"),
        lambda: bart.rank(picture, "a"),
    ):
        with pytest.raises(UserError, match="bart_denoise: a text model, which reads no pictures; give a student"):
            use()


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
