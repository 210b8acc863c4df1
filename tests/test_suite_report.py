"""`vlkd report`: every suite's figures and pictures on one page; what models said cannot harm it."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from configs import suites
from vlkd_jax.errors import UserError
from vlkd_jax.evals import statistics
from vlkd_jax.evals.suites import SUITES
from vlkd_jax.report import EXAMPLES, write_report


@pytest.fixture(autouse=True)
def quick_intervals(monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 20)


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for k in range(12):
        Image.new("RGB", (400, 300), (20 * k, 0, 0)).save(folder / f"{k}.jpg")
    return folder


def evaluation(directory, **rows_of):
    """An evaluation's directory as `vlkd evaluate` leaves it, of judged rows; {suite: (fields, rows)}."""
    results = {}
    for name, (fields, rows) in rows_of.items():
        suite = suites.get_config(name)[name]
        suite.update(fields)
        kind = SUITES[suite.kind]
        rows = [row if "score" in row or "fault" in row else row | kind.judge(row) for row in rows]
        (directory / name).mkdir(parents=True)
        (directory / name / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        scored = [row for row in rows if "score" in row]
        results[name] = (kind.score(scored) if scored else {"n": 0}) | {"suite": suite.to_dict(), "files": {}}
    about = {"checkpoint": {"step": 3, "inputs": {}}, "seed": 0, "devices": ["cpu"], "python": "3.11", "versions": {}}
    (directory / "metrics.json").write_text(json.dumps({"suites": results, **about}))
    return directory


def vqa_rows(answer=lambda k: "yes" if k % 3 else "no"):
    return [
        {
            **{"task": "vqa", "id": k, "image": f"{k % 12}.jpg", "prompt": f"question: is it {k}? answer:"},
            **{"answers": ["yes"] * 10, "metric": "vqa_accuracy", "answer_type": "yes/no", "raw": answer(k)},
            "question_type": f"is it {k % 30}",
        }
        for k in range(60)
    ]


def caption_rows(said):
    return [
        {
            **{"task": "caption", "id": k, "image": f"{k}.jpg", "prompt": "a picture of"},
            **{"answers": [f"a red bus {k}", "a bus"], "raw": said(k)},
        }
        for k in range(12)
    ]


def page_of(directory):
    page = write_report(directory).read_text()
    assert "<script" not in page and not re.search(r"(?:src|href)=[\"'](?!data:)", page)
    return page


def test_questions(tmp_path, pictures):
    page = page_of(evaluation(tmp_path / "out", vqav2=({"images": str(pictures)}, vqa_rows())))
    assert page.count('class="card ') == 2 * EXAMPLES and page.count("data:image/jpeg") == 2 * EXAMPLES
    assert "66.7%" in page and "lmms_eval_ok_vqa" in page and page.count("data:image/svg+xml") == 2
    assert "The 24 most frequent of 30." in page and "One caption repeats" not in page
    assert (
        page.count("score 1.00") == 8 and page.count("score 0.00") == 4
    )  # every question about a picture scores alike
    numbers = re.findall(r"is it (\d+)\? answer", page)
    assert len(set(numbers)) == len(numbers)


def test_a_caption_that_repeats_is_warned_of(tmp_path, pictures):
    fields = {"images": str(pictures)}
    repeated = page_of(evaluation(tmp_path / "a", coco_caption=(fields, caption_rows(lambda k: "a bus <b>&"))))
    assert "One caption repeats" in repeated and "a bus &lt;b&gt;&amp;”" in repeated and "12 of\n" not in repeated
    assert re.search(r"was said for 12 of\s+12 pictures \(1 different", repeated)
    varied = page_of(evaluation(tmp_path / "b", coco_caption=(fields, caption_rows(lambda k: f"a bus {k}"))))
    assert "One caption repeats" not in varied and "CIDEr" in varied


def test_text_is_escaped_and_pictures_may_be_gone(tmp_path, pictures):
    (pictures / "1.jpg").unlink()
    (pictures / "2.jpg").write_bytes(b"no picture")
    rows = vqa_rows(lambda k: '<img src="http://x"><script>' if k % 2 else "yes")
    page = page_of(evaluation(tmp_path / "out", vqav2=({"images": str(pictures)}, rows)))
    assert "&lt;script&gt;" in page and "picture 1.jpg cannot be shown" in page


def test_domains_and_suites_without_a_score_or_pictures(tmp_path, pictures):
    rows = [row | {"domain": f"{('in', 'near')[k % 2]}-domain"} for k, row in enumerate(caption_rows(str))]
    summaries = [
        {"task": "summary", "id": k, "image": None, "prompt": "", "answers": [f"text {k}"], "raw": "text 1"}
        for k in range(4)
    ]
    asked = [{**row, "answers": []} for row in vqa_rows()]
    page = page_of(
        evaluation(
            tmp_path / "out",
            nocaps=({"images": str(pictures)}, rows),
            xsum=({}, summaries),
            vqav2_test_dev=({"images": str(pictures)}, asked),
        )
    )
    assert page.count("<section>") == 4 and "By domain" in page and "vqa without a score" in page
    assert "rougeLsum" in page


def test_retrieval_classes_and_shapes(tmp_path, pictures):
    matches = [
        {
            "task": "retrieval",
            "id": k,
            "image": f"{k}.jpg",
            "texts": ["a", "b"],
            "image_ranks": [1, k + 1],
            "text_rank": k + 1,
        }
        for k in range(12)
    ]
    classes = [
        {
            "task": "classification",
            "id": k,
            "image": f"{k}.jpg",
            "label": 0,
            "rank": 1 + k % 3,
            "best": ["cat", "dog"],
            "raw": "cat",
        }
        for k in range(12)
    ]
    scenes = [
        {
            "task": "vqa",
            "id": k,
            "image": k,
            "type": "color",
            "prompt": "q",
            "answers": ["red"],
            "raw": ("red", "blue")[k % 2],
        }
        for k in range(6)
    ]
    out = evaluation(
        tmp_path / "out",
        coco_retrieval=({"images": str(pictures)}, matches),
        imagenet_zeroshot=({"images": str(pictures)}, classes),
        shapes=({}, scenes),
    )
    page = page_of(out)
    assert "text_to_image_r_at_10" in page and "rank 7" in page and "mean_per_class" in page
    assert page.count("data:image/png") == 6 and "vqa: overall" in page


def test_what_is_no_evaluation(tmp_path):
    with pytest.raises(UserError, match=r"metrics\.json: not there; give the --workdir of vlkd evaluate"):
        write_report(tmp_path)
    (tmp_path / "metrics.json").write_text("{}")
    with pytest.raises(UserError, match="no suite in it"):
        write_report(tmp_path)


def test_bars_of_one_kind_have_their_values(monkeypatch):
    from vlkd_jax.evals import plots

    drawn = []
    monkeypatch.setattr(plots, "_data_uri", lambda figure: drawn.append(figure.axes[0]) or "")
    plots.bars_by_name({"a (3)": (0.5, (0.25, 0.75)), "b (9)": (0.125, None)}, "right answers (%)")
    [axes] = drawn
    assert [bar.get_width() for bar in axes.patches] == [50, 12.5]
    assert [text.get_text() for text in axes.texts] == ["50.0", "12.5"]
    whiskers = axes.collections[0].get_segments()
    assert np.allclose(whiskers[0][:, 0], [25, 75]) and np.allclose(whiskers[1][:, 0], 12.5)
