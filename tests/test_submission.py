"""`vlkd submission`: what a server takes, and why it would reject the rest."""

import json

import pytest
from tiny import SHARED_DATA

from vlkd_jax.errors import UserError
from vlkd_jax.submission import submission

IDS = [30, 10, 20]


def write(path, value):
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


@pytest.fixture
def questions(tmp_path):
    entries = [{"question_id": k, "image_id": 1, "question": "why?"} for k in IDS]
    return write(tmp_path / "q.json", {"questions": entries})


def test_every_question_once_in_the_splits_order(tmp_path, questions):
    rows = [{"task": "vqa", "id": k, "raw": f"answer {k}"} for k in sorted(IDS)]
    rows[1] = {"task": "vqa", "id": 20, "fault": "gone", "unusable": "miss"}
    own = write(tmp_path / "predictions.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    expected = [{"question_id": 30, "answer": "answer 30"}, {"question_id": 10, "answer": "answer 10"}]
    assert submission("vqav2", own, questions) == [*expected, {"question_id": 20, "answer": ""}]
    assert (
        submission("okvqa", write(tmp_path / "up.json", submission("vqav2", own, questions)), questions)[:2] == expected
    )


def test_captions(tmp_path):
    images = write(tmp_path / "n.json", {"images": [{"id": k, "domain": "in-domain"} for k in IDS]})
    said = write(tmp_path / "r.json", [{"image_id": k, "caption": "a bus"} for k in (10, 20, 30)])
    assert submission("nocaps", said, images) == [{"image_id": k, "caption": "a bus"} for k in IDS]
    with pytest.raises(UserError, match=r"n\.json: no list 'images' with ids"):
        submission("nocaps", said, write(images, {"images": [1]}))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda r: r[:2], r"would be rejected: no prediction for question_id 20 \(1; .*q\.json has 3\)"),
        (lambda r: [*r, {"question_id": 9, "answer": "x"}], r"would be rejected: not of the split: question_id 9 "),
        (lambda r: [*r, r[0]], "30 has a prediction already"),
        (lambda r: [dict(r[0], question_id="30"), *r[1:]], r"question_id '30' is not a whole number \(1 of 3\)"),
        (lambda r: [dict(r[0], question_id=True), *r[1:]], "the id True is neither"),
        (lambda r: [dict(r[0], question_id=30.0), *r[1:]], "the id 30.0 is neither"),
        (lambda r: [dict(r[0], answer=2), *r[1:]], "the prediction 2 is not a text"),
        (lambda r: {"results": r}, "not a list"),
    ],
)
def test_why_a_file_would_be_rejected(tmp_path, questions, change, told):
    entries = [{"question_id": k, "answer": "x"} for k in IDS]
    with pytest.raises(UserError, match=told) as error:
        submission("vqav2", write(tmp_path / "r.json", change(entries)), questions)
    assert str(tmp_path) in str(error.value)


@pytest.mark.shared_data
def test_a_real_split(tmp_path):
    questions = SHARED_DATA / "okvqa" / "OpenEnded_mscoco_val2014_questions.json.gz"
    import gzip

    ids = [entry["question_id"] for entry in json.loads(gzip.decompress(questions.read_bytes()))["questions"]]
    said = write(tmp_path / "r.json", [{"question_id": k, "answer": "yes"} for k in sorted(ids)])
    entries = submission("okvqa", said, questions)
    assert [entry["question_id"] for entry in entries] == ids and len(ids) == 5046
