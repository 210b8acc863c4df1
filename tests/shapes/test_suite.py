"""The suite of the built-in world on a tiny student: an oracle scores 1, a guesser scores what guessing scores."""

import json
from collections import defaultdict

import numpy as np
import pytest
from tiny import make_assets, tiny_config

from vlkd_jax import predict
from vlkd_jax.configs import suites
from vlkd_jax.errors import UserError
from vlkd_jax.evals import statistics
from vlkd_jax.evals.suite import Prompt, predict_rows
from vlkd_jax.shapes import world
from vlkd_jax.shapes.suite import SUITE, items, majority, score
from vlkd_jax.sharding import one_device
from vlkd_jax.tasks import make_task
from vlkd_jax.vlkd import VLKD

KEYS = {"task", "id", "image", "prompt", "raw", "normalised", "answers", "score"}
MORE = {"caption": {"things", "match"}, "vqa": {"type"}, "vqa_blind": {"type"}, "text_qa": {"type"}}
BATCH = 16


@pytest.fixture(scope="module", autouse=True)
def quick_intervals():
    """Fewer resamples: the intervals themselves are tested elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, "RESAMPLES", 100)
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny student as it starts."""
    task = make_task(tiny_config(make_assets(tmp_path_factory.getbasetemp())))
    return VLKD.of(task, task.load_params(), task.load_frozen(), one_device())


def small_suite(**changes):
    suite = suites.get_config("shapes").shapes
    suite.update({"seed": 5, "questions": 70, "captions": 12, "retrieval": 30, "text_questions": 42} | changes)
    return suite


def answer_with(monkeypatch, suite, choose):
    """Makes a model give `choose(question)` and perfect captions.

    Which question is asked, about which scene, is read from the ids and the pixels, so what reaches the model garbled
    does not find its answer.
    """
    about, written, scenes = {}, {}, {}
    for index, _, question in world.question_set(suite.seed, suite.split, suite.questions):
        about[index, question.question] = question
    for index, scene, question in world.question_set(suite.seed, suite.split, suite.text_questions):
        description = world.caption(scene, world.generator(suite.seed, suite.split, index, 5), complete=1.0)
        written[description, question.question] = question
    for index in range(max(suite.captions, suite.questions)):
        scene = world.make_scene(suite.seed, suite.split, index)
        scenes[world.render(scene).tobytes()] = index, scene
    by_question = {question: answer for (_, question), answer in about.items()}

    def generate(model, requests, decoding, batch_size):
        text = model.bart_text
        for request in requests:
            prompt, source = text.decode(request.prefix), text.decode(request.source)
            assert request.source.count(text.mask) == 1
            if prompt == "a picture of":
                _, scene = scenes[request.image.tobytes()]
                yield (" and ".join("a {} {} {} at {}".format(*t.attributes) for t in scene.things),)
                continue
            assert source == prompt  # but for the mask
            question = prompt.removeprefix("question: ").removesuffix(" answer:")
            if request.context:
                yield (choose(written[text.decode(request.context), question]),)
            elif request.image is None:
                yield (choose(by_question[question]),)
            else:
                yield (choose(about[scenes[request.image.tobytes()][0], question]),)

    monkeypatch.setattr(predict, "generate", generate)


def rows_of(suite, model, *tasks):
    rows = list(predict_rows(SUITE, SUITE.items(suite), model, BATCH))
    return [row for row in rows if not tasks or row["task"] in tasks]


def most_frequent(suite):
    """Kind -> (its most frequent answer, how often it is right), counted one question after the other."""
    answers = defaultdict(list)
    for _, _, question in world.question_set(suite.seed, suite.split, suite.questions):
        answers[question.kind].append(question.answer)
    best = {kind: max(sorted(set(some)), key=some.count) for kind, some in answers.items()}
    return {kind: (best[kind], answers[kind].count(best[kind]) / len(answers[kind])) for kind in answers}


def test_the_true_answers_score_one_everywhere(model, monkeypatch):
    suite = small_suite()
    answer_with(monkeypatch, suite, lambda question: f" {question.answer.title()}. ")
    rows = rows_of(suite, model, "vqa", "text_qa", "caption")
    metrics = score(rows)
    for task in ("vqa", "text_qa"):
        assert metrics[task]["overall"] == 1
        assert metrics[task]["overall_interval"] == (1, 1)
        assert all(figures["accuracy"] == 1 for figures in metrics[task]["by_type"].values())
    assert metrics["caption"]["exact_match"] == metrics["caption"]["attribute_f1"] == 1
    assert {row["score"] for row in rows} == {1}


