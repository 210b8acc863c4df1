"""The predictor against the training forward, row by row; and rows that keep to themselves: no mix-up of images."""

import dataclasses
import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import IMAGE_SIZE, generate, tiny_config

from vlkd_jax import predict
from vlkd_jax.decoding import Decoding
from vlkd_jax.errors import UserError
from vlkd_jax.hf.load import load_bart
from vlkd_jax.hf.save import save_bart
from vlkd_jax.models.bart import POSITION_OFFSET
from vlkd_jax.sharding import one_device
from vlkd_jax.tasks import make_task
from vlkd_jax.tasks.distill import teacher_outputs
from vlkd_jax.train import train
from vlkd_jax.types import Batch
from vlkd_jax.vlkd import VLKD

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


def loud(task, rng):
    """A task's parameters blown up until what is said depends on all that is read, and only words are said."""
    params = jax.tree.map(np.array, task.load_params())
    params["bart"] = jax.tree.map(lambda x: x * 8 if x.ndim > 1 else x, params["bart"])
    params["bart"]["decoder"]["layers"]["encoder_attn"]["out_proj"]["kernel"] *= 8
    params["image_projection"]["kernel"] *= 100
    if "image_whitening" in params:
        width = params["image_whitening"]["mean"].size
        params["image_whitening"]["mean"] = rng.normal(size=width).astype(np.float32)
        params["image_whitening"]["matrix"] = rng.normal(size=(width, width)).astype(np.float32)
    bias = params["bart"]["final_logits_bias"]
    bias[:] = -1e9
    bias[0, [*words(task.encoder.bart_text).values()]] = 0
    return params


def words(text):
    """Word -> its one token, of the tokens that are whole words."""
    ids = {text.decode([k]): k for k in range(text.vocab_size)}  # " red" and "red" are read alike: one stays
    return {word: k for word, k in ids.items() if word.isalpha() and word.isascii()}


@pytest.fixture(scope="module")
def make(assets):
    """Function kind -> (task, parameters, model), made once."""

    @functools.cache
    def made(kind):
        task = make_task(tiny_config(assets, **KINDS[kind]))
        params = loud(task, np.random.default_rng(0))
        return task, params, VLKD.of(task, jax.device_put(params), task.load_frozen(), one_device())

    return made


@pytest.fixture(scope="module")
def pixels():
    """Pictures of noise, uint8 [height, width, 3] each."""
    shape = IMAGES, IMAGE_SIZE, IMAGE_SIZE, 3
    return list(np.random.default_rng(1).integers(0, 256, shape, np.uint8))


def prompts(task, rng, count=ROWS):
    """(sources, prefixes): different words in every row, and prefixes of 0 to 5 words."""
    text = task.encoder.bart_text
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


def training_tokens(task, model, kind, pixels):
    """(image tokens, image embeddings) as the losses are given them."""
    ids = np.full((len(pixels), 2), task.encoder.clip_text.eos, np.int32)
    batch = Batch(pixels=np.stack(pixels), clip_ids=ids, clip_mask=np.ones_like(ids, bool))
    kind = KINDS[kind]["student__image_tokens"]
    return jax.tree.map(np.asarray, teacher_of(task.teacher, kind)(model.clip_params, batch=batch)[:2])


def training_answers(task, params, sources, prefixes, tokens=None, contexts=None):
    """What the training forward, run again for each word, holds most likely after every row's prefix, as texts."""
    text = task.encoder.bart_text

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

        return task.module.apply({"params": params}, method=forward)

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
    task, params, model = make(kind)
    sources, prefixes = prompts(task, rng)
    expected_tokens, expected_embeddings = training_tokens(task, model, kind, pixels)
    np.testing.assert_allclose(predict.embed_images(model, pixels, BATCH), expected_embeddings, atol=1e-5)
    answers = generate(model, BATCH, sources, prefixes, NEW, pixels, IMAGE_OF)
    assert answers == training_answers(task, params, sources, prefixes, expected_tokens[IMAGE_OF])
    differ(answers)
    assert answers != training_answers(task, params, sources, prefixes)  # the picture has a say


@pytest.mark.parametrize("kind", ["projected", "whitened"])
def test_one_question_about_many_images(make, pixels, rng, kind):
    """Each image has its own answer, wherever in a batch it is asked about and however often."""
    task, _, model = make(kind)
    sources, prefixes = prompts(task, rng, 6)
    source, prefix = sources[5], prefixes[5]
    by_image = generate(model, BATCH, [source] * IMAGES, [prefix] * IMAGES, NEW, pixels)
    assert len(set(by_image)) >= IMAGES - 1, by_image  # noise may look alike once
    for image_of in (IMAGE_OF, IMAGE_OF[::-1], [2] * BATCH):
        rows = len(image_of)
        answers = generate(model, BATCH, [source] * rows, [prefix] * rows, NEW, pixels, image_of)
        assert answers == [by_image[k] for k in image_of]
    order = rng.permutation(IMAGES)
    moved = generate(model, BATCH, [source] * IMAGES, [prefix] * IMAGES, NEW, [pixels[k] for k in order])
    assert moved == [by_image[k] for k in order]


