"""Evaluation sets in record files: the same items as from the official files, and what cannot be prepared."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image
from tiny import SHARED_DATA

from vlkd_jax.configs import suites
from vlkd_jax.data.leakage import find
from vlkd_jax.data.prepare_suite import prepare_suite
from vlkd_jax.data.records import RecordPairs
from vlkd_jax.errors import UserError
from vlkd_jax.evals.prepared import picture_named
from vlkd_jax.evals.suites import SUITES
from vlkd_jax.evaluate import hash_files
from vlkd_jax.manifest import file_sha256

NUMBERS = (7, 3, 11, 5, 2)
DOMAINS = ("in-domain", "near-domain", "out-domain", "near-domain", "in-domain")


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def pictures(folder, names):
    folder.mkdir(parents=True, exist_ok=True)
    for k, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(k).integers(0, 255, (6, 9, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((90, 60)).save(folder / name)


def vqa(root, ok=False):
    names = {n: f"COCO_val2014_{n:012d}.jpg" for n in NUMBERS}
    pictures(root / "val2014", names.values())
    asked = [
        {"question_id": 10 * n + k, "image_id": n, "question": f"is é {n}\u2028 or {k}?"}
        for k in range(3)
        for n in NUMBERS
    ]
    answers = [{"answer": f"{k}", "raw_answer": f"{k}s", "answer_id": k + 1} for k in range(10)]
    answered = [
        {"question_id": q["question_id"], "image_id": q["image_id"], "answers": answers, "answer_type": "other"}
        for q in asked[::-1]
    ]
    prefix = ("", "") if ok else ("v2_", "v2_")
    write(root / f"{prefix[0]}OpenEnded_mscoco_val2014_questions.json", {"questions": asked})
    write(root / f"{prefix[1]}mscoco_val2014_annotations.json", {"annotations": answered})


def karpathy(root, name, images):
    entries = [
        {
            "filename": f"{n}.jpg",
            "split": "test" if n != 5 else "train",
            "sentences": [{"raw": f"a cat, {n} \u00e9 {k}"} for k in range(5)],
        }
        | ({"cocoid": n, "filepath": "val2014"} if name == "coco" else {"imgid": n})
        for n in NUMBERS
    ]
    pictures(root / images, [f"{entry.get('filepath', '.')}/{entry['filename']}" for entry in entries])
    write(root / f"dataset_{name}.json", {"images": entries})


def nocaps(root):
    images = [{"id": n, "file_name": f"{n}.jpg", "domain": domain} for n, domain in zip(NUMBERS, DOMAINS, strict=True)]
    annotations = [{"id": 10 * n + k, "image_id": n, "caption": f"{n} of {k}"} for n in NUMBERS for k in range(10)]
    pictures(root / "nocaps_val", [image["file_name"] for image in images])
    write(root / "nocaps_val_4500_captions.json", {"images": images, "annotations": annotations})


OFFICIAL = {
    "vqav2": vqa,
    "okvqa": lambda root: vqa(root, ok=True),
    "coco_caption": lambda root: karpathy(root, "coco", "."),
    "coco_retrieval": lambda root: karpathy(root, "coco", "."),
    "flickr30k_caption": lambda root: karpathy(root, "flickr30k", "flickr30k-images"),
    "nocaps": nocaps,
}


def config_of(name, root, **changes):
    config = suites.get_config(name)
    config.root = str(root)
    for field, value in changes.items():
        config[name][field] = value
    return config


def items(config):
    """Of each item its row, its texts and its picture's pixels."""
    (name,) = config.suites
    found = []
    for item in SUITES[config[name].kind].items(config[name]):
        picture = item.open_image()
        found.append((item.row, getattr(item, "texts", None), np.asarray(picture).tolist()))
    return found