def test_the_most_frequent_answers_score_the_majority_figure(model, monkeypatch):
    suite = small_suite()
    best = most_frequent(suite)
    answer_with(monkeypatch, suite, lambda question: best[question.kind][0])
    rows = rows_of(suite, model, "vqa")
    metrics, shares = score(rows)["vqa"], majority(rows)
    assert metrics["overall"] == pytest.approx(shares["overall"])
    for kind, (_, share) in best.items():
        assert metrics["by_type"][kind]["accuracy"] == pytest.approx(shares[kind]) == pytest.approx(share)
    counts = {kind: figures["n"] for kind, figures in metrics["by_type"].items()}
    expected = sum(best[kind][1] * n for kind, n in counts.items()) / sum(counts.values())
    assert metrics["overall"] == pytest.approx(expected)


def test_a_student_as_it_starts(model):
    suite = small_suite()
    rows = rows_of(suite, model)
    metrics, tasks = score(rows), defaultdict(list)
    for row in rows:
        tasks[row["task"]].append(row)
    matches = len(tasks.pop("retrieval"))
    assert {task: len(some) for task, some in tasks.items()} == {
        "vqa": 70,
        "caption": 12,
        "text_qa": 42,
        "vqa_blind": 70,
    }
    assert 20 < matches == metrics["retrieval"]["n"] <= suite.retrieval
    for task, some in tasks.items():
        assert all(set(row) == KEYS | MORE[task] for row in some)
        assert len({row["id"] for row in some}) == len(some)
        assert all(0 <= row["score"] <= 1 and isinstance(row["raw"], str) for row in some)
        if task != "caption":
            assert metrics[task]["overall"] == pytest.approx(np.mean([row["score"] for row in some]))
            assert metrics[task]["n"] == sum(figures["n"] for figures in metrics[task]["by_type"].values()) == len(some)
            low, high = metrics[task]["overall_interval"]
            assert low <= metrics[task]["overall"] <= high
    assert [row["id"] for row in tasks["vqa"]] == [row["id"] for row in tasks["vqa_blind"]]
    assert rows_of(suite, model) == rows
    read_back = json.loads(json.dumps(rows))  # what is on disk is all that scoring needs
    assert json.dumps(score([row | SUITE.judge(row) for row in read_back])) == json.dumps(metrics)


def test_rows_name_the_scene_they_are_about():
    suite = small_suite()
    asked = [item for item in items(suite) if isinstance(item, Prompt)]
    for item in asked:
        scene = world.make_scene(suite.seed, suite.split, item.row["image"])
        if item.open_image:
            np.testing.assert_array_equal(item.open_image(), world.render(scene))
        if item.row["task"] == "text_qa":
            rng = world.generator(suite.seed, suite.split, item.row["image"], 5)
            assert item.row["prompt"].startswith(f"{world.caption(scene, rng, complete=1.0)} question: ")
        if item.row["task"] == "caption":
            assert item.row["answers"] == [", ".join(" ".join(thing.attributes) for thing in scene.things)]
    assert {item.row["task"] for item in asked if item.open_image} == {"vqa", "caption"}
    assert len({item.row["image"] for item in asked if item.row["task"] == "text_qa"}) < suite.text_questions


def test_retrieval_is_among_distinct_scenes(model, monkeypatch):
    suite = small_suite()
    scenes = [world.make_scene(suite.seed, suite.split, i) for i in range(suite.retrieval)]
    seen = [tuple(thing.attributes for thing in scene.things) for scene in scenes]
    first = [k for k, attributes in enumerate(seen) if attributes not in seen[:k]]
    by_words = {tuple(sorted(attributes)): k for k, attributes in reversed(list(enumerate(seen)))}
    images = np.asarray(predict.embed_images(model, [world.render(scene) for scene in scenes]))

    def embed_texts(model, texts, batch_size):
        return images[[by_words[tuple(sorted(world.parse_caption(text)))] for text in texts]]

    monkeypatch.setattr(predict, "embed_texts", embed_texts)
    metrics = score(rows_of(suite, model, "retrieval"))["retrieval"]
    assert metrics["n"] == len(first)
    assert metrics["r_at_1"] == 1
    assert 0 <= metrics["clip_r_at_1"] <= 1


@pytest.mark.parametrize(
    ("field", "value", "told"), [("split", "tset", "train, validation, test"), ("questions", 0, "at least 1")]
)
def test_a_suite_that_cannot_run_is_refused(field, value, told):
    with pytest.raises(UserError, match=rf"config\.shapes\.{field} .*{told}"):
        list(items(small_suite(**{field: value})))
