"""`vlkd score`: known answers, other programs' rules, files of every form, one line for each that cannot be used."""

import dataclasses
import gzip
import json
import shutil
import stat
import subprocess
import sys

import numpy as np
import pytest
from tiny import ROOT, SHARED_DATA, environment

from vlkd_jax import score
from vlkd_jax.errors import UserError
from vlkd_jax.evals import standard_captions, statistics
from vlkd_jax.evals.scoring import Files
from vlkd_jax.evals.vqa import RULES

COCO, VQA, XSUM = (SHARED_DATA / name for name in ("coco_captions", "vqav2_mini", "xsum"))
RESULTS = COCO / "captions_val2014_fakecap_results.json"
REFERENCES = COCO / "captions_val2014_partial.json.gz"


@pytest.fixture(autouse=True)
def quick_intervals(monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 20)


def write(path, value):
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


# VQA


@pytest.mark.parametrize(
    ("humans", "answer", "expected"),
    [  # what the programs themselves gave for these
        (["2"] * 10, "two", (0, 1, 1, 1, 0)),
        (["yes"] * 10, "Yes", (0, 1, 1, 1, 0)),
        (["yes"] * 10, "yes.", (0, 1, 1, 1, 0)),
        (["t-shirt"] * 10, "t-shirt", (1, 0, 1, 1, 1)),
        (["the beach"] * 5 + ["beach"] * 3 + ["sand"] * 2, "beach", (1, 0.9, 1, 1, 1)),
        (["yes"] * 3 + ["no"] * 7, "yes", (0.9, 0.9, 0.9, 0.9, 1)),
        (["yes"] * 2 + ["no"] * 8, "yes", (0.6, 0.6, 0.6, 0.6, 2 / 3)),
        (["man's"] * 10, "man 's", (0, 0, 0, 1, 0)),
        (["1,,000"] * 9 + ["2"], "1000", (0, 0, 1, 1, 0)),
    ],
)
def test_other_programs_rules(humans, answer, expected):
    assert [rule(answer, humans) for rule in RULES.values()] == pytest.approx(expected)


