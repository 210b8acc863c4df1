"""The predictor against the training forward, row by row; and rows that keep to themselves: no mix-up of images."""

import dataclasses
import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import IMAGE_SIZE, tiny_config

from vlkd_jax.distill import make_objective, teacher_outputs
from vlkd_jax.errors import UserError
from vlkd_jax.hf.load import load_bart
from vlkd_jax.hf.save import save_bart
from vlkd_jax.models.bart import POSITION_OFFSET
from vlkd_jax.predict import Predictor
from vlkd_jax.types import Batch

IMAGES, ROWS, BATCH = 5, 11, 4  # rows are no multiple of the batch
IMAGE_OF = [3, 0, 0, 4, 1, 2, 0, 3, 3, 1, 4]
WIDTH = 40  # tokens of a padded text in the training forward
KNOWN = ("red", "blue", "circle", "square", "large", "small", "left", "right")
NEW = 4  # the last of them is the forced `</s>`
KINDS = {
    "projected": {"student__image_tokens": "projected"},
    "penultimate": {"student__image_tokens": "penultimate"},
    "pooled": {"student__image_tokens": "pooled"},
    "whitened": {"student__image_tokens": "penultimate", "student__whiten": 1},
}


def loud(objective, rng):
    """The objective's parameters blown up until what is said depends on all that is read, and only words are said."""
    params = jax.tree.map(np.array, objective.params)
    params["bart"] = jax.tree.map(lambda x: x * 8 if x.ndim > 1 else x, params["bart"])
    params["bart"]["decoder"]["layers"]["encoder_attn"]["out_proj"]["kernel"] *= 8
    params["image_projection"]["kernel"] *= 100
    if "image_whitening" in params:
        width = params["image_whitening"]["mean"].size
        params["image_whitening"]["mean"] = rng.normal(size=width).astype(np.float32)
        params["image_whitening"]["matrix"] = rng.normal(size=(width, width)).astype(np.float32)
    bias = params["bart"]["final_logits_bias"]
    bias[:] = -1e9
    bias[0, [*words(objective.encoder.bart_text).values()]] = 0
    return params


def words(text):
    """Word -> its one token, of the tokens that are whole words."""
    found = {text.decode([k]): k for k in range(text.vocab_size)}  # " red" and "red" are read alike: one stays
    return {word: k for word, k in found.items() if word.isalpha() and word.isascii()}


@pytest.fixture(scope="module")
def make(assets):
    """Function kind -> (objective, parameters, predictor), made once."""

    @functools.cache
    def made(kind):
        config = tiny_config(assets, **KINDS[kind])
        objective = make_objective(config)
        params = loud(objective, np.random.default_rng(0))
        return objective, params, Predictor(objective, config.student.image_tokens, BATCH)

    return made


@pytest.fixture(scope="module")
def pixels():
    """Pictures [IMAGES, height, width, 3] of noise."""
    shape = IMAGES, IMAGE_SIZE, IMAGE_SIZE, 3
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


def prompts(objective, rng, count=ROWS):
    """(sources, prefixes): different words in every row, and prefixes of 0 to 5 words."""
    text = objective.encoder.bart_text
    said = [text.encode(" ".join(rng.permutation(KNOWN)[: 1 + k % 6])) for k in range(count)]
    return [[*ids, text.mask] for ids in said], [ids[: k % 6] for k, ids in enumerate(said)]


def padded(rows, pad):
    rows = list(rows)
    ids = np.full((len(rows), WIDTH), pad, np.int32)
    for k, row in enumerate(rows):
        ids[k, : len(row)] = row
    return ids, np.arange(WIDTH) < np.array([len(row) for row in rows])[:, None]


@functools.cache
def teacher_of(teacher, kind):
    return jax.jit(functools.partial(teacher_outputs, teacher, image_tokens=kind))


def training_tokens(objective, kind, pixels):
    """(image tokens, image embeddings) as the losses are given them."""
    ids = np.full((len(pixels), 2), objective.encoder.clip_text.eos, np.int32)
    batch = Batch(pixels=pixels, clip_ids=ids, clip_mask=np.ones_like(ids, bool))
    kind = KINDS[kind]["student__image_tokens"]
    return jax.tree.map(np.asarray, teacher_of(objective.teacher, kind)(objective.frozen["clip"], batch=batch)[:2])


