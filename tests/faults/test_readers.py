"""Files as nobody would write them, for every reader: each is read, or refused in one line that names it.

Nothing in them is run, nothing is written elsewhere, no reader hangs (`fuzzing.harmless`).
"""

import contextlib
import gzip
import io
import json
import shutil
import struct
import tarfile
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from fuzzing import TEXT, VALUES, broken, damaged, fuzz, harmless
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import load_file

from configs import base, suites
from vlkd_jax.compare import compare_paths, read_evaluation
from vlkd_jax.data import inputs, tar
from vlkd_jax.data.asked import Questions
from vlkd_jax.data.documents import Documents
from vlkd_jax.data.glue import GlueRows
from vlkd_jax.data.images import check_picture, open_image, resize_and_crop
from vlkd_jax.data.prepare import Options, prepare
from vlkd_jax.data.records import RecordPairs
from vlkd_jax.data.sources import FolderPairs, Record, TextLines
from vlkd_jax.data.teacher_cache import CachedPairs, _opened, pack, row_type
from vlkd_jax.data.text import BartText, ClipText
from vlkd_jax.errors import RecordError, UserError
from vlkd_jax.evals import caption_suite, classification_suite, summary_suite, vqa_suite
from vlkd_jax.evals.predictions import read_predictions
from vlkd_jax.evals.retrieval_suite import retrieval_items
from vlkd_jax.evals.scoring import Files, judged_rows
from vlkd_jax.hf.convert import convert
from vlkd_jax.hf.load import load_bart, load_clip
from vlkd_jax.hf.student import load_student, read_prompts, read_student_config
from vlkd_jax.identity import INPUTS_FILE, check_inputs
from vlkd_jax.models.preprocessing import Preprocessing
from vlkd_jax.report import write_report
from vlkd_jax.runs import run_config
from vlkd_jax.types import TeacherOutputs

STUDENT = Path(__file__).parents[2] / "vlkd_jax" / "shapes" / "models" / "student"
IMAGES = [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "b.png"}]
COCO = {"images": IMAGES, "annotations": [{"image_id": 1, "caption": "a red ball"}, {"image_id": 2, "caption": "b"}]}
KARPATHY = {
    "images": [
        {"filename": f"{name}.png", "split": "test", "cocoid": k, "sentences": [{"raw": "a red ball"}, {"raw": "b"}]}
        for k, name in enumerate("ab")
    ]
}
QUESTIONS = {"questions": [{"question_id": k, "image_id": "a", "question": "what?"} for k in (1, 2)]}
ANSWERS = {"annotations": [{"question_id": k, "answers": [{"answer": "x"}] * 10} for k in (1, 2)]}
LINES = [{"image": "a.png", "caption": "a red ball"}, {"image": "b.png", "caption": "b"}]
BYTES = st.one_of(st.binary(max_size=60), TEXT.map(lambda text: text.encode("utf-8", "surrogatepass")))
READER_SECONDS = 60
"""Of fuzzing each reader in the nightly run: half an hour for all of them."""


@pytest.fixture
def fuzzed(request, tmp_path, record_property):
    """Function (read, *strategies, examples): `read` gets draws, runs nothing, and ends; tells how many there were."""

    def run(read, *strategies, examples=60):
        def watched(*values):
            with harmless(tmp_path):
                read(*values)

        seconds = READER_SECONDS if request.config.getoption("nightly") else 0
        record_property("files", fuzz(watched, *strategies, examples=examples, seconds=seconds))

    return run


@pytest.fixture
def folder(tmp_path):
    for name in ("a", "b"):
        Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / f"{name}.png")
    return tmp_path


def read_or_refuse(read, *names):
    """What `read` gives, or None where it refuses in one line that holds one of `names`."""
    try:
        return read()
    except UserError as error:
        said = str(error)
        assert any(str(name) in said for name in names), error
        assert len(said.splitlines()) == 1, said
        return None


# models


def read_model(directory):
    """All that training reads of a directory: weights, configuration, tokenizer."""
    if directory.name == "bart":
        load_bart(directory)
        BartText(directory).encode("a red circle")
    else:
        load_clip(directory)
        ClipText(directory).encode("a red circle")


