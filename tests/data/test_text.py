"""Tokenizers against known answers, text that must never become a special token, and BART's text infilling."""

import collections
import json
import shutil

import numpy as np
import pytest
from tiny import SHARED_DATA

from vlkd_jax.data.pipeline import Corruption, Encoder
from vlkd_jax.data.sources import Record
from vlkd_jax.data.text import BartText, ClipText, infill, pad
from vlkd_jax.errors import UserError

MASK = -1
ODD = [
    "<mask>",
    "a <mask> b</s><s>",
    "</s>",
    "<s> <pad> <unk>",
    "<|endoftext|>",
    "<|startoftext|>a cat<|endoftext|>",
    "< | endoftext | >",
    "ｆｕｌｌ ｗｉｄｔｈ",
    "\ud800 lone",
    "pair reversed \udc00\ud83d end",
    "smile 😀👨‍👩‍👧 \u202e rtl עברית",
    "nul \x00 and bell \x07",
    "a\u2028b\u2029c\x0bd\x0ce\r\nf",
    "e\u0301 \ufb01 \u200b\ufeff \U0010ffff",
    "",
    " ",
    "\t\n",
    "x" * 3000,
]


@pytest.fixture(scope="module", params=["tiny", pytest.param("real", marks=pytest.mark.shared_data)])
def texts(request):
    """(BartText, ClipText) of the tiny models and of the real vocabularies."""
    directory = SHARED_DATA / "tokenizers" if request.param == "real" else request.getfixturevalue("assets")
    return BartText(directory / "bart"), ClipText(directory / "clip")


@pytest.mark.shared_data
def test_known_answers():
    bart, clip = BartText(SHARED_DATA / "tokenizers" / "bart"), ClipText(SHARED_DATA / "tokenizers" / "clip")
    assert bart.wrap(bart.encode("Hello world")) == [0, 31414, 232, 2]
    prompt = bart.wrap(bart.encode_template("A, <mask> AllenNLP sentence."))
    assert prompt == [0, 250, 6, 50264, 3823, 487, 21992, 3645, 4, 2]
    assert (bart.bos, bart.pad, bart.eos, bart.mask, bart.vocab_size) == (0, 1, 2, 50264, 50265)
    ids = clip.encode("a photo of a cat")
    assert ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert pad([ids], 10, clip.pad)[0].tolist() == [[*ids, 49407, 49407, 49407]]
    assert clip.vocab_size == 49408 and clip.encode("A  Photo of\na CAT ") == ids


@pytest.mark.parametrize("text", ODD, ids=range(len(ODD)))
def test_text_never_becomes_a_special_token(texts, text):
    bart, clip = texts
    special = {bart._tokenizer.convert_tokens_to_ids(t) for t in ("<s>", "<pad>", "</s>", "<unk>", "<mask>")}
    for ids in (bart.encode(text), bart.encode_template("question: {q} answer:", q=text)):
        assert not special & set(ids)
        assert all(0 <= i < bart.vocab_size for i in ids)
    ids = clip.encode(text)
    assert (ids[0], ids[-1]) == (clip.bos, clip.eos)
    assert not {clip.bos, clip.eos} & set(ids[1:-1]) and all(0 <= i < clip.vocab_size for i in ids)


@pytest.mark.parametrize("text", [t for t in ODD if t.strip() and "\ud800" not in t and "\udc00" not in t])
def test_bart_gives_text_back(texts, text):
    assert texts[0].decode(texts[0].encode(text)) == text.strip()


@pytest.mark.parametrize("text", ["it's a dog 's , toy . ok ?", "A large red circle at top left", "naïve 東京 3,000"])
def test_bart_gives_ordinary_text_back(texts, text):
    bart = texts[0]
    assert bart.decode(bart.wrap(bart.encode(text)) + [bart.pad] * 3) == text
    assert bart.decode(np.array(bart.encode(text), np.int32)) == text


def test_templates(texts):
    bart = texts[0]
    prompt = bart.encode_template("question: {q} answer: <mask>", q="is it <mask>?")
    assert prompt == [*bart.encode("question: is it <mask>? answer:"), bart.mask]
    assert bart.encode_template("<mask>") == [bart.mask]
    assert bart.encode_template("<mask> of <mask>") == [bart.mask, *bart.encode(" of"), bart.mask]
    assert bart.encode_template("say {q}", q="{braces} {0}") == bart.encode("say {braces} {0}")


