"""Objectives, the frozen teacher and the optimizer: every option runs and does what it says, in numbers."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import JOINT, WIDTH, make_assets, tiny_config

from vlkd_jax import losses
from vlkd_jax.data.pipeline import batches
from vlkd_jax.data.sources import ShapesPairs
from vlkd_jax.data.streams import train_stream
from vlkd_jax.distill import make_objective, make_train_step, teacher_outputs
from vlkd_jax.errors import UserError
from vlkd_jax.models.vlkd import MAX_LOGIT_SCALE
from vlkd_jax.optim import LINEARS, count_parameters, decayed, groups, make_optimizer, schedule
from vlkd_jax.types import Batch, TrainState

MIXED = {"loss__text": 0.5, "loss__l2": 0.1}


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    return make_assets(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def plain(assets):
    """(objective, batch, parameters a little away from their start) of the default options."""
    return prepared(tiny_config(assets))


def prepared(config):
    objective = make_objective(config)
    batch = next(iter(train_stream(config, objective, 0))).replace(index=None)
    return objective, batch, nudged(objective.params)


def nudged(params, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: np.asarray(x + 0.05 * rng.normal(size=np.shape(x)), np.float32), params)


def terms_of(objective, params, batch, rng=None):
    found = jax.jit(objective.terms)(params, objective.frozen, batch, rng)
    return {name: (float(total), float(count)) for name, (total, count) in found.items()}


def mean_of(objective, params, batch):
    return {name: total / count for name, (total, count) in terms_of(objective, params, batch).items()}


def gradient(objective, of="params"):
    """Jitted gradient of the weighted loss by the parameters, or by what is frozen."""

    def loss(params, frozen, batch, rng):
        terms = objective.terms(params, frozen, batch, rng)
        return sum(weight * terms[name][0] / terms[name][1] for name, weight in objective.weights.items())

    return jax.jit(jax.grad(loss, argnums=0 if of == "params" else 1))


def largest(tree):
    return max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(tree))


def test_terms_and_parameters(plain):
    objective, batch, params = plain
    assert set(objective.weights) == {"ttdm", "itcl", "icti"} == set(terms_of(objective, params, batch))
    assert set(params) == {"bart", "sentence_projection", "image_projection", "logit_scale"} == {"bart", *LINEARS}
    assert jax.tree.map(np.shape, params["sentence_projection"]) == {"kernel": (WIDTH, JOINT)}
    assert jax.tree.map(np.shape, params["image_projection"]) == {"kernel": (JOINT, WIDTH)}
    assert float(objective.params["logit_scale"]) == pytest.approx(np.log(1 / 0.07))
    assert set(objective.frozen) == {"clip"}
    found = terms_of(objective, params, batch)
    assert found["ttdm"][1] == found["itcl"][1] == 8 and found["icti"][1] == batch.text_mask.sum()


@functools.cache
def student_outputs(student):
    def read(params, batch, tokens):
        def forward(s):
            hidden = s.encode(batch.text_ids, batch.text_mask)
            corrupted = s.encode(batch.source_ids, batch.source_mask)
            memory, mask = s.memory(s.image_prefix(tokens), corrupted, batch.source_mask)
            return hidden, memory, mask, s.decode_logits(batch.text_ids, memory, mask)

        return student.apply({"params": params}, method=forward)

    return jax.jit(read)


def test_losses_follow_the_method(plain):
    """Each term again in the method's words: which text each side reads, where the sentence stands, the prefix."""
    objective, batch, params = plain
    tokens, image, text = (
        np.asarray(x) for x in teacher_outputs(objective.teacher, objective.frozen["clip"], batch, "projected")
    )
    assert tokens.shape == (8, 5, JOINT)
    np.testing.assert_allclose(np.linalg.norm(image, axis=-1), 1, rtol=1e-5)
    hidden, memory, mask, logits = map(np.asarray, student_outputs(objective.module)(params, batch, tokens))
    eos = objective.encoder.bart_text.eos
    at = [list(row[keep]).index(eos) for row, keep in zip(batch.text_ids, batch.text_mask)]
    sentence = hidden[np.arange(8), at] @ params["sentence_projection"]["kernel"]
    sentence /= np.linalg.norm(sentence, axis=-1, keepdims=True)
    np.testing.assert_allclose(memory[:, :5], tokens @ params["image_projection"]["kernel"], atol=1e-4)
    assert mask.shape == (8, 5 + 40) and mask[:, :5].all() and (mask[:, 5:] == batch.source_mask).all()
    scale = np.exp(params["logit_scale"])
    expected = {
        "ttdm": np.mean(np.sum((sentence - text) ** 2, -1)),
        "itcl": float(losses.itcl(image, sentence, scale)[0]) / 8,
        "icti": float(losses.icti(logits, batch.text_ids, batch.text_mask)[0]) / batch.text_mask.sum(),
    }
    found = mean_of(objective, params, batch)
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-4), name


