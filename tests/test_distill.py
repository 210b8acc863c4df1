"""Objectives, the frozen teacher and the optimizer: every option runs and does what it says, in numbers."""

import dataclasses
import functools
import itertools
import json
import shutil
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import JOINT, WIDTH, tiny_config

from vlkd_jax import losses
from vlkd_jax.data.pipeline import batches
from vlkd_jax.data.streams import train_stream
from vlkd_jax.errors import UserError
from vlkd_jax.hf.save import save_bart
from vlkd_jax.models.layers import l2_normalize
from vlkd_jax.models.vlkd import NEW
from vlkd_jax.optim import count_parameters, decayed, groups, make_optimizer, schedule
from vlkd_jax.shapes.sources import ShapesPairs
from vlkd_jax.step import make_train_step
from vlkd_jax.tasks import make_task
from vlkd_jax.tasks.distill import HIDDEN, teacher_outputs
from vlkd_jax.types import Batch, TrainState

MIXED = {"loss__denoise": 0.5, "loss__l2": 0.1}


class Prepared(NamedTuple):
    """A task, a batch, parameters a little away from their start, `evaluate` (see `evaluator`), what is frozen."""

    task: Any
    batch: Batch
    params: Any
    evaluate: Any
    frozen: Any

    def means(self, params=None, **changes) -> dict[str, float]:
        """Every term's mean, for other parameters or a changed batch."""
        weights = dict.fromkeys(self.task.weights, 0.0)
        params = self.params if params is None else params
        (_, terms), _ = self.evaluate(params, self.frozen, self.batch.replace(**changes), weights)
        return {name: float(total / count) for name, (total, count) in terms.items()}

    def gradients(self, **weights):
        """Gradients of the terms so weighted by (parameters, what is frozen)."""
        weights = dict.fromkeys(self.task.weights, 0.0) | weights
        return self.evaluate(self.params, self.frozen, self.batch, weights)[1]


def evaluator(task):
    """Jitted (params, frozen, batch, weights) -> ((loss, terms), gradients by params and by frozen)."""

    def loss(params, frozen, batch, weights):
        terms = losses.finish(task.terms(params, frozen, batch, None))
        return sum(weight * terms[name][0] / terms[name][1] for name, weight in weights.items()), terms

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))


def prepare(config) -> Prepared:
    task = make_task(config)
    batch = next(iter(train_stream(config, task, 0))).replace(index=None)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: np.asarray(x + 0.05 * rng.normal(size=np.shape(x)), np.float32), task.load_params())
    return Prepared(task, batch, params, evaluator(task), task.load_frozen())


@pytest.fixture(scope="module")
def mixed(assets) -> Prepared:
    """The default options with every loss turned on."""
    return prepare(tiny_config(assets, **MIXED))


def largest(tree):
    return max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(tree))


def test_terms_and_parameters(assets, mixed):
    task, batch, params, evaluate, frozen = mixed
    assert make_task(tiny_config(assets)).weights == {"ttdm": 1.0, "itcl": 1.0, "icti": 1.0}
    assert task.weights == {"ttdm": 1.0, "itcl": 1.0, "icti": 1.0, "denoise": 0.5, "l2": 0.1}
    assert set(params) == {"bart", "sentence_projection", "image_projection", "logit_scale"} == {"bart", *NEW}
    assert jax.tree.map(np.shape, params["sentence_projection"]) == {"kernel": (WIDTH, JOINT)}
    assert jax.tree.map(np.shape, params["image_projection"]) == {"kernel": (JOINT, WIDTH)}
    assert float(task.load_params()["logit_scale"]) == pytest.approx(np.log(1 / 0.07))
    assert set(frozen) == {"clip", "start"}
    (_, terms), _ = evaluate(params, frozen, batch, task.weights)
    counts = {name: float(count) for name, (_, count) in terms.items()}
    assert counts["ttdm"] == counts["itcl"] == 8 and counts["icti"] == batch.target_mask.sum()
    assert counts["denoise"] == batch.replay.target_mask.sum()
    assert set(counts) == {*task.weights, "itcl_accuracy"}


