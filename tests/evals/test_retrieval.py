"""Retrieval and classification: ranks against plain loops, ties, towers, pictures that cannot be used."""

import json

import numpy as np
import pytest
from PIL import Image

from vlkd_jax import predict
from vlkd_jax.configs import suites
from vlkd_jax.errors import UserError
from vlkd_jax.evals import classification_suite, retrieval, retrieval_suite
from vlkd_jax.evals.retrieval import ranks
from vlkd_jax.evals.suite import predict_rows


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_ranks_are_those_of_a_search_by_every_query(rng, monkeypatch):
    """Against plain loops, both directions, five texts a picture, in blocks that do not divide the queries."""
    monkeypatch.setattr(retrieval, "BLOCK", 7)
    images, image_of = unit(rng.normal(size=(30, 6))), np.repeat(np.arange(30), 5)
    order = rng.permutation(150)
    image_of = image_of[order]
    texts = unit(images[image_of] + 0.8 * rng.normal(size=(150, 6)))
    similarity = texts @ images.T
    to_image = [1 + sorted(-similarity[t]).index(-similarity[t, image_of[t]]) for t in range(150)]
    assert ranks(texts, images, image_of, np.arange(30)).tolist() == to_image
    to_text = []
    for k in range(30):
        found = sorted(range(150), key=lambda t: -similarity[t, k])
        to_text.append(1 + next(at for at, t in enumerate(found) if image_of[t] == k))
    assert ranks(images, texts, np.arange(30), image_of).tolist() == to_text
    assert 1 in to_text and max(to_text) > 3 and max(to_image) > 5


def test_equal_ones_count_against_the_model():
    same, numbers = np.tile([[1.0, 0.0]], (3, 1)), np.arange(3)
    assert ranks(same, same, numbers, numbers).tolist() == [3, 3, 3]
    twins = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    assert ranks(twins, twins, numbers, numbers).tolist() == [2, 2, 1]
    assert ranks(same * np.nan, same, numbers, numbers).tolist() == [3, 3, 3]


COLOURS = {"red": (200, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 200), "grey": (90, 110, 100)}


@pytest.fixture
def towers(monkeypatch):
    """A teacher that sees mean colours and knows their names; a student that takes green for blue."""

    def image_embeddings(model, images, batch_size):
        for image in images:
            yield unit(np.asarray(image, float).mean((0, 1)))[None]

    def embed(model, texts, batch_size):
        return unit(np.array([COLOURS[next(word for word in COLOURS if word in text)] for text in texts], float))

    def embed_student(model, texts, batch_size):
        return embed(model, [text.replace("green", "blue") for text in texts], batch_size)

    monkeypatch.setattr(predict, "image_embeddings", image_embeddings)
    monkeypatch.setattr(predict, "embed_texts", embed_student)
    monkeypatch.setattr(predict, "embed_texts_clip", embed)


@pytest.fixture
def folder(tmp_path):
    for name, colour in COLOURS.items():
        Image.new("RGB", (20, 20), colour).save(tmp_path / f"{name}.png")
    return tmp_path


def captions(folder, names=tuple(COLOURS), each=5):
    """Karpathy's file of these pictures: `each` captions, a sixth that names another colour, and a training picture."""
    images = [
        {
            "filename": f"{name}.png",
            "split": "test",
            "imgid": k,
            "sentences": [{"raw": f"{name} {n}"} for n in range(each)] + [{"raw": "a red one"}] * (each == 5),
        }
        for k, name in enumerate(names)
    ]
    images.append({"filename": "gone.png", "split": "train", "sentences": [{"raw": "red"}]})
    (folder / "dataset.json").write_text(json.dumps({"images": images}))
    suite = suites.get_config("flickr30k_retrieval").flickr30k_retrieval
    suite.update({"captions": "dataset.json", "images": ".", "root": str(folder)})
    return suite


@pytest.mark.parametrize("tower", ["student", "clip"])
def test_five_captions_each(towers, folder, tower):
    suite = captions(folder)
    items = list(retrieval_suite.retrieval_items(suite))
    assert [len(item.texts) for item in items] == [5] * 4
    rows = list(predict_rows(retrieval_suite.SUITE, items, None, 3, tower))
    metrics = retrieval_suite.score_retrieval(rows)
    # the student's texts of green and blue are alike: its green ones find blue, and blue pictures find both at once
    right = {"clip": (1, 1), "student": (0.75, 0.5)}[tower]
    assert (metrics["text_to_image_r_at_1"], metrics["image_to_text_r_at_1"]) == right
    assert (metrics["n"], metrics["texts"]) == (4, 20) and metrics["text_to_image_r_at_5"] == 1
    again = [json.loads(json.dumps(row)) for row in rows]
    assert retrieval_suite.score_retrieval(again) == metrics


@pytest.mark.parametrize("unusable", ["left_out", "miss"])
def test_a_damaged_picture(towers, folder, unusable):
    suite = captions(folder)
    suite.unusable = unusable
    items = list(retrieval_suite.retrieval_items(suite))
    (folder / "blue.png").write_bytes(b"no picture")
    rows = list(predict_rows(retrieval_suite.SUITE, items, None, 3, "clip"))
    assert [row["image"] for row in rows if "fault" in row] == ["blue.png"] and len(rows) == 4
    scored = [row for row in rows if "score" in row]
    metrics = retrieval_suite.score_retrieval(scored)
    assert metrics["image_to_text_r_at_10"] == (1 if unusable == "left_out" else 0.75)
    assert metrics["n"] == (3 if unusable == "left_out" else 4)


