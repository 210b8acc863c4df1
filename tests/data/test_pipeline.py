"""Batches: a pure function of seed and step, however they are read; and the proof that no question meets an image."""

import dataclasses
import itertools
import json
import re

import jax
import numpy as np
import pytest
from PIL import Image
from tiny import tiny_config, write_pictures

from vlkd_jax.configs import base
from vlkd_jax.data.pipeline import Corruption, Encoder, UnusableRecords, batches
from vlkd_jax.data.sources import Record, Subset, TextLines
from vlkd_jax.data.streams import held_out, make_source, make_text_source, train_stream
from vlkd_jax.data.text import BartText, ClipText
from vlkd_jax.errors import RecordError, UserError
from vlkd_jax.models.configs import ClipTextConfig
from vlkd_jax.models.preprocessing import Preprocessing
from vlkd_jax.shapes import world
from vlkd_jax.shapes.sources import ShapesPairs, ShapesTexts
from vlkd_jax.shapes.world import SPLITS
from vlkd_jax.tasks import make_task
from vlkd_jax.types import Batch


class Numbers:
    """A source of 23 texts, each its own number."""

    def __len__(self):
        return 23

    def __getitem__(self, index):
        return Record(f"a large red circle and {index} more", name=f"number {index}")


@pytest.fixture(scope="module")
def encoders(assets):
    """(for pictures and captions, for texts) with the tiny tokenizers."""
    bart, clip = BartText(assets / "bart"), ClipText(assets / "clip")
    pairs = Encoder(clip, 40, bart, 40, 40, preprocessing=Preprocessing(24, 24))
    return pairs, Encoder(bart_text=bart, text_length=40, source_length=64, context_length=40)


def take(count, source, encode, **options):
    options = {"batch_size": 4, "seed": 7, "threads": 0, **options}
    return list(itertools.islice(batches(source, encode, **options), count))


def same(ours: list[Batch], theirs: list[Batch]):
    assert len(ours) == len(theirs)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.parametrize("shuffle", [True, False])
def test_starting_late_is_skipping(encoders, shuffle):
    whole = take(14, Numbers(), encoders[1], shuffle=shuffle)  # two epochs and more
    for start in (1, 5, 6, 13):
        same(take(14 - start, Numbers(), encoders[1], shuffle=shuffle, start=start), whole[start:])


def test_pairs_start_late_too(encoders):
    source = ShapesPairs(0, "train")
    same(take(2, source, encoders[0], start=3, shuffle=False), take(5, source, encoders[0], shuffle=False)[3:])
    far = take(1, source, encoders[0], start=100_000, shuffle=False)[0]
    np.testing.assert_array_equal(far.index, np.arange(4) + 400_000)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_processes_share_the_global_batch(encoders, count):
    whole = take(8, Numbers(), encoders[1])
    parts = [take(8, Numbers(), encoders[1], share=(p, count)) for p in range(count)]
    for step, batch in enumerate(whole):
        same([batch], [jax.tree.map(lambda *leaves: np.concatenate(leaves), *(part[step] for part in parts))])


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_change_nothing(encoders, threads):
    same(take(8, Numbers(), encoders[1], threads=threads, start=2), take(8, Numbers(), encoders[1], start=2))


def test_the_order_is_shuffled_anew_each_epoch_and_complete(encoders):
    order = np.concatenate([b.index for b in take(23, Numbers(), encoders[1])]).reshape(4, 23)
    for epoch in order:
        assert sorted(epoch) == list(range(23))
    assert len({tuple(epoch) for epoch in order.tolist()}) == 4
    assert order[0].tolist() != list(range(23))
    plain = np.concatenate([b.index for b in take(6, Numbers(), encoders[1], shuffle=False)])
    np.testing.assert_array_equal(plain, np.arange(24) % 23)


def test_the_seed_decides(encoders):
    one, other = (take(3, Numbers(), encoders[1], seed=seed) for seed in (1, 2))
    assert any((a.index != b.index).any() for a, b in zip(one, other))
    plain = [take(6, Numbers(), encoders[1], seed=seed, shuffle=False) for seed in (1, 2)]
    assert any((a.source_ids != b.source_ids).any() for a, b in zip(*plain))
    # The same record is corrupted anew in each epoch.
    epochs = np.concatenate([b.source_ids for b in take(12, Numbers(), encoders[1], shuffle=False)])
    assert any((epochs[i] != epochs[i + 23]).any() for i in range(23))


