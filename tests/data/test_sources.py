"""Sources: the three folder formats and what is wrong in them, held-out parts, and texts that carry no picture."""

import codecs
import io
import json

import numpy as np
import pytest
from PIL import Image

from vlkd_jax.console import say
from vlkd_jax.data.files import read_json
from vlkd_jax.data.sources import CaptionTexts, FolderPairs, Subset, TextLines
from vlkd_jax.errors import RecordError, UserError
from vlkd_jax.shapes import world
from vlkd_jax.shapes.sources import ShapesPairs, ShapesTexts

PAIRS = [("a.png", "a red circle"), ("sub/b.jpg", "two  dogs\tand \u2028 a café"), ("a.png", "the circle again")]
ONE_LINE = [(image, " ".join(text.split())) for image, text in PAIRS]


@pytest.fixture
def folder(tmp_path):
    """A folder with the two pictures of PAIRS."""
    (tmp_path / "images" / "sub").mkdir(parents=True)
    for k, name in enumerate(("a.png", "sub/b.jpg")):
        Image.new("RGB", (20 + k, 30), (200 * k, 10, 10)).save(tmp_path / "images" / name)
    return tmp_path


def coco(pairs):
    names = sorted({image for image, _ in pairs})
    ids = {name: 90 - 7 * k for k, name in enumerate(names)}  # in another order than the images
    images = [{"id": ids[name], "file_name": name, "license": 1} for name in names]
    annotations = [{"id": 100 + k, "image_id": ids[i], "caption": c} for k, (i, c) in enumerate(pairs)]
    return json.dumps({"info": {}, "images": images, "annotations": annotations})


def jsonl(pairs):
    return "\n".join(json.dumps({"image": i, "caption": c, "more": 1}) for i, c in pairs) + "\n\n"


def tsv(pairs):
    return "".join(f"{i}\t{' '.join(c.split())}\r\n" for i, c in pairs) + "\n"


FORMATS = {"c.json": coco, "c.jsonl": jsonl, "c.tsv": tsv}


def read(folder, name, content):
    data = content if isinstance(content, bytes) else content.encode()
    (folder / name).write_bytes(data)
    return FolderPairs(folder / name, folder / "images")


def refused(folder, name, content):
    with pytest.raises(UserError) as caught:
        read(folder, name, content)
    message = str(caught.value)
    assert "\n" not in message and (name in message or "images" in message)
    return message


@pytest.mark.parametrize("name", FORMATS)
def test_folder_formats(folder, name):
    pairs = read(folder, name, FORMATS[name](PAIRS))
    assert len(pairs) == 3
    kept = [(str(r.image.relative_to(folder / "images")), r.text) for r in (pairs[i] for i in range(3))]
    assert kept == ONE_LINE
    assert all(name in pairs[i].name for i in range(3)) and len({pairs[i].name for i in range(3)}) == 3


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_wrong_with_a_pair_is_named(folder, name):
    write = FORMATS[name]
    message = refused(folder, name, write([*PAIRS, ("a.png", " ")]))
    assert "caption is empty" in message and ("line 4" in message or "annotation 103" in message)
    message = refused(folder, name, write([*PAIRS, ("missing.png", "x")]))
    assert "missing.png not found" in message and "data.images" in message
    (folder / "images" / "page.jpg").write_text("<html>404</html>")
    message = refused(folder, name, write([*PAIRS, ("page.jpg", "x")]))
    assert "page.jpg" in message and "does not decode" in message and ("line 4" in message or "103" in message)
    (folder / "images" / "folder.png").mkdir()
    assert "folder.png not found" in refused(folder, name, write([("folder.png", "x")]))
    assert "UTF-8" in refused(folder, name, write(PAIRS).encode("utf-16"))
    assert "no captions" in refused(folder, name, write([]))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("c.json", "{", ["line 1", "not JSON"]),
        ("c.json", "[]", ["not a COCO captions file"]),
        ("c.json", '{"images": []}', ["field 'annotations'"]),
        ("c.json", '{"images": [{"id": 1}], "annotations": []}', ["field 'file_name'"]),
        ("c.json", '{"images": [3], "annotations": []}', ["not a COCO captions file"]),
        ("c.json", '{"images": [], "annotations": [3]}', ["not a COCO captions file"]),
        ("c.json", '{"images": [], "annotations": [{"image_id": [], "caption": "x"}]}', ["not a COCO captions file"]),
        (
            "c.json",
            '{"images": [], "annotations": [{"id": 5, "image_id": 9, "caption": "x"}]}',
            ["annotation 5", "image_id"],
        ),
        ("c.jsonl", '{"image": "a.png", "caption": "x"}\n{', ["line 2", "not JSON"]),
        ("c.jsonl", '{"image": "a.png"}', ["line 1", "field 'caption'"]),
        ("c.jsonl", '\n{"caption": "x"}', ["line 2", "field 'image'"]),
        ("c.jsonl", "[1]", ["line 1", "not an object"]),
        ("c.jsonl", '{"image": "a.png", "caption": null}', ["line 1", "caption is not a text"]),
        ("c.jsonl", '{"image": 5, "caption": "x"}', ["line 1", "image is not a text"]),
        ("c.tsv", "a.png", ["line 1", "1 fields"]),
        ("c.tsv", "a.png\tx\n\na.png\tx\ty", ["line 3", "3 fields"]),
        ("c.tsv", "a.png\t", ["line 1", "caption is empty"]),
        ("c.txt", "a.png\tx", ["data.captions", ".tsv"]),
    ],
)
def test_what_is_wrong_with_a_file_is_named(folder, name, content, words):
    message = refused(folder, name, content)
    assert all(word in message for word in words), message