@functools.cache
def teacher_of(teacher):
    """Jitted (CLIP's parameters, batch) -> outputs for every kind of image token."""
    kinds = ("projected", "hidden", "pooled")
    return jax.jit(lambda params, batch: {kind: teacher_outputs(teacher, params, batch, kind) for kind in kinds})


@functools.cache
def student_outputs(student):
    def read(params, batch, tokens):
        def forward(s):
            hidden = s.encode(batch.text_ids, batch.text_mask)
            corrupted = s.encode(batch.source_ids, batch.source_mask)
            memory, mask = s.memory(s.image_prefix(tokens), corrupted, batch.source_mask)
            return hidden, memory, mask, s.decode(batch.text_ids, memory, mask)

        return student.apply({"params": params}, method=forward)

    return jax.jit(read)


@pytest.fixture(scope="module")
def parts(mixed):
    """What the losses are made from, each computed by itself: teacher outputs by kind, student outputs."""
    task, batch, params, _, frozen = mixed
    teacher = teacher_of(task.teacher)(frozen["clip"], batch)
    student = student_outputs(task.module)(params, batch, teacher["projected"][0])
    return jax.tree.map(np.asarray, (teacher, student))


def cross_entropy(bart, decoded, targets):
    """Of every position, for BART's parameters and the decoder's states."""
    logits = decoded @ np.transpose(bart["shared"]["embedding"]) + bart["final_logits_bias"]
    return -np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), targets[..., None], -1)[..., 0]


def test_losses_follow_the_method(mixed, parts):
    """Each term again in the method's words: which text each side reads, where the sentence stands, the prefix."""
    task, batch, params, *_ = mixed
    (tokens, image, text), (hidden, memory, mask, decoded) = parts[0]["projected"], parts[1]
    np.testing.assert_allclose(np.linalg.norm(image, axis=-1), 1, rtol=1e-5)
    eos = task.encoder.bart_text.eos
    at = [list(row[keep]).index(eos) for row, keep in zip(batch.text_ids, batch.text_mask)]
    sentence = hidden[np.arange(8), at] @ params["sentence_projection"]["kernel"]
    sentence /= np.linalg.norm(sentence, axis=-1, keepdims=True)
    np.testing.assert_allclose(memory[:, :5], tokens @ params["image_projection"]["kernel"], atol=1e-4)
    assert mask.shape == (8, 5 + 40) and mask[:, :5].all() and (mask[:, 5:] == batch.source_mask).all()
    assert (batch.target_mask == batch.text_mask).all()  # the whole clean caption is the target
    expected = {
        "ttdm": np.mean(np.sum((sentence - text) ** 2, -1)),
        "itcl": float(losses.itcl(image, sentence, np.exp(params["logit_scale"]))[0][0]) / 8,
        "icti": cross_entropy(params["bart"], decoded, batch.text_ids)[batch.text_mask].mean(),
    }
    means = mixed.means()
    for name, value in expected.items():
        assert means[name] == pytest.approx(value, rel=1e-4), name


def test_image_token_options(parts):
    tokens = {kind: outputs[0] for kind, outputs in parts[0].items()}
    assert {kind: of_kind.shape for kind, of_kind in tokens.items()} == {
        "projected": (8, 5, JOINT),
        "hidden": (8, 5, WIDTH),
        "pooled": (8, 1, JOINT),
    }
    # The pooled token is the class token of the projected ones, normalised.
    np.testing.assert_allclose(l2_normalize(tokens["projected"][:, 0]), tokens["pooled"][:, 0], atol=1e-5)


