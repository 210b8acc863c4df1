"""The suite of the built-in world on a tiny student: an oracle scores 1, a guesser scores what guessing scores."""

import json
from collections import defaultdict

import numpy as np
import pytest
from tiny import make_assets, tiny_config

from vlkd_jax.configs import suites
from vlkd_jax.data.images import normalize_pixels, resize_and_crop
from vlkd_jax.distill import make_objective
from vlkd_jax.errors import UserError
from vlkd_jax.evals import statistics
from vlkd_jax.predict import Predictor
from vlkd_jax.shapes import world
from vlkd_jax.shapes.suite import ShapesSuite

KEYS = {"task", "id", "image", "prompt", "raw", "normalised", "answers", "score"}


@pytest.fixture(scope="module", autouse=True)
def quick_intervals():
    """Fewer resamples: the intervals themselves are tested elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, "RESAMPLES", 100)
        yield


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """(predictor, parameters) of a tiny student as it starts."""
    config = tiny_config(make_assets(tmp_path_factory.getbasetemp()))
    objective = make_objective(config)
    return Predictor(objective, config.student.image_tokens, batch_size=16), objective.params


def small_suite(**changes):
    suite = suites.get_config("shapes").shapes
    suite.update({"seed": 5, "questions": 70, "captions": 12, "retrieval": 30, "text_questions": 42} | changes)
    return suite


@pytest.fixture(scope="module")
def runner(start):
    return ShapesSuite(small_suite(), start[0])


def answer_with(runner, monkeypatch, choose):
    """Makes the predictor give `choose(question)` and perfect captions; returns the image tokens each call was given.

    Which question is asked is read from the ids, so prompts that reach the model garbled do not find their answer.
    """
    suite, text = runner.suite, runner.predictor.text
    about = {(index, question.question): question for index, _, question in runner.questions}
    written = {}
    for index, scene, question in world.question_set(suite.seed, suite.split, suite.text_questions):
        description = world.caption(scene, world.generator(suite.seed, suite.split, index, 5), complete=1.0)
        written[description, question.question] = question
    given = []

    def generate(params, sources, prefixes, max_new_tokens, image_tokens=None, image_of=None, contexts=None):
        given.append(image_tokens)
        prompts = [text.decode(ids) for ids in prefixes]
        assert all(ids.count(text.mask) == 1 for ids in sources)
        if prompts[0] == "a picture of":
            assert len(image_tokens) == len(sources)
            scenes = [world.make_scene(suite.seed, suite.split, k) for k in range(len(sources))]
            return [" and ".join("a {} {} {} at {}".format(*t.attributes) for t in scene.things) for scene in scenes]
        assert [text.decode(ids) for ids in sources] == prompts  # but for the mask
        questions = [prompt.removeprefix("question: ").removesuffix(" answer:") for prompt in prompts]
        if contexts is not None:
            return [choose(written[pair]) for pair in zip(map(text.decode, contexts), questions, strict=True)]
        return [choose(about[pair]) for pair in zip(image_of, questions, strict=True)]

    monkeypatch.setattr(runner.predictor, "generate", generate)
    return given


def most_frequent(suite):
    """Kind -> (its most frequent answer, how often it is right), counted one question after the other."""
    answers = defaultdict(list)
    for _, _, question in world.question_set(suite.seed, suite.split, suite.questions):
        answers[question.kind].append(question.answer)
    best = {kind: max(sorted(set(some)), key=some.count) for kind, some in answers.items()}
    return {kind: (best[kind], answers[kind].count(best[kind]) / len(answers[kind])) for kind in answers}


def test_the_true_answers_score_one_everywhere(runner, start, monkeypatch):
    given = answer_with(runner, monkeypatch, lambda question: f" {question.answer.title()}. ")
    metrics, rows = runner.run(start[1], blind=True)
    assert [tokens is None for tokens in given] == [False, False, True, True]  # text-only and blind see no picture
    for task in ("vqa", "vqa_blind", "text_qa"):
        assert metrics[task]["overall"] == 1
        assert metrics[task]["overall_interval"] == (1, 1)
        assert all(figures["accuracy"] == 1 for figures in metrics[task]["by_type"].values())
    assert metrics["caption"]["exact_match"] == metrics["caption"]["attribute_f1"] == 1
    assert {row["score"] for row in rows} == {1}


def test_the_most_frequent_answers_score_the_majority_figure(runner, start, monkeypatch):
    best = most_frequent(runner.suite)
    answer_with(runner, monkeypatch, lambda question: best[question.kind][0])
    metrics, _ = runner.vqa(start[1])
    majority = runner.majority()
    assert metrics["overall"] == pytest.approx(majority["overall"])
    for kind, (_, share) in best.items():
        assert metrics["by_type"][kind]["accuracy"] == pytest.approx(majority[kind]) == pytest.approx(share)
    counts = {kind: figures["n"] for kind, figures in metrics["by_type"].items()}
    expected = sum(best[kind][1] * n for kind, n in counts.items()) / sum(counts.values())
    assert majority["overall"] == pytest.approx(expected)


def test_a_student_as_it_starts(runner, start):
    metrics, rows = runner.run(start[1], blind=True)
    tasks = {task: [row for row in rows if row["task"] == task] for task in ("vqa", "caption", "text_qa", "vqa_blind")}
    assert {task: len(some) for task, some in tasks.items()} == {
        "vqa": 70,
        "caption": 12,
        "text_qa": 42,
        "vqa_blind": 70,
    }
    for task, some in tasks.items():
        kind = set() if task == "caption" else {"type"}
        assert all(set(row) == KEYS | kind for row in some)
        assert len({row["id"] for row in some}) == len(some)
        assert all(0 <= row["score"] <= 1 and isinstance(row["raw"], str) for row in some)
        if task != "caption":
            assert metrics[task]["overall"] == pytest.approx(np.mean([row["score"] for row in some]))
            assert metrics[task]["n"] == sum(figures["n"] for figures in metrics[task]["by_type"].values()) == len(some)
            low, high = metrics[task]["overall_interval"]
            assert low <= metrics[task]["overall"] <= high
    assert [row["id"] for row in tasks["vqa"]] == [row["id"] for row in tasks["vqa_blind"]]
    assert json.loads(json.dumps(rows)) == rows
    json.dumps(metrics)
    assert runner.run(start[1], blind=True)[1] == rows


def test_rows_name_the_scene_they_are_about(runner, start, monkeypatch):
    answer_with(runner, monkeypatch, lambda question: question.answer)
    _, rows = runner.run(start[1])
    suite = runner.suite
    for row in rows:
        scene = world.make_scene(suite.seed, suite.split, row["image"])
        if row["task"] == "text_qa":
            description = world.caption(scene, world.generator(suite.seed, suite.split, row["image"], 5), complete=1.0)
            assert row["prompt"].startswith(f"{description} question: ")
        if row["task"] == "caption":
            assert row["answers"] == [", ".join(" ".join(thing.attributes) for thing in scene.things)]
    assert len({row["image"] for row in rows if row["task"] == "text_qa"}) < suite.text_questions


def test_retrieval_is_among_distinct_scenes(runner, start, monkeypatch):
    suite = runner.suite
    scenes = [world.make_scene(suite.seed, suite.split, i) for i in range(suite.retrieval)]
    seen = [tuple(thing.attributes for thing in scene.things) for scene in scenes]
    first = [k for k, attributes in enumerate(seen) if attributes not in seen[:k]]
    by_words = {tuple(sorted(attributes)): k for k, attributes in reversed(list(enumerate(seen)))}

    def embed_texts(params, texts):
        return runner.embeddings[[by_words[tuple(sorted(world.parse_caption(text)))] for text in texts]]

    monkeypatch.setattr(runner.predictor, "embed_texts", embed_texts)
    found = runner.retrieval(start[1])
    assert found["n"] == len(first)
    assert found["r_at_1"] == 1
    assert 0 <= found["clip_r_at_1"] <= 1


def test_image_tokens_are_of_the_scene_asked_about(runner, start, monkeypatch):
    """What the student is given for a question or a caption is what the teacher makes of that row's scene."""
    predictor, suite = runner.predictor, runner.suite
    given = []

    def generate(params, sources, prefixes, max_new_tokens, image_tokens=None, image_of=None, contexts=None):
        image_of = range(len(sources)) if image_of is None else image_of
        given.append(None if image_tokens is None else image_tokens[list(image_of)])
        return [""] * len(sources)

    monkeypatch.setattr(predictor, "generate", generate)
    rows = [runner.vqa(start[1])[1], runner.captions(start[1])[1]]
    for tokens, some in zip(given, rows, strict=True):
        scenes = [world.make_scene(suite.seed, suite.split, row["image"]) for row in some]
        pictures = [normalize_pixels(resize_and_crop(world.render(scene), predictor.image_size)) for scene in scenes]
        np.testing.assert_allclose(tokens, predictor.encode_images(pictures)[0], atol=1e-5)
    assert [row["image"] for row in rows[0]] == [index for index, _, _ in runner.questions]


@pytest.mark.parametrize(
    ("field", "value", "told"), [("split", "tset", "train, validation, test"), ("questions", 0, "at least 1")]
)
def test_a_suite_that_cannot_run_is_refused(start, field, value, told):
    with pytest.raises(UserError, match=rf"config\.shapes\.{field} .*{told}"):
        ShapesSuite(small_suite(**{field: value}), start[0])
