"""Times sentence embeddings, as retrieval needs them, against PyTorch: `python -m benchmarks.embed`.

    python -m benchmarks.embed [--size=base] [--batch=64] [--tokens=32] [--rounds=7] [--output=FILE]

Texts to the student's embeddings, float32, the same random BART and linear on both sides, rivals in turn; first the
embeddings are compared. The peer is Hugging Face's BART encoder with SDPA attention in inference mode.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from benchmarks import peer, timing
from benchmarks.train_step import SEED, make_peer
from benchmarks.workload import Workload, texts

TOLERANCE = 1e-4


def our_program(workload: Workload) -> Callable[..., jax.Array]:
    """(params, ids, mask) -> the texts' unit embeddings, float32 [B, E]; jitted."""

    def embed(student, ids, mask):
        return student.embed_sentence(student.encode(ids, mask), mask)

    return jax.jit(lambda params, ids, mask: workload.student.apply({"params": params}, ids, mask, method=embed))


@torch.inference_mode()
def their_embeddings(student: peer.Student, inputs: peer.Tensors, autocast: bool = False) -> torch.Tensor:
    """The same of `inputs` "ids" and "mask" by Hugging Face's encoder."""
    with torch.autocast(inputs["ids"].device.type, torch.bfloat16, enabled=autocast):
        hidden = student.bart.model.encoder(inputs["ids"], attention_mask=inputs["mask"]).last_hidden_state
    state = hidden[torch.arange(len(hidden)), inputs["mask"].sum(1) - 1].float()
    return torch.nn.functional.normalize(state @ student.sentence_projection.T, dim=-1)


def main() -> None:
    """Measures and prints."""
    parser = timing.parser(__doc__, batch=64, what="texts", rounds=7)
    parser.add_argument("--tokens", type=int, default=32, help="of a text, padding included")
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    workload, rng = Workload.of(options.size, jnp.float32), np.random.default_rng(SEED)
    params, frozen = workload.draw(SEED)
    _, student = make_peer(workload, params, frozen)
    lengths = rng.integers(options.tokens // 4, options.tokens + 1, options.batch)
    ids, mask = texts(rng, lengths, options.tokens, workload.bart)
    program, inputs = our_program(workload), peer.tensors({"ids": ids, "mask": mask}, torch.device("cpu"))
    theirs = functools.partial(their_embeddings, student, inputs)
    runs = {"ours": lambda: jax.block_until_ready(program(params, ids, mask)), "peer": theirs}
    gap = float(np.abs(np.asarray(runs["ours"]()) - theirs().numpy()).max())
    if gap > TOLERANCE:
        raise SystemExit(f"the peer computes something else: embeddings differ by {gap}")
    seconds = timing.alternate(runs, options.rounds)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    flops = timing.matmul_flops(program, params, ids, mask)
    result = timing.circumstances(options) | {
        "largest_difference": gap,
        "texts_per_second": {name: options.batch / value for name, value in median.items()},
        "times_faster": timing.ratio(seconds, "peer", "ours"),
        "floor_texts_per_second": options.batch / (flops / timing.machine_rates()["flops"]),
    }
    timing.tell(result, options.output, seconds=seconds)


if __name__ == "__main__":
    main()