def test_padding_and_other_inputs_have_no_say_where_they_should_not(mixed):
    batch, means = mixed.batch, mixed.means()
    noisy = {
        f"{name}_ids": np.where(getattr(batch, f"{name}_mask"), getattr(batch, f"{name}_ids"), 7).astype(np.int32)
        for name in ("text", "source", "clip")
    }
    assert mixed.means(**noisy) == pytest.approx(means, rel=1e-5)
    blank = mixed.means(pixels=np.zeros_like(batch.pixels))
    assert {name for name in means if blank[name] != pytest.approx(means[name], rel=1e-6)} == {"itcl", "icti"}
    masks = np.full_like(batch.source_ids, mixed.task.encoder.bart_text.mask)
    corrupted = mixed.means(source_ids=masks)
    assert {name for name in means if corrupted[name] != pytest.approx(means[name], rel=1e-6)} == {"icti"}


def test_the_teacher_gets_no_gradient(mixed):
    by_params, by_frozen = mixed.gradients(**mixed.task.weights)
    assert largest(by_frozen["clip"]) == 0
    assert all(largest(by_params[name]) > 0 for name in by_params)


def test_each_loss_trains_what_it_should(mixed):
    """The projections and the scale hear from the losses they belong to, and from no other."""
    moved = {}
    for name in mixed.task.weights:
        by_params, _ = mixed.gradients(**{name: 1.0})
        moved[name] = {part for part in by_params if largest(by_params[part]) > 0}
    assert moved == {
        "ttdm": {"bart", "sentence_projection"},
        "itcl": {"bart", "sentence_projection", "logit_scale"},
        "icti": {"bart", "image_projection"},
        "denoise": {"bart"},
        "l2": {"bart"},
    }


@pytest.mark.parametrize("name", ["vlkd", "clip_contrastive"])
def test_the_scale_is_capped_and_comes_back(assets, name):
    """An update that would lift the scale above 100 leaves it there; one that lowers it is not held back."""
    config = tiny_config(assets, objective=name, optim__lr=0.5, optim__lr_linears=0.5, optim__warmup=0)
    task, batch, state, _, frozen = start(config)
    state = state.replace(params=state.params | {"logit_scale": jnp.float32(np.log(100))})
    scales = []
    for slope in (-1.0, 1.0):

        def terms(params, *_, slope=slope):
            return {"itcl": (slope * params["logit_scale"], jnp.float32(1))}

        linear = dataclasses.replace(task, terms=terms, weights={"itcl": 1.0})
        step = make_train_step(linear, make_optimizer(config.optim, config.steps, task.new), 0.0, 0)
        new, _ = jax.jit(step)(state, frozen, batch)
        scales.append(float(jnp.exp(new.params["logit_scale"])))
    assert scales == pytest.approx([100, 100 * np.exp(-0.5)], rel=1e-5)


def test_the_scale_hears_from_its_loss_at_the_cap(mixed):
    at_cap = mixed._replace(params=mixed.params | {"logit_scale": np.float32(np.log(100.001))})
    assert largest(at_cap.gradients(itcl=1.0)[0]["logit_scale"]) > 0


def test_the_pull_to_the_start_in_numbers(mixed):
    frozen, params = mixed.frozen, mixed.params
    gaps = jax.tree.map(
        lambda a, b: np.sum((a.astype(np.float64) - np.asarray(b)) ** 2), params["bart"], frozen["start"]
    )
    expected = 0.5 * sum(jax.tree.leaves(gaps))
    assert mixed.means()["l2"] == pytest.approx(expected, rel=1e-4) and expected > 1
    assert mixed.means(mixed.task.load_params())["l2"] == 0
    pull, _ = mixed.gradients(l2=1.0)
    for gradient, now, start in zip(*map(jax.tree.leaves, (pull["bart"], params["bart"], frozen["start"]))):
        np.testing.assert_allclose(gradient, now - start, atol=1e-5)