def test_padding_and_other_images_have_no_say_where_they_should_not(plain, rng):
    objective, batch, params = plain
    found = mean_of(objective, params, batch)
    noisy = {
        f"{name}_ids": np.where(getattr(batch, f"{name}_mask"), getattr(batch, f"{name}_ids"), 7).astype(np.int32)
        for name in ("text", "source", "clip")
    }
    assert mean_of(objective, params, batch.replace(**noisy)) == pytest.approx(found, rel=1e-5)
    blank = mean_of(objective, params, batch.replace(pixels=np.zeros_like(batch.pixels)))
    assert blank["ttdm"] == pytest.approx(found["ttdm"], rel=1e-6)  # texts alone
    assert blank["icti"] != found["icti"] and blank["itcl"] != found["itcl"]
    masks = np.full_like(batch.source_ids, objective.encoder.bart_text.mask)
    corrupted = mean_of(objective, params, batch.replace(source_ids=masks))
    assert corrupted["icti"] != found["icti"]
    assert corrupted["ttdm"] == pytest.approx(found["ttdm"]) and corrupted["itcl"] == pytest.approx(found["itcl"])


def test_halves_add_up(plain):
    objective, batch, params = plain
    whole = terms_of(objective, params, batch)
    halves = [terms_of(objective, params, jax.tree.map(lambda x, s=s: x[s : s + 4], batch)) for s in (0, 4)]
    for name in ("ttdm", "icti"):
        np.testing.assert_allclose(np.sum([half[name] for half in halves], 0), whole[name], rtol=1e-5)


def test_the_teacher_gets_no_gradient(assets):
    """With every option that reads frozen parameters turned on."""
    objective, batch, params = prepared(tiny_config(assets, student__logit_scale="clip", **MIXED))
    assert set(objective.frozen) == {"clip", "start"}
    assert largest(gradient(objective, "frozen")(params, objective.frozen, batch, None)["clip"]) == 0
    assert largest(gradient(objective)(params, objective.frozen, batch, None)) > 0


OPTIONS = {
    "hidden": {"student__image_tokens": "hidden", "student__sentence_position": "bos", "student__ttdm": "raw"},
    "pooled": {"student__image_tokens": "pooled", "student__logit_scale": "clip", "remat": True, **MIXED},
    "mixed": {"dtype": "bfloat16", "dropout": 0.1, "remat": True, **MIXED},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_train(assets, name):
    """One whole step: finite, every parameter group moves, the count of updates is right."""
    config = tiny_config(assets, **OPTIONS[name])
    objective, batch, _ = prepared(config)
    optimizer = make_optimizer(config.optim, config.steps)
    params = jax.tree.map(jnp.asarray, objective.params)
    state = TrainState(jnp.int32(0), params, optimizer.init(params), jnp.int32(0), jnp.int32(0))
    step = jax.jit(make_train_step(objective, optimizer, config.dropout, config.seed))
    new, metrics = step(state, objective.frozen, batch)
    assert {"loss", "grad_norm", *objective.weights} <= set(metrics)
    assert all(np.isfinite(value) for value in metrics.values())
    total = sum(weight * metrics[key] for key, weight in objective.weights.items())
    assert float(metrics["loss"]) == pytest.approx(float(total), rel=1e-5)
    assert int(new.step) == 1 and int(new.skipped) == 0
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(new.params))
    for group in ("bart", "sentence_projection", "image_projection"):
        assert largest(jax.tree.map(jnp.subtract, new.params[group], params[group])) > 0
    moved = float(new.params["logit_scale"]) != float(params["logit_scale"])
    assert moved == (config.student.logit_scale == "learned")
    rows = {"projected": JOINT, "pooled": JOINT, "hidden": WIDTH}[config.student.image_tokens]
    assert params["image_projection"]["kernel"].shape == (rows, WIDTH)


def test_image_token_options(plain):
    objective, batch, _ = plain
    clip = objective.frozen["clip"]
    kinds = {
        kind: teacher_outputs(objective.teacher, clip, batch, kind)[0] for kind in ("projected", "hidden", "pooled")
    }
    assert {kind: found.shape for kind, found in kinds.items()} == {
        "projected": (8, 5, JOINT),
        "hidden": (8, 5, WIDTH),
        "pooled": (8, 1, JOINT),
    }
    # The pooled token is the class token of the projected ones, normalised.
    np.testing.assert_allclose(losses.normalise(kinds["projected"][:, 0]), kinds["pooled"][:, 0], atol=1e-5)