def test_shapes_and_dtypes(encoders):
    pair, text = take(1, ShapesPairs(0, "train"), encoders[0])[0], take(1, ShapesTexts(0, "train"), encoders[1])[0]
    assert pair.pixels.shape == (4, 24, 24, 3) and pair.pixels.dtype == np.uint8
    for batch, fields in (
        (pair, {"clip": 40, "text": 40, "source": 40}),
        (text, {"text": 40, "source": 64, "context": 40}),
    ):
        for name in ("clip", "text", "source", "context"):
            ids, mask = getattr(batch, f"{name}_ids"), getattr(batch, f"{name}_mask")
            if name not in fields:
                assert ids is None and mask is None
                continue
            assert ids.shape == mask.shape == (4, fields[name])
            assert ids.dtype == np.int32 and mask.dtype == bool
            assert (np.diff(mask.astype(int), axis=1) <= 0).all()  # padded on the right
    assert text.pixels is None and pair.replay is None


def test_rows_are_the_records(encoders):
    """Every row decodes to its record's caption in both vocabularies, beside that record's picture."""
    encode, source = encoders[0], ShapesPairs(0, "train")
    for batch in take(4, source, encode):
        for row, index in enumerate(batch.index):
            record = source[int(index)]
            text = batch.text_ids[row][batch.text_mask[row]]
            assert (text[0], text[-1]) == (encode.bart_text.bos, encode.bart_text.eos)
            assert encode.bart_text.decode(text) == record.text
            clip = batch.clip_ids[row][batch.clip_mask[row]].tolist()
            assert clip == encode.clip_text.encode(record.text)
            alone = encode(record, np.random.default_rng(0))
            np.testing.assert_array_equal(batch.pixels[row], alone["pixels"])


def test_contexts_stand_beside_and_prompts_carry_no_loss(encoders):
    encode = encoders[1]
    bart, rng = encode.bart_text, np.random.default_rng(0)
    record = Record("the answer is red", context="a red circle", prompt="the answer is")
    row = encode(record, rng)
    assert row["source_ids"][row["source_mask"]].tolist() == bart.wrap([*bart.encode("the answer is"), bart.mask])
    assert row["context_ids"][row["context_mask"]].tolist() == bart.wrap(bart.encode(record.context))
    assert row["text_ids"][row["target_mask"]].tolist() == [*bart.encode(" red"), bart.eos]
    row = encode(Record("no context"), rng)
    assert not row["context_mask"].any()
    np.testing.assert_array_equal(row["target_mask"], row["text_mask"])


def test_long_texts(assets):
    bart, clip = BartText(assets / "bart"), ClipText(assets / "clip")
    record, rng = Record("a red circle " * 20, name="captions.tsv line 3"), np.random.default_rng(0)
    corruption = Corruption(0.0, 3.0, 0.0)
    for encode, whose in (
        (Encoder(bart_text=bart, text_length=20, source_length=99, corruption=corruption), "data.text_length"),
        (Encoder(bart_text=bart, text_length=99, source_length=20, corruption=corruption), "data.source_length"),
        (Encoder(clip_text=clip, clip_length=20), "CLIP's"),
    ):
        with pytest.raises(UserError) as caught:
            encode(record, rng)
        message = str(caught.value)
        assert all(
            w in message for w in ("captions.tsv line 3", "field caption", whose, "limit is 20", "data.truncate")
        )
    encode = Encoder(clip, 20, bart, 20, 60, truncate=True, corruption=corruption)
    row = encode(record, rng)
    np.testing.assert_array_equal(row["source_ids"][:20], row["text_ids"])  # nothing was corrupted, so it says the same
    assert row["source_mask"].sum() == 20
    words = dataclasses.replace(encode, corruption=Corruption(0.0, 3.0, 1.0))(record, rng)
    assert words["source_ids"][words["source_mask"]].tolist() == bart.wrap([bart.mask])
    encode = Encoder(clip, 20, bart, 20, 20, truncate=True, corruption=corruption)
    row = encode(record, rng)
    for name, end in (("clip", clip.eos), ("text", bart.eos), ("source", bart.eos)):
        assert row[f"{name}_mask"].all() and row[f"{name}_ids"][-1] == end