def test_long_captions_and_odd_characters_are_read(folder):
    texts = ["x" * 200_000, 'say "hi", it\'s', "nul \x00 vt \x0b nel \x85", "a <mask> </s>"]
    pairs = read(folder, "c.tsv", "".join(f"a.png\t{t}\n" for t in texts))
    assert [pairs[i].text for i in range(4)] == [" ".join(t.split()) for t in texts]
    pairs = read(folder, "c.jsonl", "\n".join(json.dumps({"image": "a.png", "caption": t}) for t in ["\ud800", *texts]))
    assert len(pairs) == 5 and pairs[0].text == "\ud800"


def test_files_that_are_not_there(folder):
    for path in (folder / "absent.json", folder / "images"):
        with pytest.raises(UserError, match=str(path)):
            read_json(path)
    with pytest.raises(UserError, match=r"absent\.tsv: cannot be read"):
        FolderPairs(folder / "absent.tsv", folder)


@pytest.mark.parametrize("every", [2, 3, 20])
def test_parts_are_disjoint_and_complete(folder, every):
    path = folder / "lines.txt"
    path.write_text("\n\n".join(f"line {i}" for i in range(47)) + "\n")
    whole = TextLines(path)
    parts = [Subset(whole, held_out, every) for held_out in (True, False)]
    texts = [{part[i].text for i in range(len(part))} for part in parts]
    assert [len(f) for f in texts] == [len(p) for p in parts]
    assert not texts[0] & texts[1] and texts[0] | texts[1] == {f"line {i}" for i in range(47)}


def test_about_one_in_so_many_is_held_out(folder):
    (folder / "lines.txt").write_text("\n".join(f"line {i}" for i in range(4000)))
    whole = TextLines(folder / "lines.txt")
    for every in (2, 20):
        count, expected = len(Subset(whole, True, every)), 4000 / every
        assert abs(count - expected) < 4 * np.sqrt(expected)


@pytest.mark.parametrize("every", [2, 3, 20])
def test_an_image_lies_on_one_side_with_all_its_captions(folder, every):
    """Under whichever of its names, and wherever its lines stand; new lines move no image to the other side."""
    names = [f"{k}.png" for k in range(12)]
    for name in names:
        Image.new("RGB", (8, 8)).save(folder / "images" / name)
    lines = [(f"./{name}" if k == 3 else name, f"caption {k} of {name}") for k in range(5) for name in names]
    sides = []
    for content in (lines, lines[::-1], [*lines, ("a.png", "one more"), ("sub/b.jpg", "and another")]):
        pairs = read(folder, "c.tsv", tsv(content))
        parts = [Subset(pairs, held_out, every) for held_out in (True, False)]
        images = [{part[i].image.resolve() for i in range(len(part))} for part in parts]
        assert images[0] and images[1] and not images[0] & images[1]
        assert sum(map(len, parts)) == len(content)
        sides.append({path.name for path in images[0]} & set(names))
    assert sides[0] == sides[1] and (sides[2] == sides[0] or len(sides[0]) == 1)


