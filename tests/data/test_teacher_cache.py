"""The teacher's outputs from a cache against a teacher that runs, and every cache that must not be used."""

import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from tiny import tiny_config, write_pictures

from vlkd_jax import cache_teacher, compression
from vlkd_jax.cache_teacher import PART, Layout
from vlkd_jax.data.builder import locked
from vlkd_jax.data.sources import FolderPairs
from vlkd_jax.data.streams import cache_key, make_source
from vlkd_jax.data.teacher_cache import FAULTS, MANIFEST, PLAN, CachedPairs, pack, row_type, unpack
from vlkd_jax.errors import RecordError, UserError
from vlkd_jax.identity import hash_inputs
from vlkd_jax.metrics import METRICS_FILE
from vlkd_jax.tasks import make_task
from vlkd_jax.train import train
from vlkd_jax.types import TeacherOutputs

PICTURES, BROKEN = 26, 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures with a caption each, one of them broken."""
    path = tmp_path_factory.mktemp("folder")
    (path / "captions.tsv").write_text("\n".join(write_pictures(path / "images", PICTURES)) + "\n")
    (path / "images" / f"{BROKEN}.png").write_bytes(b"<html>")
    return path


def config_of(assets, folder, **changes):
    return tiny_config(
        assets,
        data__source="folder",
        data__captions=str(folder / "captions.tsv"),
        data__images=str(folder / "images"),
        data__max_unusable=0.2,
        **changes,
    )


def losses(workdir):
    lines = map(json.loads, (workdir / METRICS_FILE).read_text().splitlines())
    names = ("loss", "ttdm", "itcl", "icti", "grad_norm", "held_out/icti")
    figures = [{name: line[name] for name in names if name in line} for line in lines]
    return [figure for figure in figures if figure]  # lines on memory and time have none


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def cached(assets, folder, directory, **changes):
    """The records of a run that reads the cache."""
    config = config_of(assets, folder, **changes)
    task, source = make_task(config), make_source(config, "train")
    return CachedPairs(source, str(directory), cache_key(config, task, hash_inputs(config), source))


@pytest.fixture(scope="module")
def cache(assets, folder, tmp_path_factory):
    """A float32 cache of several files, and its manifest."""
    output = tmp_path_factory.mktemp("cache") / "float32"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_teacher, "SHARD_BYTES", 1)
        manifest = cache_teacher.cache_teacher(config_of(assets, folder), output)
    assert len(manifest["shards"]) > 2 and manifest["unusable"] == 1
    assert manifest["relative_error"] == {"tokens": 0, "image": 0, "text": 0}
    return output


@pytest.mark.parametrize("sizes", [{"mesh__data": 8}, {"mesh__data": 2, "mesh__fsdp": 2}], ids=str)
def test_the_bits_are_those_of_the_mesh_that_trains(assets, folder, tmp_path, sizes):
    """Where models are split as well, the compiler may place their parts otherwise in a step that has no teacher."""
    config = config_of(assets, folder, steps=3, **sizes)
    live = train(config, tmp_path / "live")
    cache_teacher.cache_teacher(config, tmp_path / "cache")
    config.data.teacher_cache = str(tmp_path / "cache")
    from_cache = train(config, tmp_path / "cached")
    if "mesh__fsdp" not in sizes:
        assert bits(from_cache.params) == bits(live.params)
    for ours, theirs in zip(losses(tmp_path / "cached"), losses(tmp_path / "live"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6)


@pytest.fixture
def copied(cache, tmp_path):
    shutil.copytree(cache, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"student__image_tokens": "pooled", "accumulate": 2, "loss__l2": 1e-3},
        {"student__image_tokens": "penultimate", "student__whiten": 10, "data__workers": 1},
    ],
    ids=["projected", "pooled", "whitened"],
)
def test_a_run_from_a_cache_has_the_bits_of_one_with_its_teacher(assets, folder, tmp_path, changes):
    """Over several epochs, a broken picture among the records, and on past a stop."""
    config = config_of(assets, folder, steps=10, eval__every=5, optim__schedule="constant", **changes)
    live = train(config, tmp_path / "live")
    cache_teacher.cache_teacher(config, tmp_path / "cache")
    config.data.teacher_cache = str(tmp_path / "cache")
    config.steps = 4
    train(config, tmp_path / "cached")
    config.steps = 10
    from_cache = train(config, tmp_path / "cached")
    assert bits(from_cache.params) == bits(live.params)
    last = losses(tmp_path / "live")[-2:]
    assert losses(tmp_path / "cached")[-2:] == last and "held_out/icti" in last[-1]
    config.data.teacher_cache = ""
    with pytest.raises(UserError, match=r"data\.teacher_cache"):
        train(config, tmp_path / "cached")  # which has begun with the cache


def test_rows_are_what_the_teacher_gives(assets, folder, cache):
    config = config_of(assets, folder)
    records = cached(assets, folder, cache)
    live = make_source(config, "train")
    task = make_task(config)
    params = task.load_frozen()["clip"]
    assert len(records) == len(live)
    (bad,) = [k for k in range(len(live)) if f" {BROKEN + 1}" in live.source.pairs[live.indices[k]][0]]
    for source in (records, live):
        with pytest.raises(RecordError, match=f"{BROKEN}.png"):
            source[bad]
    index = next(k for k in range(len(live)) if k != bad)
    assert records[index].image is None and records[index].text == live[index].text
    pixels = task.encoder(live[index], np.random.default_rng(0))["pixels"].astype(np.float32)[None]
    scaled = pixels * task.teacher.config.preprocessing.rescale
    normal = (scaled - np.float32(task.teacher.config.preprocessing.mean)) / task.teacher.config.preprocessing.std
    output = task.teacher.apply({"params": params}, normal.astype(np.float32), method="encode_images")
    np.testing.assert_allclose(records[index].teacher.tokens, output.tokens[0], atol=1e-5)
    np.testing.assert_allclose(records[index].teacher.image, output.tokens[0, 0], atol=1e-5)


@pytest.mark.parametrize(("dtype", "most"), [("bfloat16", 2**-8), ("int8", 0.01)])
def test_the_stated_error_is_that_of_the_rows(assets, folder, cache, tmp_path, dtype, most):
    manifest = cache_teacher.cache_teacher(config_of(assets, folder), tmp_path / dtype, dtype)
    exact, close = cached(assets, folder, cache), cached(assets, folder, tmp_path / dtype)
    pairs = []
    for index in range(len(exact)):
        try:
            pairs.append((exact[index].teacher, close[index].teacher))
        except RecordError:
            continue
    for k, name in enumerate(TeacherOutputs._fields):
        true = np.stack([one[k] for one, _ in pairs])
        rounded = np.stack([np.asarray(compression.restore(two[k], jnp.float32)) for _, two in pairs])
        error = np.sqrt(np.square(rounded - true).sum() / np.square(true).sum())
        assert manifest["relative_error"][name] == pytest.approx(error, rel=1e-3) and 0 < error < most
    assert manifest["bytes_per_record"] < json.loads((cache / MANIFEST).read_text())["bytes_per_record"] * 0.55
    config = config_of(assets, folder, steps=2, data__teacher_cache=str(tmp_path / dtype))
    train(config, tmp_path / "rounded")
    config.data.teacher_cache = ""
    train(config, tmp_path / "live")
    assert losses(tmp_path / "rounded")[0] == pytest.approx(losses(tmp_path / "live")[0], rel=0.02)


@pytest.mark.parametrize("dtype", compression.DTYPES)
def test_compression_against_numpy(rng, dtype):
    x = rng.normal(size=(5, 3, 16)).astype(np.float32) * rng.uniform(1e-3, 1e3, (5, 3, 1)).astype(np.float32)
    x[1, 2] = 0
    stored = jax.jit(lambda x: compression.compress(x, dtype))(x)
    restored = np.asarray(compression.restore(stored, jnp.float32))
    if dtype == "int8":
        step = np.abs(x).max(-1, keepdims=True) / 127
        assert np.abs(restored - x).max() <= 0.51 * step.max() and (np.abs(restored - x) <= 0.501 * step).all()
        assert np.array_equal(np.abs(stored.values).max(-1) == 127, np.abs(x).max(-1) > 0)
    else:
        expected = x.astype(np.float32 if dtype == "float32" else ml_dtypes.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(restored, expected)
    outputs = TeacherOutputs(stored, None, jax.tree.map(lambda v: v[:, 0], stored))
    rows = np.zeros(5, row_type(TeacherOutputs((3, 16), None, (16,)), dtype))
    pack(rows, jax.device_get(outputs))
    for k in range(5):
        jax.tree.map(np.testing.assert_array_equal, unpack(rows[k]), jax.tree.map(lambda v, k=k: v[k], outputs))


def test_what_was_cut_off_goes_on_and_is_refused_until_then(assets, folder, cache, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_teacher, "SHARD_BYTES", 1)
    written = Layout.write

    def cut(self, shard, blocks):
        for rows in written(self, shard, blocks):
            yield rows
            if shard == 1:
                raise KeyboardInterrupt

    monkeypatch.setattr(Layout, "write", cut)
    with pytest.raises(KeyboardInterrupt):
        cache_teacher.cache_teacher(config_of(assets, folder), tmp_path / "cut")
    monkeypatch.setattr(Layout, "write", written)
    assert {path.name for path in (tmp_path / "cut").iterdir()} >= {"00000.npy", f"00001.npy{PART}", PLAN}
    with pytest.raises(UserError, match="not whole yet; the same vlkd cache-teacher goes on"):
        cached(assets, folder, tmp_path / "cut")
    stamp = (tmp_path / "cut" / "00000.npy").stat().st_mtime_ns
    cache_teacher.cache_teacher(config_of(assets, folder), tmp_path / "cut")
    assert (tmp_path / "cut" / "00000.npy").stat().st_mtime_ns == stamp
    names = [path.name for path in cache.iterdir()]
    assert sorted(names) == sorted(path.name for path in (tmp_path / "cut").iterdir())
    for name in (*(name for name in names if name.endswith(".npy")), MANIFEST, FAULTS):
        assert (tmp_path / "cut" / name).read_bytes() == (cache / name).read_bytes()


def change_weights(assets, folder):
    path = assets / "clip" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def change_preprocessing(assets, folder):
    path = assets / "clip" / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"image_std": [0.5, 0.5, 0.5]}))


def change_caption(assets, folder):
    path = folder / "captions.tsv"
    path.write_text(path.read_text().replace("\t", "\tthe ", 1))


def change_picture(assets, folder):
    path = folder / "images" / "5.png"
    data = bytearray(path.read_bytes())
    data[-30] ^= 1
    path.write_bytes(data)


STALE = {
    "weights": (change_weights, {}, r"clip.model.safetensors was \w{12}... and is \w{12}..."),
    "preprocessing": (change_preprocessing, {}, r"preprocessing.std was \["),
    "caption": (change_caption, {}, "files was"),
    "picture": (change_picture, {}, r"pictures was \w{12}"),
    "tokens": (None, {"student__image_tokens": "hidden"}, "image_tokens was projected and is hidden"),
    "split": (None, {"data__validation_every": 2}, "records was .*validation_every was 20 and is 2"),
    "dtype": (None, {"dtype": "bfloat16"}, "dtype was float32 and is bfloat16"),
}


@pytest.mark.parametrize("name", STALE)
def test_a_cache_of_something_else_is_refused(assets, folder, cache, tmp_path, name):
    change, changes, told = STALE[name]
    shutil.copytree(assets, tmp_path / "assets")
    shutil.copytree(folder, tmp_path / "folder")
    assert len(cached(tmp_path / "assets", tmp_path / "folder", cache))  # a copy elsewhere is the same
    if change:
        change(tmp_path / "assets", tmp_path / "folder")
    with pytest.raises(UserError, match=told) as e:
        cached(tmp_path / "assets", tmp_path / "folder", cache, **changes)
    assert str(e.value).startswith(f"{cache}: a cache of something else: ")
    with pytest.raises(UserError, match=told):
        cache_teacher.cache_teacher(config_of(tmp_path / "assets", tmp_path / "folder", **changes), cache)


def test_damage_is_refused_and_mended(assets, folder, copied, tmp_path, rng, monkeypatch):
    monkeypatch.setattr(cache_teacher, "SHARD_BYTES", 1)
    victim = copied / "00001.npy"
    whole = victim.read_bytes()
    for _ in range(30):  # behind the head: in one row or another
        data = bytearray(whole)
        data[rng.integers(512, len(whole))] ^= 1 << rng.integers(8)
        victim.write_bytes(data)
        shutil.copytree(
            copied, other := tmp_path / f"{rng.integers(2**60)}"
        )  # opened files are kept by their directory
        records = cached(assets, folder, other)
        with pytest.raises(UserError, match=r"00001.npy: row \d is damaged"):
            for index in range(len(records)):
                try:
                    records[index]
                except RecordError:
                    continue
    for content in (whole[:-1], whole + b"x", None):
        victim.unlink()
        if content is not None:
            victim.write_bytes(content)
        with pytest.raises(UserError, match=r"00001.npy: (has|is not there)"):
            cached(assets, folder, copied)
    cache_teacher.cache_teacher(config_of(assets, folder), copied)
    assert victim.read_bytes() == whole


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"objective": "clip_contrastive"}, "no frozen teacher"),
        ({"data__source": "shapes"}, "a cache is for folder or tfds"),
        ({"data__flip": True}, "change pictures at random"),
        ({"data__smallest_crop": 0.5}, "change pictures at random"),
    ],
)
def test_what_no_cache_can_serve(assets, folder, tmp_path, changes, told):
    config = config_of(assets, folder)
    for name, value in changes.items():
        config.update_from_flattened_dict({name.replace("__", "."): value})
    with pytest.raises(UserError, match=told):
        cache_teacher.cache_teacher(config, tmp_path / "cache")
    config.data.teacher_cache = str(tmp_path)
    with pytest.raises(UserError, match=told):
        train(config, tmp_path / "run")


def test_no_cache_there(assets, folder, tmp_path):
    with pytest.raises(UserError, match=r"no manifest.json in it; name the --output"):
        cached(assets, folder, tmp_path)
    (tmp_path / MANIFEST).write_text("[]")
    with pytest.raises(UserError, match="not the manifest of a teacher cache"):
        cached(assets, folder, tmp_path)


def test_two_at_once_in_one_directory(assets, folder, copied):
    with locked(copied, "cache.lock"), pytest.raises(UserError, match="another command is at work there; wait for it"):
        cache_teacher.cache_teacher(config_of(assets, folder), copied)


def test_a_full_disk_is_one_line(assets, folder, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache_teacher.os, "replace", full)
    with pytest.raises(UserError, match="No space left on device"):
        cache_teacher.cache_teacher(config_of(assets, folder), tmp_path / "cache")


def test_a_fingerprint_is_of_every_picture(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "folder")
    pairs = FolderPairs(tmp_path / "folder" / "captions.tsv", tmp_path / "folder" / "images", 0.5)
    before = pairs.fingerprint()
    for number in (0, 7, PICTURES - 1):
        path = tmp_path / "folder" / "images" / f"{number}.png"
        content = path.read_bytes()
        path.write_bytes(content + b"x")
        assert pairs.fingerprint() != before
        path.unlink()
        assert pairs.fingerprint() != before
        path.write_bytes(content)
        assert pairs.fingerprint() == before
