"""The suites for a user's pictures: questions meet their own picture and answers, captions their own references."""

import dataclasses
import json
import re
import types

import numpy as np
import pytest
from PIL import Image
from tiny import SHARED_DATA

from configs import suites
from vlkd_jax import predict
from vlkd_jax.data.text import BartText
from vlkd_jax.errors import UserError
from vlkd_jax.evals import caption_suite, statistics, vqa_suite
from vlkd_jax.evals.runner import read_rows
from vlkd_jax.evals.suite import predict_rows
from vlkd_jax.evaluate import check_left_out, evaluate, read_items

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

    def generate(model, requests, decoding, batch_size):
        for request in requests:
            prompt = text.decode(request.prefix)
            assert text.decode(request.source) == prompt  # but for the mask, which is not read out
            assert request.source.count(text.mask) == 1
            yield (speak(by_shade[round(np.asarray(request.image).mean())], prompt),)

    monkeypatch.setattr(predict, "generate", generate)
    rows = list(predict_rows(kind, kind.items(suite), types.SimpleNamespace(bart_text=text), 4))
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

    metrics, answered_rows = run(monkeypatch, assets, vqa_suite.SUITE, suite, speak)
    assert metrics["overall"] == 1 and metrics["n"] == len(rows)
    expected = [(number, f"v_{image:04d}.png", f"question: {text} answer:", said) for number, image, text, said in rows]
    assert sorted((row["id"], row["image"], row["prompt"], row["raw"]) for row in answered_rows) == sorted(expected)
    assert all(row["answers"] == [row["raw"]] * 10 and row["score"] == 1 for row in answered_rows)
    wrong, _ = run(monkeypatch, assets, vqa_suite.SUITE, suite, lambda image, prompt: speak(3, prompt))
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
    metrics, rows = run(monkeypatch, assets, caption_suite.SUITE, suite, lambda image, _: f"{words[image]} number 2")
    assert metrics["word_f1"] == 1 and metrics["distinct"] == 1 and metrics["n"] == len(SHADES)
    assert [row["image"] for row in rows] == list(dict.fromkeys(line["image"] for line in lines))
    for row in rows:
        references = [line["caption"] for line in lines if line["image"] == row["image"]]
        assert row["answers"] == references and row["raw"] in references and row["id"] == row["image"]


def official_files(folder, change=lambda questions, annotations: None):
    """A vqav2 suite of one question for each picture; `change` edits the two lists before they are written."""
    asked = [{"question_id": 10 * image, "image_id": image, "question": f"is it {image}?"} for image in SHADES]
    answered = [{"question_id": 10 * image, "answers": [{"answer": f"{image} a"}] * 10} for image in SHADES]
    change(asked, answered)
    (folder / "q.json").write_text(json.dumps({"questions": asked}))
    (folder / "a.json").write_text(json.dumps({"annotations": answered}))
    suite = suites.get_config("vqav2").vqav2
    suite.update({"questions": str(folder / "q.json"), "annotations": str(folder / "a.json"), "images": str(folder)})
    suite.image_name = "v_{image_id:04d}.png"
    return suite


def answers(*given):
    def change(_, annotations):
        annotations[1]["answers"] = list(given)

    return change