def training_answers(objective, params, sources, prefixes, tokens=None, contexts=None):
    """What the training forward, run again for each word, holds most likely after every row's prefix, as texts."""
    text = objective.encoder.bart_text

    @jax.jit
    def logits(targets, source, tokens, context):
        def forward(student):
            memory, mask = student.encode(*source), source[1]
            if tokens is not None:
                memory, mask = student.memory(student.image_prefix(tokens), memory, mask)
            if context is not None:
                memory = jnp.concatenate([student.encode(*context), memory], 1)
                mask = jnp.concatenate([context[1], mask], 1)
            return student.decode_logits(targets, memory, mask)

        return objective.module.apply({"params": params}, method=forward)

    source = padded(map(text.wrap, sources), text.pad)
    context = None if contexts is None else padded(map(text.wrap, contexts), text.pad)
    targets, said = [[text.bos, *row] for row in prefixes], [[] for _ in prefixes]
    for _ in range(NEW - 1):
        scores = np.asarray(logits(padded(targets, text.pad)[0], source, tokens, context))
        for k, row in enumerate(targets):
            second, first = np.sort(scores[k, len(row)])[-2:]
            assert first - second > 1e-4  # rounding decides nothing
            said[k].append(int(scores[k, len(row)].argmax()))
            row.append(said[k][-1])
    return [text.decode(row) for row in said]


def differ(texts):
    """Most of them are said once."""
    assert len(set(texts)) > 0.7 * len(texts), texts


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_those_of_the_training_forward(make, pixels, rng, kind):
    """Other images, questions and prefix lengths in every row, over batches that do not come out even."""
    objective, params, predictor = make(kind)
    sources, prefixes = prompts(objective, rng)
    expected_tokens, expected_embeddings = training_tokens(objective, kind, pixels)
    tokens, embeddings = predictor.encode_images(list(pixels))
    np.testing.assert_allclose(tokens, expected_tokens, atol=1e-5)
    np.testing.assert_allclose(embeddings, expected_embeddings, atol=1e-5)
    found = predictor.generate(params, sources, prefixes, NEW, tokens, IMAGE_OF)
    assert found == training_answers(objective, params, sources, prefixes, expected_tokens[IMAGE_OF])
    differ(found)
    assert found != training_answers(objective, params, sources, prefixes)  # the picture has a say


@pytest.mark.parametrize("kind", ["projected", "whitened"])
def test_one_question_about_many_images(make, pixels, rng, kind):
    """Each image has its own answer, wherever in a batch it is asked about and however often."""
    objective, params, predictor = make(kind)
    sources, prefixes = prompts(objective, rng, 6)
    source, prefix = sources[5], prefixes[5]
    tokens, _ = predictor.encode_images(list(pixels))
    by_image = predictor.generate(params, [source] * IMAGES, [prefix] * IMAGES, NEW, tokens)
    assert len(set(by_image)) == IMAGES, by_image
    for image_of in (IMAGE_OF, IMAGE_OF[::-1], [2] * BATCH):
        rows = len(image_of)
        found = predictor.generate(params, [source] * rows, [prefix] * rows, NEW, tokens, image_of)
        assert found == [by_image[k] for k in image_of]
    order = rng.permutation(IMAGES)
    moved = predictor.generate(params, [source] * IMAGES, [prefix] * IMAGES, NEW, tokens[order])
    assert moved == [by_image[k] for k in order]


def test_rows_are_their_own_whatever_the_batches(make, pixels, rng):
    objective, params, predictor = make("projected")
    sources, prefixes = prompts(objective, rng)
    tokens, _ = predictor.encode_images(list(pixels))
    found = predictor.generate(params, sources, prefixes, NEW, tokens, IMAGE_OF)
    order = rng.permutation(ROWS)
    rows = [[some[k] for k in order] for some in (sources, prefixes, IMAGE_OF)]
    assert predictor.generate(params, *rows[:2], NEW, tokens, rows[2]) == [found[k] for k in order]
    for k in (0, 5, 10):
        alone = predictor.generate(params, [sources[k]], [prefixes[k]], NEW, tokens, [IMAGE_OF[k]])
        assert alone == [found[k]]


def test_answers_from_contexts_are_those_of_the_training_forward(make, rng):
    """A context of another length in every row, before the source, where an image would stand."""
    objective, params, predictor = make("projected")
    sources, prefixes = prompts(objective, rng)
    text = objective.encoder.bart_text
    contexts = [
        text.encode(" ".join(["a red circle", "two", "blue rings"][: 1 + k % 3] * (1 + k % 4))) for k in range(ROWS)
    ]
    found = predictor.generate(params, sources, prefixes, NEW, contexts=contexts)
    assert found == training_answers(objective, params, sources, prefixes, contexts=contexts)
    differ(found)
    others = predictor.generate(params, sources, prefixes, NEW, contexts=contexts[1:] + contexts[:1])
    assert sum(a != b for a, b in zip(found, others)) > ROWS / 2