def test_texts_may_fill_their_room(encoders):
    """To the last token; one more is refused, or cut."""
    encode, rng = dataclasses.replace(encoders[0], preprocessing=None), np.random.default_rng(0)
    record = Record("a large red circle", context="a small blue square", prompt="a large")
    bart, clip = encode.bart_text, encode.clip_text
    room = {
        "clip": len(clip.encode(record.text)),
        "text": 2 + len(bart.encode(record.text)),
        "source": 3 + len(bart.encode(record.prompt)),
        "context": 2 + len(bart.encode(record.context)),
    }
    full = dataclasses.replace(encode, **{f"{name}_length": length for name, length in room.items()})
    row, cut = full(record, rng), dataclasses.replace(full, truncate=True)(record, rng)
    for name, length in room.items():
        assert row[f"{name}_mask"].all() and len(row[f"{name}_ids"]) == length
        np.testing.assert_array_equal(cut[f"{name}_ids"], row[f"{name}_ids"])
        small = dataclasses.replace(full, **{f"{name}_length": length - 1})
        with pytest.raises(RecordError, match=f"has {length} of .* tokens, the limit is {length - 1}"):
            small(record, rng)
        ids = dataclasses.replace(small, truncate=True)(record, rng)[f"{name}_ids"]
        assert ids.tolist() == [*row[f"{name}_ids"][: length - 2], row[f"{name}_ids"][-1]]


def test_lengths_and_limits_are_those_of_the_rows(encoders):
    """Each vocabulary's where it is read, and the whole caption's also where it does not fit."""
    encode, source = dataclasses.replace(encoders[0], preprocessing=None), ShapesPairs(0, "train")
    only = dataclasses.replace(encode, bart_text=None), dataclasses.replace(encode, clip_text=None)
    for record in (source[k] for k in range(20)):
        row = encode(record, np.random.default_rng(0))
        lengths = {"BART": row["text_mask"].sum(), "CLIP": row["clip_mask"].sum()}
        limits = {"BART": len(row["text_ids"]), "CLIP": len(row["clip_ids"])}
        assert encode.lengths(record) == dataclasses.replace(encode, text_length=3).lengths(record) == lengths
        for some, name in zip(only, ("CLIP", "BART"), strict=True):
            assert some.lengths(record) == {name: lengths[name]}
            assert dataclasses.replace(some, clip_length=9, text_length=9).limits() == {name: 9}
    assert dataclasses.replace(encode, text_length=30).limits() == limits | {"BART": 30}


def test_defaults_are_those_of_a_run():
    data, corruption = base.get_config().data, base.get_config().corruption
    encode = Encoder()
    assert dataclasses.asdict(encode.corruption) == corruption.to_dict()
    assert encode.truncate == data.truncate and encode.clip_length == ClipTextConfig.max_position_embeddings
    for name in ("text_length", "source_length", "context_length"):
        assert getattr(encode, name) == data[name]


@pytest.mark.parametrize("threads", [0, 2])
def test_what_a_reading_thread_raises_arrives_as_it_is(encoders, tmp_path, threads):
    path = tmp_path / "half.png"
    Image.effect_noise((80, 80), 90).save(path)
    path.write_bytes(path.read_bytes()[:2000])

    class Damaged(Numbers):
        def __getitem__(self, index):
            return (
                Record("a circle", path, name=f"pairs line {index}") if index == 9 else ShapesPairs(0, "train")[index]
            )

    stream = batches(Damaged(), encoders[0], batch_size=4, seed=0, shuffle=False, threads=threads)
    with pytest.raises(UserError, match=r"pairs line 9: field image: .*half\.png: the image does not decode"):
        list(itertools.islice(stream, 4))


class SomeBad(Numbers):
    """Of its 23 texts, those in `bad` cannot be read."""

    def __init__(self, *bad):
        self.bad = bad

    def __getitem__(self, index):
        if index in self.bad:
            raise RecordError("image not found" if index % 2 else "caption empty", f"number {index} is bad")
        return super().__getitem__(index)


