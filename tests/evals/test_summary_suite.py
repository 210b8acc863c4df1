"""Summaries: ROUGE by the official code, its known answers, and documents that are longer than the model."""

import gzip
import types

import numpy as np
import pytest
from tiny import SHARED_DATA

from vlkd_jax import predict
from vlkd_jax.configs import suites
from vlkd_jax.data.text import BartText
from vlkd_jax.errors import UserError
from vlkd_jax.evals import statistics, summary_suite
from vlkd_jax.evals.suite import check_item, predict_rows


def suite_of(folder, documents, summaries):
    suite = suites.get_config("xsum").xsum
    suite.root = str(folder)
    (folder / "test.source").write_text("".join(f"{text}\n" for text in documents))
    (folder / "test.target").write_text("".join(f"{text}\n" for text in summaries))
    return suite


@pytest.mark.shared_data
def test_known_answers(monkeypatch):
    """ConvS2S on the test set, every tenth sentence by our rule and by the figures of all; see the data's README."""
    monkeypatch.setattr(statistics, "RESAMPLES", 2)
    said, gold = (
        gzip.decompress((SHARED_DATA / "xsum" / f"{name}.txt.gz").read_bytes()).decode().splitlines()
        for name in ("convs2s-test-output", "gold-test-sentences")
    )
    rows = [
        {"raw": text, "answers": [reference], "rouge": summary_suite.rouge(text, reference)}
        for text, reference in zip(said, gold, strict=True)
    ]
    metrics = summary_suite.score_summaries(rows)
    figures = [round(100 * metrics[name], 3) for name in ("rouge1", "rouge2", "rougeL")]
    assert metrics["n"] == 11334 and figures == [30.945, 11.023, 25.050]


def test_documents_are_cut_at_their_end(assets, tmp_path, monkeypatch):
    """What is read is the beginning of the document, as long as there is room; what fits is whole."""
    text = BartText(assets / "bart")
    config = types.SimpleNamespace(max_position_embeddings=100, decoder_start_token_id=2)
    model = types.SimpleNamespace(bart_text=text, bart=types.SimpleNamespace(config=config))
    documents = ["red circle " * 200, "a blue ring", "two green squares " * 12]
    suite = suite_of(tmp_path, documents, ["a red one", "blue", "green"])
    suite.summary_encoder = "read: {document} short: <mask>"
    read = []

    def generate(model, requests, decoding, batch_size):
        for request in requests:
            read.append(request.source)
            yield ("a red one",)

    monkeypatch.setattr(predict, "generate", generate)
    items = list(summary_suite.summary_items(suite))
    for item in items:
        check_item("xsum", model, item)
    assert items[0].decoding.method == "beam" and items[0].decoding.beams == 6
    rows = list(predict_rows(summary_suite.SUITE, items, model, 2))
    whole = [text.encode_template(suite.summary_encoder, document=document.strip()) for document in documents]
    for source, full, row in zip(read, whole, rows, strict=True):
        if len(full) <= 98:
            assert source == full and "cut" not in row
        else:
            tail = text.encode_template(" short: <mask>")
            assert len(source) == 98 and source[: 98 - len(tail)] == full[: 98 - len(tail)] and row["cut"]
            assert source[-len(tail) :] == tail
    assert [row.get("cut", False) for row in rows][:2] == [True, False]
    assert [row["score"] for row in rows] == [1.0, 0.0, 0.0]
    assert rows[0]["rouge"] == {name: 1.0 for name in summary_suite.ROUGE}


def test_files_that_cannot_be_used(tmp_path):
    suite = suite_of(tmp_path, ["a", "b"], ["x"])
    with pytest.raises(UserError, match=r"test\.target: 1 lines, and 2 in .*test\.source"):
        list(summary_suite.summary_items(suite))
    suite = suite_of(tmp_path, ["a", "", "b"], ["x"] * 3)
    with pytest.raises(UserError, match=r"test\.source line 2: empty"):
        list(summary_suite.summary_items(suite))
    suite.documents = "gone"
    with pytest.raises(UserError, match=r"gone \(config\.xsum\.documents\)"):
        list(summary_suite.summary_items(suite))
    assert np.isclose(summary_suite.rouge("the cat sat", "the cats sat")["rouge1"], 1)  # with stemmer
