"""Memory that the losses take at large batches, plain and in chunks: `python benchmarks/loss_memory.py [--json]`.

The figure is what one of eight devices needs for intermediate values (`temp_size_in_bytes` of the compiled program's
memory analysis) of a loss and its gradients. The programs are compiled for eight CPU devices and never run.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable

DEVICES = 8
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax  # noqa: E402 (what stands above is read when jax starts)
import jax.numpy as jnp  # noqa: E402
import optax  # noqa: E402
from jax.sharding import AxisType, NamedSharding  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402

from vlkd_jax import losses  # noqa: E402

BATCHES = (1024, 4096, 16384, 65536)
WIDTH = 768
"""Of CLIP ViT-L/14's joint space."""
BART = {"D": 1024, "V": 50265, "T": 32}
"""BART-large, and captions of 32 tokens."""


def plain_itcl(image: jax.Array, sentence: jax.Array, scale: jax.Array) -> jax.Array:
    """The summed loss from all B x B logits."""
    logits = scale * jnp.einsum("be,ce->bc", image, sentence, precision="highest", preferred_element_type=jnp.float32)
    both = jax.nn.logsumexp(logits, 0) + jax.nn.logsumexp(logits, 1)
    return jnp.sum(0.5 * both - jnp.diagonal(logits))


def plain_icti(hidden: jax.Array, table: jax.Array, bias: jax.Array, targets: jax.Array, mask: jax.Array) -> jax.Array:
    """The summed loss from all B x T x V logits."""
    products = jnp.einsum("btd,vd->btv", hidden, table.astype(hidden.dtype), preferred_element_type=jnp.float32)
    loss = optax.softmax_cross_entropy_with_integer_labels(products + bias, targets)
    return jnp.sum(jnp.where(mask, loss, 0))


def chunked_itcl(*inputs: jax.Array) -> jax.Array:
    """The package's, summed."""
    return losses.itcl(*inputs)[0][0]


def chunked_icti(*inputs: jax.Array) -> jax.Array:
    """The package's, summed."""
    return losses.icti(*inputs)[0][0]


LOSSES: dict[str, tuple[Callable, Callable]] = {"ITCL": (plain_itcl, chunked_itcl), "ICTI": (plain_icti, chunked_icti)}


def inputs_of(name: str, batch: int, mesh: jax.sharding.Mesh) -> list[jax.ShapeDtypeStruct]:
    """Shapes of a loss's inputs, rows spread over the mesh."""

    def array(shape: tuple[int, ...], dtype: jax.typing.DTypeLike, rows: bool) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(mesh.axis_names) if rows else P()))

    if name == "ITCL":
        return [*[array((batch, WIDTH), jnp.float32, True)] * 2, array((), jnp.float32, False)]
    width, vocabulary, length = BART.values()
    return [
        array((batch, length, width), jnp.bfloat16, True),
        array((vocabulary, width), jnp.float32, False),
        array((vocabulary,), jnp.float32, False),
        array((batch, length), jnp.int32, True),
        array((batch, length), jnp.bool, True),
    ]


def bytes_of(loss: Callable, inputs: list[jax.ShapeDtypeStruct], mesh: jax.sharding.Mesh) -> int:
    """Bytes that each device needs for intermediate values of the loss and its gradients by the first two inputs."""
    with jax.set_mesh(mesh):
        compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*inputs).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def measure() -> list[dict]:
    """A row for each loss and batch."""
    mesh = jax.make_mesh((DEVICES, 1, 1), ("data", "fsdp", "model"), axis_types=(AxisType.Auto,) * 3)
    rows = []
    for name, (plain, chunked) in LOSSES.items():
        for batch in BATCHES:
            inputs = inputs_of(name, batch, mesh)
            sizes = {"plain": bytes_of(plain, inputs, mesh), "chunked": bytes_of(chunked, inputs, mesh)}
            rows.append({"loss": name, "batch": batch, **sizes, "ratio": sizes["plain"] / sizes["chunked"]})
    return rows


def main() -> None:
    """Prints the table, as Markdown or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON list instead of the table")
    options, rows = parser.parse_args(), measure()
    if options.json:
        print(json.dumps(rows))
        return
    print(f"jax {jax.__version__}, {jax.device_count()} {jax.devices()[0].platform} devices\n")
    print("| loss | global batch | plain, MiB | in chunks, MiB | ratio |\n| --- | ---: | ---: | ---: | ---: |")
    for row in rows:
        plain, chunked = (f"{row[key] / 2**20:,.0f}" for key in ("plain", "chunked"))
        print(f"| {row['loss']} | {row['batch']:,} | {plain} | {chunked} | {row['ratio']:.1f} |")


if __name__ == "__main__":
    main()