@pytest.mark.parametrize("shuffle", [True, False])
def test_bad_records_are_replaced_where_they_stand(encoders, shuffle, capsys):
    """The other rows are untouched; the same ones take their places whatever the threads, processes and start."""
    whole = take(14, Numbers(), encoders[1], shuffle=shuffle)
    options = {"shuffle": shuffle, "unusable": UnusableRecords(1.0)}
    taken = take(14, SomeBad(3, 8), encoders[1], **options)
    told = capsys.readouterr().out
    assert options["unusable"].reasons == {"image not found": 1, "caption empty": 1}
    assert told.count("record passed over, image not found: number 3 is bad") == told.count("number 8 is bad") == 1
    replaced = 0
    for ours, theirs in zip(taken, whole, strict=True):
        assert len(ours.index) == 4
        for k in range(4):
            if theirs.index[k] in (3, 8):
                replaced += 1
                assert ours.index[k] not in (3, 8)
            else:
                jax.tree.map(lambda a, b, k=k: np.testing.assert_array_equal(a[k], b[k]), ours, theirs)
    assert replaced == sum(np.isin(batch.index, (3, 8)).sum() for batch in whole) >= 4
    same(take(9, SomeBad(3, 8), encoders[1], **options, start=5, threads=2), taken[5:])
    parts = [take(14, SomeBad(3, 8), encoders[1], **options, share=(p, 2)) for p in range(2)]
    for step, batch in enumerate(taken):
        same([batch], [jax.tree.map(lambda *leaves: np.concatenate(leaves), *(part[step] for part in parts))])


def test_too_many_bad_records_end_the_run(encoders, monkeypatch):
    """Of the first thousand more than the share, or of all read so far; and at once where nothing can be read."""
    unusable = UnusableRecords(0.01)
    stream = batches(SomeBad(3, 8), encoders[1], batch_size=4, seed=0, threads=0, unusable=unusable)
    count = 0
    with pytest.raises(UserError) as caught:
        for batch in stream:
            count += len(batch.index)
    assert 60 < count < 200  # of 23 two are bad: 10 of them are in about 115
    message = str(caught.value)
    assert re.match(r"1[1-4] of the \d+ records", message)
    for word in ("image not found 1", "caption empty 1", "config.data.max_unusable=0.01", "is bad"):
        assert word in message
    gone = batches(SomeBad(*range(23)), encoders[1], batch_size=4, seed=0, threads=0, unusable=UnusableRecords(0.5))
    with pytest.raises(UserError, match=r"100 records in a row cannot be used"):
        next(gone)
    monkeypatch.setattr(UnusableRecords, "GRACE", 10)
    few = batches(SomeBad(3), encoders[1], batch_size=4, seed=0, threads=0, unusable=UnusableRecords(0.2))
    assert len(list(itertools.islice(few, 40))) == 40  # one in 23 is less than one in five


def test_the_share_of_bad_records(monkeypatch):
    """Of those read, the bad ones among them, and of GRACE while fewer are read; the share itself is allowed."""
    monkeypatch.setattr(UnusableRecords, "GRACE", 16)
    unusable = UnusableRecords(0.25)
    unusable.check(faults([], ["a", "b", "c"], []))
    unusable.check(faults(["b"]))  # 4 of 8, a quarter of 16
    unusable.check(faults(*[[]] * 8))
    unusable.check(faults([], ["b"], []))  # 5 of 20
    with pytest.raises(UserError) as caught:
        unusable.check(faults(["b"]))
    told = "6 of the 22 records read so far cannot be used (caption empty 2, image not found 1)"
    assert str(caught.value).startswith(told) and str(caught.value).endswith("the last one: record b")
    early = UnusableRecords(0.25)
    with pytest.raises(UserError, match="5 of the 6 records"):
        early.check(faults(["a"] * 5))


def faults(*rows: list[str]) -> np.ndarray:
    """What a batch of these rows tells of the records that were passed over for each."""
    reasons = {"a": "image not found", "b": "caption empty", "c": "caption empty"}
    return np.array(["\n".join(json.dumps([reasons[name], f"record {name}"]) for name in row) for row in rows])


