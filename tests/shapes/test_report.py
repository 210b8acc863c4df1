"""The report page: one file, the figures as given, hostile answers harmless, nothing hidden that went wrong."""

import json
import re
from collections import Counter
from html.parser import HTMLParser

import pytest

from vlkd_jax.configs import suites
from vlkd_jax.evals import plots, statistics
from vlkd_jax.evaluate import circumstances
from vlkd_jax.shapes import world
from vlkd_jax.shapes.demo import _summary
from vlkd_jax.shapes.report import write_report
from vlkd_jax.shapes.suite import items, judge, score


@pytest.fixture(scope="module", autouse=True)
def quick_intervals():
    """Fewer resamples: the intervals themselves are tested elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, "RESAMPLES", 100)
        yield


def rows_of(suite, reply):
    """The rows of a model that says `reply(task, k, truth)` to the k-th item of a task, and finds every picture."""
    rows, counts = [], Counter()
    for item in items(suite):
        task = item.row["task"]
        k, row = counts[task], item.row | {"hit": True, "clip_hit": True}
        counts[task] += 1
        if task == "retrieval":
            rows.append(row | judge(row))
            continue
        truth = item.row["answers"][0]
        if task == "caption":
            truth = " and ".join("a {} {} {} at {}".format(*thing) for thing in item.row["things"])
        row = item.row | {"raw": reply({"vqa_blind": "blind", "text_qa": "text"}.get(task, task), k, truth)}
        rows.append(row | judge(row))
    return rows


def small_suite():
    suite = suites.get_config("shapes").shapes
    suite.update({"seed": 2, "questions": 70, "captions": 20, "retrieval": 10, "text_questions": 35})
    return suite


def mixed(task, k, truth):
    """Every third wrong; without the picture every third right."""
    return truth if (k % 3 == 0) == (task == "blind") else "something else"


def metric_lines():
    train = [{"step": s, "kind": "train", "ttdm": 2 / s, "itcl": 40 / s, "icti": 60 / s} for s in range(20, 201, 20)]
    held_out = [
        {"step": s, "kind": "eval", "held_out/ttdm": 1 / (s + 1), "held_out/itcl": 2, "held_out/icti": 3}
        | {"retention/text_qa": 0.75 - s / 2000, "retention/token_accuracy": 0.9}
        for s in (0, 100, 200)
    ]
    return [json.dumps(line) for line in train + held_out]


def build(directory, reply=mixed, lines=None):
    """(page, result): the report of a run in which the model said what `reply` says."""
    suite, summaries = small_suite(), []
    for split in ("test_seen", "test"):
        suite.split = split
        # of kinds it has seen, every fifth answer that would be wrong is right
        said = reply if split == "test" else lambda task, k, truth: truth if k % 5 == 0 else reply(task, k, truth)
        rows, before = rows_of(suite, said), rows_of(suite, lambda task, k, truth: "no")
        summaries.append(_summary(score(before), score(rows)))
    result = summaries[1] | {"seen_kinds": summaries[0], "steps": 1234, **circumstances(2)}
    metrics = directory / "metrics.jsonl"
    if lines is not None:
        metrics.write_text("\n".join(lines) + "\n")
    path = write_report(directory / "report", result, rows, metrics, suite)
    assert path == directory / "report" / "index.html"
    assert list(path.parent.iterdir()) == [path]
    return path.read_text(encoding="utf-8"), result


@pytest.fixture
def no_drawing(monkeypatch):
    """Figures are not drawn: the tests that use this look at words."""
    monkeypatch.setattr(plots, "bars", lambda *args: "data:,")
    monkeypatch.setattr(plots, "panel", lambda *args, **options: "data:,")


class Page(HTMLParser):
    """Tags, addresses, alternative texts, and the text of every table row."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.addresses, self.alts, self.rows, self.words = [], [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        self.addresses += [attrs[k] for k in ("src", "srcset", "href", "action", "data") if k in attrs]
        self.alts += [attrs.get("alt", "")] if tag == "img" else []
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append([])

    def handle_data(self, data):
        self.words.append(data)
        if self.rows and self.rows[-1] and data.strip():
            self.rows[-1][-1].append(data.strip())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return build(tmp_path_factory.mktemp("whole"), lines=metric_lines())


def test_everything_is_inlined(whole):
    text, _ = whole
    page = Page(text)
    assert not {"script", "link", "iframe", "object", "embed", "base", "form", "a"} & set(page.tags)
    assert not re.search(r"https?:|@import|url\(|\son\w+=|\$\w", re.sub(r'"data:[^"]*"', '""', text))
    assert all(address.startswith("data:image/") for address in page.addresses)
    assert len(page.alts) == page.tags.count("img") > 20
    assert all(page.alts)