FAULTS = {
    "a question twice": (lambda q, a: q.append(dict(q[2])), r"q\.json: question_id 110 occurs twice in questions"),
    "an annotation twice": (lambda q, a: a.append(dict(a[2])), r"a\.json: question_id 110 occurs twice in annotations"),
    "a number": (answers(*[{"answer": "x"}] * 9, {"answer": 2}), "question 30: answers are {'answer': 2}"),
    "null": (answers(*[{"answer": "x"}] * 9, {"answer": None}), "question 30: answers are {'answer': None}"),
    "bare texts": (answers(*["x"] * 10), "question 30: answers are 'x'"),
    "no answers": (answers(), "question 30: answers are none"),
    "one human": (answers({"answer": "x"}), r"question 30 has 1 human answer.*metric=exact_match"),
    "nine humans": (answers(*[{"answer": "x"}] * 9), "question 30 has 9 human answer"),
    "no annotation": (lambda q, a: a.pop(0), r"a\.json: no answers for question 70 \(1 of 6.*annotations=none"),
    "no text": (lambda q, a: q[1].update(question=5), r"q\.json: question 30: field question is not a text"),
    "no field": (lambda q, a: q[1].pop("image_id"), r"q\.json: questions\[1\] has no field image_id"),
    "another kind of id": (lambda q, a: q[1].update(image_id="x"), "image_name .* does not fit image_id 'x'"),
    "no such picture": (
        lambda q, a: [x.update(image_id=77) for x in q[1:3]],
        r"q\.json: .*v_0077\.png: image file not found.* \(1 of 5 .*config\.vqav2\.max_unusable is 0\)",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_a_score_needs_is_checked_before_anything_is_asked(folder, fault):
    change, message = FAULTS[fault]
    with pytest.raises(UserError, match=message):
        next(iter(vqa_suite.vqa_items(official_files(folder, change))))


@pytest.mark.parametrize("count", [1, 2, 3, 9])
def test_few_humans_are_scored_by_exact_match(folder, assets, monkeypatch, count):
    """A right answer is right however many there are; wrong is wrong."""
    suite = official_files(folder, lambda q, a: [x.update(answers=x["answers"][:count]) for x in a])
    suite.metric = "exact_match"
    metrics, _ = run(
        monkeypatch, assets, vqa_suite.SUITE, suite, lambda image, _: f"The {image}." if image != 3 else "no"
    )
    assert metrics["overall"] == pytest.approx(5 / 6) and metrics["metric"] == "exact_match"


def test_what_is_told_of_files_of_two_splits(folder):
    suite = official_files(folder)
    for name, split in (("q", "val2014"), ("a", "train2014")):
        data = json.loads((folder / f"{name}.json").read_text()) | {"data_subtype": split}
        (folder / f"{name}.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match=r"a\.json: data_subtype is 'train2014', and 'val2014' in .*q\.json"):
        next(iter(vqa_suite.vqa_items(suite)))


def test_every_missing_file_is_named_at_once(folder):
    suite = suites.get_config("okvqa").okvqa
    suite.root = str(folder)
    names = ("OpenEnded_mscoco_val2014_questions.json", "mscoco_val2014_annotations.json", "val2014")
    with pytest.raises(UserError, match=".*".join(map(re.escape, names))):
        next(iter(vqa_suite.vqa_items(suite)))


def test_fewer_than_ten_answers_are_scored_only_where_it_is_said(folder, assets, monkeypatch, capsys):
    suite = official_files(folder, lambda q, a: a[1].update(answers=a[1]["answers"][:5]))
    suite.answers_needed = 5
    metrics, _ = run(monkeypatch, assets, vqa_suite.SUITE, suite, lambda image, _: f"{image} a")
    assert metrics["other_than_ten"] == 1 and metrics["overall"] == 1
    assert "1 of 6 questions have other than 10 answers" in capsys.readouterr().out
    suite.answers_needed = 3
    with pytest.raises(UserError, match="answers_needed is 3; it must be from 4 to 10"):
        next(iter(vqa_suite.vqa_items(suite)))


def test_a_damaged_picture_counts_as_a_miss_where_it_is_said(folder, assets, monkeypatch):
    suite = official_files(folder)
    suite.unusable = "miss"
    items = list(vqa_suite.vqa_items(suite))
    (folder / "v_0003.png").write_bytes(b"no picture")
    kind = dataclasses.replace(vqa_suite.SUITE, items=lambda _: items)
    metrics, rows = run(monkeypatch, assets, kind, suite, lambda image, _: f"{image} a")
    assert metrics["n"] == 6 and metrics["overall"] == pytest.approx(5 / 6)
    assert [row["score"] for row in rows if "fault" in row] == [0.0]


@pytest.mark.parametrize("form", ["lines", "list", "annotations"])
def test_answers_to_choose_from(folder, form):
    suite = official_files(folder)
    given = {
        "lines": ("c.txt", "yes\nno\n\nyes\n two \n"),
        "list": ("c.json", json.dumps(["yes", "no", "yes ", "two"])),
        "annotations": (
            "c.json",
            json.dumps(
                {
                    "annotations": [
                        {"question_id": k, "answers": [{"answer": "x"}] * 10, "multiple_choice_answer": answer}
                        for k, answer in enumerate(["no", "yes", "two", "yes", "no", "yes", "rare"])
                    ]
                }
            ),
        ),
    }[form]
    (folder / given[0]).write_text(given[1])
    suite.update({"answers": str(folder / given[0]), "answers_top": 3})
    candidates = next(iter(vqa_suite.vqa_items(suite))).candidates
    assert candidates == (("yes", "no", "rare") if form == "annotations" else ("yes", "no", "two"))
    suite.answers = suite.annotations
    with pytest.raises(UserError, match="answers is the file of the answers to be scored"):
        next(iter(vqa_suite.vqa_items(suite)))


class Model:
    """Answers a question about picture k with `k`; `fails_after` answers its computer is switched off."""

    def __init__(self, assets, monkeypatch, fails_after=None):
        self.bart_text, self.fails_after, self.identity = BartText(assets / "bart"), fails_after, {}
        config = types.SimpleNamespace(max_position_embeddings=64, decoder_start_token_id=2)
        self.bart = types.SimpleNamespace(config=config, dtype=np.float32)
        monkeypatch.setattr(predict, "generate", self.generate)

    def needs_pictures(self):
        """It reads them."""

    def generate(self, model, requests, decoding, batch_size):
        by_shade = {shade: image for image, shade in SHADES.items()}
        for count, request in enumerate(requests):
            if count == self.fails_after:
                raise RuntimeError("switched off")
            yield (f"{by_shade[round(np.asarray(request.image).mean())]} a",)


def evaluated(config, model, workdir):
    return dict(evaluate(config, read_items(config), model, workdir))


def config_of(**chosen):
    config = suites.get_config(",".join(chosen))
    for name, suite in chosen.items():
        config[name].update(suite if isinstance(suite, dict) else suite.to_dict())
    return config


def test_rows_are_on_disk_as_they_are_computed(folder, assets, monkeypatch, tmp_path_factory):
    """What ends an evaluation midway takes nothing of what was done: neither rows, nor the suites before."""
    out = tmp_path_factory.mktemp("out")
    config = config_of(vqav2=official_files(folder))
    with pytest.raises(RuntimeError, match="switched off"):
        evaluated(config, Model(assets, monkeypatch, fails_after=4), out)
    part = [json.loads(line) for line in (out / "vqav2" / "predictions.jsonl.part").read_text().splitlines()]
    assert len(part) == 4 and all(row["score"] == 1 for row in part)
    metrics = evaluated(config, Model(assets, monkeypatch), out)["vqav2"]
    assert metrics["overall"] == 1 and len(read_rows(out / "vqav2")) == 6
    assert not (out / "vqav2" / "predictions.jsonl.part").exists()


def test_half_an_emoji_in_a_question_costs_nothing(folder, assets, monkeypatch, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    config = config_of(vqav2=official_files(folder, lambda q, a: q[1].update(question="what is \ud83d ?")))
    metrics = evaluated(config, Model(assets, monkeypatch), out)["vqav2"]
    assert metrics["escaped"] == 1 and metrics["overall"] == 1 and metrics["n"] == 6
    assert [row["prompt"] for row in read_rows(out / "vqav2") if row["id"] == 30] == [
        "question: what is \ud83d ? answer:"
    ]


def test_without_annotations_questions_are_answered_for_the_server(folder, assets, monkeypatch, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    suite = official_files(folder)
    suite.annotations = "none"
    metrics = evaluated(config_of(vqav2=suite), Model(assets, monkeypatch), out)["vqav2"]
    assert metrics["unscored"] == 6 and "overall" not in metrics
    results = json.loads((out / "vqav2" / "results.json").read_text())
    expected = [{"question_id": 10 * image, "answer": f"{image} a"} for image in sorted(SHADES)]
    assert sorted(results, key=lambda entry: entry["question_id"]) == expected


@pytest.mark.parametrize("form", ["images alone", "some captions", "folder"])
def test_pictures_without_references_are_captioned(folder, assets, monkeypatch, tmp_path_factory, form):
    out = tmp_path_factory.mktemp("out")
    images = [{"id": 1000 + image, "file_name": f"v_{image:04d}.png"} for image in SHADES]
    data = {"images": images} | ({"annotations": [{"image_id": 1003, "caption": "3 a"}]} if form[0] == "s" else {})
    (folder / "c.json").write_text(json.dumps(data))
    suite = {"captions": "none" if form == "folder" else str(folder / "c.json"), "images": str(folder)}
    metrics = evaluated(config_of(coco_caption=suite), Model(assets, monkeypatch), out)["coco_caption"]
    assert metrics["unscored"] == 5 + (form != "some captions")
    assert metrics.get("word_f1") == (1 if form == "some captions" else None)
    name = (lambda image: f"v_{image:04d}.png") if form == "folder" else (lambda image: 1000 + image)
    expected = {name(image): f"{image} a" for image in SHADES}
    results = json.loads((out / "coco_caption" / "results.json").read_text())
    assert {entry["image_id"]: entry["caption"] for entry in results} == expected and len(results) == 6


def test_captions_that_cannot_be_used_are_told_with_the_suites_own_limit(folder):
    """An entry without its caption and one without its picture; allowed, the first is no reference."""
    names = [f"v_{image:04d}.png" for image in SHADES]
    lines = [*({"image": name, "caption": "fine"} for name in names), {"image": names[0], "caption": " "}]
    (folder / "c.jsonl").write_text("\n".join(map(json.dumps, [*lines, {"image": "gone.png", "caption": "x"}])))
    config = config_of(coco_caption={"captions": str(folder / "c.jsonl"), "images": str(folder)})
    told = r"caption empty 1, image not found 1: .*\(2 of 8 records .*, config\.coco_caption\.max_unusable is 0\)"
    with pytest.raises(UserError, match=told):
        read_items(config)
    config.coco_caption.max_unusable = 0.3
    rows = [item.row for item in read_items(config)["coco_caption"]]
    assert [(row["image"], row["answers"]) for row in rows] == [*((n, ["fine"]) for n in names), ("gone.png", ["x"])]


def test_a_picture_that_proves_damaged_is_left_out_and_told(folder, assets, monkeypatch, tmp_path_factory):
    """Its header and end are good; the others are answered, the server's file has every question."""
    out, path = tmp_path_factory.mktemp("out"), folder / "v_0003.png"
    config = config_of(vqav2=official_files(folder))
    data = path.read_bytes()
    path.write_bytes(data[:45] + bytes(8) + data[53:])
    metrics = evaluated(config, Model(assets, monkeypatch), out)["vqav2"]
    assert metrics["n"] == 5 and metrics["overall"] == 1 and metrics["left_out"] == {"image does not decode": 1}
    results = json.loads((out / "vqav2" / "results.json").read_text())
    assert {"question_id": 30, "answer": ""} in results and len(results) == 6
    with pytest.raises(UserError, match=r"vqav2: 1 items are left out .*image does not decode 1.*max_unusable is 0"):
        check_left_out({"vqav2": metrics})
    metrics["suite"]["max_unusable"] = 0.2
    check_left_out({"vqav2": metrics})


@pytest.mark.shared_data
def test_cases():
    """Files of the kinds that people report."""
    cases, images = SHARED_DATA / "cases", str(SHARED_DATA / "coco_open" / "images")

    def vqa(questions, annotations, **fields):
        files = {"questions": str(cases / questions), "annotations": str(cases / annotations), "images": images}
        return len(read_items(config_of(vqav2=files | fields))["vqav2"])

    def captions(name):
        items = read_items(config_of(coco_caption={"captions": str(cases / name), "images": images}))["coco_caption"]
        return [(item.row["image"], [" ".join(text.split()) for text in item.row["answers"]]) for item in items]

    assert vqa("q.json", "a.json") == vqa("q_surrogate.json", "a.json") == 8
    assert vqa("q.json", "a_one.json", metric="exact_match") == 8
    for files in (("q_dup.json", "a.json"), ("q.json", "a_dup.json")):
        with pytest.raises(UserError, match="question_id 790001 occurs twice"):
            vqa(*files)
    for name in ("a_int.json", "a_null.json", "a_strings.json", "a_one.json"):
        with pytest.raises(UserError, match="question 790001"):
            vqa("q.json", name)
    plain = captions("small.json")
    assert captions("bom.json") == captions("bom.jsonl") == captions("bom.tsv") == plain
    assert [image for image, _ in captions("images_only.json")] == [image for image, _ in plain]
    assert len(captions("surrogate.json")) == 8
    with pytest.raises(UserError, match="image id 1 names two files"):
        captions("duplicate_ids.json")
