"""Whitening of the image tokens: its statistics against numpy, on one device and eight, and that training keeps it."""

import jax
import numpy as np
import pytest
from tiny import WIDTH, make_mesh, tiny_config

from vlkd_jax import whitening
from vlkd_jax.data.streams import train_stream
from vlkd_jax.errors import UserError
from vlkd_jax.models.clip import normalize_pixels
from vlkd_jax.models.vlkd import Whitening
from vlkd_jax.runs import load_run
from vlkd_jax.tasks import make_task
from vlkd_jax.tasks.distill import select_tokens
from vlkd_jax.train import train, whitened
from vlkd_jax.vlkd import VLKD

IMAGES, BATCHES = 20, 3  # 20 images are three batches of 8


@pytest.fixture(scope="module")
def config(assets):
    return tiny_config(assets, student__image_tokens="penultimate", student__whiten=IMAGES, steps=2)


@pytest.fixture(scope="module")
def task(config):
    return make_task(config)


@pytest.fixture(scope="module")
def frozen(task):
    return task.load_frozen()


@pytest.fixture(scope="module")
def estimates(config, task, frozen):
    """On a mesh of one device and on one of eight."""
    streams = ((train_stream(config, task, 0), make_mesh(count)) for count in (1, 8))
    return [whitening.estimate(task, frozen["clip"], stream, mesh) for stream, mesh in streams]


def tokens_of(config, task, frozen, start, count):
    stream = train_stream(config, task, start)
    images = np.concatenate([next(stream).pixels for _ in range(count)])
    pixels = normalize_pixels(images, task.teacher.config.preprocessing)
    output = task.teacher.apply({"params": frozen["clip"]}, pixels, method="encode_images")
    return np.asarray(select_tokens(output, "penultimate"))


def test_the_statistics_are_those_of_the_first_images(config, task, frozen, estimates):
    tokens = tokens_of(config, task, frozen, 0, BATCHES).reshape(-1, WIDTH).astype(np.float64)
    np.testing.assert_allclose(estimates[0]["mean"], tokens.mean(0), atol=1e-5)
    white = (tokens - estimates[0]["mean"]) @ estimates[0]["matrix"]
    variances = np.linalg.eigvalsh(np.cov(tokens.T, bias=True))
    expected = variances / (variances + whitening.FLOOR * variances.mean())
    np.testing.assert_allclose(np.linalg.eigvalsh(np.cov(white.T, bias=True)), np.sort(expected), atol=1e-3)


def test_eight_devices_are_one(estimates):
    one, eight = estimates
    np.testing.assert_allclose(one["mean"], eight["mean"], atol=1e-6)
    np.testing.assert_allclose(one["matrix"], eight["matrix"], rtol=1e-3, atol=1e-3 * np.abs(one["matrix"]).max())


def test_zca_of_known_variances(rng):
    axes, variances = np.linalg.qr(rng.normal(size=(5, 5)))[0], np.array([1e4, 10, 1, 0.5, 0])
    matrix = whitening.zca(axes @ np.diag(variances) @ axes.T)
    expected = axes @ np.diag((variances + whitening.FLOOR * variances.mean()) ** -0.5) @ axes.T
    np.testing.assert_allclose(matrix, expected, rtol=1e-4, atol=1e-6)


def test_training_sets_it_once_and_keeps_it(config, task, frozen, estimates, tmp_path):
    state = train(config, tmp_path)
    config = config.copy_and_resolve_references()
    config.steps = 3
    later = train(config, tmp_path)
    for params in (state.params, later.params, load_run(tmp_path)[1]):
        for name, value in estimates[0].items():
            np.testing.assert_allclose(params["image_whitening"][name], value, rtol=1e-5, atol=1e-5)
    prefix = task.module.apply(
        {"params": later.params}, tokens := tokens_of(config, task, frozen, 5, 1), method="image_prefix"
    )
    w, kernel = jax.device_get((later.params["image_whitening"], later.params["image_projection"]["kernel"]))
    np.testing.assert_allclose(prefix, (tokens - w["mean"]) @ w["matrix"] @ kernel, atol=1e-4)
    assert np.abs(kernel - task.load_params()["image_projection"]["kernel"]).max() > 0


def test_before_training_is_as_training_starts(config, task, frozen, estimates, tmp_path):
    """What is compared with the trained student, in the demo and in `evaluate`, whitens from the start too."""
    started = whitened(config, task, task.load_params(), frozen, make_mesh(1))
    train(config, tmp_path)
    read = VLKD.from_run(tmp_path, at_start=True).params
    for params in (started, read):
        for name, value in estimates[0].items():
            np.testing.assert_allclose(params["image_whitening"][name], value, rtol=1e-5, atol=1e-5)
    for one, other in zip(jax.tree.leaves(started), jax.tree.leaves(read), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_it_is_exact_on_every_device(config, task, frozen, estimates):
    """Rounded to TF32 or bfloat16, as accelerators do unless asked, strong directions would drown the weak ones."""
    params = task.load_params() | {"image_whitening": estimates[0]}
    tokens = np.zeros((2, 5, WIDTH), np.float32)
    with jax.default_matmul_precision("bfloat16"):
        whitening_module = Whitening()
        lowered = jax.jit(whitening_module.apply).lower({"params": params["image_whitening"]}, tokens)
    products = [line for line in lowered.as_text().splitlines() if "dot_general" in line]
    assert len(products) == 1 and "HIGHEST" in products[0]


def test_a_negative_number_of_images_is_refused(config, tmp_path):
    config = config.copy_and_resolve_references()
    config.student.whiten = -1
    with pytest.raises(UserError, match=r"config\.student\.whiten is -1"):
        train(config, tmp_path)
