"""Random prompts for a BART, and what our decoding and Hugging Face's `generate` say after them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from vlkd_jax import decoding
from vlkd_jax.decoding import Decoding

START, BOS, PAD, EOS = 2, 0, 1, 2


def padded(rows, width=None):
    """(ids, mask) of lists of ids."""
    width = width or max(map(len, rows))
    ids = np.full((len(rows), width), PAD, np.int32)
    for k, row in enumerate(rows):
        ids[k, : len(row)] = row
    return ids, np.arange(width) < np.array([len(row) for row in rows])[:, None]


def sources(rng, count, low=1, high=14):
    """Random encoder inputs from `<s>` to `</s>`."""
    return [[BOS, *rng.integers(3, 99, rng.integers(low, high)), EOS] for _ in range(count)]


def prefixes(rng, lengths):
    """Forced decoder tokens: start, `<s>` and some words."""
    return [[START, BOS, *rng.integers(3, 99, n)] for n in lengths]


def encode(model, rows, width=None):
    """(encoder states, mask) of sources."""
    bart, params = model
    ids, mask = padded(rows, width)
    return np.asarray(jax.jit(functools.partial(bart.apply, method="encode"))({"params": params}, ids, mask)), mask


@functools.cache
def compiled(bart, options):
    """Memory, its mask, a prefix, its mask and draws -> the new tokens [B, returns, max_new_tokens]."""

    @jax.jit
    def run(params, memory, memory_mask, prefix, prefix_mask, draws):
        decoder = decoding.make_decoder(bart, params, decoding.project_memory(bart, params, memory, memory_mask))
        return decoding.decode(decoder, prefix, prefix_mask, draws, options)

    return run


def decode(model, memory, memory_mask, prefix, prefix_mask, draws=None, **options):
    """What our decoding says."""
    bart, params = model
    draws = np.arange(len(prefix), dtype=np.int32) if draws is None else draws
    options = Decoding(**options)
    ids = compiled(bart, options)(params, memory, memory_mask, prefix, prefix_mask, draws)
    assert ids.shape == (len(prefix), options.returns, options.max_new_tokens) and ids.dtype == jnp.int32
    return np.asarray(ids)


def hugging_face(torch_model, texts, decoder_ids, new, forced_bos=BOS, forced_eos=EOS, **options):
    """What `generate` says after `decoder_ids` (all of one length): [B, returns, new], padded."""
    import torch

    ids, mask = padded(texts)
    generation = torch_model.generation_config
    special = {"pad": PAD, "bos": BOS, "eos": EOS, "decoder_start": START}
    for name, value in (special | {"forced_bos": forced_bos, "forced_eos": forced_eos}).items():
        setattr(generation, f"{name}_token_id", value)
    out = torch_model.generate(
        input_ids=torch.tensor(ids).long(),
        attention_mask=torch.tensor(mask).long(),
        decoder_input_ids=torch.tensor(np.array(decoder_ids)).long(),
        do_sample=False,
        max_new_tokens=new,
        **options,
    ).numpy()
    return padded(out[:, len(decoder_ids[0]) :].tolist(), new)[0].reshape(len(texts), -1, new)


def varied(ids, share=0.6):
    """Asserts that more than this share of texts differ, and that they have more than a few words."""
    assert len({tuple(row) for row in ids.reshape(-1, ids.shape[-1]).tolist()}) > share * ids.shape[0]
    assert len(np.unique(ids)) > 9