def test_figures_are_those_given(whole):
    text, result = whole
    tables = [[]]
    for row in Page(text).rows:
        cells = [cell[:1] for cell in row[1:]]
        tables += [[]] if len(tables[-1]) and len(tables[-1][-1][1]) != len(cells) else []
        tables[-1].append((row[0][0], cells))
    questions, kinds, others = (dict(table[1:]) for table in tables)  # without their headers
    rows = questions | others

    def told(*values):
        return [["–"] if value is None else [f"{100 * value:.1f}%"] for value in values]

    vqa, caption, text_qa, retrieval = (result[name] for name in ("vqa", "caption", "text_qa", "retrieval"))
    for label, f in {"all questions": vqa, **vqa["by_type"]}.items():
        assert rows[label] == told(f["before"], f["after"], f["blind"], f["majority"])
    for label, name in (("attribute F1", "attribute_f1"), ("right in every detail", "exact_match")):
        assert rows[f"captions: {label}"] == told(caption[name]["before"], caption[name]["after"], None)
    assert rows["text-only questions, no picture"] == told(text_qa["before"], text_qa["after"], None)
    expected = told(retrieval["before"], retrieval["r_at_1"], retrieval["clip_r_at_1"])
    assert rows["retrieval: the right picture first"] == expected
    seen = result["seen_kinds"]
    assert seen["vqa"]["after"] > vqa["after"] and seen["caption"]["exact_match"] != caption["exact_match"]
    for label, one, other in (
        ("all questions", vqa, seen["vqa"]),
        *((kind, f, seen["vqa"]["by_type"][kind]) for kind, f in vqa["by_type"].items()),
        ("captions: attribute F1", caption["attribute_f1"], seen["caption"]["attribute_f1"]),
        ("captions: right in every detail", caption["exact_match"], seen["caption"]["exact_match"]),
    ):
        assert kinds[label] == told(one["after"], other["after"])
    low, high = vqa["after_interval"]
    assert f"(95% interval {100 * low:.1f}–{100 * high:.1f})" in text
    for value in ("1,234 steps", result["date"], result["versions"]["jax"], *result["devices"]):
        assert value in text


def test_right_and_wrong_examples_are_marked_in_words(whole):
    text, _ = whole
    assert text.count("✓ right</p>") == text.count("✗ wrong</p>") == len(world.QUESTION_TYPES)
    assert text.count("✓ right in every detail</p>") == text.count("✗ wrong: attribute F1") == 4
    assert "Picked by rule" in text
    assert "an object whose size, color and shape no training picture combined" in text
    suite = small_suite()
    _, _, first = next(world.question_set(suite.seed, suite.split, 1))
    assert f"“{first.question}”" in text  # the sample beside the introduction


def test_the_story_says_whether_the_picture_helps(tmp_path, no_drawing):
    better, _ = build(tmp_path, mixed)
    assert "seeing the picture makes the difference (+" in better
    same, _ = build(tmp_path, lambda task, k, truth: truth if k % 2 else "no idea")
    assert "no effect of the picture" in same
    worse, _ = build(tmp_path, lambda task, k, truth: truth if task == "blind" else "no idea")
    assert "<strong>worse</strong> with the picture" in worse


def test_hostile_answers_are_escaped(tmp_path, no_drawing):
    hostile = "</p><script>alert('1')</script>\x00\u202e\ud800\n\"&amp;${style} $style"
    text, _ = build(tmp_path, lambda task, k, truth: truth if k % 2 else hostile)
    page = Page(text)
    assert "script" not in page.tags
    assert "&lt;script&gt;alert(&#x27;1&#x27;)&lt;/script&gt;" in text
    assert "&amp;amp;${style} $style" in text
    assert not set("\x00\u202e\ud800") & set(text)
    assert sum("<script>alert" in word for word in page.words) >= 7


def test_empty_answers_are_told(tmp_path, no_drawing):
    text, _ = build(tmp_path, lambda task, k, truth: "" if task == "vqa" else truth)
    assert "<em>nothing</em>" in text


def test_no_wrong_answers_and_no_right_ones(tmp_path, no_drawing):
    text, _ = build(tmp_path, lambda task, k, truth: truth)
    assert "✗" not in text
    assert text.count("No question of this type was answered wrong.") == len(world.QUESTION_TYPES)
    assert "No caption was wrong." in text
    text, _ = build(tmp_path, lambda task, k, truth: "mu")
    assert "✓" not in text
    assert text.count("No question of this type was answered right.") == len(world.QUESTION_TYPES)


def test_metrics_without_held_out_figures(tmp_path):
    text, _ = build(tmp_path, lines=[line for line in metric_lines() if "eval" not in line])
    assert "No held-out figures were recorded" in text
    assert sum(alt.startswith("Curves of ") for alt in Page(text).alts) == 3


def test_metrics_missing_broken_or_logged_twice(tmp_path, no_drawing):
    text, _ = build(tmp_path)
    assert "No losses were recorded" in text
    again = json.dumps({"step": 200, "kind": "train", "ttdm": 0.125, "itcl": float("nan"), "icti": 1.0})
    text, _ = build(tmp_path, lines=[*metric_lines(), '{"step": 300, "kind"', again])
    assert "Lines of metrics.jsonl that could not be read: 1." in text
    alts = Page(text).alts
    assert any("training: 0.1 at step 20, 0.125 at step 200" in alt for alt in alts)  # the later line counts
    assert any("training: 2 at step 20, 0.222 at step 180" in alt for alt in alts)  # what is not finite is left out


def test_smoothing_is_a_centred_mean():
    assert plots.smooth([0, 3, 6, 0], window=3).tolist() == [1.5, 3, 3, 3]
    assert plots.smooth([5]).tolist() == [5]