def test_replay_is_denoising_beside_the_pairs(mixed):
    alone = jax.jit(mixed.task.denoise_terms)(mixed.params, mixed.frozen, mixed.batch.replay, None)
    assert mixed.means()["denoise"] == pytest.approx(float(alone["denoise"][0] / alone["denoise"][1]), rel=1e-5)
    assert 0 <= float(alone["token_accuracy"][0] / alone["token_accuracy"][1]) < 1


def test_sentence_distance_and_scale_options_in_numbers(assets, mixed, parts):
    options = {"student__sentence_position": "bos", "student__ttdm": "raw", "student__logit_scale": "clip"}
    task = make_task(tiny_config(assets, **options))
    other = Prepared(task, mixed.batch.replace(replay=None), mixed.params, evaluator(task), task.load_frozen())
    (_, image, text), hidden = parts[0]["projected"], parts[1][0]
    raw = hidden[:, 0] @ mixed.params["sentence_projection"]["kernel"]
    unit = raw / np.linalg.norm(raw, axis=-1, keepdims=True)
    means = other.means()
    assert means["ttdm"] == pytest.approx(np.mean(np.sum((raw - text) ** 2, -1)), rel=1e-4)
    scale = np.exp(other.frozen["clip"]["logit_scale"])
    assert means["itcl"] == pytest.approx(float(losses.itcl(image, unit, scale)[0][0]) / 8, rel=1e-4)
    by_params, by_frozen = other.gradients(**task.weights)
    assert largest(by_frozen) == 0 and largest(by_params["logit_scale"]) == 0


def start(config):
    """(task, a batch, the state at step 0, the jitted step, what is frozen) of a config."""
    task = make_task(config)
    optimizer = make_optimizer(config.optim, config.steps, task.new)
    params = task.load_params()
    state = TrainState(jnp.int32(0), params, optimizer.init(params), jnp.int32(0), jnp.int32(0))
    step = jax.jit(make_train_step(task, optimizer, config.dropout, config.seed))
    return task, next(iter(train_stream(config, task, 0))).replace(index=None), state, step, task.load_frozen()


OPTIONS = {
    "hidden": {"student__image_tokens": "hidden", "student__sentence_position": "bos", "student__ttdm": "raw"},
    "penultimate": {"student__image_tokens": "penultimate"},
    "pooled": {"student__image_tokens": "pooled", "student__logit_scale": "clip", "dropout": 0.3},
    "half": {"dtype": "bfloat16", "remat": True, **MIXED},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_train(assets, mixed, name):
    """A whole step: finite, every parameter group moves; and what else is particular to the option."""
    config = tiny_config(assets, **OPTIONS[name])
    task, batch, state, step, frozen = start(config)
    new, metrics = step(state, frozen, batch)
    assert {"loss", "grad_norm", *task.weights} <= set(metrics)
    assert all(np.isfinite(value) for value in metrics.values())
    total = sum(weight * metrics[key] for key, weight in task.weights.items())
    assert float(metrics["loss"]) == pytest.approx(float(total), rel=1e-5)
    assert int(new.step) == 1 and int(new.skipped) == 0
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(new.params))
    moved = {part for part in new.params if largest(jax.tree.map(jnp.subtract, new.params[part], state.params[part]))}
    assert moved == {"bart", *NEW} - ({"logit_scale"} if config.student.logit_scale == "clip" else set())
    rows = WIDTH if config.student.image_tokens in HIDDEN else JOINT
    assert state.params["image_projection"]["kernel"].shape == (rows, WIDTH)
    if config.dropout:  # its random numbers are a function of the step
        again, later = (step(state.replace(step=jnp.int32(k)), frozen, batch)[1] for k in (0, 1))
        assert float(again["icti"]) == float(metrics["icti"]) != float(later["icti"])
    if config.dtype == "bfloat16":
        expected = mixed.means(jax.tree.map(np.asarray, state.params))
        assert {k: float(metrics[k]) for k in expected} == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"objective": "x"}, ["config.objective is 'x'", "vlkd"]),
        ({"student__image_tokens": "all"}, ["config.student.image_tokens", "pooled"]),
        ({"student__sentence_position": "cls"}, ["config.student.sentence_position", "eos"]),
        ({"student__logit_scale": "free"}, ["config.student.logit_scale", "learned"]),
        ({"student__ttdm": "cosine"}, ["config.student.ttdm", "raw"]),
        ({"dtype": "float16"}, ["config.dtype", "bfloat16"]),
        ({"data__replay_length": 65}, ["config.data.replay_length is 65", "64 positions"]),
        ({"clip": ""}, ["config.clip is empty"]),
        ({"bart": ""}, ["config.bart is empty"]),
    ],
)
def test_unknown_choices_are_named(assets, changes, words):
    with pytest.raises(UserError) as caught:
        make_task(tiny_config(assets, **changes))
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize("objective_name", ["clip_contrastive", "bart_denoise"])
def test_the_other_objectives_train(assets, objective_name):
    source = "shapes" if objective_name == "clip_contrastive" else "shapes_texts"
    config = tiny_config(assets, objective=objective_name, data__source=source, data__source_length=64, optim__lr=3e-3)
    _, batch, state, step, frozen = start(config)
    seen = []
    for _ in range(5):
        state, metrics = step(state, frozen, batch)
        seen.append(float(metrics["loss"]))
    assert seen[-1] < seen[0] and frozen == {}


