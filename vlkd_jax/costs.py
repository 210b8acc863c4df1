"""What a program costs: operations, counted before compilation, and the network's traffic, in the compiled text."""

from __future__ import annotations

import collections
import functools
import math
import re
from typing import Any

from jax.extend.core import jaxprs_in_params


def count_flops(jaxpr: Any) -> float:
    """Multiplications and additions of every matrix product and convolution of a program, its loops run to their end.

    Of the branches of a condition the largest counts; a loop without a known length counts once.
    """
    total = 0.0
    for equation in jaxpr.eqns:
        name, parameters = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = parameters["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
        elif name == "conv_general_dilated":
            kernel, spec = equation.invars[1].aval.shape, parameters["dimension_numbers"].rhs_spec
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) / kernel[spec[0]]
        elif name == "cond":
            total += max(count_flops(branch.jaxpr) for branch in parameters["branches"])
        else:
            times = parameters["length"] if name == "scan" else 1
            total += times * sum(count_flops(inner) for inner in jaxprs_in_params(parameters))
    return total


SENT = {
    "all-reduce": lambda size, n: 2 * size * (n - 1) / n,
    "all-gather": lambda size, n: size * (n - 1) / n,
    "reduce-scatter": lambda size, n: size * (n - 1),
    "all-to-all": lambda size, n: size * (n - 1) / n,
    "collective-permute": lambda size, n: size,
}
"""Kind -> bytes that each of n devices sends around a ring, by the bytes of its result."""
_OPERATION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (.*?) ([a-z][\w\-]*)\((.*)$")
_SHAPE = re.compile(r"\b(pred|[suf]\d+|bf16|f8\w*)\[([\d,]*)\]")


def collective_bytes(hlo: str) -> dict[str, float]:
    """Bytes that each device sends in one run of a compiled program, by kind of collective.

    A loop's body counts as often as it runs, and a collective that a TPU's program spreads over several fused
    computations, beside what else they compute, where it starts.

    Raises:
      ValueError: a loop, or a group of devices, that this cannot count.
    """
    computations, entry_name = _computations(hlo)

    @functools.cache
    def sent_by(name: str) -> collections.Counter[str]:
        sent: collections.Counter[str] = collections.Counter()
        for line in computations[name]:
            operation = _OPERATION.match(line)
            if not operation:
                continue
            result, kind, rest = operation.groups()
            whole = kind.removesuffix("-start")
            if whole in SENT and not _goes_on(name, computations[name]):
                sizes = [_bytes_of(*shape) for shape in _SHAPE.findall(result)]
                size = sum(sizes) if kind == whole else max(sizes)  # the start of a pair also names what goes in
                sent[whole] += SENT[whole](size, _group_size(rest))
            for callee in re.findall(r"(?:calls|to_apply|body|async_computation)=%?([\w.\-]+)", rest):
                inner = sent_by(callee)
                times = _trips(rest, computations) if kind == "while" and inner else 1
                for part, size in inner.items():
                    sent[part] += times * size
        return sent

    return dict(sent_by(entry_name))


def _computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    """The lines of every computation, and the name of the first that runs."""
    computations: dict[str, list[str]] = {}
    entry_name, name = "", ""
    for line in hlo.splitlines():
        if header := re.match(r"^(ENTRY )?%?([\w.\-]+) .*\{$", line):
            name = header[2]
            entry_name = name if header[1] else entry_name
            computations[name] = []
        elif name:
            computations[name].append(line)
    return computations, entry_name


def _goes_on(name: str, lines: list[str]) -> bool:
    """Whether a computation only carries on or ends a collective that another one has started, as TPUs' do."""
    return name.startswith("async_collective_fusion") or any('"AsyncCollectiveDone"' in line for line in lines)


def _trips(loop: str, computations: dict[str, list[str]]) -> int:
    """How often a loop runs: as the compiler notes, or below the one constant of its condition, from 0 by ones."""
    if noted := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop):
        return int(noted[1])
    condition = "\n".join(computations[re.search(r"condition=%?([\w.\-]+)", loop)[1]])
    limits = re.findall(r" = [su]\d+\[\]\S* constant\((\d+)\)", condition)
    if len(limits) != 1 or "direction=LT" not in condition:
        raise ValueError(f"a loop without a length that this knows: {loop[:200]}")
    return int(limits[0])


def _bytes_of(dtype: str, dimensions: str) -> int:
    bits = 8 if dtype == "pred" or dtype.startswith("f8") else 16 if dtype == "bf16" else int(dtype[1:])
    return math.prod(int(n) for n in dimensions.split(",") if n) * bits // 8


def _group_size(text: str) -> int:
    """Devices that take part together, from an operation's text in any of the three ways to write it.

    Raises:
      ValueError: a fourth way; a figure would be wrong.
    """
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]", text):
        return int(match[1])
    if match := re.search(r"replica_groups=\{\{([\d,]*)\}", text):
        return match[1].count(",") + 1
    if match := re.search(r"replica_groups=mesh\[(.*?)\][^{]*\{(.*?)\}", text):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", match[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    if "source_target_pairs=" in text:
        return 2
    raise ValueError(f"no replica_groups that this knows: {text[:200]}")
