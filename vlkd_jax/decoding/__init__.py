"""Decoding over BART with a key-value cache: greedy, beam search and sampling, and ranking of given texts."""

from vlkd_jax.decoding.beam_search import beam
from vlkd_jax.decoding.cache import Decoder, Memory, join_memories, make_decoder, project_memory, take_rows
from vlkd_jax.decoding.options import Decoding, DecodingOptions
from vlkd_jax.decoding.ranking import Candidates, likelihood, pack, rank
from vlkd_jax.decoding.sampling import greedy, sample
from vlkd_jax.types import Array, ArrayLike, Bool, Int


def decode(
    decoder: Decoder,
    prefix: Int[ArrayLike, "B P"],
    prefix_mask: Bool[ArrayLike, "B P"],
    draws: Int[ArrayLike, " B"],
    options: Decoding,
) -> Int[Array, "B R {options.max_new_tokens}"]:
    """R = `options.returns` texts for each row by the method that `options` name, the best first.

    Args:
      prefix, prefix_mask: what each text is forced to begin with, from the decoder's start token on.
      draws: see `sample`.

    Returns:
      The new tokens, int32, `</s>` included, then padding.
    """
    if options.method == "sample":
        return sample(decoder, prefix, prefix_mask, draws, options)
    return {"greedy": greedy, "beam": beam}[options.method](decoder, prefix, prefix_mask, options)


__all__ = [
    "Candidates",
    "Decoder",
    "Decoding",
    "DecodingOptions",
    "Memory",
    "beam",
    "decode",
    "greedy",
    "join_memories",
    "likelihood",
    "make_decoder",
    "pack",
    "project_memory",
    "rank",
    "sample",
    "take_rows",
]