# The optimizer.


def one_step(config, params, grads):
    optimizer = make_optimizer(config.optim, config.steps, NEW)
    updates, _ = jax.jit(optimizer.update)(grads, jax.jit(optimizer.init)(params), params)
    return updates


def test_parameter_groups_have_their_rates(assets, mixed):
    """Adam's first step is the rate times the gradient's sign, whatever its size."""
    params = mixed.params
    config = tiny_config(
        assets,
        optim__lr=3e-5,
        optim__lr_linears=2e-3,
        optim__weight_decay=0.0,
        optim__warmup=0,
        optim__schedule="constant",
    )
    grads = jax.tree.map(
        lambda x: np.where(np.arange(x.size).reshape(x.shape) % 2, 0.5, -0.01).astype(np.float32), params
    )
    updates = one_step(config, params, grads)
    assert jax.tree.leaves(groups(params, NEW)).count("linears") == 3
    for name, tree in updates.items():
        rate = 2e-3 if name in NEW else 3e-5
        for update, grad in zip(jax.tree.leaves(tree), jax.tree.leaves(grads[name])):
            np.testing.assert_allclose(update, -rate * np.sign(grad), rtol=1e-2)


def test_weight_decay_spares_biases_norms_and_the_scale(assets, mixed):
    params = mixed.params
    config = tiny_config(assets, optim__lr=1e-3, optim__lr_linears=1e-2, optim__weight_decay=0.1, optim__warmup=0)
    updates = one_step(config, params, jax.tree.map(np.zeros_like, params))
    spared = []
    for (path, update), value in zip(jax.tree_util.tree_leaves_with_path(updates), jax.tree.leaves(params)):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        rate = 1e-2 if name.split("/")[0] in NEW else 1e-3
        if name.endswith(("/kernel", "/embedding")):
            np.testing.assert_allclose(update, -rate * 0.1 * value, rtol=1e-4, atol=1e-9)
        else:
            assert not np.any(update)
            spared.append(name.split("/")[-1])
    assert set(spared) == {"bias", "scale", "final_logits_bias", "logit_scale"}
    assert sum(jax.tree.leaves(decayed(params))) == len(jax.tree.leaves(params)) - len(spared)


