"""Times decoding against Hugging Face's `generate` on this machine: `python -m benchmarks.decode`.

    python -m benchmarks.decode [--size=tiny|base|large] [--batch=8] [--new=16] [--rounds=5] [--output=FILE]

Random models of the size of ViT-B/32 and BART-base, float32, the same on both sides, as are prompts, lengths and the
tokens that come out; the rivals take turns. Whole is from pixels; from features, what the teacher gives of the pictures
is there already. The floor is what the arithmetic and the bytes take at this machine's measured rates.
"""

from __future__ import annotations

import functools
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from benchmarks import peer, timing
from benchmarks.workload import PREFIX, QUESTION, Prompts, Workload, answer, image_memory
from vlkd_jax import decoding
from vlkd_jax.decoding import Decoding
from vlkd_jax.hf.save import save_bart, save_clip
from vlkd_jax.models.bart import Bart
from vlkd_jax.types import Array

SEED = 0


@functools.partial(jax.jit, static_argnums=0)
def memory_of_features(student, params, tokens: Array) -> decoding.Memory:
    """What the decoder reads, from the teacher's tokens [B, N, E]."""
    prefix = student.apply({"params": params}, tokens, method="image_prefix")
    bart = Bart(student.config, dtype=student.dtype)
    return decoding.project_memory(bart, params["bart"], prefix, jnp.ones(prefix.shape[:2], bool))


class Bench:
    """The same models on both sides, and the questions about `batch` pictures."""

    def __init__(self, size: str, batch: int):
        self.workload, self.batch, self.rng = Workload.of(size, jnp.float32), batch, np.random.default_rng(SEED)
        self.params, self.frozen = self.workload.draw(SEED)
        with tempfile.TemporaryDirectory() as folder:
            save_clip(Path(folder) / "clip", self.workload.clip, self.frozen["clip"])
            save_bart(Path(folder) / "bart", self.workload.bart, self.params["bart"])
            teacher = peer.Teacher(Path(folder) / "clip", torch.float32, self.workload.clip.preprocessing)
            linears = (np.asarray(self.params[n]["kernel"]).T for n in ("sentence_projection", "image_projection"))
            student = peer.Student(
                Path(folder) / "bart", *map(torch.tensor, linears), float(self.params["logit_scale"])
            )
            self.reader = peer.Reader(teacher, student, torch.float32, Path(folder) / "bart")
        self.pixels = self.workload.pixels(self.rng, batch)

    def ours(self, prompts: Prompts, options: Decoding, each: int, tokens: Any = None) -> Array:
        """The best tokens of `each` questions a picture, from features if they are given."""
        student = self.workload.student
        if tokens is None:
            image = image_memory(student, self.workload.teacher, self.params, self.frozen["clip"], self.pixels)
        else:
            image = memory_of_features(student, self.params, tokens)
        image = decoding.take_rows(image, np.repeat(np.arange(self.batch), each)) if each > 1 else image
        return answer(student, self.params, image, prompts, options)

    def theirs(self, prompts: dict, options: Decoding, each: int, tokens: Any = None) -> torch.Tensor:
        """The same; a picture is encoded once for all of its questions here too."""
        with torch.inference_mode():
            tokens = self.reader.teacher.image_tokens(torch.tensor(self.pixels)) if tokens is None else tokens
            prefix = torch.nn.functional.linear(tokens, self.reader.image_projection).repeat_interleave(each, 0)
        return self.reader.answer(prefix, prompts, options)