def test_the_denoising_loss_holds_answers_from_contexts_likely(make, rng):
    """The text-only term's own accuracy is 1 on what the predictor says from contexts, and not on another row's."""
    objective, params, predictor = make("projected")
    sources, prefixes = prompts(objective, rng, 8)
    text = objective.encoder.bart_text
    contexts = [text.encode(" ".join(rng.permutation(KNOWN)[: 1 + k % 4])) for k in range(8)]
    said = [words(text)[word] for word in predictor.generate(params, sources, prefixes, 2, contexts=contexts)]
    accuracy = []
    for shift in (0, 1):
        targets = [[text.bos, *row, said[(k + shift) % 8]] for k, row in enumerate(prefixes)]
        ids, mask = padded(targets, text.pad)
        source, context = (padded(map(text.wrap, rows), text.pad) for rows in (sources, contexts))
        last = np.arange(WIDTH) == mask.sum(1, keepdims=True) - 1
        batch = Batch(
            text_ids=ids,
            text_mask=mask,
            target_mask=last,
            source_ids=source[0],
            source_mask=source[1],
            context_ids=context[0],
            context_mask=context[1],
        )
        right, count = jax.jit(objective.text_terms)(params, objective.frozen, batch, None)["token_accuracy"]
        assert count == 8
        accuracy.append(float(right) / 8)
    assert accuracy[0] == 1 and accuracy[1] < 0.5


def test_images_are_read_one_by_one(make, pixels):
    """Not even a picture of NaN beside it changes a row, nor how far the last batch is filled."""
    predictor = make("projected")[2]
    single = [predictor.encode_images([picture]) for picture in pixels]
    expected = [np.concatenate(some) for some in zip(*single)]
    assert len(np.unique(np.round(expected[1], 3), axis=0)) == IMAGES
    order = [4, 2, 0, 3, 1, 1, 0]
    for some in (range(IMAGES), order, order[:4]):
        for ours, theirs in zip(predictor.encode_images(pixels[k] for k in some), expected):
            np.testing.assert_array_equal(ours, theirs[list(some)])
    broken = np.full_like(pixels[0], np.nan)
    tokens, embeddings = predictor.encode_images([pixels[0], broken, pixels[1], broken, broken, pixels[2]])
    for ours, theirs in ((tokens, expected[0]), (embeddings, expected[1])):
        np.testing.assert_array_equal(ours[[0, 2, 5]], theirs[:3])
        assert np.isnan(ours[[1, 3, 4]]).all()


TEXTS = ["a red circle", "two", "a large blue ring at the top left", "no", "a small square and a circle", "left of it"]


@pytest.mark.parametrize("tower", ["student", "teacher"])
def test_texts_are_embedded_one_by_one_as_in_training(make, tower):
    objective, params, predictor = make("projected")
    if tower == "student":
        text = objective.encoder.bart_text
        ids, mask = padded([text.wrap(text.encode(words)) for words in TEXTS], text.pad)

        def sentence(student):
            return student.embed_sentence(student.encode(ids, mask), mask)

        expected = jax.jit(lambda p: objective.module.apply({"params": p}, method=sentence))(params)
        embed = functools.partial(predictor.embed_texts, params)
    else:
        text = objective.encoder.clip_text
        ids, mask = padded(map(text.encode, TEXTS), text.pad)
        batch = Batch(pixels=np.zeros((len(TEXTS), IMAGE_SIZE, IMAGE_SIZE, 3)), clip_ids=ids, clip_mask=mask)
        expected = teacher_of(objective.teacher, "pooled")(objective.frozen["clip"], batch=batch)[2]
        embed = predictor.embed_texts_clip
    expected = np.asarray(expected)
    distance = np.linalg.norm(expected[:, None] - expected[None], axis=-1)
    assert distance[~np.eye(len(TEXTS), dtype=bool)].min() > 0.01
    order = [5, 0, 3, 1, 4, 2, 2]
    for some in ([*range(len(TEXTS))], order, order[:BATCH], [2]):
        np.testing.assert_allclose(embed([TEXTS[k] for k in some]), expected[some], atol=1e-5)