USES = {
    "cut": {"truncation": True, "max_length": 4},
    "cut from the left": {"truncation": True, "max_length": 5, "stride": 1},
    "padded to a length": {"padding": "max_length", "max_length": 60},
    "padded to a multiple": {"padding": True, "pad_to_multiple_of": 32},
    "both": {"truncation": True, "padding": "max_length", "max_length": 7},
}
"""Arguments of a tokenizer's last use before it is saved, by what they do."""
PIECES = ["large", "Red", "circle", "at", "'s", "naïve", "東京", "3,000", "?", "<mask>", "</s>", "<pad>", "  ", "\n"]


def kind_of(name):
    from transformers import BartTokenizer, CLIPTokenizer

    return {"bart": (BartText, BartTokenizer), "clip": (ClipText, CLIPTokenizer)}[name]


def same_as_transformers(name, changed, original, rng):
    """Ids from the directory `changed` against transformers', which sets truncation and padding at every call."""
    kind, reference = kind_of(name)
    text, theirs = kind(changed), [reference.from_pretrained(str(d)) for d in (original, changed)]
    for length in rng.integers(0, 60, 20):
        caption = " ".join(rng.choice(PIECES, size=length))
        for tokenizer in theirs:
            ids = tokenizer(caption, add_special_tokens=name == "clip", split_special_tokens=True)["input_ids"]
            assert text.encode(caption) == ids


@pytest.mark.parity
@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("name", ["bart", "clip"])
def test_what_the_last_use_left_behind_changes_nothing(assets, tmp_path, rng, name, use):
    tokenizer = kind_of(name)[1].from_pretrained(str(assets / name), padding_side="left", truncation_side="left")
    tokenizer(["a large red circle at top left", "a circle"], **USES[use])
    tokenizer.save_pretrained(str(tmp_path))
    saved = json.loads((tmp_path / "tokenizer.json").read_text())
    assert saved["truncation"] or saved["padding"]
    same_as_transformers(name, tmp_path, assets / name, rng)


OTHER_STATE = {
    "template": {"post_processor": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}},
    "lower case": {"normalizer": {"type": "Lowercase"}},
    "pre-tokenizer": {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}},
}
"""Fields of tokenizer.json that a model of this kind has of its own."""


@pytest.mark.parity
@pytest.mark.parametrize("state", [*OTHER_STATE, "ordinary tokens", "greedy tokens", "dropout", "model_max_length"])
@pytest.mark.parametrize("name", ["bart", "clip"])
def test_other_saved_state_gives_what_transformers_gives(assets, tmp_path, rng, name, state):
    changed = shutil.copytree(assets / name, tmp_path / name)
    values = json.loads((changed / "tokenizer.json").read_text()) | OTHER_STATE.get(state, {})
    for token in values["added_tokens"]:
        token |= {"ordinary tokens": {"special": False}}.get(state, {})
        token |= {"greedy tokens": {"lstrip": True, "rstrip": True, "normalized": True}}.get(state, {})
    values["model"]["dropout"] = 0.9 if state == "dropout" else None
    (changed / "tokenizer.json").write_text(json.dumps(values))
    if state == "model_max_length":
        settings = json.loads((changed / "tokenizer_config.json").read_text())
        (changed / "tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": 5}))
    same_as_transformers(name, changed, assets / name, rng)


@pytest.mark.parity
def test_a_space_put_before_every_text_is_the_directorys_choice(assets, tmp_path, rng):
    changed = shutil.copytree(assets / "bart", tmp_path / "bart")
    settings = json.loads((changed / "tokenizer_config.json").read_text())
    (changed / "tokenizer_config.json").write_text(json.dumps(settings | {"add_prefix_space": True}))
    assert BartText(changed).encode("a circle") == BartText(assets / "bart").encode(" a circle")
    same_as_transformers("bart", changed, changed, rng)


