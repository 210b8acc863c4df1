"""`vlkd compare`: paired intervals against bootstraps written out plainly, on real captions and on made-up answers."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny import ROOT, SHARED_DATA, environment

from vlkd_jax import compare
from vlkd_jax.errors import UserError
from vlkd_jax.evals import caption_metrics, statistics
from vlkd_jax.evals.caption_suite import judge_caption
from vlkd_jax.evals.scoring import Files


def answers(rng, right, count=300):
    """Rows of questions, three about each picture."""
    return [
        {
            "task": "vqa",
            "id": k,
            "image": k // 3,
            "answers": ["yes"] * 10,
            "metric": "vqa_accuracy",
            "score": float(hit),
        }
        for k, hit in enumerate(rng.random(count) < right)
    ]


def bootstrap(a, b, clusters, seed=0):
    """Quantiles of the mean difference, whole clusters drawn: written out without sums."""
    names, rng, draws = sorted(set(clusters)), np.random.default_rng(seed), []
    for _ in range(statistics.RESAMPLES):
        drawn = rng.integers(len(names), size=len(names))
        items = [k for n in drawn for k, cluster in enumerate(clusters) if cluster == names[n]]
        draws.append(np.mean([b[k] - a[k] for k in items]))
    return np.quantile(draws, [0.025, 0.975])


def test_a_paired_interval(rng, monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 100)
    a, b = answers(rng, 0.5), answers(rng, 0.7)
    result = compare.compare(a, list(reversed(b)))["accuracy"]  # rows are matched by id
    of_a, of_b = ([row["score"] for row in rows] for rows in (a, b))
    assert (result["a"], result["b"], result["n"]) == pytest.approx((np.mean(of_a), np.mean(of_b), 300))
    assert result["difference"] == pytest.approx(np.mean(of_b) - np.mean(of_a))
    assert result["interval"] == pytest.approx(bootstrap(of_a, of_b, [row["image"] for row in a]))
    same = compare.compare(a, a)["accuracy"]
    assert same["difference"] == 0 and same["interval"] == (0, 0)
    back = compare.compare(b, a)["accuracy"]
    assert back["interval"] == pytest.approx([-bound for bound in result["interval"][::-1]])


def test_pairing_narrows_what_it_should(rng):
    """Two systems that fail on the same items differ by little, however hard the items are."""
    a = answers(rng, 0.5)
    b = [dict(row, score=1.0) if k % 50 == 0 else row for k, row in enumerate(a)]
    low, high = compare.compare(a, b)["accuracy"]["interval"]
    alone = statistics.interval(np.array([row["score"] for row in a]), [row["image"] for row in a])
    assert high - low < 0.3 * (alone[1] - alone[0])


WORDS = ["a", "the", "red", "blue", "big", "cat", "dog", "bus", "tree", "on", "under", "near", "stands", "runs"]


def captions(rng, count=30, noise=0.3):
    """(rows of A, rows of B): the same pictures and references."""
    said, other = [], []
    for k in range(count):
        references = [" ".join(rng.choice(WORDS, rng.integers(4, 9))) for _ in range(3)]
        base = {"task": "caption", "id": k, "image": f"{k}.jpg", "answers": references}
        for rows, share in ((said, noise), (other, 2 * noise)):
            words = [str(rng.choice(WORDS)) if rng.random() < share else word for word in references[0].split()]
            rows.append(base | {"raw": " ".join(words)})
    return [[row | judge_caption(row) for row in rows] for rows in (said, other)]


def test_captions_with_fixed_document_frequencies(rng, monkeypatch):
    """CIDEr of a draw by frequencies of all references; BLEU of a draw as if its pictures were the whole set."""
    monkeypatch.setattr(statistics, "RESAMPLES", 40)
    a, b = captions(rng)
    result = compare.compare(a, b)
    references = [caption_metrics.tokenize_all(row["answers"]) for row in a]
    frequencies = caption_metrics.DocumentFrequencies(references)
    tokens = [caption_metrics.tokenize_all([row["raw"] for row in rows]) for rows in (a, b)]
    order = sorted(range(30), key=lambda k: f"{k}.jpg")  # clusters are drawn in the order of their names
    draws, bleus, generator = [], [], np.random.default_rng(0)
    for _ in range(40):
        drawn = [order[k] for k in generator.integers(30, size=30)]
        given = [references[k] for k in drawn]
        cider_a, cider_b = (
            np.mean([caption_metrics.cider(some[k], references[k], frequencies) for k in drawn]) for some in tokens
        )
        bleu_a, bleu_b = (caption_metrics.scores([some[k] for k in drawn], given)["Bleu"][3] for some in tokens)
        draws.append(cider_b - cider_a)
        bleus.append(bleu_b - bleu_a)
    assert result["CIDEr"]["interval"] == pytest.approx(np.quantile(draws, [0.025, 0.975]))
    assert result["Bleu_4"]["interval"] == pytest.approx(np.quantile(bleus, [0.025, 0.975]))
    assert result["CIDEr"]["a"] > result["CIDEr"]["b"] and result["CIDEr"]["interval"][1] < 0


def test_every_kind_of_row(rng):
    rows = [
        {
            "task": "retrieval",
            "id": 1,
            "image": "a",
            "texts": ["x", "y"],
            "image_ranks": [1, 7],
            "text_rank": 2,
            "score": 0.5,
        },
        {
            "task": "retrieval",
            "id": 2,
            "image": "b",
            "texts": ["z"],
            "image_ranks": [None],
            "text_rank": None,
            "score": 0.0,
        },
        {"task": "classification", "id": 3, "image": "c", "label": 2, "rank": 1, "score": 1.0},
        {
            "task": "summary",
            "id": 4,
            "image": None,
            "answers": ["x"],
            "rouge": dict.fromkeys(compare.ROUGE, 0.25),
            "score": 0.25,
        },
        {"task": "caption", "id": 5, "image": 0, "answers": ["x"], "things": [], "raw": "x", "score": 0.75},
        {"task": "caption", "id": 6, "image": 0, "fault": "gone"},
    ]
    result = compare.compare(rows, rows)
    assert {name: figure["a"] for name, figure in result.items()} == {
        "retrieval/text_to_image_r_at_1": pytest.approx(1 / 3),
        "retrieval/text_to_image_r_at_5": pytest.approx(1 / 3),
        "retrieval/text_to_image_r_at_10": pytest.approx(2 / 3),
        "retrieval/image_to_text_r_at_1": 0,
        "retrieval/image_to_text_r_at_5": 0.5,
        "retrieval/image_to_text_r_at_10": 0.5,
        "classification/top_1": 1,
        **{f"summary/{name}": 0.25 for name in compare.ROUGE},
        "caption/score": 0.75,
    }


def test_what_cannot_be_compared(rng, tmp_path):
    a = answers(rng, 0.5, 9)
    with pytest.raises(UserError, match="A has scores for 7, 8, and B has none"):
        compare.compare(a, a[:7])
    with pytest.raises(UserError, match="B has scores for 0, and A has none"):
        compare.compare(a[1:], a)
    with pytest.raises(UserError, match="vqa 3 has another picture or other answers in A than in B"):
        compare.compare(a, [dict(row, answers=["no"] * 10) if row["id"] == 3 else row for row in a])
    with pytest.raises(UserError, match="B has no scored predictions"):
        compare.compare(a, [{"task": "vqa", "id": 0, "raw": "x"}])
    with pytest.raises(UserError, match=r"no predictions\.jsonl there"):
        compare.read_evaluation(tmp_path)


def evaluation(directory, **suites):
    for name, rows in suites.items():
        (directory / name).mkdir(parents=True)
        (directory / name / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


def test_directories_of_evaluations(rng, tmp_path):
    one, two = answers(rng, 0.5, 9), answers(rng, 0.9, 9)
    a = evaluation(tmp_path / "a", vqav2=one, okvqa=one)
    b = evaluation(tmp_path / "b", vqav2=two, xsum=two)
    results = compare.compare_paths(a, b, None)
    assert list(results) == ["vqav2"] and results["vqav2"] == compare.compare(one, two)
    assert compare.compare_paths(a / "vqav2", b / "xsum", None) == {"": compare.compare(one, two)}
    with pytest.raises(UserError, match="no suite that both have"):
        compare.compare_paths(a, evaluation(tmp_path / "c", x=one, y=one), None)
    done = subprocess.run(
        [sys.executable, "-m", "vlkd_jax", "compare", a, b, "--json"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment() | {"JAX_PLATFORMS": "nonsense"},
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["vqav2"]["accuracy"]["n"] == 9
    assert "B - A" in compare.table(results, a, b)


@pytest.mark.shared_data
def test_two_systems_captions(tmp_path, monkeypatch):
    """A real result file against itself with its words shuffled in every third caption."""
    monkeypatch.setattr(statistics, "RESAMPLES", 50)
    folder = SHARED_DATA / "coco_captions"
    results, rng = folder / "captions_val2014_fakecap_results.json", np.random.default_rng(0)
    entries = json.loads(results.read_text())
    for entry in entries[::3]:
        entry["caption"] = " ".join(rng.permutation(entry["caption"].split()))
    other = tmp_path / "other.json.gz"
    other.write_bytes(gzip.compress(json.dumps(entries).encode()))
    files = Files("caption", Path(), folder / "captions_val2014_partial.json.gz", allow_partial=True)
    result = compare.compare_paths(results, other, files)["caption"]
    assert result["CIDEr"]["a"] == pytest.approx(0.60723, abs=5e-6) and result["CIDEr"]["n"] == 269
    assert all(figure["interval"][1] < 0 for figure in result.values())