@pytest.mark.parametrize("model", ["bart", "clip"])
@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "header"]
)
def test_json_of_a_model_directory(assets, tmp_path, fuzzed, model, name):
    directory = shutil.copytree(assets / model, tmp_path / model)
    weights = (directory / "model.safetensors").read_bytes()
    if name == "header":
        size = struct.unpack("<Q", weights[:8])[0]
        whole = json.loads(weights[8 : 8 + size])
    elif (directory / name).exists():
        whole = json.loads((directory / name).read_text())
    else:
        whole = {"size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}, "image_mean": [0.5] * 3}

    def read(value):
        if name == "header":
            header = json.dumps(value).encode()
            (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + weights[8 + size :])
        else:
            (directory / name).write_text(json.dumps(value))
        read_or_refuse(lambda: read_model(directory), directory)

    fuzzed(read, broken(whole), examples=40)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_bytes_of_a_model_directory(assets, tmp_path, fuzzed, name):
    directory = shutil.copytree(assets / "bart", tmp_path / "bart")

    def read(data):
        (directory / name).write_bytes(data)
        read_or_refuse(lambda: read_model(directory), directory)

    fuzzed(read, damaged((assets / "bart" / name).read_bytes()), examples=40)


def test_an_index_of_shards(assets, tmp_path, fuzzed):
    directory = shutil.copytree(assets / "bart", tmp_path / "bart")
    (directory / "model.safetensors").rename(directory / "model-00001-of-00001.safetensors")
    names = load_file(directory / "model-00001-of-00001.safetensors")
    whole = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}

    def read(value):
        (directory / "model.safetensors.index.json").write_text(json.dumps(value))
        read_or_refuse(lambda: load_bart(directory), directory)

    fuzzed(read, broken(whole))


@pytest.mark.parametrize("name", ["config.json", "processor_config.json"])
def test_an_exported_student(tmp_path, fuzzed, name):
    directory = shutil.copytree(STUDENT, tmp_path / "student")
    whole = json.loads((directory / name).read_text())

    def read(value):
        (directory / name).write_text(json.dumps(value))
        read_or_refuse(lambda: (read_student_config(directory), read_prompts(directory)), directory)
        read_or_refuse(lambda: load_student(directory), directory)

    fuzzed(read, broken(whole), examples=25)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_weights(assets, tmp_path, fuzzed, zipped):
    (tmp_path / "bart").mkdir()
    path = tmp_path / "bart" / "pytorch_model.bin"
    tensors = {"a": torch.arange(6.0), "b": torch.ones(2, 3, dtype=torch.int64)}
    torch.save(tensors, path, _use_new_zipfile_serialization=zipped)

    def read(data):
        path.write_bytes(data)
        read_or_refuse(lambda: convert(tmp_path / "bart", tmp_path / "out"), path)
        (tmp_path / "out" / "model.safetensors").unlink(missing_ok=True)

    fuzzed(read, damaged(path.read_bytes()))


# pictures and archives


def picture(form):
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (12, 9, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, form)
    return buffer.getvalue()