def test_clipping_is_of_the_global_norm(assets, mixed):
    """Adam forgets a common factor, so clipping shows in its first moment after a huge gradient."""
    params = mixed.params
    config = tiny_config(assets, optim__clip_norm=0.5)
    optimizer = make_optimizer(config.optim, 6, NEW)
    grads = jax.tree.map(lambda x: np.full_like(x, 3.0), params)
    _, state = jax.jit(optimizer.update)(grads, optimizer.init(params), params)
    first_moment = state[1].mu
    expected = 0.1 * 0.5 / np.sqrt(count_parameters(params))
    for leaf in jax.tree.leaves(first_moment):
        np.testing.assert_allclose(leaf, expected, rtol=1e-3)


def test_schedules(assets):
    peak, steps, warmup = 2e-3, 100, 20
    config = tiny_config(assets, optim__warmup=warmup).optim
    after = {
        "constant": lambda k: peak,
        "linear": lambda k: peak * (1 - k / 80),
        "cosine": lambda k: peak * (1 + np.cos(np.pi * k / 80)) / 2,
    }
    for name, value in after.items():
        config.schedule = name
        rate = schedule(config, peak, steps)
        assert float(rate(0)) == pytest.approx(peak / 20)  # never a step of size zero
        assert float(rate(10)) == pytest.approx(peak / 20 + (peak - peak / 20) / 2)
        for k in (0, 1, 40, 79):
            assert float(rate(warmup + k)) == pytest.approx(value(k), rel=1e-5, abs=1e-7 * peak)
        config.warmup = 0
        assert float(schedule(config, peak, steps)(0)) == pytest.approx(peak)
        config.warmup = 500  # longer than the run: it warms up all along
        assert float(schedule(config, peak, steps)(99)) < peak
        config.warmup = warmup


def test_a_few_pairs_are_learned_by_heart(assets):
    """Eight pairs, corrupted anew at each step: the infilling loss goes below 0.05."""
    config = tiny_config(
        assets, steps=120, optim__lr=1e-2, optim__lr_linears=1e-2, optim__weight_decay=0.0, optim__warmup=20
    )
    task, _, state, step, frozen = start(config)
    seen = []
    for batch in itertools.islice(eight_pairs(config, task), config.steps):
        state, metrics = step(state, frozen, batch)
        seen.append(float(metrics["icti"]))
    assert seen[0] > 3 and np.mean(seen[-10:]) < 0.05, np.mean(seen[-10:])


def eight_pairs(config, task):
    """Endless batches of the same eight pairs, each time corrupted in another way."""

    class Eight(ShapesPairs):
        def __len__(self) -> int:
            return 8

    stream = batches(Eight(0, "train"), task.encoder, batch_size=8, seed=0, shuffle=False, threads=0)
    return (batch.replace(index=None) for batch in stream)


def test_batches_without_a_field_are_trees(mixed):
    """What an objective does not use is no leaf, so nothing of it is moved to a device."""
    assert len(jax.tree.leaves(mixed.batch.replace(replay=None))) == 8
    assert jax.tree.leaves(Batch()) == []


@pytest.mark.parametrize("objective", ["vlkd", "bart_denoise"])
def test_what_is_saved_keeps_the_dropout_of_its_parent(assets, tmp_path, objective):
    """A run trains with rates of its own; the directory written from it says what the one it came from said."""
    shutil.copytree(assets / "bart", tmp_path / "bart")
    values = json.loads((tmp_path / "bart" / "config.json").read_text())
    rates = {"dropout": 0.1, "attention_dropout": 0.2, "activation_dropout": 0.3}
    (tmp_path / "bart" / "config.json").write_text(json.dumps(values | rates))
    config = tiny_config(assets, objective=objective, bart=str(tmp_path / "bart"), dropout=0.4)
    made = make_task(config)
    assert made.module.config.dropout == 0.4 and made.module.config.attention_dropout == 0
    params = made.load_params()["bart"] if objective == "vlkd" else made.load_params()
    save_bart(tmp_path / "saved", made.configs["bart"], jax.device_get(params))
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert {name: saved[name] for name in rates} == rates