def vqa_files(folder, answers, said, **fields):
    """Files of questions 1, 2, ...: two about each picture; `answers` are lists of human answers."""
    entries = [
        {"question_id": k, "image_id": k // 2, "answers": [{"answer": a} for a in humans], "answer_type": kind}
        for k, (kind, humans) in enumerate(answers, 1)
    ]
    asked = [{"question_id": k, "image_id": k // 2, "question": "why?"} for k in range(1, len(answers) + 1)]
    results = [{"question_id": k, "answer": text} for k, text in said.items()]
    return Files(
        "vqav2",
        write(folder / "r.json", results),
        write(folder / "a.json", {"info": {"version": "1.1"}, "data_subtype": "val", "annotations": entries}),
        write(folder / "q.json", {"questions": asked}),
        **fields,
    )


ANSWERS = [("number", ["2"] * 10), ("yes/no", ["yes"] * 3 + ["no"] * 7), ("yes/no", ["no"] * 10)]
SAID = {1: "two", 2: "yes", 3: "no"}


def test_vqa(tmp_path):
    result = score.score(vqa_files(tmp_path, ANSWERS, SAID))
    assert result["overall"] == pytest.approx(100 * 1.9 / 3)
    assert result["per_answer_type"] == pytest.approx({"number": 0, "yes/no": 95}) and result["per_question_type"] == {}
    assert result["rules"] == pytest.approx(
        dict(zip(RULES, [190 / 3, 290 / 3, 290 / 3, 290 / 3, 200 / 3], strict=True))
    )
    assert result["n"] == 3 and result["annotation_version"] == "version 1.1, val"
    assert {len(file["sha256"]) for file in result["files"].values()} == {64} and len(result["files"]) == 3
    text = score.table(result)
    for line in ("VQA accuracy", "63.33", "LAVIS", "96.67", "yes/no", "field answer of each human answer"):
        assert line in text


def test_our_own_rows_and_gzip(tmp_path):
    """Pictures that could not be used have no prediction, or an empty one where they count as a miss."""
    files = vqa_files(tmp_path, ANSWERS, SAID)
    rows = [{"task": "vqa", "id": k, "raw": text} for k, text in SAID.items()]
    rows[0] = {"task": "vqa", "id": 1, "fault": "gone", "unusable": "miss", "score": 0.0}
    packed = tmp_path / "predictions.jsonl.gz"
    packed.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    files = dataclasses.replace(files, predictions=packed)
    assert score.score(files)["overall"] == pytest.approx(100 * 1.9 / 3)
    rows[0].pop("unusable")
    packed.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    with pytest.raises(UserError, match=r"no prediction for 1 \(1 of 3"):
        score.score(files)
    partial = score.score(dataclasses.replace(files, allow_partial=True))
    assert partial["overall"] == pytest.approx(95) and (partial["n"], partial["missing"]) == (2, 1)


def test_okvqa_says_which_answers(tmp_path):
    files = vqa_files(tmp_path, ANSWERS, SAID)
    data = json.loads(files.annotations.read_text())
    for entry in data["annotations"]:
        for human in entry["answers"]:
            human["raw_answer"] = "two"
    write(files.annotations, data)
    typed = score.score(dataclasses.replace(files, suite="okvqa", answer_field="raw_answer"))
    assert typed["overall"] == pytest.approx(100 / 3) and typed["answer_field"] == "raw_answer"


def test_other_numbers_of_answers_are_counted(tmp_path):
    files = vqa_files(tmp_path, [("other", ["a"] * 5 + ["b"]), *ANSWERS[1:]], {**SAID, 1: "b"})
    assert score.score(files)["other_than_ten"] == 1
    with pytest.raises(UserError, match=r"question 1 has 1 human answer\(s\); VQA accuracy takes 10, and 4 at least"):
        score.score(vqa_files(tmp_path, [("other", ["a"]), *ANSWERS[1:]], SAID))


@pytest.mark.shared_data
def test_every_real_question(tmp_path):
    """8,977 questions: the answer of the most humans scores what a count over them gives."""
    annotations = VQA / "v2_mscoco_train2014_mini-valid_annotations.json.gz"
    entries = json.loads(gzip.decompress(annotations.read_bytes()))["annotations"]
    results = [{"question_id": e["question_id"], "answer": e["multiple_choice_answer"]} for e in entries]
    files = Files(
        "vqav2",
        write(tmp_path / "r.json", results),
        annotations,
        VQA / "v2_OpenEnded_mscoco_train2014_mini-valid_questions.json.gz",
    )
    result = score.score(files)
    assert result["n"] == 8977 and sum(result["per_answer_type_n"].values()) == 8977
    assert set(result["per_answer_type"]) == {"number", "other", "yes/no"} and len(result["per_question_type"]) == 65
    agree = [sum(a["answer"] == e["multiple_choice_answer"] for a in e["answers"]) for e in entries]
    least = np.mean([(n * min((n - 1) / 3, 1) + (10 - n) * min(n / 3, 1)) / 10 for n in agree])
    assert 100 * least <= result["overall"] < 100 * least + 5  # normalising lets some more agree


# Captions


@pytest.mark.shared_data
def test_known_captions(tmp_path):
    expected = json.loads((COCO / "fakecap_expected.json").read_text())
    result = score.score(Files("caption", RESULTS, REFERENCES, allow_partial=True))
    assert [result[f"Bleu_{n}"] for n in (1, 2, 3, 4)] == pytest.approx(expected["Bleu"], abs=1e-9)
    assert (result["ROUGE_L"], result["CIDEr"]) == pytest.approx((expected["ROUGE_L"], expected["CIDEr"]), abs=1e-9)
    assert result["METEOR"] is None and "METEOR" in result["not_computed"] and result["n"] == 269
    assert result["document_frequencies"] == "references of these 269 pictures"
    with pytest.raises(UserError, match=r"no prediction for .*10,647 of 10,916 .*--allow_partial"):
        score.score(Files("caption", RESULTS, REFERENCES))


@pytest.mark.java
@pytest.mark.shared_data
@pytest.mark.skipif(shutil.which("java") is None, reason="no java here")
def test_known_captions_by_the_standard_tools():
    assert standard_captions.why_absent() == ""
    expected = json.loads((COCO / "fakecap_expected.json").read_text())
    result = score.score(Files("caption", RESULTS, REFERENCES, allow_partial=True))
    assert [result[f"Bleu_{n}"] for n in (1, 2, 3, 4)] == pytest.approx(expected["Bleu"], abs=1e-9)
    for name in ("METEOR", "ROUGE_L", "CIDEr"):
        assert result[name] == pytest.approx(expected[name], abs=1e-9)
    assert "pycocoevalcap 1.2" in result["scorer"] and "METEOR" not in result["not_computed"]


MARKS = ("\r", "\r\n", "\n", "\u2028", "\u2029", "\v", "\f", "\x85", "\x1c")


@pytest.mark.java
@pytest.mark.skipif(shutil.which("java") is None, reason="no java here")
def test_line_ends_inside_a_caption_move_no_other():
    captions = [f"a red{mark}bus {k}" for k, mark in enumerate(MARKS)] + ["", " ", "the last one"]
    tokens = standard_captions.tokenize_all(captions)
    assert tokens == [["a", "red", "bus", str(k)] for k in range(len(MARKS))] + [[], [], ["the", "last", "one"]]


def test_line_ends_inside_a_caption_without_java(tmp_path):
    def result(marks):
        said = [{"image_id": k, "caption": f"a red{mark}bus {k}"} for k, mark in enumerate(marks)]
        given = [{"image_id": k, "caption": f"a red bus {k} drives"} for k in range(len(marks))]
        files = Files("caption", write(tmp_path / "r.json", said), write(tmp_path / "a.json", {"annotations": given}))
        return {name: value for name, value in score.score(files).items() if name in score.CAPTION_FIGURES}

    assert result(MARKS) == result([" "] * len(MARKS))


def nocaps(folder):
    """(captions file, results): three pictures a domain."""
    domains = ["in-domain"] * 3 + ["near-domain"] * 3 + ["out-domain"] * 3
    images = [{"id": k, "file_name": f"{k}.jpg", "domain": domain} for k, domain in enumerate(domains)]
    words = ["cat", "dog", "bus", "tree", "boat", "sign", "horse", "bear", "kite"]
    given = [{"image_id": k, "caption": f"a {words[k]} stands in the {words[-k]}"} for k in range(9)]
    said = [{"image_id": k, "caption": f"a {words[k]} stands in the sun"} for k in range(9)]
    return write(folder / "n.json", {"images": images, "annotations": given}), write(folder / "r.json", said)


def test_nocaps_by_domain(tmp_path):
    """A domain's figures are those of its pictures alone; beside them CIDEr by the frequencies of all."""
    captions, results = nocaps(tmp_path)
    result = score.score(Files("nocaps", results, captions))
    assert list(result["by_domain"]) == ["in", "near", "out", "entire"]
    for domain, of_domain in (("in", range(3)), ("near", range(3, 6)), ("out", range(6, 9))):
        said = [entry for entry in json.loads(results.read_text()) if entry["image_id"] in of_domain]
        data = json.loads(captions.read_text())
        given = [entry for entry in data["annotations"] if entry["image_id"] in of_domain]
        alone = Files("caption", write(tmp_path / "x.json", said), write(tmp_path / "y.json", {"annotations": given}))
        expected, figures = score.score(alone), result["by_domain"][domain]
        for name in ("Bleu_4", "ROUGE_L", "CIDEr", "n", "document_frequencies"):
            assert figures[name] == pytest.approx(expected[name])
    by_all = [result["by_domain"][name]["CIDEr_entire_frequencies"] for name in ("in", "near", "out")]
    assert np.mean(by_all) == pytest.approx(result["CIDEr"]) == pytest.approx(result["by_domain"]["entire"]["CIDEr"])
    text = score.table(result)
    assert "in" in text.split("\n")[0] and "each column's own references" in text
    data = json.loads(captions.read_text())
    del data["images"][4]["domain"]
    with pytest.raises(UserError, match="images without a domain"):
        score.score(Files("nocaps", results, write(captions, data)))


def test_karpathy_splits(tmp_path):
    sentences = [{"raw": "a red bus"}, {"raw": "the bus is red"}]
    images = [
        {"split": split, "filename": f"{k}.jpg", "cocoid": k, "sentences": sentences}
        for k, split in enumerate(("train", "test", "val", "test"))
    ]
    captions = write(tmp_path / "dataset_coco.json", {"images": images})
    said = write(tmp_path / "r.json", [{"image_id": k, "caption": "a red bus"} for k in (1, 3)])
    assert score.score(Files("caption", said, captions))["n"] == 2
    with pytest.raises(UserError, match=r"no images of split 'dev'; --split is of test, train, val"):
        score.score(Files("caption", said, captions, split="dev"))


def test_spice_runs_where_its_program_is(tmp_path, monkeypatch):
    """A program in its place, which answers in the form of the real one: it is not at hand."""
    captions, results = nocaps(tmp_path)
    with pytest.raises(UserError, match=r"spice-1\.0\.jar: not there"):
        score.score(Files("caption", results, captions), tmp_path)
    (tmp_path / "spice-1.0.jar").touch()
    code = (
        "import json, sys; a = sys.argv; entries = json.load(open(a[4]))\n"
        "answer = [{'image_id': e['image_id'], 'scores': {'All': {'f': e['image_id'] / 10}}} for e in entries]\n"
        "json.dump(answer[::-1], open(a[6], 'w'))"
    )
    java = tmp_path / "java"
    java.write_text(f"#!{sys.executable}\n{code}\n")
    java.chmod(java.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    result = score.score(Files("nocaps", results, captions), tmp_path)
    assert result["SPICE"] == pytest.approx(0.4) and result["by_domain"]["out"]["SPICE"] == pytest.approx(0.7)
    java.write_text("#!/bin/sh\necho it broke >&2\nexit 3\n")
    with pytest.raises(UserError, match=r"spice-1\.0\.jar: failed \(it broke\)"):
        score.score(Files("nocaps", results, captions), tmp_path)


# Summaries


@pytest.mark.shared_data
def test_known_summaries(tmp_path):
    """Every tenth line here; test_summary_suite.py has all of them through the same functions."""
    lines = [
        gzip.decompress((XSUM / f"{name}.txt.gz").read_bytes()).decode().splitlines()[::10]
        for name in ("convs2s-test-output", "gold-test-sentences")
    ]
    said, given = (write(tmp_path / f"{k}.txt", "\n".join(some) + "\n") for k, some in enumerate(lines))
    result = score.score(Files("xsum", said, given))
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rouge1", "rouge2", "rougeL", "rougeLsum"], use_stemmer=True)
    values = [scorer.score(b, a) for a, b in zip(*lines, strict=True)]
    for name in ("rouge1", "rouge2", "rougeL", "rougeLsum"):
        assert result[name] == pytest.approx(100 * np.mean([value[name].fmeasure for value in values]), abs=1e-9)
    assert result["n"] == 1134 and result["scorer"] == "rouge_score 0.1.2, with stemmer"


# What cannot be used


def change(results, **fields):
    entries = json.loads(results.read_text())
    entries[1] |= fields
    return write(results, entries)


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda f: change(f, question_id=77), r"predictions for 77, which .*q\.json does not have \(1 of 3\)"),
        (lambda f: change(f, question_id="2"), r"predictions for '2', .*there its id is the number 2"),
        (lambda f: change(f, question_id=1), r"entry 1: 1 has a prediction already; keep one"),
        (lambda f: change(f, answer=3), r"entry 1: the prediction 3 is not a text"),
        (lambda f: change(f, answer=None), r"entry 1: the prediction None is not a text"),
        (lambda f: change(f, question_id=None), r"entry 1: the id None is neither a number nor a text"),
        (lambda f: write(f, json.loads(f.read_text())[:2]), r"no prediction for 3 \(1 of 3 .*--allow_partial"),
        (lambda f: write(f, f.read_text()[:-9]), r"r\.json line 1: not JSON"),
        (lambda f: write(f, [{"image_id": 1, "caption": "x"}]), "entry 0: a file of captions, of another suite"),
        (lambda f: write(f, {"a": 1}), "not a list; a result file is one JSON list"),
        (lambda f: write(f, [1]), "entry 0: not an object"),
        (lambda f: write(f, []), "no predictions in it"),
    ],
)
def test_predictions_that_cannot_be_used(tmp_path, spoil, told):
    files = vqa_files(tmp_path, ANSWERS, SAID)
    spoil(files.predictions)
    with pytest.raises(UserError, match=told) as error:
        score.score(files)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_other_files_that_cannot_be_used(tmp_path):
    files = vqa_files(tmp_path, ANSWERS, SAID)
    for name, data in (("r.json.gz", b"[]"), ("cut.json.gz", gzip.compress(files.predictions.read_bytes())[:-12])):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=rf"{name}: not a gzip file that can be read"):
            score.score(dataclasses.replace(files, predictions=tmp_path / name))
    rows = write(tmp_path / "predictions.jsonl", json.dumps({"task": "caption", "id": 1, "raw": "x"}) + "\n")
    with pytest.raises(UserError, match=r"line 1: a row of task 'caption', not 'vqa': of another suite"):
        score.score(dataclasses.replace(files, predictions=rows))
    rows.write_text(rows.read_text() + '{"task": "vq')
    with pytest.raises(UserError, match=r"line 2: not JSON .*is the file cut off"):
        score.score(dataclasses.replace(files, predictions=rows))
    with pytest.raises(UserError, match="no list 'annotations'"):
        score.score(dataclasses.replace(files, annotations=files.questions))
    with pytest.raises(UserError, match=r"gone: cannot be read"):
        score.score(dataclasses.replace(files, annotations=tmp_path / "gone"))
    with pytest.raises(UserError, match=r"a\.json: annotations\[0\] is no image_id with a caption"):
        said = write(tmp_path / "c.json", [{"image_id": 1, "caption": "x"}])
        score.score(Files("caption", said, files.annotations))
    said, given = write(tmp_path / "s.txt", "one\ntwo\n"), write(tmp_path / "g.txt", "one\n")
    with pytest.raises(UserError, match="predictions for 1, which"):
        score.score(Files("xsum", said, given))
    with pytest.raises(UserError, match="no prediction for 1 "):
        score.score(Files("xsum", given, said))
    with pytest.raises(UserError, match="JSON, and summaries are one text a line"):
        score.score(Files("xsum", files.predictions, given))
    with pytest.raises(UserError, match=r"g\.txt line 2: empty"):
        score.score(Files("xsum", said, write(given, "one\n\n")))


def test_the_command(tmp_path):
    """It asks for no device; a mistake is one line and exit code 2."""
    files = vqa_files(tmp_path, ANSWERS, SAID)
    base = ["--suite=vqav2", f"--predictions={files.predictions}", f"--annotations={files.annotations}"]

    def run(*argv):
        whole = [sys.executable, "-m", "vlkd_jax", "score", *base, *argv]
        settings = environment() | {"JAX_PLATFORMS": "nonsense"}
        return subprocess.run(whole, capture_output=True, text=True, env=settings, cwd=ROOT)

    done = run("--json", f"--questions={files.questions}")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["overall"] == pytest.approx(100 * 1.9 / 3)
    change(files.predictions, question_id=77)
    done = run("--allow-partial")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("error: ") and "predictions for 77" in done.stderr
