"""The suites for a user's pictures: questions meet their own picture and answers, captions their own references."""

import json
import types

import numpy as np
import pytest
from PIL import Image

from configs import suites
from vlkd_jax import predict
from vlkd_jax.data.text import BartText
from vlkd_jax.evals import official, statistics
from vlkd_jax.evals.suite import predict_rows

SIDE = 8
SHADES = {7: 20, 3: 60, 11: 100, 5: 140, 2: 180, 9: 220}
"""Image id -> the grey of its picture, by which the model below knows it."""


@pytest.fixture(autouse=True)
def quick_intervals(monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 20)


@pytest.fixture
def folder(tmp_path):
    """Plain pictures, named as the suites' template says."""
    for image, shade in SHADES.items():
        Image.new("RGB", (SIDE, SIDE), (shade,) * 3).save(tmp_path / f"v_{image:04d}.png")
    return tmp_path


def run(monkeypatch, assets, kind, suite, speak):
    """(metrics, rows) of a model that says `speak(image id, prompt)`: the picture is known by its shade alone."""
    text, by_shade = BartText(assets / "bart"), {shade: image for image, shade in SHADES.items()}

    def generate(model, requests, max_new_tokens, batch_size):
        for request in requests:
            prompt = text.decode(request.prefix)
            assert text.decode(request.source) == prompt  # but for the mask, which is not read out
            assert request.source.count(text.mask) == 1
            yield speak(by_shade[round(np.asarray(request.image).mean())], prompt)

    monkeypatch.setattr(predict, "generate", generate)
    rows = list(predict_rows(kind, suite, types.SimpleNamespace(bart_text=text), 4))
    return kind.score(rows), rows


def questions(rng):
    """(question id, image id, question, answer): several a picture, the same question about several, all shuffled."""
    rows = [(100 * image + k, image, f"is it {k}?", f"{image} {k}") for image in SHADES for k in range(1, 4)]
    ids = rng.permutation([row[0] for row in rows])
    rows = [(int(new), *row[1:]) for new, row in zip(ids, rows)]  # ids say nothing about pictures
    return [rows[k] for k in rng.permutation(len(rows))]


def test_questions_meet_their_picture_and_their_answers(folder, assets, rng, monkeypatch):
    """Questions, annotations and file names are each in an order of their own."""
    rows = questions(rng)
    asked = [{"question_id": number, "image_id": image, "question": text} for number, image, text, _ in rows]
    answered = [
        {"question_id": number, "image_id": image, "answers": [{"answer": answer}] * 10}
        for number, image, _, answer in (rows[k] for k in rng.permutation(len(rows)))
    ]
    (folder / "q.json").write_text(json.dumps({"questions": asked}))
    (folder / "a.json").write_text(json.dumps({"annotations": answered}))
    suite = suites.get_config("vqav2").vqav2
    suite.update({"questions": str(folder / "q.json"), "annotations": str(folder / "a.json"), "images": str(folder)})
    suite.image_name = "v_{image_id:04d}.png"

    def speak(image, prompt):
        return f"{image} {prompt.removeprefix('question: is it ').removesuffix('? answer:')}"

    metrics, answered_rows = run(monkeypatch, assets, official.VQA, suite, speak)
    assert metrics["overall"] == 1 and metrics["n"] == len(rows)
    expected = [(number, f"v_{image:04d}.png", f"question: {text} answer:", said) for number, image, text, said in rows]
    assert sorted((row["id"], row["image"], row["prompt"], row["raw"]) for row in answered_rows) == sorted(expected)
    assert all(row["answers"] == [row["raw"]] * 10 and row["score"] == 1 for row in answered_rows)
    wrong, _ = run(monkeypatch, assets, official.VQA, suite, lambda image, prompt: speak(3, prompt))
    assert wrong["overall"] == pytest.approx(1 / len(SHADES))


def test_captions_meet_their_references(folder, assets, rng, monkeypatch):
    """The captions of a picture lie apart in the file, among those of others; one reference is right."""
    words = dict(zip(SHADES, ("red", "green", "blue", "cyan", "pink", "white")))
    pairs = [(image, f"{word} number {k}") for image, word in words.items() for k in range(3)]
    pairs = [pairs[k] for k in rng.permutation(len(pairs))]
    lines = [{"image": f"v_{image:04d}.png", "caption": caption} for image, caption in pairs]
    (folder / "c.jsonl").write_text("\n".join(map(json.dumps, lines)))
    suite = suites.get_config("coco_caption").coco_caption
    suite.update({"captions": str(folder / "c.jsonl"), "images": str(folder)})
    metrics, rows = run(monkeypatch, assets, official.CAPTION, suite, lambda image, _: f"{words[image]} number 2")
    assert metrics["word_f1"] == 1 and metrics["distinct"] == 1 and metrics["n"] == len(SHADES)
    assert [row["image"] for row in rows] == list(dict.fromkeys(line["image"] for line in lines))
    for row in rows:
        references = [line["caption"] for line in lines if line["image"] == row["image"]]
        assert row["answers"] == references and row["raw"] in references and row["id"] == row["image"]