def test_bad_lines_keep_their_place(folder):
    """Up to the share that is allowed: the good ones keep their numbers, each bad one raises its reason."""
    (folder / "images" / "page.jpg").write_text("<html>404</html>")
    lines = [{"image": "a.png", "caption": f"caption {k}"} for k in range(10)]
    lines[1] = {"image": "absent.png", "caption": "x"}
    lines[3] = {"image": "a.png", "caption": " "}
    lines[5] = {"image": "page.jpg", "caption": "x"}
    lines[7] = {"caption": "x"}
    (folder / "c.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n{\n")
    pairs = FolderPairs(folder / "c.jsonl", folder / "images", max_unusable=0.5)
    reasons = {}
    for index in range(len(pairs)):
        try:
            assert pairs[index].text == f"caption {index}"
        except RecordError as e:
            reasons[index] = e.reason
            assert f"line {index + 1}" in str(e)
    assert reasons == {
        1: "image not found",
        3: "caption empty",
        5: "image does not decode",
        7: "malformed entry",
        10: "malformed entry",
    }
    with pytest.raises(UserError, match=r"line 2: image .*absent\.png not found.*5 of 11 records.*is 0\.4"):
        FolderPairs(folder / "c.jsonl", folder / "images", max_unusable=0.4)


def test_annotations_without_their_fields_are_bad_lines(folder):
    data = json.loads(coco(PAIRS))
    data["annotations"] += [
        {"id": 500, "image_id": 7},
        {"id": 501, "caption": "x"},
        {"id": 502, "image_id": 99} | {"caption": "x"},
    ]
    (folder / "c.json").write_text(json.dumps(data))
    pairs = FolderPairs(folder / "c.json", folder / "images", max_unusable=0.5)
    assert {i: e.reason for i, e in pairs.faults.items()} == dict.fromkeys((3, 4, 5), "malformed entry")
    assert [f"annotation {500 + k}" in str(pairs.faults[3 + k]) for k in range(3)] == [True] * 3


def test_a_part_that_is_empty_is_named(folder):
    (folder / "lines.txt").write_text("one\n")
    with pytest.raises(UserError, match=r"lines\.txt: 1 different item"):
        Subset(TextLines(folder / "lines.txt"), held_out=False)
    (folder / "blank.txt").write_text("\n \n")
    with pytest.raises(UserError, match=r"blank\.txt: no text"):
        TextLines(folder / "blank.txt")


def test_texts_carry_no_picture(folder):
    (folder / "lines.txt").write_text("one\ntwo\n")
    pairs = read(folder, "c.jsonl", jsonl(PAIRS))
    for source in (TextLines(folder / "lines.txt"), ShapesTexts(0, "train"), CaptionTexts(ShapesPairs(0, "train"))):
        assert all(source[i].image is None for i in range(min(len(source), 300)))
    texts = CaptionTexts(pairs)
    assert [(texts[i].text, texts[i].image) for i in range(3)] == [(text, None) for _, text in ONE_LINE]
    assert [texts[i].name for i in range(len(texts))] == [pairs[i].name for i in range(3)]


@pytest.mark.parametrize("split", ["train", "validation"])
def test_pairs_of_the_world(split):
    source = ShapesPairs(5, split, twins=4, complete=0.8)
    for index in range(60):
        record, again = source[index], source[index]
        scene = world.make_scene(5, split, index, twins=4)
        np.testing.assert_array_equal(record.image, world.render(scene))
        np.testing.assert_array_equal(record.image, again.image)
        assert record.text == again.text and not (record.context or record.prompt)
        assert "?" not in record.text and "question" not in record.text and "answer" not in record.text
        assert split in record.name and str(index) in record.name