def test_worker_processes_change_nothing(encoders, capsys):
    """None, two or four: the same batches over two epochs, from any step on; bad records are counted once."""
    count = 2 * 23 // 4
    whole = take(count, SomeBad(3, 8), encoders[1], unusable=UnusableRecords(1.0))
    for workers, start in ((2, 0), (4, 5)):
        unusable = UnusableRecords(1.0)
        taken = take(count - start, SomeBad(3, 8), encoders[1], unusable=unusable, workers=workers, start=start)
        same(taken, whole[start:])
        assert unusable.reasons.keys() <= {"image not found", "caption empty"} and unusable.reasons
    strict = batches(SomeBad(3, 8), encoders[1], batch_size=4, seed=0, workers=1)
    with pytest.raises(Exception, match=r"number [38] is bad"):
        list(itertools.islice(strict, count))


def test_augmentation_is_of_the_seed_and_the_place(encoders):
    """Another part of a picture in every epoch, the same for every start and number of workers; flips are flips."""
    pairs, plain = ShapesPairs(0, "train"), encoders[0]
    moved = dataclasses.replace(plain, smallest_crop=0.4)
    first, again = (take(3, pairs, moved) for _ in range(2))
    same(first, again)
    same(take(2, pairs, moved, start=1, threads=1), first[1:])
    assert not np.array_equal(first[0].pixels, take(1, pairs, plain)[0].pixels)
    flipped = take(8, pairs, dataclasses.replace(plain, flip=True))
    straight = take(8, pairs, plain)
    mirrored = 0
    for ours, theirs in zip(flipped, straight, strict=True):
        for a, b in zip(ours.pixels, theirs.pixels, strict=True):
            assert np.array_equal(a, b) or np.array_equal(a[:, ::-1], b)
            mirrored += not np.array_equal(a, b)
    assert 6 < mirrored < 26


def folder_config(assets, tmp_path, **changes):
    """A config on a folder of 40 pictures with their captions, and a file of texts."""
    (tmp_path / "captions.tsv").write_text("\n".join(write_pictures(tmp_path / "images", 40)))
    (tmp_path / "texts.txt").write_text("\n".join(f"question: is it {i}? answer: yes" for i in range(30)))
    folder = {
        "data__source": "folder",
        "data__captions": f"{tmp_path}/captions.tsv",
        "data__images": f"{tmp_path}/images",
    }
    return tiny_config(assets, **folder, data__validation_every=4, **changes)


@pytest.mark.parametrize("replay", ["", "captions"])
def test_replayed_captions_are_not_the_pairs_own(assets, tmp_path, replay):
    """They come in another order and with another corruption: the same row again would teach nothing new."""
    config = folder_config(assets, tmp_path, data__replay=replay, loss__denoise=1.0, data__replay_length=40)
    task = make_task(config)
    same_text, same_source, rows = 0, 0, 0
    for batch in itertools.islice(train_stream(config, task, 0), 12):
        for k in range(len(batch.index)):
            rows += 1
            same_text += (batch.text_ids[k] == batch.replay.text_ids[k]).all()
            same_source += (batch.source_ids[k] == batch.replay.source_ids[k]).all()
    assert rows == 96 and same_text < 16 and same_source < 16  # of 30 captions now and then one meets itself


def test_seeds_train_on_scenes_of_their_own(assets):
    """And are measured on the same held-out ones."""
    for name in ("shapes", "shapes_texts"):
        configs = [tiny_config(assets, seed=seed, data__source=name) for seed in (0, 0, 3)]
        train, held_out = ([[make_source(c, s)[i].text for i in range(20)] for c in configs] for s in SPLITS[:2])
        assert train[0] == train[1] != train[2] and len(set(train[0]) & set(train[2])) < 10
        assert held_out[0] == held_out[1] == held_out[2]
        texts = [[make_text_source(c, s)[i].text for i in range(20)] for c in configs for s in SPLITS[:2]]
        assert texts[0] == texts[2] != texts[4] and texts[1] == texts[3] == texts[5]


