"""Greedy decoding: against an uncached loop, against Hugging Face token for token, and rows that keep to themselves."""

import dataclasses

import jax
import numpy as np
import pytest
from prompts import BOS, EOS, PAD, START, compiled, decode, encode, hugging_face, padded, prefixes, sources, varied
from tiny import generate, make_assets, tiny_config

from vlkd_jax.decoding import beam_search, sampling
from vlkd_jax.decoding.cache import extend
from vlkd_jax.models.bart import Bart
from vlkd_jax.shapes.sources import ShapesPairs
from vlkd_jax.sharding import one_device
from vlkd_jax.tasks import make_task
from vlkd_jax.vlkd import VLKD

NEW = 12


@pytest.fixture
def model(wordy):
    return wordy


def greedy(model, memory, memory_mask, prefix, prefix_mask, max_new_tokens=NEW):
    return decode(model, memory, memory_mask, prefix, prefix_mask, max_new_tokens=max_new_tokens)[:, 0]


def naive(model, memory, memory_mask, rows, max_new_tokens=NEW, forced_eos=EOS):
    """The whole decoder run again for each new token: no cache, no positions but the plain ones."""
    bart, params = model
    width = max(map(len, rows)) + max_new_tokens
    run = jax.jit(
        lambda ids: bart.apply(
            {"params": params},
            bart.apply({"params": params}, ids, memory, memory_mask, method="decode"),
            method="logits",
        )
    )
    rows, generated = [list(map(int, row)) for row in rows], [[] for _ in rows]
    for step in range(max_new_tokens):
        logits = np.asarray(run(padded(rows, width)[0]))
        for k, row in enumerate(rows):
            if EOS in generated[k]:
                continue
            token = int(logits[k, len(row) - 1].argmax())
            if step == max_new_tokens - 1 and forced_eos is not None:
                token = forced_eos
            generated[k].append(token)
            row.append(token)
    return padded(generated, max_new_tokens)[0]


def test_cached_is_naive(model, rng):
    memory, mask = encode(model, sources(rng, 8))
    rows = prefixes(rng, [0, 1, 2, 5, 9, 3, 0, 7])
    generated = greedy(model, memory, mask, *padded(rows))
    np.testing.assert_array_equal(generated, naive(model, memory, mask, rows))
    varied(generated)


def test_padding_is_not_seen(model, rng):
    """Wider buffers for source and prefix, with anything in the padding, give the same tokens."""
    texts, rows = sources(rng, 6), prefixes(rng, [4, 0, 2, 6, 1, 3])
    memory, mask = encode(model, texts)
    plain = greedy(model, memory, mask, *padded(rows))
    wide, wide_mask = encode(model, texts, 20)
    wide = np.where(wide_mask[..., None], wide, rng.normal(size=wide.shape) * 10).astype(np.float32)
    prefix, prefix_mask = padded(rows, 16)
    prefix = np.where(prefix_mask, prefix, rng.integers(3, 99, prefix.shape)).astype(np.int32)
    np.testing.assert_array_equal(greedy(model, wide, wide_mask, prefix, prefix_mask), plain)


def test_a_row_alone_says_the_same(model, rng):
    texts, rows = sources(rng, 5), prefixes(rng, [0, 3, 1, 6, 2])
    memory, mask = encode(model, texts)
    together = greedy(model, memory, mask, *padded(rows))
    for k in (1, 3):
        alone = greedy(model, *encode(model, texts[k : k + 1]), *padded(rows[k : k + 1]))
        np.testing.assert_array_equal(alone[0], together[k])


def test_neighbours_do_not_matter(model, rng):
    texts, rows = sources(rng, 6), prefixes(rng, [2, 0, 4, 1, 3, 5])
    memory, mask = encode(model, texts, 16)
    together = greedy(model, memory, mask, *padded(rows, 8))
    order = rng.permutation(6)
    prefix, prefix_mask = padded(rows, 8)
    moved = greedy(model, memory[order], mask[order], prefix[order], prefix_mask[order])
    np.testing.assert_array_equal(moved, together[order])
    others, others_mask = encode(model, sources(rng, 6), 16)
    others, others_mask = np.array(others), np.array(others_mask)
    others[2], others_mask[2] = memory[2], mask[2]
    strangers = [rows[2] if k == 2 else row for k, row in enumerate(prefixes(rng, [0, 6, 0, 6, 0, 6]))]
    np.testing.assert_array_equal(greedy(model, others, others_mask, *padded(strangers, 8))[2], together[2])


def test_ends(model, rng):
    memory, mask = encode(model, sources(rng, 40))
    prefix = padded(prefixes(rng, [0] * 40))
    generated = greedy(model, memory, mask, *prefix)
    ends = (generated == EOS).argmax(1)
    assert (generated == EOS).any(1).all()  # the last token is forced
    assert (ends < NEW - 1).sum() > 3 and (ends == NEW - 1).any()
    for row, end in zip(generated, ends):
        assert (row[end + 1 :] == PAD).all() and (row[:end] != PAD).all()
    short = greedy(model, memory, mask, *prefix, max_new_tokens=3)
    for row, longer in zip(short, generated):
        np.testing.assert_array_equal(row[:2], longer[:2])
    assert (short[:, 2][(short[:, :2] != EOS).all(1)] == EOS).all()