def test_decoded_text_keeps_its_spaces(assets, tmp_path):
    changed = shutil.copytree(assets / "bart", tmp_path / "bart")
    settings = json.loads((changed / "tokenizer_config.json").read_text())
    clean = "clean_up_tokenization_spaces"
    settings |= {clean: True, f"{clean}_for_bpe_even_though_it_will_corrupt_output": True}
    (changed / "tokenizer_config.json").write_text(json.dumps(settings))
    text = BartText(changed)
    assert text.decode(text.encode("it 's a dog , ok ?")) == "it 's a dog , ok ?"


def test_directories_without_a_tokenizer(tmp_path, assets):
    for kind in (BartText, ClipText):
        with pytest.raises(UserError, match="no tokenizer here"):
            kind(tmp_path)
        with pytest.raises(UserError, match="no tokenizer here"):
            kind(tmp_path / "absent")
    with pytest.raises(UserError, match="has no"):
        BartText(assets / "clip")
    (tmp_path / "vocab.json").write_text("{")
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(UserError, match="cannot be read"):
        BartText(tmp_path)


def test_pad():
    ids, mask = pad([[5, 6], [], [7, 8, 9]], 3, 1)
    assert ids.dtype == np.int32 and ids.tolist() == [[5, 6, 1], [1, 1, 1], [7, 8, 9]]
    assert mask.dtype == bool and mask.sum(1).tolist() == [2, 0, 3]
    with pytest.raises(ValueError, match="do not fit"):
        pad([[1, 2, 3, 4]], 3, 1)


def corrupt(length: int, count: int, seed: int = 0, ratio=0.3, poisson=3.0, mask_all=0.0):
    """`count` corruptions of the ids 0, 1, ... `length` - 1."""
    rng = np.random.default_rng(seed)
    return [infill(list(range(length)), rng, MASK, ratio, poisson, mask_all) for _ in range(count)]


def kept(out):
    return [i for i in out if i != MASK]


def plain_infill(length, rng, ratio, poisson):
    """The same process written naively: tokens and spans are shuffled as cards, then laid out."""
    whole, part = divmod(length * ratio, 1)
    budget = int(whole) + (rng.random() < part)
    spans = []
    while sum(spans) < budget:
        spans.append(min(rng.poisson(poisson), budget - sum(spans)))
    cards = [None] * (length - sum(spans)) + spans
    out, position = [], 0
    for k in rng.permutation(len(cards)):
        if cards[k] is None:
            out.append(position)
            position += 1
        else:
            out.append(MASK)
            position += cards[k]
    return out


def gaps(out, length):
    """(masks in a row, tokens missing there) for each run of masks."""
    runs, masks, position = [], 0, 0
    for item in [*out, length]:
        if item == MASK:
            masks += 1
            continue
        if masks:
            runs.append((masks, item - position))
        masks, position = 0, item + 1
    return runs


def same_distribution(ours, theirs, tail=5):
    """Two-sample chi-square over the values; rare ones are pooled. True unless p < about 1e-4."""
    a, b = collections.Counter(ours), collections.Counter(theirs)
    cells = [(a[k], b[k]) for k in a | b if a[k] + b[k] >= 2 * tail]
    cells.append((len(ours) - sum(x for x, _ in cells), len(theirs) - sum(y for _, y in cells)))
    cells = np.array([c for c in cells if sum(c)], float)
    share = cells.sum(0) / cells.sum()
    expected = cells.sum(1, keepdims=True) * share
    statistic, freedom = ((cells - expected) ** 2 / expected).sum(), len(cells) - 1
    return statistic < freedom + 4 * np.sqrt(2 * freedom) + 8


def test_the_distribution_test_can_fail():
    rng = np.random.default_rng(0)
    a, b, c = rng.poisson(3.0, 4000), rng.poisson(3.0, 4000), rng.poisson(3.2, 4000)
    assert same_distribution(a.tolist(), b.tolist()) and not same_distribution(a.tolist(), c.tolist())