def test_texts_of_the_world():
    """Some of every kind, answers that the context supports, and never a held-out pair."""
    source = ShapesTexts(0, "train")
    records = [source[i] for i in range(1500)]
    assert records[:50] == [source[i] for i in range(50)]
    asked = [r for r in records if r.text.startswith("question: ")]
    shares = [len(asked) / len(records), np.mean([not r.context for r in records])]
    assert all(0.02 < share < 0.95 for share in shares), shares
    for record in asked:
        prompt, answer = record.text.rsplit(" answer: ", 1)
        assert record.prompt == f"{prompt} answer:" and record.context
        if answer in world.COLORS or answer in world.SHAPES or answer in world.RADII or answer in world.POSITIONS:
            assert answer in record.context
    texts = " ".join(r.text + " " + r.context for r in records)
    assert not any(" ".join(kind) in " ".join(r.context for r in records) for kind in world.HELD_OUT)
    assert all(word in texts for word in (*world.COLORS, *world.SHAPES))


@pytest.mark.parametrize("name", FORMATS)
def test_a_byte_order_mark_is_no_text(folder, name):
    """Windows programs begin a file with one."""
    content = FORMATS[name](PAIRS).encode()
    plain, marked = read(folder, name, content), read(folder, name, codecs.BOM_UTF8 + content)
    assert [marked[k] for k in range(3)] == [plain[k] for k in range(3)]
    assert "UTF-16, not UTF-8; save it as UTF-8" in refused(folder, name, FORMATS[name](PAIRS).encode("utf-16"))


def test_texts_end_where_lines_do(folder):
    path = folder / "lines.txt"
    path.write_bytes(codecs.BOM_UTF8 + "one\u2028still one\r\ntwo\x0b\n\n three \n".encode())
    lines = TextLines(path)
    assert [lines[k].text for k in range(len(lines))] == ["one\u2028still one", "two\x0b", " three "]


def test_an_image_id_of_two_pictures_is_refused(folder):
    """As where two data sets were merged; the same picture listed twice is none of that."""
    data = json.loads(coco(PAIRS))
    data["images"].append(dict(data["images"][0]))
    assert len(read(folder, "c.json", json.dumps(data))) == 3
    data["images"].append({"id": data["images"][0]["id"], "file_name": "sub/b.jpg"})
    message = refused(folder, "c.json", json.dumps(data))
    assert f"image id {data['images'][0]['id']} names two files, a.png and sub/b.jpg" in message


@pytest.mark.parametrize("name", ["c.json", "c.jsonl"])
def test_half_an_emoji_is_counted_and_costs_nothing(folder, capsys, name):
    pairs = [*PAIRS, ("a.png", "half \ud83d"), ("a.png", "\udc00")]
    for _ in ("training", "held out"):
        folder_pairs = read(folder, name, FORMATS[name](pairs))
        assert folder_pairs[3].text == "half \ud83d" and not folder_pairs.faults
    assert capsys.readouterr().out.count(f"{name}: 2 caption(s) hold half an emoji (a lone surrogate); it is read") == 1


def test_faults_are_told_all_at_once(folder):
    """Counts by kind, and five of them by name."""
    lines = [*(f"gone{k}.png\tx" for k in range(7)), "a.png\t ", "a.png\tfine"]
    message = refused(folder, "c.tsv", "\n".join(lines))
    assert message.startswith("image not found 7, caption empty 1: ")
    assert all((f"gone{k}.png" in message) == (k < 5) for k in range(7))
    assert "; and 3 more (8 of 9 records cannot be used, config.data.max_unusable is 0)" in message


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "gif", "bmp", "tiff"])
def test_downloads_that_broke_off_are_seen_at_the_start(folder, rng, kind):
    path = folder / "images" / f"cut.{kind}"
    Image.fromarray(rng.integers(0, 255, (60, 60, 3), np.uint8)).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole + (b"\0 trailing bytes" if kind == "jpeg" else b""))
    assert len(read(folder, "c.tsv", f"cut.{kind}\tx\n")) == 1
    path.write_bytes(whole[: len(whole) * 2 // 3])
    assert "image does not decode" in refused(folder, "c.tsv", f"cut.{kind}\tx\nb.png\tx\n")


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
def test_what_a_terminal_cannot_show_is_escaped(monkeypatch, encoding):
    """A picture's name may be half an emoji, a terminal's encoding ASCII."""
    written = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr("sys.stdout", written)
    say("record passed over: \ud83d caf\u00e9.png \u732b")
    shown = written.buffer.getvalue().decode(encoding)
    assert shown.startswith("record passed over: \\ud83d caf")
    assert (
        shown.encode("ascii", "backslashreplace").decode().encode().decode("unicode_escape").strip().endswith("\u732b")
    )
