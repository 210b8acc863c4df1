"""What belongs together stays together: every field of a batch's row, and of a source's record, is of one item."""

import itertools
import json

import numpy as np
import pytest
from PIL import Image

from vlkd_jax.data.pipeline import Encoder, batches
from vlkd_jax.data.sources import FolderPairs, Subset, TextLines
from vlkd_jax.data.text import BartText
from vlkd_jax.models.preprocessing import Preprocessing
from vlkd_jax.shapes import world
from vlkd_jax.shapes.sources import ShapesPairs, ShapesTexts
from vlkd_jax.shapes.suite import scene_match


def is_corrupted(source, text, mask):
    """Whether `source` is `text` with spans of any length, also none, replaced by masks."""
    reached = {0}  # how much of the text may have been read
    for token in source:
        if token == mask:
            reached = set(range(min(reached), len(text) + 1))
        else:
            reached = {k + 1 for k in reached if k < len(text) and text[k] == token}
        if not reached:
            return False
    return len(text) in reached


def test_corruption_is_recognised():
    assert is_corrupted([1, 9, 4], [1, 2, 3, 4], 9) and is_corrupted([9], [1, 2], 9) and is_corrupted([1, 9], [1], 9)
    assert not is_corrupted([4, 9, 1], [1, 2, 3, 4], 9) and not is_corrupted([1, 9, 4], [1, 2, 3], 9)
    assert not is_corrupted([1, 2], [1, 2, 3], 9)


@pytest.mark.parametrize("threads", [0, 2])
def test_every_field_of_a_row_is_of_its_record(assets, threads):
    """Text, corrupted text, context, prompt and index, over shuffled batches of texts of the built-in world."""
    text = BartText(assets / "bart")
    encode = Encoder(bart_text=text, text_length=64, source_length=64, context_length=64)
    source = ShapesTexts(0, "train")
    stream = batches(source, encode, batch_size=8, seed=3, threads=threads)
    asked = 0
    for batch in itertools.islice(stream, 12):
        for row, index in enumerate(batch.index):
            record = source[int(index)]
            read = {
                name: getattr(batch, f"{name}_ids")[row][getattr(batch, f"{name}_mask")[row]].tolist()
                for name in ("text", "source", "context")
            }
            assert read["text"] == text.wrap(text.encode(record.text))
            assert read["context"] == (text.wrap(text.encode(record.context)) if record.context else [])
            prompt = [] if record.prompt is None else text.encode(record.prompt)
            if prompt:
                asked += 1
                assert read["source"] == text.wrap([*prompt, text.mask])
            else:
                assert is_corrupted(read["source"], read["text"], text.mask)
            losses = batch.text_ids[row][batch.target_mask[row]].tolist()
            assert losses == (read["text"][1 + len(prompt) :] if prompt else read["text"])
    assert asked > 40


@pytest.mark.parametrize("split", ["train", "test"])
def test_captions_of_the_world_are_of_their_scene(split):
    source = ShapesPairs(5, split, twins=2, complete=1.0)
    for index in range(60):
        scene = world.make_scene(5, split, index, 2)
        assert scene_match(source[index].text, [t.attributes for t in scene.things])[0]
        assert not scene_match(source[index ^ 1].text, [t.attributes for t in scene.things])[0]


@pytest.fixture
def pictures(tmp_path):
    for k in range(6):
        Image.new("RGB", (8, 8), (40 * k,) * 3).save(tmp_path / f"{k}.png")
    return tmp_path


PAIRS = [(k, f"caption {k} of {n}") for k, n in ((3, 0), (0, 0), (5, 0), (0, 1), (2, 0), (3, 1), (4, 0), (1, 0))]


@pytest.mark.parametrize("suffix", ["json", "jsonl", "tsv"])
def test_pairs_of_a_folder_keep_picture_caption_and_place(pictures, suffix):
    """Lines in no order, COCO's images in another order than their ids; a name is of the place it is read from."""
    path = pictures / f"captions.{suffix}"
    if suffix == "json":
        images = [{"id": 50 - 3 * k, "file_name": f"{k}.png"} for k in (4, 1, 0, 3, 5, 2)]
        annotations = [{"id": 200 - n, "image_id": 50 - 3 * k, "caption": c} for n, (k, c) in enumerate(PAIRS)]
        path.write_text(json.dumps({"annotations": annotations, "images": images}))
        places = [f"annotation {200 - n}" for n in range(len(PAIRS))]
    else:
        lines = [json.dumps({"caption": c, "image": f"{k}.png"}) for k, c in PAIRS]
        if suffix == "tsv":
            lines = [f"{k}.png\t{c}" for k, c in PAIRS]
        path.write_text("\n\n".join(lines))
        places = [f"line {1 + 2 * n}" for n in range(len(PAIRS))]
    source = FolderPairs(path, pictures)
    records = [source[n] for n in range(len(source))]
    assert [(record.image, record.text) for record in records] == [(pictures / f"{k}.png", c) for k, c in PAIRS]
    assert [record.name for record in records] == [f"{path} {place}" for place in places]


def test_pictures_meet_their_captions_in_batches(pictures, assets):
    """Files are decoded into the row of their caption, known by their grey."""
    path = pictures / "captions.tsv"
    path.write_text("\n".join(f"{k}.png\t{c}" for k, c in PAIRS))
    text = BartText(assets / "bart")
    encode = Encoder(bart_text=text, preprocessing=Preprocessing(8, 8))
    source, rng = FolderPairs(path, pictures), np.random.default_rng(0)
    grey = {k: encode(source[n], rng)["pixels"].mean() for n, (k, _) in enumerate(PAIRS)}
    assert sorted(grey, key=grey.get) == list(range(6))
    for batch in itertools.islice(batches(source, encode, batch_size=4, seed=1, threads=2), 6):
        for row, index in enumerate(batch.index):
            picture, caption = PAIRS[index]
            assert text.decode(batch.text_ids[row]) == caption
            assert batch.pixels[row].mean() == pytest.approx(grey[picture], abs=1e-6)


def test_lines_and_parts_keep_their_order_and_names(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_text("\n".join(f"text {n + 1}" for n in range(30)))
    lines = TextLines(path)
    assert all(lines[n].name == f"{path} {lines[n].text}" for n in range(30))
    order = {lines[n].text: n for n in range(30)}
    parts = [[part[n] for n in range(len(part))] for part in (Subset(lines, True, 7), Subset(lines, False, 7))]
    for part in parts:
        numbers = [order[record.text] for record in part]
        assert numbers == sorted(numbers) and part == [lines[n] for n in numbers]
    assert sum(map(len, parts)) == 30