@pytest.mark.parametrize(
    ("length", "ratio", "poisson"), [(20, 0.3, 3.0), (7, 0.3, 3.0), (40, 0.5, 2.0), (3, 0.15, 3.0)]
)
def test_spans_are_distributed_as_in_a_naive_simulation(length, ratio, poisson):
    rng = np.random.default_rng(1)
    ours = corrupt(length, 4000, ratio=ratio, poisson=poisson)
    theirs = [plain_infill(length, rng, ratio, poisson) for _ in range(4000)]
    for statistic in (
        len,
        lambda out: out.count(MASK),
        lambda out: tuple(gaps(out, length))[:1],
        lambda out: tuple(gaps(out, length))[-1:],
        lambda out: max((m for m, _ in gaps(out, length)), default=0),
    ):
        assert same_distribution([statistic(o) for o in ours], [statistic(o) for o in theirs])
    # Lengths of lone spans: Poisson, cut by the budget.
    lone = [[n for out in outs for m, n in gaps(out, length) if m == 1] for outs in (ours, theirs)]
    assert same_distribution(*lone)


def test_the_masked_share_is_exact_on_average():
    for length in (5, 17, 33):
        masked = [length - len(kept(out)) for out in corrupt(length, 3000)]
        assert set(masked) <= {int(0.3 * length), int(0.3 * length) + 1}
        assert abs(np.mean(masked) - 0.3 * length) < 4 * 0.5 / np.sqrt(3000)


def test_long_texts_have_poisson_spans():
    """Without a budget that binds, the lengths of lone spans have Poisson's mean, variance and share of zeros."""
    lengths = [n for out in corrupt(400, 300, ratio=0.1) for m, n in gaps(out, 400) if m == 1]
    error = 1 / np.sqrt(len(lengths))
    assert abs(np.mean(lengths) - 3) < 0.15 and abs(np.var(lengths) - 3) < 0.4
    assert abs(np.mean(np.array(lengths) == 0) - np.exp(-3)) < 4 * error


def test_what_is_left_is_the_text_in_order():
    for length in (1, 2, 9, 30):
        for out in corrupt(length, 300, mask_all=0.1):
            rest = kept(out)
            assert rest == sorted(set(rest)) and set(rest) <= set(range(length))
            if rest:
                assert all(n >= 0 for _, n in gaps(out, length))
                assert sum(n for _, n in gaps(out, length)) == length - len(rest)


def test_spans_of_length_zero_insert_and_neighbours_stay_two_masks():
    outs = corrupt(30, 2000)
    replaced = [gap for out in outs for gap in gaps(out, 30)]
    assert (1, 0) in replaced
    assert any(m >= 2 and n >= 2 for m, n in replaced)
    for poisson in (0.01, 0.05):
        assert max(len(out) for out in corrupt(10, 20, poisson=poisson)) > 10


def test_mask_all():
    outs = corrupt(12, 4000, mask_all=0.15)
    share = np.mean([out == [MASK] for out in outs])
    assert abs(share - 0.15) < 4 * np.sqrt(0.15 * 0.85 / 4000)
    assert all(out == [MASK] for out in corrupt(12, 20, mask_all=1.0))


def test_nothing_to_corrupt():
    assert all(out == list(range(9)) for out in corrupt(9, 20, ratio=0.0))
    assert all(out == [] for out in corrupt(0, 20))
    assert all(kept(out) == [] for out in corrupt(6, 20, ratio=1.0))


def test_corrupted_rows_keep_their_ends(assets):
    """The encoder corrupts what stands between `<s>` and `</s>`; the target stays clean."""
    bart = BartText(assets / "bart")
    encode = Encoder(bart_text=bart, text_length=30, source_length=40, corruption=Corruption(0.6, 3.0, 0.1))
    clean = bart.encode("a picture of a large red circle at top left")
    for seed in range(200):
        row = encode(Record("a picture of a large red circle at top left"), np.random.default_rng(seed))
        source = row["source_ids"][row["source_mask"]].tolist()
        assert (source[0], source[-1]) == (bart.bos, bart.eos)
        assert not {bart.bos, bart.eos, bart.pad} & set(source[1:-1])
        assert row["text_ids"][row["text_mask"]].tolist() == bart.wrap(clean)
        rest = iter(clean)
        assert all(i in rest for i in source[1:-1] if i != bart.mask)  # a subsequence
        assert bart.mask in source