def test_training_and_held_out_items_do_not_meet(assets, tmp_path):
    config = folder_config(assets, tmp_path, data__replay=f"{tmp_path}/texts.txt")
    for make in (make_source, make_text_source):
        train, validation = (
            {s[i].name for i in range(len(s))} for s in (make(config, "train"), make(config, "validation"))
        )
        assert train and validation and not train & validation
    task = make_task(config)
    first, again = held_out(config, task), held_out(config, task)
    same(first, again)
    names = {
        make_source(config, "train")[int(i)].name
        for b in itertools.islice(train_stream(config, task, 0), 8)
        for i in b.index
    }
    assert len(names) == 30


WORDS = ("question", "answer", "?", "yes", "no")


def decoded(encoder, batch):
    """Everything a batch says, in words; whole words are looked for, so "no" is not found in "not"."""
    said = []
    for name in ("text", "source", "context"):
        ids, mask = getattr(batch, f"{name}_ids"), getattr(batch, f"{name}_mask")
        if ids is not None:
            said += [encoder.bart_text.decode(row[keep]) for row, keep in zip(ids, mask)]
    if batch.clip_ids is not None:
        clip = encoder.clip_text
        said += [clip._tokenizer.decode(row[keep].tolist()) for row, keep in zip(batch.clip_ids, batch.clip_mask)]
    return said


def says(texts, word):
    return any(word in (text.replace("?", " ? ").replace(":", " ").split()) for text in texts)


@pytest.mark.parametrize("replay", [0.0, 1.0], ids=["alone", "with_replay"])
@pytest.mark.parametrize("twins", [1, 4])
def test_no_question_meets_an_image(assets, replay, twins):
    """120 batches of what distillation reads: no word of a question or an answer stands beside pixels, ever."""
    config = tiny_config(assets, loss__denoise=replay, data__twins=twins, batch_size=16, data__threads=0)
    task = make_task(config)
    kinds = set()
    for batch in itertools.islice(train_stream(config, task, 0), 120):
        assert batch.pixels is not None
        beside_pixels = decoded(task.encoder, batch)
        assert len(beside_pixels) == 3 * 16
        for word in WORDS:
            assert not says(beside_pixels, word), word
        assert batch.context_ids is None
        assert (batch.replay is not None) == bool(replay)
        if batch.replay is not None:
            assert batch.replay.pixels is None and batch.replay.clip_ids is None and batch.replay.replay is None
            kinds |= {word for word in WORDS if says(decoded(task.replay_encoder, batch.replay), word)}
    assert kinds == (set(WORDS) if replay else set())  # the search finds such words where they are


def test_no_question_steers_a_run(assets):
    """The held-out pairs have none either, and pairs come from a class that knows no question."""
    config = tiny_config(assets, eval__batches=10, batch_size=16)
    task = make_task(config)
    for batch in held_out(config, task):
        assert not any(says(decoded(task.encoder, batch), word) for word in WORDS)
    for batch in held_out(config, task, texts=True):
        assert batch.pixels is None
    for split in ("train", "validation"):
        source = make_source(config, split)
        assert type(source) is ShapesPairs and source.split == split
        assert make_text_source(config, split).split == split


def test_pairs_cannot_ask(monkeypatch):
    """The source of pairs works with the question functions torn out."""
    for name in ("ask", "question_set", "_ask_existence", "_ask_relation", "Question"):
        monkeypatch.delattr(world, name)
    assert ShapesPairs(0, "train")[0].image is not None
    with pytest.raises(AttributeError):
        [ShapesTexts(0, "train")[i] for i in range(40)]


def test_replay_of_a_users_texts_has_no_picture(assets, tmp_path):
    config = folder_config(assets, tmp_path, data__replay=f"{tmp_path}/texts.txt", loss__denoise=1.0)
    task = make_task(config)
    assert isinstance(make_text_source(config, "train").source, TextLines)
    assert isinstance(make_source(config, "train"), Subset)
    for batch in itertools.islice(train_stream(config, task, 0), 10):
        assert not any(says(decoded(task.encoder, batch), word) for word in WORDS)
        assert says(decoded(task.replay_encoder, batch.replay), "question") and batch.replay.pixels is None