def test_sentence_raw_and_scale_options_in_numbers(assets, plain):
    default, batch, params = plain
    config = tiny_config(assets, student__sentence_position="bos", student__ttdm="raw", student__logit_scale="clip")
    objective = make_objective(config)
    tokens, image, text = map(
        np.asarray, teacher_outputs(objective.teacher, objective.frozen["clip"], batch, "projected")
    )
    hidden = np.asarray(student_outputs(default.module)(params, batch, tokens)[0])
    raw = hidden[:, 0] @ params["sentence_projection"]["kernel"]
    unit = raw / np.linalg.norm(raw, axis=-1, keepdims=True)
    found = mean_of(objective, params, batch)
    assert found["ttdm"] == pytest.approx(np.mean(np.sum((raw - text) ** 2, -1)), rel=1e-4)
    scale = np.exp(objective.frozen["clip"]["logit_scale"])
    assert found["itcl"] == pytest.approx(float(losses.itcl(image, unit, scale)[0]) / 8, rel=1e-4)


def test_the_scale_is_capped(plain):
    objective, batch, params = plain
    for value, expected in ((np.log(50), 50), (np.log(100), 100), (10.0, MAX_LOGIT_SCALE)):
        moved = params | {"logit_scale": np.float32(value)}
        found = objective.module.apply({"params": moved}, method="scale")
        assert float(found) == pytest.approx(expected, rel=1e-5) and MAX_LOGIT_SCALE == 100
    at_cap = [mean_of(objective, params | {"logit_scale": np.float32(v)}, batch)["itcl"] for v in (5.0, 10.0)]
    assert at_cap[0] == pytest.approx(at_cap[1], rel=1e-5)


def test_the_pull_to_the_start_in_numbers(assets):
    objective, batch, params = prepared(tiny_config(assets, loss__l2=0.1))
    gaps = jax.tree.map(lambda a, b: np.sum((a.astype(np.float64) - b) ** 2), params["bart"], objective.frozen["start"])
    expected = 0.5 * sum(jax.tree.leaves(gaps))
    assert mean_of(objective, params, batch)["l2"] == pytest.approx(expected, rel=1e-4) and expected > 1
    assert mean_of(objective, objective.params, batch)["l2"] == 0
    alone = dataclasses.replace(objective, weights={"l2": 1.0})
    pull = gradient(alone)(params, objective.frozen, batch, None)
    for found, now, start in zip(*map(jax.tree.leaves, (pull["bart"], params["bart"], objective.frozen["start"]))):
        np.testing.assert_allclose(found, now - start, atol=1e-5)
    assert largest({name: pull[name] for name in LINEARS}) == 0


def test_replay_is_denoising_beside_the_pairs(assets):
    objective, batch, params = prepared(tiny_config(assets, loss__text=0.5))
    found = mean_of(objective, params, batch)
    alone = jax.jit(objective.text_terms)(params, objective.frozen, batch.replay, None)
    assert found["text"] == pytest.approx(float(alone["text"][0] / alone["text"][1]), rel=1e-5)
    assert 0 <= float(alone["token_accuracy"][0] / alone["token_accuracy"][1]) < 1
    without = mean_of(objective, params, batch.replace(replay=None))
    assert without == pytest.approx({k: v for k, v in found.items() if k != "text"}, rel=1e-5)


def test_dropout_needs_its_random_numbers(assets, plain):
    objective, batch, params = prepared(tiny_config(assets, dropout=0.3))
    one, again, other = (terms_of(objective, params, batch, jax.random.key(k)) for k in (1, 1, 2))
    assert one == again and one["icti"] != other["icti"]
    assert mean_of(objective, params, batch) == pytest.approx(mean_of(plain[0], params, batch), rel=1e-5)