def test_what_captions_cannot_be_used_for(folder):
    suite = captions(folder, each=0)
    with pytest.raises(UserError, match=r"dataset\.json: 4 of 4 pictures have no caption, such as red\.png"):
        list(retrieval_suite.retrieval_items(suite))
    suite = captions(folder)
    suite.split = "tets"
    with pytest.raises(UserError, match=r"no images of split 'tets'; config\.flickr30k_retrieval\.split is of"):
        list(retrieval_suite.retrieval_items(suite))
    suite.update({"split": "test", "captions_each": -1})
    with pytest.raises(UserError, match="captions_each is -1"):
        list(retrieval_suite.retrieval_items(suite))


def imagenet(folder, names=("red", "green", "blue", "grey")):
    """The official files: all pictures in one folder, a solution file, names by folder."""
    (folder / "val").mkdir()
    lines = ["ImageId,PredictionString"]
    for k, name in enumerate(names * 2):
        Image.new("RGB", (20, 20), COLOURS[name]).save(folder / "val" / f"P_{k}.JPEG", format="JPEG")
        lines.append(f"P_{k},n{list(COLOURS).index(name)} 1 2 3 4 n9 5 6 7 8 ")
    (folder / "LOC_val_solution.csv").write_text("\n".join(lines) + "\n")
    mapping = "".join(f"n{k} {name}, another name\n" for k, name in enumerate(COLOURS))
    (folder / "LOC_synset_mapping.txt").write_text(mapping)
    suite = suites.get_config("imagenet_zeroshot").imagenet_zeroshot
    suite.root = str(folder)
    return suite


@pytest.mark.parametrize("tower", ["student", "clip"])
def test_classes_by_the_mean_of_their_templates(towers, tmp_path, tower):
    suite = imagenet(tmp_path)
    items = list(classification_suite.classification_items(suite))
    assert items[0].classes.names == tuple(COLOURS) and {len(texts) for texts in items[0].classes.texts} == {7}
    assert items[0].classes.texts[1][2] == "a origami green."
    rows = list(predict_rows(classification_suite.SUITE, items, None, 3, tower))
    metrics = classification_suite.score_classes(rows)
    # the student has one embedding for green and blue: blue pictures are as near to green, green ones nearer to grey
    assert metrics["top_1"] == metrics["mean_per_class"] == (1 if tower == "clip" else 0.5) and metrics["top_5"] == 1
    assert (metrics["n"], metrics["classes"]) == (8, 4)
    assert [row["name"] for row in rows] == list(COLOURS) * 2 and all(len(row["best"]) == 4 for row in rows)


def test_means_of_classes_against_numpy(rng, monkeypatch):
    """Random embeddings: ranks and the five best are those of the plain formula."""
    texts, images = rng.normal(size=(12, 3, 8)), unit(rng.normal(size=(20, 8)))
    monkeypatch.setattr(predict, "embed_texts", lambda *_: unit(texts).reshape(36, 8))
    monkeypatch.setattr(predict, "image_embeddings", lambda model, pictures, size: [images[[k]] for k, _ in pictures])
    monkeypatch.setattr(classification_suite, "with_pictures", lambda items, _: ((item, (0, item)) for item in items))
    monkeypatch.setattr(
        predict, "image_embeddings", lambda model, pictures, size: (images[k : k + 1] for k, _ in enumerate(pictures))
    )
    names = tuple(f"c{k}" for k in range(12))
    classes = classification_suite.Classes(names, ((("x",) * 3),) * 12)
    labels = rng.integers(0, 12, 20)
    items = [classification_suite.Shown({"task": "c", "label": int(k)}, classes, None) for k in labels]
    rows = list(classification_suite.classify(None, items, 4, "student"))
    expected = images @ unit(unit(texts).mean(1)).T
    order = np.argsort(-expected, 1)
    assert [row["rank"] for row in rows] == [1 + order[k].tolist().index(label) for k, label in enumerate(labels)]
    assert [row["best"] for row in rows] == [[names[k] for k in row[:5]] for row in order]


def test_folders_for_classes(folder):
    suite = suites.get_config("imagenet_zeroshot").imagenet_zeroshot
    suite.update({"root": str(folder), "images": "mine", "classes": "none"})
    with pytest.raises(UserError, match=r"not there: .*mine \(config\.imagenet_zeroshot\.images\); --config\.root=DIR"):
        list(classification_suite.classification_items(suite))
    for name, colour in COLOURS.items():
        (folder / "mine" / f"light_{name}").mkdir(parents=True)
        Image.new("RGB", (20, 20), colour).save(folder / "mine" / f"light_{name}" / "1.png")
    items = list(classification_suite.classification_items(suite))
    assert items[0].classes.names == ("light blue", "light green", "light grey", "light red")
    assert [item.row["name"] for item in items] == list(items[0].classes.names)
    for names, told in (
        (["a", "b"], "2 names for 4 folders"),
        ({"light_red": "red"}, "class light_blue has no name"),
        ({"light_red": 1}, "takes {folder: name}"),
        ("a", "takes {folder: name}"),
    ):
        (folder / "names.json").write_text(json.dumps(names))
        suite.classes = "names.json"
        with pytest.raises(UserError, match=told):
            list(classification_suite.classification_items(suite))
