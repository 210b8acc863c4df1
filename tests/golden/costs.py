"""Writes tests/golden/costs.json: what the compiled programs take, in exact counts, without a clock.

`python tests/golden/costs.py` regenerates it; look at the difference, and say in the commit what it buys. Sizes are
those of ViT-B/32 and BART-base, float32; nothing is drawn or computed. `matmul_gflop` is counted from the program as it
is written, the rest is what XLA says of the program that it made for a CPU.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing
from benchmarks.teacher_cache import cached
from benchmarks.workload import Workload, answer, image_memory
from vlkd_jax.decoding import Decoding

FILE = Path(__file__).with_name("costs.json")
ROWS, CAPTION, NEW_TOKENS = 8, 32, 16


def programs() -> dict[str, tuple]:
    """Name -> a jitted function and the shapes of its arguments."""
    workload, rng = Workload.of("base", jnp.float32), np.random.default_rng(0)
    params, frozen = jax.eval_shape(lambda: workload.draw(0))
    state = jax.eval_shape(workload.state, params)
    batch = shapes_of(workload.batch(rng, ROWS, CAPTION))
    from_cache = jax.eval_shape(
        lambda teacher, batch: cached(workload, teacher, batch, "float32"), frozen["clip"], batch
    )
    step = jax.jit(workload.train_step(), donate_argnums=0)
    prompts, student = shapes_of(workload.prompts(rng, ROWS, ask=True)), workload.student
    image = jax.eval_shape(
        lambda params, clip, pixels: image_memory(student, workload.teacher, params, clip, pixels),
        *(params, frozen["clip"], prompts.pixels),
    )

    def embed(student, ids, mask):
        return student.embed_sentence(student.encode(ids, mask), mask)

    def embed_texts(params, ids, mask):
        return student.apply({"params": params}, ids, mask, method=embed)

    def generate(options):
        return jax.jit(lambda params, image, prompts: answer(student, params, image, prompts, options))

    return {
        "train step": (step, (state, frozen, batch)),
        "train step, teacher cached": (step, (state, frozen, from_cache)),
        "image memory": (
            jax.jit(lambda *arrays: image_memory(student, workload.teacher, *arrays)),
            (params, frozen["clip"], prompts.pixels),
        ),
        "answer, greedy": (generate(Decoding(max_new_tokens=NEW_TOKENS)), (params, image, prompts)),
        "answer, beam 5": (generate(Decoding("beam", max_new_tokens=NEW_TOKENS)), (params, image, prompts)),
        "text embeddings": (jax.jit(embed_texts), (params, prompts.source_ids, prompts.source_mask)),
    }


def shapes_of(tree):
    """The shapes and dtypes of a tree of arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def cost(function, arguments) -> dict[str, float]:
    """What one program takes."""
    compiled = function.lower(*arguments).compile()
    counted, memory = compiled.cost_analysis(), compiled.memory_analysis()
    return {
        "matmul_gflop": round(timing.matmul_flops(function, *arguments) / 1e9, 6),
        "xla_gflop": round(counted["flops"] / 1e9, 3),
        "accessed_gb": round(counted["bytes accessed"] / 1e9, 3),
        "temporaries_mb": round(memory.temp_size_in_bytes / 1e6, 1),
    }


if __name__ == "__main__":
    costs = {name: cost(*program) for name, program in programs().items()}
    FILE.write_text(json.dumps({"jax": jax.__version__, "programs": costs}, indent=1) + "\n")