def test_remat_and_bfloat16_compute_the_same(assets, plain):
    _, batch, params = plain
    expected = mean_of(plain[0], params, batch)
    grads = gradient(plain[0])(params, plain[0].frozen, batch, None)
    saved = make_objective(tiny_config(assets, remat=True))
    for ours, theirs in zip(*map(jax.tree.leaves, (gradient(saved)(params, saved.frozen, batch, None), grads))):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    half = make_objective(tiny_config(assets, dtype="bfloat16"))
    assert mean_of(half, params, batch) == pytest.approx(expected, rel=0.03)


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
        make_objective(tiny_config(assets, **changes))
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize("objective_name", ["clip_contrastive", "bart_denoise"])
def test_the_other_objectives_train(assets, objective_name):
    source = "shapes" if objective_name == "clip_contrastive" else "shapes_texts"
    config = tiny_config(assets, objective=objective_name, data__source=source, data__source_length=64, optim__lr=1e-2)
    objective = make_objective(config)
    optimizer = make_optimizer(config.optim, config.steps)
    params = jax.tree.map(jnp.asarray, objective.params)
    state = TrainState(jnp.int32(0), params, optimizer.init(params), jnp.int32(0), jnp.int32(0))
    step = jax.jit(make_train_step(objective, optimizer, 0.0, 0))
    batch = next(iter(train_stream(config, objective, 0))).replace(index=None)
    seen = []
    for _ in range(5):
        state, metrics = step(state, objective.frozen, batch)
        seen.append(float(metrics["loss"]))
    assert seen[-1] < seen[0] and objective.frozen == {}


# The optimizer.


def one_step(config, params, grads):
    optimizer = make_optimizer(config.optim, config.steps)
    updates, _ = jax.jit(optimizer.update)(grads, jax.jit(optimizer.init)(params), params)
    return updates


def test_parameter_groups_have_their_rates(assets, plain):
    """Adam's first step is the rate times the gradient's sign, whatever its size."""
    _, _, params = plain
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
    assert jax.tree.leaves(groups(params)).count("linears") == 3
    for name, tree in updates.items():
        rate = 2e-3 if name in LINEARS else 3e-5
        for update, grad in zip(jax.tree.leaves(tree), jax.tree.leaves(grads[name])):
            np.testing.assert_allclose(update, -rate * np.sign(grad), rtol=1e-2)


def test_weight_decay_spares_biases_norms_and_the_scale(assets, plain):
    _, _, params = plain
    config = tiny_config(assets, optim__lr=1e-3, optim__lr_linears=1e-2, optim__weight_decay=0.1, optim__warmup=0)
    updates = one_step(config, params, jax.tree.map(np.zeros_like, params))
    spared = []
    for (path, update), value in zip(jax.tree_util.tree_leaves_with_path(updates), jax.tree.leaves(params)):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        rate = 1e-2 if name.split("/")[0] in LINEARS else 1e-3
        if name.endswith(("/kernel", "/embedding")):
            np.testing.assert_allclose(update, -rate * 0.1 * value, rtol=1e-4, atol=1e-9)
        else:
            assert not np.any(update)
            spared.append(name.split("/")[-1])
    assert set(spared) == {"bias", "scale", "final_logits_bias", "logit_scale"}
    assert sum(jax.tree.leaves(decayed(params))) == len(jax.tree.leaves(params)) - len(spared)


def test_clipping_is_of_the_global_norm(assets, plain):
    """Adam forgets a common factor, so clipping shows in the second moment: the state after a huge gradient."""
    _, _, params = plain
    config = tiny_config(assets, optim__clip_norm=0.5)
    optimizer = make_optimizer(config.optim, 6)
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
        assets, steps=300, optim__lr=1e-2, optim__lr_linears=1e-2, optim__weight_decay=0.0, optim__warmup=20
    )
    objective = make_objective(config)
    optimizer = make_optimizer(config.optim, config.steps)
    params = jax.tree.map(jnp.asarray, objective.params)
    state = TrainState(jnp.int32(0), params, optimizer.init(params), jnp.int32(0), jnp.int32(0))
    step = jax.jit(make_train_step(objective, optimizer, 0.0, 0), donate_argnums=0)
    seen = []
    for batch in itertools.islice(eight_pairs(config, objective), config.steps):
        state, metrics = step(state, objective.frozen, batch)
        seen.append(float(metrics["icti"]))
    assert seen[0] > 3 and np.mean(seen[-10:]) < 0.05, np.mean(seen[-10:])


def eight_pairs(config, objective):
    """Endless batches of the same eight pairs, each time corrupted in another way."""

    class Eight(ShapesPairs):
        def __len__(self) -> int:
            return 8

    stream = batches(Eight(0, "train"), objective.encoder, batch_size=8, seed=0, shuffle=False, threads=0)
    return (batch.replace(index=None) for batch in stream)


def test_batches_without_a_field_are_trees(plain):
    """What an objective does not use is no leaf, so nothing of it is moved to a device."""
    _, batch, _ = plain
    assert len(jax.tree.leaves(batch)) == 8 and batch.replay is None
    assert jax.tree.leaves(Batch()) == []
