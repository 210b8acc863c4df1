"""What the processes of one run tell one another. Every process makes the same calls in the same order.

Process 0 claims the workdir, writes logs and predictions, and computes what has to be the same to the last bit.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from vlkd_jax.errors import UserError, few

Tree = TypeVar("Tree")


def check_alike(told: dict[str, Any]) -> None:
    """Raises UserError, in every process, naming a field of the JSON values `told` that is not the same in all."""
    fault = differences(share(told)) if jax.process_count() > 1 else None
    if fault:
        raise UserError(fault)


def differences(told: list[dict[str, Any]]) -> str | None:
    """Which field is not the same in these, one a process, with its values and the processes that have them."""
    for field in dict.fromkeys(name for one in told for name in one):
        holders: dict[str, list[str]] = {}
        for process, one in enumerate(told):
            holders.setdefault(str(one.get(field)), []).append(str(process))
        if len(holders) > 1:
            values = ", ".join(f"{value} in process {few(who)}" for value, who in holders.items())
            return f"{field} differs between the processes: {values}; start all of them alike"
    return None


def is_first() -> bool:
    """Whether this process writes what a run leaves behind."""
    return jax.process_index() == 0


def share(value: Any) -> list[Any]:
    """The JSON values of all processes, in order."""
    if jax.process_count() == 1:
        return [value]
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(data.size))
    buffer = np.zeros(1 << int(max(sizes) - 1).bit_length(), np.uint8)  # few sizes: each is compiled once
    buffer[: data.size] = data
    rows = multihost_utils.process_allgather(buffer)
    return [json.loads(bytes(row[:size])) for row, size in zip(rows, sizes, strict=True)]


def broadcast(tree: Tree) -> Tree:
    """Process 0's numpy arrays, on every process; the others give arrays of the same shapes and dtypes."""
    return tree if jax.process_count() == 1 else multihost_utils.broadcast_one_to_all(tree)


def on_first(work: Callable[[], Any]) -> Any:
    """The JSON value of `work()`, done by process 0 alone; what it raises is raised on every process."""
    value: Any = None
    failure: Exception | None = None
    if is_first():
        try:
            value = work()
        except Exception as error:
            failure = error
    told = share([value, report(failure)])[0]
    if failure is not None:
        raise failure
    raise_reported([told[1]])
    return told[0]


def report(error: BaseException | None) -> dict[str, Any] | None:
    """What a process tells the others of what went wrong in it, for `raise_reported`."""
    return None if error is None else {"error": str(error), "user": isinstance(error, UserError)}


def raise_reported(reports: list[dict[str, Any] | None]) -> None:
    """Raises the first failure there is: UserError for one, RuntimeError for any other."""
    for index, failure in enumerate(reports):
        if failure is not None:
            raise (UserError if failure["user"] else RuntimeError)(f"process {index}: {failure['error']}")