def test_parameters_go_to_the_device_once(assets):
    """Not with each batch: every call of a compiled function gets arrays that are there already, the same ones."""
    objective = make_objective(tiny_config(assets))
    predictor, calls = Predictor(objective, batch_size=2), []
    for name in ("_encode_images", "_generate", "_embed", "_embed_clip"):
        compiled = getattr(predictor, name)
        setattr(predictor, name, lambda p, *a, f=compiled, n=name, **k: (calls.append((n, p)), f(p, *a, **k))[1])
    size, texts = predictor.image_size, ["a red circle", "a blue square", "a ring"]
    predictor.encode_images(np.zeros((3, size, size, 3), np.float32))
    predictor.embed_texts_clip(texts)
    predictor.embed_texts(objective.params, texts)
    predictor.generate(objective.params, [[7]] * 3, [[7]] * 3, 2)
    functions = ("_encode_images", "_embed_clip", "_embed", "_generate")
    assert [name for name, _ in calls] == [name for name in functions for _ in range(2)]
    for (_, first), (_, second) in zip(calls[::2], calls[1::2], strict=True):
        for one, other in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
            assert isinstance(one, jax.Array) and one is other


@pytest.fixture(scope="module")
def narrow(assets, tmp_path_factory):
    """(objective, parameters, predictor) of a BART of WIDTH positions: no multiple of the widths that are compiled."""
    place = shutil.copytree(assets / "bart", tmp_path_factory.mktemp("narrow") / "bart")
    config, params = load_bart(place)
    for side in ("encoder", "decoder"):
        table = params[side]["embed_positions"]
        table["embedding"] = table["embedding"][: WIDTH + POSITION_OFFSET]
    save_bart(place, dataclasses.replace(config, max_position_embeddings=WIDTH), params)
    objective = make_objective(tiny_config(assets, bart=str(place), data__replay_length=WIDTH))
    return objective, loud(objective, np.random.default_rng(0)), Predictor(objective, batch_size=BATCH)


def test_prompts_may_fill_the_positions_and_no_more(narrow, rng):
    """The longest beside a short one; the ends of a text, and the decoder's start and new tokens, take their room."""
    objective, params, predictor = narrow
    known = [*words(objective.encoder.bart_text).values()]

    def rows(longest):
        return [[int(k) for k in rng.choice(known, n)] for n in (3, longest)]

    room = {"sources": WIDTH - 2, "prefixes": WIDTH - 2 - NEW, "contexts": WIDTH - 2}
    full = {name: rows(count) for name, count in room.items()}
    found = predictor.generate(params, max_new_tokens=NEW, **full)
    assert found == training_answers(objective, params, **full)
    short = full | {"sources": rows(1), "contexts": rows(2)}  # the prefix is much the longest
    assert predictor.generate(params, max_new_tokens=NEW, **short) == training_answers(objective, params, **short)
    for name, count in room.items():
        with pytest.raises(UserError, match=f"there is room for {WIDTH - NEW if name == 'prefixes' else WIDTH};"):
            predictor.generate(params, max_new_tokens=NEW, **full | {name: rows(count + 1)})


def test_texts_to_embed_may_fill_the_positions(narrow, rng):
    """The student refuses longer ones; for the teacher they are cut, and end all the same."""
    objective, params, predictor = narrow
    text, clip_text = objective.encoder.bart_text, objective.encoder.clip_text
    said = [str(word) for word in rng.choice(KNOWN, 3 * WIDTH)]

    def longest(encode, room):
        return max(k for k in range(len(said)) if len(encode(" ".join(said[:k]))) <= room)

    count = longest(text.encode, WIDTH - 2)
    full = " ".join(said[:count])
    assert len(text.encode(full)) > 32
    for some in ([full], ["a red circle", full]):
        ids, mask = padded([text.wrap(text.encode(words)) for words in some], text.pad)

        def sentence(student, ids=ids, mask=mask):
            return student.embed_sentence(student.encode(ids, mask), mask)

        expected = jax.jit(lambda p, sentence=sentence: objective.module.apply({"params": p}, method=sentence))(params)
        np.testing.assert_allclose(predictor.embed_texts(params, some), expected, atol=1e-5)
    with pytest.raises(UserError, match="max_position_embeddings is 40"):
        predictor.embed_texts(params, ["a red circle", " ".join(said)])

    count = longest(clip_text.encode, predictor.clip_length)
    assert len(clip_text.encode(" ".join(said[:count]))) == predictor.clip_length
    found = predictor.embed_texts_clip([" ".join(said[:k]) for k in (count - 1, count, count + 1, len(said))])
    assert np.linalg.norm(found[0] - found[1]) > 1e-3
    np.testing.assert_array_equal(found[2:], found[[1, 1]])
