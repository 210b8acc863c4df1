"""Files as nobody would write them: each is read, or refused in one line that names it. Nothing else may happen."""

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from configs import suites
from vlkd_jax.data.sources import FolderPairs, TextLines
from vlkd_jax.errors import UserError
from vlkd_jax.evals import caption_suite, vqa_suite

EXAMPLES = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
TEXT = st.text(st.characters(), max_size=8)  # lone surrogates among them
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXT, st.sampled_from(["a.png", 1, "1", ""]))
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXT, inner, max_size=3)),
    max_leaves=6,
)
IMAGES = [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "b.png"}]
COCO = {"images": IMAGES, "annotations": [{"image_id": 1, "caption": "a red ball"}, {"image_id": 2, "caption": "b"}]}
QUESTIONS = {"questions": [{"question_id": k, "image_id": "a", "question": "what?"} for k in (1, 2)]}
ANSWERS = {"annotations": [{"question_id": k, "answers": [{"answer": "x"}] * 10} for k in (1, 2)]}
LINES = [{"image": "a.png", "caption": "a red ball"}, {"image": "b.png", "caption": "b"}]


@st.composite
def broken(draw, whole):
    """A JSON value with one or two places replaced by something else, or taken out."""
    value = json.loads(json.dumps(whole))
    for _ in range(draw(st.integers(1, 2))):
        places = list(_places(value))
        if not places:
            return draw(VALUES)
        parent, key = places[draw(st.integers(0, len(places) - 1))]
        if draw(st.booleans()):
            parent[key] = draw(VALUES)
        else:
            del parent[key]
    return value


def _places(value):
    """(container, key) of everything within a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items):
        yield value, key
        yield from _places(inner)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("fuzz")
    for name in ("a", "b"):
        Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(place / f"{name}.png")
    return place


def read_or_refuse(read, path):
    try:
        read()
    except UserError as e:
        assert path.name in str(e) or "config." in str(e), e


def items(name, **files):
    suite = suites.get_config(name)[name]
    suite.update({field: str(path) for field, path in files.items()})
    return lambda: list({"vqav2": vqa_suite.vqa_items, "coco_caption": caption_suite.caption_items}[name](suite))


@EXAMPLES
@given(value=broken(COCO))
def test_coco_captions(folder, value):
    path = folder / "c.json"
    path.write_text(json.dumps(value))
    read_or_refuse(lambda: FolderPairs(path, folder, 1.0), path)
    read_or_refuse(items("coco_caption", captions=path, images=folder), path)


@EXAMPLES
@given(values=st.lists(st.one_of(broken(LINES[0]), VALUES), max_size=3))
def test_jsonl_captions(folder, values):
    path = folder / "c.jsonl"
    path.write_text("\n".join(map(json.dumps, [*LINES, *values])))
    read_or_refuse(lambda: FolderPairs(path, folder, 1.0), path)
    read_or_refuse(items("coco_caption", captions=path, images=folder), path)


@EXAMPLES
@given(data=st.one_of(st.binary(max_size=60), TEXT.map(lambda text: text.encode("utf-8", "surrogatepass"))))
def test_any_bytes(folder, data):
    for suffix in (".json", ".jsonl", ".tsv", ".txt"):
        path = folder / f"bytes{suffix}"
        path.write_bytes(data)
        if suffix == ".txt":
            read_or_refuse(lambda path=path: TextLines(path), path)
            continue
        read_or_refuse(lambda path=path: FolderPairs(path, folder, 1.0), path)
        read_or_refuse(items("coco_caption", captions=path, images=folder), path)


@EXAMPLES
@given(questions=broken(QUESTIONS), answers=broken(ANSWERS), which=st.sampled_from(["questions", "answers", "both"]))
def test_questions_and_answers(folder, questions, answers, which):
    (folder / "q.json").write_text(json.dumps(QUESTIONS if which == "answers" else questions))
    (folder / "a.json").write_text(json.dumps(ANSWERS if which == "questions" else answers))
    suite = {"questions": folder / "q.json", "annotations": folder / "a.json", "images": folder}
    try:
        prompts = items("vqav2", image_name="{image_id}.png", **suite)()
    except UserError as e:
        assert ".json" in str(e) or "config." in str(e)
        return
    for prompt in prompts:  # what is let through can be scored
        row = prompt.row | {"raw": "x"}
        assert 0 <= vqa_suite.judge_answer(row)["score"] <= 1
