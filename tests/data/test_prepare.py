"""`vlkd prepare` and what training reads of it: every kind of source, broken pairs, kills, damage."""

import csv
import gzip
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image
from tiny import ROOT, environment, tiny_config

from vlkd_jax.data.inputs import Columns, parts, read
from vlkd_jax.data.prepare import Options, caption_of, prepare, shrink
from vlkd_jax.data.records import RecordPairs
from vlkd_jax.data.streams import train_sources, train_stream
from vlkd_jax.errors import RecordError, UserError
from vlkd_jax.manifest import file_sha256
from vlkd_jax.runs import load_run
from vlkd_jax.tasks import make_task
from vlkd_jax.train import train

COUNT = 23
SHARED = ROOT.parent / "shared" / "data"


def picture(seed: int, width: int = 60, height: int = 40, form: str = "PNG", **settings) -> bytes:
    small = np.random.default_rng(seed).integers(0, 255, (5, 5, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(small).resize((width, height)).save(buffer, form, **settings)
    return buffer.getvalue()


CAPTIONS = [f'a "{k}", <b>é\u2028,\t{"x" * k}' for k in range(COUNT)]
CLEAN = [" ".join(caption.split()) for caption in CAPTIONS]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("images")
    for k in range(COUNT):
        (directory / f"{k}.png").write_bytes(picture(k))
    return directory


def tar_of(path: Path, samples: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as file:
        for name, data in samples.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


def source(kind: str, directory: Path, images: Path) -> tuple[Path, Columns]:
    """The same pairs in a file of this kind."""
    path, rows = directory / f"pairs.{kind}", [(f"{k}.png", CAPTIONS[k]) for k in range(COUNT)]
    columns = Columns(images=str(images))
    if kind == "tsv":
        rows = [(name, caption.replace("\t", " ")) for name, caption in rows]
        path.write_text("".join(f"{name}\t{caption}\n" for name, caption in rows), newline="")
    elif kind == "jsonl":
        path.write_text("\n\n".join(json.dumps({"image": a, "caption": b}, ensure_ascii=False) for a, b in rows))
    elif kind == "csv":
        with open(path, "w", newline="", encoding="utf-8-sig") as file:
            csv.writer(file).writerows([("url", "image", "caption"), *[("u\nv", a, b) for a, b in rows]])
    elif kind == "json":
        entries = [{"id": k, "image_id": k, "caption": rows[k][1]} for k in range(COUNT)]
        files = [{"id": k, "file_name": rows[k][0]} for k in range(COUNT)]
        path.write_text(json.dumps({"images": files, "annotations": entries}))
    elif kind == "parquet":
        table = pyarrow.table({"image": [a for a, _ in rows], "caption": [b for _, b in rows]})
        pyarrow.parquet.write_table(table, path, row_group_size=7)
    elif kind == "bytes.parquet":
        values = [{"bytes": picture(k), "path": None} for k in range(COUNT)]
        pyarrow.parquet.write_table(pyarrow.table({"image": values, "caption": CAPTIONS}), path, row_group_size=7)
    else:
        samples = {}
        for k in range(COUNT):
            samples[f"{k:05d}.png"] = picture(k)
            samples |= {f"{k:05d}.txt": CAPTIONS[k].encode()} if k % 2 else {}
            samples[f"{k:05d}.json"] = json.dumps({"caption": CAPTIONS[k], "status": "success"}).encode()
        tar_of(path, samples)
        if kind == "tar.gz":
            path.write_bytes(gzip.compress(path.read_bytes()))
    return path, columns


KINDS = ["tar", "tar.gz", "tsv", "jsonl", "csv", "json", "parquet", "bytes.parquet"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_source_gives_the_same_pairs(kind, images, tmp_path):
    """In parts of seven rows; each part read alone."""
    path, columns = source(kind, tmp_path, images)
    found = parts(path, columns, 7)
    assert len(found) == (1 if "tar" in kind else 4)
    samples = [sample for part in found for sample in read(part, columns)]
    assert [caption_of(sample) for sample in samples] == CLEAN
    data = [s.image if isinstance(s.image, bytes) else s.image.read_bytes() for s in samples]
    assert data == [picture(k) for k in range(COUNT)]
    assert len({sample.key for sample in samples}) == COUNT


def test_a_folder_of_tables_and_the_names_of_pictures(images, tmp_path):
    """CC3M's own columns; a picture's name from the row or from its URL's hash; what is no table is passed over."""
    (tmp_path / "in").mkdir()
    for k in range(2):
        (tmp_path / "in" / f"{k}.tsv").write_text(
            f"caption {k}\thttp://x/{k}.png?s=1\nother {k}\thttp://x/{k + 2}.png\n"
        )
    (tmp_path / "in" / "stats.txt").write_text("x")
    columns = Columns("1", "0", str(images), "{name}")
    samples = [s for part in parts(tmp_path / "in", columns, 10) for s in read(part, columns)]
    assert [(s.caption, s.image.name) for s in samples][:2] == [("caption 0", "0.png"), ("other 0", "2.png")]
    by_hash = Columns("1", "0", str(images), "{row:04d}-{md5}.jpg")
    first = next(read(parts(tmp_path / "in" / "1.tsv", by_hash, 10)[0], by_hash))
    assert first.image.name == "0000-" + hashlib.md5(b"http://x/1.png?s=1").hexdigest() + ".jpg"


@pytest.fixture(scope="module")
def prepared(images, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("out") / "data"
    path, columns = source("tsv", output.parent, images)
    prepare(path, output, columns, Options(rows=5, short=32), workers=2)
    return output


def test_what_is_written_is_what_is_read(prepared):
    """By tensorflow-datasets alone, by its own slices, and by the manifest."""
    pairs = RecordPairs(prepared, "train")
    assert [pairs[k].text for k in range(len(pairs))] == CLEAN
    for k in (0, COUNT - 1):
        shown = Image.open(io.BytesIO(pairs[k].image))
        assert (shown.size, shown.format, shown.mode) == ((48, 32), "JPEG", "RGB")
        expected = np.asarray(Image.open(io.BytesIO(picture(k))).resize((48, 32), Image.Resampling.LANCZOS), np.float32)
        assert np.abs(np.asarray(shown, np.float32) - expected).mean() < 4
    assert [RecordPairs(prepared, "train[4:9]")[k].text for k in range(5)] == CLEAN[4:9]
    manifest = json.loads((prepared / "manifest.json").read_text())
    assert (manifest["in"], manifest["out"], manifest["coverage"], manifest["skipped"]) == (COUNT, COUNT, 1.0, {})
    for name, told in manifest["records"].items():
        assert file_sha256(prepared / name) == told["sha256"]
    hashes = [json.loads(line) for line in (prepared / "hashes.jsonl").read_text().splitlines()]
    assert [h["image"] for h in hashes] == [hashlib.sha256(picture(k)).hexdigest() for k in range(COUNT)]
    assert not (prepared / "parts").exists()


def strange_pictures() -> dict[str, tuple[bytes, str | None]]:
    """Twelve classes: bytes, and the reason for which they are skipped, None where they are not."""
    good = picture(1, 100, 80, "JPEG")
    noise = np.random.default_rng(0)
    palette = Image.fromarray(noise.integers(0, 255, (9, 9), dtype=np.uint8), "P")
    palette.putpalette(noise.bytes(768))
    frames = [Image.new("RGB", (8, 8), (k * 40, 0, 0)) for k in range(4)]
    exif = Image.Exif()
    exif[0x0112] = 6

    def saved(image, form, **settings) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, form, **settings)
        return buffer.getvalue()

    bomb = saved(Image.new("1", (20_000, 20_000)), "PNG")
    deep = Image.fromarray(noise.integers(0, 65535, (9, 9), dtype=np.uint16))
    broken = "image does not decode"
    return {
        "truncated": (good[: len(good) // 2], broken),
        "html": (b"<!DOCTYPE html><html><body>404</body></html>", broken),
        "empty": (b"", broken),
        "cmyk": (saved(Image.new("CMYK", (9, 9), (9, 99, 9, 0)), "JPEG"), None),
        "palette": (saved(palette, "PNG", transparency=3), None),
        "deep": (saved(deep, "PNG"), None),
        "rotated": (saved(Image.open(io.BytesIO(good)), "JPEG", exif=exif), None),
        "animated": (saved(frames[0], "GIF", save_all=True, append_images=frames[1:]), None),
        "dot": (saved(Image.new("RGB", (1, 1)), "PNG"), None),
        "strip": (saved(Image.new("RGB", (1, 10_000)), "PNG"), None),
        "bomb": (bomb, "image too large"),
        "svg": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', broken),
    }


STRANGE_CAPTIONS = {
    "": "caption empty",
    " \t \u3000 ": "caption empty",
    "x" * 10_000: "caption too long",
    "🙂 family 👨‍👩‍👧": None,
    "שלום עולם": None,
    "a\0b": None,
    "a\r\nb\u2028c\x0bd\x0ce": None,
    "half \ud83d": None,
    "a <mask> on </s> it": None,
    "<|endoftext|>": None,
    "\x00\x01": "caption empty",
    "plain": None,
}


def test_broken_pairs_are_counted_and_never_end_the_work(tmp_path):
    """Twelve kinds of picture and twelve of caption, ten times each, in one shard: all are there or counted."""
    samples, wanted = {}, Counter()
    for turn in range(10):
        for name, (data, reason) in strange_pictures().items():
            samples |= {f"{turn}-{name}.jpg": data, f"{turn}-{name}.txt": b"a caption"}
            wanted[("image not found" if name == "empty" else reason) if reason else None] += 1
        for number, (caption, reason) in enumerate(STRANGE_CAPTIONS.items()):
            meta = json.dumps({"caption": caption}).encode()
            samples |= {f"{turn}-c{number}.jpg": picture(number), f"{turn}-c{number}.json": meta}
            wanted[reason] += 1
    tar_of(tmp_path / "a.tar", samples)
    manifest = prepare(tmp_path / "a.tar", tmp_path / "out", Columns(), Options(), workers=1)
    assert manifest["in"] == sum(wanted.values()) == 240
    assert manifest["out"] == wanted.pop(None) and manifest["skipped"] == dict(wanted)
    assert all(len(texts) == 3 and "a.tar" in texts[0] for texts in manifest["examples"].values())
    pairs = RecordPairs(tmp_path / "out", "train")
    texts = {pairs[k].text for k in range(len(pairs))}
    assert {"a b", "a b c d e", "half ?", "a <mask> on </s> it", "<|endoftext|>"} <= texts
    assert all(text.isprintable() and text == text.strip() for text in texts)


def test_pictures_as_they_are_made_smaller():
    tall = picture(3, 50, 4000, "PNG")
    made = Image.open(io.BytesIO(shrink(tall, 20, 90)))
    assert made.size == (20, 400)
    small = picture(4, 90, 70, "JPEG")
    assert shrink(small, 288, 50) == small  # as it came
    assert Image.open(io.BytesIO(shrink(small, 35, 90))).size == (45, 35)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = picture(5, 90, 70, "JPEG", exif=exif)
    assert Image.open(io.BytesIO(shrink(turned, 288, 90))).size == (70, 90)
    with pytest.raises(RecordError) as caught:
        shrink(b"junk", 288, 90)
    assert caught.value.reason == "image does not decode"


def run(argv: list[str]) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "vlkd_jax.data.prepare", *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        cwd=ROOT,
    )


def test_killed_and_started_again_it_loses_and_doubles_nothing(tmp_path):
    """SIGKILL at five moments, SIGTERM at one: then the files of a run that nothing has ended, bit for bit."""
    for shard in range(14):
        samples = {}
        for k in range(30):
            samples |= {f"{k:03d}.png": picture(100 * shard + k, 700, 500), f"{k:03d}.txt": f"{shard} {k}".encode()}
        (tmp_path / "in").mkdir(exist_ok=True)
        tar_of(tmp_path / "in" / f"{shard}.tar", samples)
    whole = run([str(tmp_path / "in"), f"--output={tmp_path / 'whole'}"])
    assert whole.wait(300) == 0, whole.stderr.read()
    lines = whole.stdout.read().splitlines()
    assert "420 of 420 pairs (100.0%); skipped: none" in lines[-1]
    output, rng = tmp_path / "killed", np.random.default_rng(0)
    argv = [str(tmp_path / "in"), f"--output={output}"]
    for number, end in enumerate([signal.SIGKILL] * 5 + [signal.SIGTERM]):
        job, deadline = run(argv), time.monotonic() + 60
        while len(list(output.glob("parts/*.json"))) <= number and job.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        if end == signal.SIGTERM:
            job.stdout.readline()  # it has begun to answer signals
        time.sleep(rng.uniform(0, 0.2))
        job.send_signal(end)
        code = job.wait(30)
        assert code == (143 if end == signal.SIGTERM else -end), job.stderr.read()
    last = run([*argv, "--json"])
    told, errors = last.communicate(timeout=300)
    assert last.returncode == 0, errors
    files = {
        path.name: path.read_bytes() for path in output.iterdir() if "record" in path.name or "hashes" in path.name
    }
    assert len(files) == 15
    assert files == {name: (tmp_path / "whole" / name).read_bytes() for name in files}
    assert json.loads(told.splitlines()[-1])["out"] == 420


def test_mistakes_of_the_command(prepared, images, tmp_path):
    path, columns = source("tsv", prepared.parent, images)
    with pytest.raises(UserError, match=r"options\.short was 32 and is 64; name another --output"):
        prepare(path, prepared, columns, Options(rows=5, short=64))
    assert prepare(path, prepared, columns, Options(rows=5, short=32))["out"] == COUNT  # it is there
    for name, told in (("nothing", "cannot be read"), ("x.txt", "a source ends in .tar, .tar.gz")):
        (tmp_path / "x.txt").touch()
        with pytest.raises(UserError, match=told):
            prepare(tmp_path / name, tmp_path / "o", columns, Options())
    for pattern in ("{nothing}", "{0}", "{row", "{path.x}"):
        with pytest.raises(UserError, match=r"its fields are \{path\}"):
            prepare(path, tmp_path / "o", Columns(name=pattern), Options())
    (tmp_path / "head.csv").write_text("url,text\na,b\n")
    with pytest.raises(UserError, match="no column image, caption; it has url, text; name them by --image"):
        parts(tmp_path / "head.csv", Columns(), 5)
    (tmp_path / "bad.jsonl").write_text('{"image": "none.png", "caption": "c"}\n' * 1001)
    with pytest.raises(
        UserError, match=r"1,001 of the 1,001 records read so far are skipped, more than --max_unusable=0\.5"
    ):
        prepare(tmp_path / "bad.jsonl", tmp_path / "bad", columns, Options(), workers=1)


def test_damaged_shards_are_never_silent(images, tmp_path):
    """A hundred cuts: what lies before is read, and the shard is counted as damaged."""
    path, columns = source("tar", tmp_path, images)
    data, rng = path.read_bytes(), np.random.default_rng(0)
    for cut in rng.integers(1, len(data.rstrip(b"\0")), 100):
        (tmp_path / "cut.tar").write_bytes(data[:cut])
        [part] = parts(tmp_path / "cut.tar", columns, 5)
        found = list(read(part, columns))
        assert found[-1].reason == "shard damaged" and "fetch the shard again" in str(found[-1])
        whole = [sample for sample in found if not isinstance(sample, RecordError)]
        assert [caption_of(sample) for sample in whole] == CLEAN[: len(whole)]


def test_damaged_record_files_are_never_silent(prepared, tmp_path):
    """A hundred times 64 other bytes, a hundred cuts: an error, or every record as it was."""
    pairs, rng = RecordPairs(prepared, "train[:5]"), np.random.default_rng(0)
    expected = [(pairs[k].text, pairs[k].image) for k in range(5)]
    for path in prepared.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    first = tmp_path / next(name for name in os.listdir(prepared) if "00000-of" in name)
    data = first.read_bytes()
    told = 0
    for turn, place in enumerate(rng.integers(0, len(data), 200)):
        first.write_bytes(data[:place] if turn % 2 else data[:place] + rng.bytes(64) + data[place + 64 :])
        try:
            damaged = RecordPairs(tmp_path, "train[:5]")
            found = [(damaged[k].text, damaged[k].image) for k in range(5)]
        except UserError:
            told += 1
        else:
            assert found == expected
    assert told > 50


def test_the_stream_of_a_data_set(prepared, assets):
    """Whatever the number of processes and threads, from any step on; a damaged record is replaced and counted."""
    config = tiny_config(assets, data__source="tfds", batch_size=8)
    config.data.directory, config.data.split, config.data.validation_split = str(prepared), "train[3:]", "train[:3]"
    config.data.truncate = True
    task = make_task(config)
    sources = train_sources(config, task)
    assert len(sources[0]) == COUNT - 3

    def stream(start=0, share=(0, 1), threads=2):
        config.data.threads = threads
        return train_stream(config, task, start, sources=sources, share=share)

    whole = [next(s) for s in [stream()] for _ in range(6)]
    for threads in (1, 4):
        blocks = [stream(2, (k, 4), threads) for k in range(4)]
        for step in range(2, 6):
            joined = jax.tree.map(lambda *rows: np.concatenate(rows), *[next(block) for block in blocks])
            jax.tree.map(np.testing.assert_array_equal, joined, whole[step])


def test_a_beam_pipeline_makes_the_same(prepared, images, tmp_path):
    """By its own runner for one machine, with two processes, in an environment of its own; and it goes on."""
    folder = Path(sys.prefix) / "beam"
    path, columns = source("tsv", prepared.parent, images)
    argv = [str(path), f"--output={tmp_path / 'out'}", f"--images={images}", "--rows=5", "--short=32"]
    argv += [f"--image={columns.image}", f"--caption={columns.caption}"]
    argv.append("--beam=--runner=DirectRunner --direct_num_workers=2 --direct_running_mode=multi_processing")
    command_line = [sys.executable, "-m", "vlkd_jax.data.prepare", *argv]
    surroundings = environment()
    without = subprocess.run(command_line, capture_output=True, text=True, env=surroundings)
    assert without.returncode == 2 and without.stderr.startswith("error: --beam needs apache-beam (No module named")
    surroundings["PYTHONPATH"] = os.pathsep.join([str(folder), surroundings["PYTHONPATH"]])
    ended = subprocess.run(command_line, capture_output=True, text=True, env=surroundings)
    assert ended.returncode == 0, ended.stderr[-2000:]
    for name in os.listdir(prepared):
        if name != "prepare.lock":
            assert (tmp_path / "out" / name).read_bytes() == (prepared / name).read_bytes(), name


def test_training_on_a_data_set(prepared, assets, tmp_path):
    """To the bits of a run that was interrupted; other records than those of the start are refused."""
    sizes = {
        "data__source": "tfds",
        "data__directory": str(prepared),
        "data__truncate": True,
        "data__split": "train[2:]",
    }
    sizes |= {"data__validation_split": "train[:2]", "eval__every": 0, "steps": 4, "save_every": 2, "batch_size": 4}
    train(tiny_config(assets, **sizes), tmp_path / "whole")
    train(tiny_config(assets, **{**sizes, "optim__schedule": "constant"}), tmp_path / "a")
    train(tiny_config(assets, **{**sizes, "optim__schedule": "constant", "steps": 2}), tmp_path / "b")
    train(tiny_config(assets, **{**sizes, "optim__schedule": "constant"}), tmp_path / "b")
    jax.tree.map(np.testing.assert_array_equal, load_run(tmp_path / "a")[1], load_run(tmp_path / "b")[1])
    other = tmp_path / "data"
    other.mkdir()
    for path in prepared.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    (other / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match=r"\(data\.directory\) has changed"):
        train(tiny_config(assets, **{**sizes, "data__directory": str(other)}), tmp_path / "whole")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"directory": ""}, r"config\.data\.directory is empty; set it to a directory that vlkd prepare has written"),
        ({"directory": "/nowhere"}, "no dataset_info.json in it; name the --output of vlkd prepare"),
        ({"split": "test"}, "split 'test' cannot be read"),
        ({"split": "train[:0]"}, "split 'train.:0.' cannot be read"),
    ],
)
def test_a_data_set_that_is_none(change, told, prepared, assets):
    config = tiny_config(assets, data__source="tfds")
    config.data.directory, config.data.split = str(prepared), "train"
    for name, value in change.items():
        config.data[name] = value
    with pytest.raises(UserError, match=told):
        train_sources(config, make_task(config))


def test_a_bomb_takes_no_memory(tmp_path):
    """400 million pixels in a small file: refused by its header, less than 200 MB of memory."""
    data = strange_pictures()["bomb"][0]
    (tmp_path / "bomb").write_bytes(data)
    code = """
import resource, sys
from vlkd_jax.data.prepare import shrink
from vlkd_jax.errors import RecordError
data, before = open(sys.argv[1], "rb").read(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    shrink(data, 288, 90)
except RecordError as error:
    print(error.reason, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "bomb")]
    told = subprocess.check_output(command, env=environment(), cwd=ROOT, text=True)
    reason, kilobytes = told.rsplit(" ", 1)
    assert reason == "image too large" and int(kilobytes) < 200_000 and len(data) < 100_000


def test_a_table_that_never_closes_a_quotation_mark(tmp_path):
    (tmp_path / "a.csv").write_text('image,caption\na.png,"x' + "y" * 200_000)
    with pytest.raises(UserError, match=r"a\.csv behind byte 14: field larger than field limit .*never closed"):
        parts(tmp_path / "a.csv", Columns(), 5)


@pytest.mark.shared_data
def test_real_photos_and_captions(tmp_path):
    """COCO's: all 550 pairs of 110 photos, each photo's captions with it."""
    coco = SHARED / "coco_open"
    manifest = prepare(coco / "captions.json", tmp_path, Columns(images=str(coco / "images")), Options(), workers=2)
    assert (manifest["in"], manifest["out"]) == (550, 550)
    pairs = RecordPairs(tmp_path, "train")
    images = Counter(pairs[k].image for k in range(550))
    assert len(images) == 110 and set(images.values()) == {5}


@pytest.mark.shared_data
def test_the_real_list_of_cc3m_without_its_pictures(tmp_path):
    """Every line is a pair, its picture named by the hash of its URL."""
    [packed] = (SHARED / "cc3m").glob("*.tsv.gz")
    text = gzip.decompress(packed.read_bytes()).decode()
    (tmp_path / "cc3m.tsv").write_text(text)
    columns = Columns("1", "0", str(tmp_path), "{sha256}.jpg")
    samples = [s for part in parts(tmp_path / "cc3m.tsv", columns, 4000) for s in read(part, columns)]
    assert len(samples) == len(text.split("\n")) - 1 and not any(isinstance(s, RecordError) for s in samples)
    assert [caption_of(s) for s in samples[:2]] == [line.split("\t")[0] for line in text.split("\n")[:2]]


def test_workers_never_touch_jax():
    code = "import sys; import vlkd_jax.data.prepare, vlkd_jax.data.inputs; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=environment(), cwd=ROOT).returncode == 0