def test_rows_are_their_own_whatever_the_batches(make, pixels, rng):
    task, _, model = make("projected")
    sources, prefixes = prompts(task, rng)
    answers = generate(model, BATCH, sources, prefixes, NEW, pixels, IMAGE_OF)
    order = rng.permutation(ROWS)
    rows = [[some[k] for k in order] for some in (sources, prefixes, IMAGE_OF)]
    assert generate(model, BATCH, *rows[:2], NEW, pixels, rows[2]) == [answers[k] for k in order]
    for k in (0, 5, 10):
        alone = generate(model, BATCH, [sources[k]], [prefixes[k]], NEW, pixels, [IMAGE_OF[k]])
        assert alone == [answers[k]]


def test_answers_from_contexts_are_those_of_the_training_forward(make, rng):
    """A context of another length in every row, before the source, where an image would stand."""
    task, params, model = make("projected")
    sources, prefixes = prompts(task, rng)
    text = task.encoder.bart_text
    contexts = [
        text.encode(" ".join(["a red circle", "two", "blue rings"][: 1 + k % 3] * (1 + k % 4))) for k in range(ROWS)
    ]
    answers = generate(model, BATCH, sources, prefixes, NEW, contexts=contexts)
    assert answers == training_answers(task, params, sources, prefixes, contexts=contexts)
    differ(answers)
    others = generate(model, BATCH, sources, prefixes, NEW, contexts=contexts[1:] + contexts[:1])
    assert sum(a != b for a, b in zip(answers, others)) > ROWS / 2


def test_the_denoising_loss_holds_answers_from_contexts_likely(make, rng):
    """The text-only term's own accuracy is 1 on what the predictor says from contexts, and not on another row's."""
    task, params, model = make("projected")
    sources, prefixes = prompts(task, rng, 8)
    text = task.encoder.bart_text
    contexts = [text.encode(" ".join(rng.permutation(KNOWN)[: 1 + k % 4])) for k in range(8)]
    said = [words(text)[word] for word in generate(model, BATCH, sources, prefixes, 2, contexts=contexts)]
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
        right, count = jax.jit(task.denoise_terms)(params, {}, batch, None)["token_accuracy"]
        assert count == 8
        accuracy.append(float(right) / 8)
    assert accuracy[0] == 1 and accuracy[1] < 0.5


def test_images_are_read_one_by_one(make, pixels):
    """No picture beside it changes a row, nor how far the last batch is filled."""
    model = make("projected")[2]
    expected = np.concatenate([predict.embed_images(model, [picture], BATCH) for picture in pixels])
    assert len(np.unique(np.round(expected, 3), axis=0)) == IMAGES
    order = [4, 2, 0, 3, 1, 1, 0]
    for some in ([*range(IMAGES)], order, order[:4]):
        vectors = predict.embed_images(model, (pixels[k] for k in some), BATCH)
        np.testing.assert_array_equal(vectors, expected[some])
    white = np.full_like(pixels[0], 255)
    vectors = predict.embed_images(model, [pixels[0], white, pixels[1], white, white, pixels[2]], BATCH)
    np.testing.assert_array_equal(vectors[[0, 2, 5]], expected[:3])


def test_an_image_is_encoded_once_for_its_questions(make, pixels, rng, monkeypatch):
    """Of a batch only the different pictures go through the towers, filled up to a power of two."""
    task, _, model = make("projected")
    rooms, project = [], predict._project_images
    monkeypatch.setattr(predict, "_project_images", lambda *a: rooms.append(len(a[-1])) or project(*a))
    sources, prefixes = prompts(task, rng, 2 * BATCH)
    generate(model, BATCH, sources, prefixes, 2, pixels, [0] * BATCH + [0, 1, 2, 2])
    assert rooms == [1, 4]


def test_pictures_are_opened_as_they_are_needed(make, pixels, rng):
    """Answers come while later requests have not been asked for: a few batches are read ahead, not a whole split."""
    task, _, model = make("projected")
    sources, prefixes = prompts(task, rng, 9 * BATCH)
    taken = []

    def requests():
        for k, (source, prefix) in enumerate(zip(sources, prefixes)):
            taken.append(k)
            yield predict.Request(source, prefix, pixels[k % IMAGES])

    answers = predict.generate(model, requests(), Decoding(max_new_tokens=2), BATCH)
    next(answers)
    assert BATCH <= len(taken) <= 4 * BATCH


TEXTS = ["a red circle", "two", "a large blue ring at the top left", "no", "a small square and a circle", "left of it"]