@pytest.mark.parametrize("name", OFFICIAL)
def test_the_same_items_as_from_the_official_files(name, tmp_path, capsys):
    OFFICIAL[name](tmp_path / "official")
    config = config_of(name, tmp_path / "official")
    expected = items(config)
    manifest = prepare_suite(config, tmp_path / "set", workers=1)
    assert manifest["in"] == manifest["out"] == len({row["image"] for row, _, _ in expected})
    shutil.rmtree(tmp_path / "official")
    prepared = config_of(name, tmp_path, records="set")
    assert sorted(items(prepared), key=str) == sorted(expected, key=str)
    if name == "nocaps":
        assert {row["domain"] for row, _, _ in expected} == set(DOMAINS)
    files = hash_files(prepared[name])
    assert files["records"]["sha256"] == file_sha256(tmp_path / "set" / "manifest.json") and len(files) == 1
    for row, _, pixels in expected[:2]:
        assert np.asarray(picture_named(prepared[name], row["image"])).tolist() == pixels
    assert len(RecordPairs(tmp_path / "set", manifest["options"]["split"])) == manifest["out"]
    told, _ = find(tmp_path / "set", tmp_path / "set", 4)
    assert told["exact"] == manifest["out"]


def test_it_goes_on_only_with_the_same_files(tmp_path):
    vqa(tmp_path / "a")
    config = config_of("vqav2", tmp_path / "a")
    first = prepare_suite(config, tmp_path / "set", workers=1)
    assert prepare_suite(config, tmp_path / "set", workers=1) == first
    path = tmp_path / "a" / "v2_mscoco_val2014_annotations.json"
    path.write_text(path.read_text().replace('"answer": "1"', '"answer": "one"'))
    with pytest.raises(UserError, match=r"source.files changed"):
        prepare_suite(config, tmp_path / "set", workers=1)


def test_what_cannot_be_prepared_or_read(tmp_path):
    vqa(tmp_path / "a")
    config = suites.get_config("vqav2,okvqa")
    with pytest.raises(UserError, match="names 2 suites"):
        prepare_suite(config, tmp_path / "set")
    with pytest.raises(UserError, match="of kind shapes"):
        prepare_suite(suites.get_config("shapes"), tmp_path / "set")
    with pytest.raises(UserError, match=r"not there: .*nocaps_val_4500_captions.json"):
        prepare_suite(config_of("nocaps", tmp_path / "a"), tmp_path / "set")
    broken = next((tmp_path / "a" / "val2014").iterdir())
    whole = broken.read_bytes()
    broken.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=broken.name):
        prepare_suite(config_of("vqav2", tmp_path / "a"), tmp_path / "set")
    manifest = prepare_suite(config_of("vqav2", tmp_path / "a", max_unusable=0.5), tmp_path / "part", workers=1)
    assert manifest["out"] == len(NUMBERS) - 1 and sum(manifest["skipped"].values()) == 1
    for name, records, told in (
        ("okvqa", "part", "made of suite vqav2, and this is okvqa"),
        ("vqav2", "nowhere", "no manifest.json in it; config.vqav2.records takes an --output of vlkd prepare-suite"),
    ):
        with pytest.raises(UserError, match=told):
            items(config_of(name, tmp_path, records=records))


@pytest.mark.shared_data
def test_real_files(tmp_path):
    """Photos of COCO with their captions and questions; five captions each, Karpathy's form and the plain one."""
    shutil.copytree(SHARED_DATA / "coco_open", tmp_path / "coco")
    changes = {"captions": "captions.json", "images": "images"}
    config = config_of("coco_caption", tmp_path / "coco", **changes)
    expected = items(config)
    manifest = prepare_suite(config, tmp_path / "captions", workers=2)
    assert manifest["out"] == len(expected) == 110
    assert items(config_of("coco_caption", tmp_path, records="captions")) == expected
    changes = {"questions": "vqa_questions.json", "annotations": "vqa_annotations.json", "images": "images"}
    config = config_of("vqav2", tmp_path / "coco", **changes)
    expected = items(config)
    prepare_suite(config, tmp_path / "questions", workers=1)
    assert items(config_of("vqav2", tmp_path, records="questions")) == expected and len(expected) == 8
