"""`vlkd caption`, `vlkd ask`, `vlkd embed`: what they say is what the class says, and a mistake is one line."""

import json

import numpy as np
import pytest
from tiny import command_line, tiny_config, write_pictures

from vlkd_jax.errors import UserError
from vlkd_jax.train import train
from vlkd_jax.use.arguments import sort_arguments
from vlkd_jax.vlkd import VLKD

QUESTIONS = ["is there a square?", "what color is it?"]


@pytest.fixture(scope="module")
def place(assets, tmp_path_factory):
    """A folder with run/ and two pictures, one with a space in its name."""
    place = tmp_path_factory.mktemp("use")
    train(tiny_config(assets, steps=2, optim__lr=1e-2), place / "run")
    write_pictures(place, 2)
    (place / "1.png").rename(place / "a b.png")
    return place


@pytest.fixture(scope="module")
def model(place):
    return VLKD.from_run(place / "run")


def use(command, place, *arguments):
    done = command_line(f"use.{command}", [*map(str, arguments), f"--model={place / 'run'}"])
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_captions(place, model):
    pictures = [place / "0.png", place / "a b.png"]
    captions = model.caption(pictures)
    said = use("caption", place, *pictures).splitlines()
    assert said == [f"{picture}: {caption}" for picture, caption in zip(pictures, captions, strict=True)]
    told = json.loads(use("caption", place, *pictures, "--method=beam", "--beams=2", "--returns=2", "--json"))
    expected = model.caption(pictures, method="beam", beams=2, returns=2, scores=True)
    assert [[caption["text"] for caption in row["captions"]] for row in told] == [[s.text for s in e] for e in expected]
    scores = [caption["score"] for row in told for caption in row["captions"]]
    np.testing.assert_allclose(scores, [s.score for e in expected for s in e], atol=1e-4)


def test_answers(place, model):
    picture = place / "a b.png"
    assert use("ask", place, picture, QUESTIONS[0]) == model.answer(picture, QUESTIONS[0]) + "\n"
    told = json.loads(use("ask", place, QUESTIONS[0], picture, QUESTIONS[1], "--json"))
    assert [(row["question"], row["answers"][0]["text"]) for row in told] == [
        (question, model.answer(picture, question)) for question in QUESTIONS
    ]
    (row,) = json.loads(use("ask", place, picture, QUESTIONS[0], "--choices=yes, no,two", "--json"))
    ranked = model.rank(picture, ["yes", "no", "two"], QUESTIONS[0])
    assert [answer["text"] for answer in row["answers"]] == [text for text, _ in ranked]


def test_embeddings(place, model, tmp_path):
    pictures, texts = [place / "0.png", place / "a b.png"], ["a red circle"]
    expected = np.concatenate([model.embed_images(pictures), model.embed_texts(texts)])
    rows = [json.loads(line) for line in use("embed", place, *pictures, *texts).splitlines()]
    assert [row["input"] for row in rows] == [*map(str, pictures), *texts]
    np.testing.assert_allclose([row["embedding"] for row in rows], expected, atol=1e-5)
    use("embed", place, *pictures, *texts, f"--output={tmp_path / 'e.npz'}")
    saved = np.load(tmp_path / "e.npz", allow_pickle=False)
    assert saved["names"].tolist() == [*map(str, pictures), *texts]
    np.testing.assert_allclose(saved["embeddings"], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("command", "arguments", "told"),
    [
        ("caption", ["--model=x"], "Missing argument 'IMG...'."),
        ("caption", ["0.png", "--model=nowhere"], "nowhere: no export and no run of training there"),
        ("ask", ["is it?", "--model=x"], "no picture given; for example: vlkd ask photo.jpg"),
        ("ask", ["gone.png", "is it?", "--model=x"], "gone.png: no such picture"),
        ("embed", ["a", "--model=x", "--output=e.txt"], "--output=e.txt: embeddings are written as .npz"),
    ],
)
def test_mistakes(place, monkeypatch, command, arguments, told):
    arguments = [str(place / "0.png") if argument == "0.png" else argument for argument in arguments]
    done = command_line(f"use.{command}", arguments)
    assert done.returncode == 2 and done.stderr.startswith(f"error: {told}") and done.stderr.count("\n") == 1


def test_what_is_a_picture(place):
    long = "is there a circle? " * 1000
    assert sort_arguments([str(place / "0.png"), "a.b?", long]) == ([place / "0.png"], ["a.b?", long])
    for argument, told in ((str(place), "a folder; name its pictures"), ("gone.JPG", "no such picture")):
        with pytest.raises(UserError, match=told):
            sort_arguments([argument])