@pytest.mark.parametrize("token", [BOS, PAD])
def test_only_the_end_token_ends(model, rng, token):
    """Also where the model would rather say another special token, as an untrained one may."""
    memory, mask = encode(model, sources(rng, 3))
    generated = greedy(likely(model, token), memory, mask, *padded(prefixes(rng, [0, 2, 4])))
    np.testing.assert_array_equal(generated, [[token] * (NEW - 1) + [EOS]] * 3)


def likely(model, token):
    """The model with a bias that makes it say `token` always."""
    bart, params = model
    bias = params["final_logits_bias"]
    return bart, params | {"final_logits_bias": bias + 100 * (np.arange(bias.shape[-1]) == token)}


@pytest.mark.parametrize("method", ["greedy", "beam", "sample"])
@pytest.mark.parametrize(("token", "new", "steps"), [(BOS, 1, 0), (BOS, 2, 1), (BOS, 7, 6), (EOS, 7, 0)])
def test_no_step_follows_the_last_token(model, rng, monkeypatch, method, token, new, steps):
    """The prefill gives the first token, so one step less than tokens; none when every row has ended."""
    taken = []

    def counted(*arguments):
        jax.debug.callback(lambda: taken.append(1))
        return extend(*arguments)

    for module in (sampling, beam_search):
        monkeypatch.setattr(module, "extend", counted)
    memory, mask = encode(model, sources(rng, 3))
    options = {"method": method, "max_new_tokens": new, "beams": 1}
    compiled.cache_clear()
    generated = decode(likely(model, token), memory, mask, *padded(prefixes(rng, [0, 2, 4])), **options)
    jax.effects_barrier()
    compiled.cache_clear()
    assert len(taken) == steps
    said = [EOS] + [PAD] * (new - 1) if token == EOS else [token] * (new - 1) + [EOS]
    np.testing.assert_array_equal(generated[:, 0], [said] * 3)


def test_nothing_is_forced_where_nothing_is_configured(model, rng):
    bart, params = model
    free = Bart(dataclasses.replace(bart.config, forced_eos_token_id=None)), params
    memory, mask = encode(model, sources(rng, 20))
    rows = [[START]] * 20
    generated = greedy(free, memory, mask, *padded(rows))
    assert (generated[:, -1] != EOS).any()
    np.testing.assert_array_equal(generated, naive(free, memory, mask, rows, forced_eos=None))


@pytest.mark.parity
@pytest.mark.parametrize("forced", [{"forced_bos": BOS, "forced_eos": EOS}, {"forced_bos": None, "forced_eos": None}])
def test_hundred_prompts_as_hugging_face(wordy_bart, model, rng, forced):
    bart, params = model
    config = dataclasses.replace(bart.config, **{f"{name}_token_id": value for name, value in forced.items()})
    texts = sources(rng, 100)
    memory, mask = encode(model, texts)
    first = [START] if forced["forced_bos"] is None else [START, forced["forced_bos"]]
    ours = greedy((Bart(config), params), memory, mask, *padded([first] * 100))
    theirs = hugging_face(wordy_bart.model, texts, [[START]] * 100, NEW + len(first) - 1, **forced, num_beams=1)[:, 0]
    if forced["forced_bos"] is not None:
        assert (theirs[:, 0] == BOS).all()
    np.testing.assert_array_equal(ours, theirs[:, len(first) - 1 :])
    varied(ours)


@pytest.mark.parity
def test_prompts_with_a_forced_beginning_as_hugging_face(wordy_bart, model, rng):
    """Rows of every prefix length in one batch here; Hugging Face takes one length at a time."""
    lengths = np.repeat([1, 4, 7, 9], 25)
    texts, rows = sources(rng, 100), prefixes(rng, lengths)
    memory, mask = encode(model, texts)
    ours = greedy(model, memory, mask, *padded(rows))
    for start in range(0, 100, 25):
        part = slice(start, start + 25)
        theirs = hugging_face(wordy_bart.model, texts[part], rows[part], NEW, num_beams=1)
        np.testing.assert_array_equal(ours[part], theirs[:, 0])


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """A distillation's task on the tiny models, its weights blown up so that the student's words vary."""
    task = make_task(tiny_config(make_assets(tmp_path_factory.getbasetemp())))
    params = jax.tree.map(np.asarray, task.load_params())
    params["bart"] = jax.tree.map(lambda x: x * 8 if x.ndim > 2 else x, params["bart"])
    params["image_projection"] = {"kernel": params["image_projection"]["kernel"] * 50}
    return VLKD.of(task, params, task.load_frozen(), one_device())


def test_batches_are_padded_and_images_shared(student):
    source, text = ShapesPairs(0, "validation"), student.bart_text
    images = [source[i].image for i in range(3)]
    prompts = [text.encode(source[i].text)[: 2 + 3 * i] for i in range(7)]
    image_of = [0, 1, 2, 2, 1, 0, 1]
    answers = {size: generate(student, size, prompts, prompts, 6, images, image_of) for size in (2, 7, 16)}
    assert answers[2] == answers[7] == answers[16] and len(answers[2]) == 7
    blind = generate(student, 16, prompts, prompts, 6)
    swapped = generate(student, 16, prompts, prompts, 6, images[1:] + images[:1], image_of)
    assert blind != answers[2] and swapped != answers[2]