def floor(bench: Bench, machine: dict[str, float], options: Decoding, each: int, with_vision: bool) -> float:
    """Seconds: vision and text encoder at the matmul rate, and for each step the greater of arithmetic and bytes."""
    workload, params, rows = bench.workload, bench.params, bench.batch * each
    student = workload.student
    flops = 0
    if with_vision:
        flops += timing.matmul_flops(
            functools.partial(image_memory, student, workload.teacher), params, bench.frozen["clip"], bench.pixels
        )
    ids, mask = jnp.ones((rows, QUESTION), jnp.int32), jnp.ones((rows, QUESTION), bool)
    flops += timing.matmul_flops(
        lambda params: Bart(student.config).apply({"params": params}, ids, mask, method="encode"), params["bart"]
    )
    decoder = sum(x.size for x in jax.tree.leaves(params["bart"]["decoder"]["layers"])) + student.config.vocab_size * (
        student.config.d_model
    )
    read = rows * options.rows
    steps = max(4 * decoder / machine["bytes"], 2 * read * decoder / machine["flops"]) * (options.max_new_tokens - 1)
    return flops / machine["flops"] + 2 * rows * PREFIX * decoder / machine["flops"] + steps


def measure(bench: Bench, machine: dict[str, float], options: Decoding, each: int, place: str, rounds: int) -> dict:
    """One row: medians in seconds, texts a second, how many times faster ours is, and the floor.

    Args:
      each: questions about each picture; 0: it is captioned.
    """
    rows, asks = bench.batch * max(each, 1), each > 0
    prompts = bench.workload.prompts(np.random.default_rng(SEED + each), rows, ask=each > 0)
    each = max(each, 1)
    in_torch, tokens = peer.tensors(prompts._asdict(), torch.device("cpu")), {"ours": None, "theirs": None}
    if place == "features":
        with torch.inference_mode():
            tokens["theirs"] = bench.reader.teacher.image_tokens(torch.tensor(bench.pixels))
        tokens["ours"] = jnp.asarray(tokens["theirs"].numpy())
    runs = {
        "ours": lambda: jax.block_until_ready(bench.ours(prompts, options, each, tokens["ours"])),
        "theirs": lambda: bench.theirs(in_torch, options, each, tokens["theirs"]),
    }
    same = float(np.mean(np.asarray(runs["ours"]()) == runs["theirs"]().numpy()))
    seconds = timing.alternate(runs, rounds)
    ours = statistics.median(seconds["ours"])
    return {
        "method": f"beam {options.beams}" if options.method == "beam" else options.method,
        "from": place,
        "questions_an_image": each if asks else "caption",
        "ours_seconds": ours,
        "theirs_seconds": statistics.median(seconds["theirs"]),
        "times_faster": timing.ratio(seconds, "theirs", "ours"),
        "ours_per_second": rows / ours,
        "floor_seconds": floor(bench, machine, options, each, place == "pixels"),
        "same_tokens": same,
        "rounds": seconds,
    }


def main() -> None:
    """Measures every row and writes them."""
    parser = timing.parser(__doc__, batch=8, what="pictures", rounds=5)
    parser.add_argument("--new", type=int, default=16, help="new tokens")
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    bench, machine = Bench(options.size, options.batch), timing.machine_rates()
    result: dict[str, Any] = timing.circumstances(options) | {"machine": machine, "rows": []}
    print(f"{machine['flops'] / 1e9:.0f} GFLOP/s, {machine['bytes'] / 1e9:.1f} GB/s", flush=True)
    greedy, beam = Decoding(max_new_tokens=options.new), Decoding("beam", max_new_tokens=options.new)
    for method, place, each in (
        (greedy, "pixels", 1),
        (greedy, "features", 1),
        (beam, "pixels", 1),
        (beam, "features", 1),
        (greedy, "pixels", 5),
        (greedy, "features", 5),
        (beam, "pixels", 5),
        (beam, "features", 5),
        (beam, "pixels", 0),
    ):
        row = measure(bench, machine, method, each, place, options.rounds)
        result["rows"].append(row)
        told = {k: f"{v:.3g}" if isinstance(v, float) else v for k, v in row.items() if k != "rounds"}
        print("  ".join(f"{name} {value}" for name, value in told.items()), flush=True)
        if options.output:
            options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