@pytest.mark.parametrize("tower", ["student", "teacher"])
def test_texts_are_embedded_one_by_one_as_in_training(make, tower):
    task, params, model = make("projected")
    if tower == "student":
        text = task.encoder.bart_text
        ids, mask = padded([text.wrap(text.encode(words)) for words in TEXTS], text.pad)

        def sentence(student):
            return student.embed_sentence(student.encode(ids, mask), mask)

        expected = jax.jit(lambda p: task.module.apply({"params": p}, method=sentence))(params)
        embed = functools.partial(predict.embed_texts, model, batch_size=BATCH)
    else:
        text = task.encoder.clip_text
        ids, mask = padded(map(text.encode, TEXTS), text.pad)
        batch = Batch(pixels=np.zeros((len(TEXTS), IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8), clip_ids=ids, clip_mask=mask)
        expected = teacher_of(task.teacher, "pooled")(model.clip_params, batch=batch)[2]
        embed = functools.partial(predict.embed_texts_clip, model, batch_size=BATCH)
    expected = np.asarray(expected)
    distance = np.linalg.norm(expected[:, None] - expected[None], axis=-1)
    assert distance[~np.eye(len(TEXTS), dtype=bool)].min() > 0.01
    order = [5, 0, 3, 1, 4, 2, 2]
    for some in ([*range(len(TEXTS))], order, order[:BATCH], [2]):
        np.testing.assert_allclose(embed([TEXTS[k] for k in some]), expected[some], atol=1e-5)


def test_parameters_go_to_the_device_once(assets, tmp_path):
    """A run's parameters are there when it has been read, not put there with each batch."""
    train(tiny_config(assets, steps=1), tmp_path)
    for model in (VLKD.from_run(tmp_path), VLKD.from_run(tmp_path, at_start=True)):
        for leaf in jax.tree.leaves((model.params, model.clip_params)):
            assert isinstance(leaf, jax.Array)


@pytest.fixture(scope="module")
def narrow(assets, tmp_path_factory):
    """(task, parameters, model) of a BART of WIDTH positions: no multiple of the widths that are compiled."""
    place = shutil.copytree(assets / "bart", tmp_path_factory.mktemp("narrow") / "bart")
    config, params = load_bart(place)
    for side in ("encoder", "decoder"):
        table = params[side]["embed_positions"]
        table["embedding"] = table["embedding"][: WIDTH + POSITION_OFFSET]
    save_bart(place, dataclasses.replace(config, max_position_embeddings=WIDTH), params)
    task = make_task(tiny_config(assets, bart=str(place), data__replay_length=WIDTH))
    params = loud(task, np.random.default_rng(0))
    return task, params, VLKD.of(task, jax.device_put(params), task.load_frozen(), one_device())


def test_prompts_may_fill_the_positions_and_no_more(narrow, rng):
    """The longest beside a short one; the ends of a text, and the decoder's start and new tokens, take their room."""
    task, params, model = narrow
    known = [*words(task.encoder.bart_text).values()]

    def rows(longest):
        return [[int(k) for k in rng.choice(known, n)] for n in (3, longest)]

    room = {"sources": WIDTH - 2, "prefixes": WIDTH - 2 - NEW, "contexts": WIDTH - 2}
    full = {name: rows(count) for name, count in room.items()}
    answers = generate(model, BATCH, max_new_tokens=NEW, **full)
    assert answers == training_answers(task, params, **full)
    short = full | {"sources": rows(1), "contexts": rows(2)}  # the prefix is much the longest
    assert generate(model, BATCH, max_new_tokens=NEW, **short) == training_answers(task, params, **short)
    for name, count in room.items():
        with pytest.raises(UserError, match=f"there is room for {WIDTH - NEW if name == 'prefixes' else WIDTH};"):
            generate(model, BATCH, max_new_tokens=NEW, **full | {name: rows(count + 1)})


def test_texts_to_embed_may_fill_the_positions(narrow, rng):
    """The student refuses longer ones; for the teacher they are cut, and end all the same."""
    task, params, model = narrow
    text, clip_text = task.encoder.bart_text, task.encoder.clip_text
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

        expected = jax.jit(lambda p, sentence=sentence: task.module.apply({"params": p}, method=sentence))(params)
        np.testing.assert_allclose(predict.embed_texts(model, some, BATCH), expected, atol=1e-5)
    with pytest.raises(UserError, match="there is room for 40;"):
        predict.embed_texts(model, ["a red circle", " ".join(said)])

    count = longest(clip_text.encode, task.encoder.clip_length)
    assert len(clip_text.encode(" ".join(said[:count]))) == task.encoder.clip_length
    vectors = predict.embed_texts_clip(model, [" ".join(said[:k]) for k in (count - 1, count, count + 1, len(said))])
    assert np.linalg.norm(vectors[0] - vectors[1]) > 1e-3
    np.testing.assert_array_equal(vectors[2:], vectors[[1, 1]])