@pytest.mark.parametrize("form", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF"])
def test_pictures(tmp_path, fuzzed, form):
    path = tmp_path / "picture"

    def read(data):
        path.write_bytes(data)
        for reader in (check_picture, open_image):
            read_or_refuse(lambda reader=reader: reader(path), path)
        image = read_or_refuse(lambda: open_image(data), "the picture")
        if image is not None:
            pixels = resize_and_crop(image, Preprocessing(8, 8))
            assert pixels.shape == (8, 8, 3) and pixels.dtype == np.uint8

    fuzzed(read, damaged(picture(form)), examples=100)


@pytest.mark.parametrize("compressed", [True, False])
def test_tar_shards(tmp_path, fuzzed, compressed):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as file:
        for name, data in (("0.png", picture("PNG")), ("0.txt", b"a"), (f"{'long' * 40}.json", b'{"caption": "b"}')):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    path, whole = tmp_path / "0.tar", buffer.getvalue()

    def read(data):
        path.write_bytes(data)
        with contextlib.suppress(tar.TarDamage):
            assert sum(len(content or b"") for _, content in tar.members(path)) < 10 * len(whole)
        told = [
            pair for part in inputs.parts(path, inputs.Columns(), 5) for pair in inputs.read(part, inputs.Columns())
        ]
        assert all(str(path) in str(pair) for pair in told if isinstance(pair, RecordError))

    fuzzed(read, damaged(gzip.compress(whole) if compressed else whole), examples=100)


@pytest.mark.parametrize("kind", ["tsv", "jsonl", "csv", "json", "parquet"])
def test_tables_to_prepare(folder, fuzzed, kind):
    path = folder / f"pairs.{kind}"
    columns = inputs.Columns("1", "0") if kind == "tsv" else inputs.Columns()
    if kind == "parquet":
        rows = {"image": ["a.png", "b.png"], "caption": ["a red ball", "b"]}
        pyarrow.parquet.write_table(pyarrow.table(rows), path)
    texts = {
        "tsv": "a red ball\ta.png\nb\tb.png\n",
        "jsonl": "\n".join(map(json.dumps, LINES)),
        "csv": 'image,caption\na.png,"a red, ball"\nb.png,b\n',
        "json": json.dumps(COCO),
    }
    whole = path.read_bytes() if kind == "parquet" else texts[kind].encode()

    def read(data):
        path.write_bytes(data)
        parts = read_or_refuse(lambda: inputs.parts(path, columns, 5), path)
        for part in parts or ():
            for pair in inputs.read(part, columns):
                assert isinstance(pair, inputs.Sample) or str(path) in str(pair)

    fuzzed(read, damaged(whole), examples=100)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A directory of record files, as `vlkd prepare` writes it."""
    place = tmp_path_factory.mktemp("prepare")
    for name in ("a", "b", "c"):
        Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(place / f"{name}.png")
    (place / "pairs.tsv").write_text("a red ball\ta.png\nb\tb.png\nc\tc.png\n")
    columns = inputs.Columns("1", "0", str(place))
    prepare(place / "pairs.tsv", place / "data", columns, Options(rows=2, short=4), workers=1)
    return place / "data"


@pytest.mark.parametrize("name", ["dataset_info.json", "features.json", "records"])
def test_record_directories(prepared, tmp_path, fuzzed, name):
    directory = shutil.copytree(prepared, tmp_path / "data")
    path = next(directory.glob("*.array_record*")) if name == "records" else directory / name
    whole = path.read_bytes()

    def read(data):
        path.write_bytes(data)
        pairs = read_or_refuse(lambda: RecordPairs(directory, "train"), directory)
        for k in range(min(len(pairs), 50) if pairs is not None else 0):  # a damaged count may be of millions
            record = read_or_refuse(lambda k=k: pairs[k], directory)
            assert record is None or isinstance(record.text, str)

    json_value = st.nothing() if name == "records" else broken(json.loads(whole)).map(lambda v: json.dumps(v).encode())
    fuzzed(read, st.one_of(damaged(whole), json_value), examples=60)


def test_an_evaluation_to_report(tmp_path, fuzzed):
    suite = json.loads(suites.get_config("vqav2").vqav2.to_json_best_effort())
    figures = {"overall": 0.5, "overall_interval": [0.4, 0.6], "n": 1, "rules": {"official": 0.5}, "scorer": "x"}
    whole = {"suites": {"vqav2": figures | {"suite": suite, "files": {}}}, "seed": 0, "devices": ["cpu"]}
    whole |= {"checkpoint": {"step": 3, "inputs": {}}, "python": "3.11", "versions": {}}
    row = {"task": "vqa", "id": 1, "image": "a.png", "prompt": "p", "answers": ["x"] * 10, "raw": "x", "score": 1.0}
    (tmp_path / "vqav2").mkdir()

    def read(value, rows):
        (tmp_path / "metrics.json").write_text(json.dumps(value))
        (tmp_path / "vqav2" / "predictions.jsonl").write_text("\n".join(map(json.dumps, rows)))
        read_or_refuse(lambda: write_report(tmp_path), tmp_path, "config.vqav2.")

    rows = st.one_of(st.just([row]), broken([row]).filter(lambda value: isinstance(value, list)))
    fuzzed(read, st.one_of(st.just(whole), broken(whole)), rows, examples=60)


# captions, questions, predictions


def items(name, **files):
    suite = suites.get_config(name)[name]
    suite.update({field: str(path) for field, path in files.items()})
    readers = {
        "vqav2": vqa_suite.vqa_items,
        "coco_caption": caption_suite.caption_items,
        "flickr30k_retrieval": retrieval_items,
        "imagenet_zeroshot": classification_suite.classification_items,
        "xsum": summary_suite.summary_items,
    }
    return lambda: list(readers[name](suite))


def test_coco_captions(folder, fuzzed):
    path = folder / "c.json"

    def read(value):
        path.write_text(json.dumps(value))
        read_or_refuse(lambda: FolderPairs(path, folder, 1.0), path.name, "config.")
        read_or_refuse(items("coco_caption", captions=path, images=folder), path.name, "config.")

    fuzzed(read, broken(COCO), examples=150)


def test_jsonl_captions(folder, fuzzed):
    path = folder / "c.jsonl"

    def read(values):
        path.write_text("\n".join(map(json.dumps, [*LINES, *values])))
        read_or_refuse(lambda: FolderPairs(path, folder, 1.0), path.name, "config.")
        read_or_refuse(items("coco_caption", captions=path, images=folder), path.name, "config.")

    fuzzed(read, st.lists(st.one_of(broken(LINES[0]), VALUES), max_size=3), examples=150)


def test_karpathys_files(folder, fuzzed):
    path = folder / "dataset.json"

    def read(value):
        path.write_text(json.dumps(value))
        read_or_refuse(items("flickr30k_retrieval", captions=path, images=folder), path.name, "config.", "a.png")

    fuzzed(read, broken(KARPATHY), examples=100)


def test_any_bytes(folder, fuzzed):
    def read(data):
        for suffix in (".json", ".jsonl", ".tsv", ".txt"):
            path = folder / f"bytes{suffix}"
            path.write_bytes(data)
            if suffix == ".txt":
                read_or_refuse(lambda path=path: TextLines(path), path.name)
                continue
            read_or_refuse(lambda path=path: FolderPairs(path, folder, 1.0), path.name, "config.")
            read_or_refuse(items("coco_caption", captions=path, images=folder), path.name, "config.")

    fuzzed(read, BYTES, examples=150)


def test_questions_and_answers(folder, fuzzed):
    def read(questions, answers, which):
        (folder / "q.json").write_text(json.dumps(QUESTIONS if which == "answers" else questions))
        (folder / "a.json").write_text(json.dumps(ANSWERS if which == "questions" else answers))
        suite = {"questions": folder / "q.json", "annotations": folder / "a.json", "images": folder}
        prompts = read_or_refuse(items("vqav2", image_name="{image_id}.png", **suite), ".json", "config.")
        for prompt in prompts or ():  # what is let through can be scored
            assert 0 <= vqa_suite.judge_answer(prompt.row | {"raw": "x"})["score"] <= 1

    fuzzed(read, broken(QUESTIONS), broken(ANSWERS), st.sampled_from(["questions", "answers", "both"]), examples=150)


@pytest.mark.parametrize("name", ["labels.csv", "classes.txt", "classes.json"])
def test_classes_and_labels(folder, fuzzed, name):
    files = {
        "labels.csv": b"ImageId,PredictionString\na,n01 1 2 3 4\nb,n02 1 2 3 4\n",
        "classes.txt": b"n01 tench, Tinca tinca\nn02 goldfish\n",
        "classes.json": b'{"n01": "tench", "n02": "goldfish"}',
    }
    for other, whole in files.items():
        (folder / other).write_bytes(whole)
    classes = folder / (name if name.startswith("classes") else "classes.txt")
    places = {"images": folder, "labels": folder / "labels.csv", "classes": classes, "image_name": "{image_id}.png"}

    def read(data):
        (folder / name).write_bytes(data)
        read_or_refuse(items("imagenet_zeroshot", **places), folder, "config.")

    fuzzed(read, st.one_of(damaged(files[name]), BYTES), examples=100)


@pytest.mark.parametrize("name", ["documents", "summaries"])
def test_documents_and_summaries(tmp_path, fuzzed, name):
    places = {field: tmp_path / f"test.{field}" for field in ("documents", "summaries")}
    for path in places.values():
        path.write_text("first\nsecond\nthird\n")

    def read(data):
        places[name].write_bytes(data)
        read_or_refuse(items("xsum", **places), *places.values())

    fuzzed(read, st.one_of(damaged(b"first\nsecond\nthird\n"), BYTES), examples=100)


PREDICTIONS = {
    "vqav2": ([{"question_id": 1, "answer": "x"}, {"question_id": 2, "answer": "y"}], ANSWERS),
    "caption": ([{"image_id": 1, "caption": "a ball"}, {"image_id": 2, "caption": "b"}], COCO),
}


@pytest.mark.parametrize("suite", PREDICTIONS)
@pytest.mark.parametrize("which", ["predictions", "annotations"])
def test_predictions_to_score(tmp_path, fuzzed, suite, which):
    predictions, annotations = PREDICTIONS[suite]
    paths = {name: tmp_path / f"{name}.json" for name in ("predictions", "annotations")}
    paths["predictions"].write_text(json.dumps(predictions))
    paths["annotations"].write_text(json.dumps(annotations))

    def read(value):
        paths[which].write_text(json.dumps(value))
        read_or_refuse(lambda: judged_rows(Files(suite, **paths)), *paths.values())

    fuzzed(read, broken(predictions if which == "predictions" else annotations), examples=150)


@pytest.mark.parametrize("ending", ["jsonl", "json", "json.gz", "txt"])
def test_bytes_of_predictions(tmp_path, fuzzed, ending):
    path = tmp_path / f"predictions.{ending}"
    rows = [{"task": "caption", "id": k, "image": k, "raw": "a ball", "score": 1.0} for k in range(3)]
    whole = "\n".join(map(json.dumps, rows)).encode() if ending == "jsonl" else json.dumps(rows).encode()
    whole = gzip.compress(whole) if ending.endswith("gz") else whole

    def read(data):
        path.write_bytes(data)
        read_or_refuse(lambda: read_predictions(path, "summary" if ending == "txt" else "caption"), path)

    fuzzed(read, st.one_of(damaged(whole), BYTES), examples=150)


def test_rows_to_compare(tmp_path, fuzzed):
    rows = [{"task": "vqa", "id": k, "image": k, "raw": "a", "score": 0.3, "answers": ["a"] * 10} for k in range(3)]
    paths = [tmp_path / name for name in ("a.jsonl", "b.jsonl")]
    paths[0].write_text("\n".join(map(json.dumps, rows)))

    def read(values):
        paths[1].write_text("\n".join(map(json.dumps, values)))
        read_or_refuse(lambda: read_evaluation(paths[1]), paths[1])
        read_or_refuse(lambda: compare_paths(*paths, None), *paths, "in A", "A has", "B has")

    fuzzed(read, broken(rows).filter(lambda value: isinstance(value, list)), examples=100)


# what runs leave


def test_the_hashes_of_a_runs_files(tmp_path, fuzzed):
    whole = {"clip": {"config.json": "ab", "model.safetensors": "cd"}, "data.captions": {"c.json": "ef"}}

    def read(value):
        (tmp_path / INPUTS_FILE).write_text(json.dumps(value))
        read_or_refuse(lambda: check_inputs(tmp_path, base.get_config(), whole), tmp_path, "started with")

    fuzzed(read, broken(whole), examples=100)


def test_the_config_of_a_run(tmp_path, fuzzed):
    whole = json.loads(base.get_config().to_json_best_effort())

    def read(value):
        (tmp_path / "config.json").write_text(json.dumps(value))
        read_or_refuse(lambda: run_config(tmp_path), tmp_path, "config.")

    fuzzed(read, broken(whole), examples=60)


@pytest.mark.parametrize(
    ("model", "field", "value"),
    [
        ("bart", "vocab_size", 2**31),
        ("bart", "encoder_layers", 10**7),
        ("clip", "text_config.hidden_size", 2**40),
        ("clip", "vision_config.image_size", 2**20),
    ],
)
def test_sizes_that_no_array_has(assets, tmp_path, model, field, value):
    """Each once hung or ended in a traceback."""
    directory = shutil.copytree(assets / model, tmp_path / model)
    config = json.loads((directory / "config.json").read_text())
    *parts, last = field.split(".")
    (config[parts[0]] if parts else config)[last] = value
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=rf"config.json: {field} is {value}; it must be a whole number of at most"):
        read_model(directory)


def test_a_group_of_fields_that_is_none(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"optim": None}))
    with pytest.raises(UserError, match=r"config.json: not the configuration of a run"):
        run_config(tmp_path)


# texts to fine-tune on


@pytest.mark.parametrize("task", ["mnli", "stsb", "cola"])
def test_rows_of_glue(tmp_path, fuzzed, task):
    whole = {
        "mnli": b"index\tsentence1\tsentence2\tgold_label\n0\ta\tb\tneutral\n1\tc\td\tentailment\n",
        "stsb": b"index\tsentence1\tsentence2\tscore\n0\ta\tb\t2.5\n1\tc\td\t5\n",
        "cola": b"x\t1\t\ta text\nx\t0\t*\tanother\n",
    }[task]
    path = tmp_path / "train.tsv"

    def read(data):
        path.write_bytes(data)
        rows = read_or_refuse(lambda: GlueRows(path, task), path)
        for k in range(len(rows or ())):
            assert rows[k].text is not None and rows[k].label is not None

    fuzzed(read, st.one_of(damaged(whole), BYTES), examples=100)


@pytest.mark.parametrize("name", ["train.jsonl", "train.parquet", "train.source"])
def test_documents_with_summaries(tmp_path, fuzzed, name):
    rows = [{"document": "a long text", "summary": "short"}, {"document": "b", "summary": "c"}]
    path = tmp_path / name
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "train.parquet")
    (tmp_path / "train.target").write_text("short\nc\n")
    lines = {"train.jsonl": "\n".join(map(json.dumps, rows)), "train.source": "a long text\nb\n"}
    whole = lines[name].encode() if name in lines else path.read_bytes()
    values = (
        broken(rows)
        .filter(lambda value: isinstance(value, list))
        .map(lambda rows: "\n".join(map(json.dumps, rows if isinstance(rows, list) else [rows])).encode())
    )

    def read(data):
        path.write_bytes(data)
        documents = read_or_refuse(lambda: Documents([path]), tmp_path)
        for k in range(len(documents or ())):
            assert documents[k].text and documents[k].fields["document"]

    fuzzed(read, st.one_of(damaged(whole), values), examples=100)


def test_questions_to_train_on(folder, fuzzed):
    questions = {"questions": [{"question_id": k, "image_id": "a", "question": "what?"} for k in (1, 2)]}

    def read(asked, answered, template):
        (folder / "q.json").write_text(json.dumps(asked))
        (folder / "n.json").write_text(json.dumps(answered))
        names = folder, "config.data.image_name"
        source = read_or_refuse(lambda: Questions(folder / "q.json", folder / "n.json", folder, template, 1.0), *names)
        for k in range(len(source or ())):
            with contextlib.suppress(RecordError):
                assert isinstance(source[k].text, str)

    templates = st.one_of(st.just("{image_id}.png"), TEXT)
    asked, answered = (st.one_of(st.just(whole), broken(whole)) for whole in (questions, ANSWERS))
    fuzzed(read, asked, answered, templates, examples=100)


class Captions:
    """Records without pictures, as a cache stands before."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return Record(f"caption {index}", None, name=str(index))


@pytest.mark.parametrize("name", ["manifest.json", "faults.jsonl", "0.npy"])
def test_a_teacher_cache(tmp_path, fuzzed, name):
    shapes = TeacherOutputs(None, (3,), (3,))
    rows = np.zeros(2, row_type(shapes, "float32"))
    pack(rows, TeacherOutputs(None, np.ones((2, 3), np.float32), np.ones((2, 3), np.float32)))
    for shard in ("0.npy", "1.npy"):
        np.save(tmp_path / shard, rows)
    size, key = (tmp_path / "0.npy").stat().st_size, {"clip": {"a": "b"}}
    manifest = {"key": key, "shards": {shard: {"bytes": size} for shard in ("0.npy", "1.npy")}, "rows": 2}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "faults.jsonl").write_text('[3, "image does not decode", "3.png: broken"]\n')
    whole = (tmp_path / name).read_bytes()

    def row(pairs, k):
        with contextlib.suppress(RecordError):  # whatever the file says of why it could not be used
            return pairs[k]

    def read(data):
        (tmp_path / name).write_bytes(data)
        if name == "0.npy":  # past the look at its size
            manifest["shards"]["0.npy"] = {"bytes": len(data)}
            (tmp_path / "manifest.json").write_text(json.dumps(manifest))
        _opened.cache_clear()
        pairs = read_or_refuse(lambda: CachedPairs(Captions(), str(tmp_path), key), tmp_path)
        for k in range(4 if pairs is not None else 0):
            read_or_refuse(lambda k=k: row(pairs, k), tmp_path)

    json_value = broken(json.loads(whole)).map(lambda v: json.dumps(v).encode()) if name != "0.npy" else st.nothing()
    fuzzed(read, st.one_of(damaged(whole), json_value), examples=100)
