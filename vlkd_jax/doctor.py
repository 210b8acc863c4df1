"""What is wrong with this machine, or not, before a run: `vlkd doctor [--config=NAME] [--workdir=DIR]`, a line each."""

from __future__ import annotations

import contextlib
import glob
import json
import os
import platform
import shutil
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict
from packaging.requirements import Requirement

from vlkd_jax import cluster, entry, processes, sharding
from vlkd_jax.checks import check_batch_size, check_config
from vlkd_jax.commands import COMMANDS, PROCESSES
from vlkd_jax.compile_cache import use_cache
from vlkd_jax.console import say
from vlkd_jax.errors import UserError, few
from vlkd_jax.optim import make_optimizer
from vlkd_jax.plan import LOCAL, plan, planned_task
from vlkd_jax.storage import is_remote
from vlkd_jax.train import abstract_state

GIB = 2**30
OK, NOTE, FAULT = "ok", "note", "FAULT"
SHARED_MEMORY = GIB
"""Bytes of /dev/shm that NCCL wants where one process drives several GPUs."""
CONNECT_SECONDS = 5.0
EXTRAS = ("tpu", "cuda12", "cuda13")
"""Extras of jax whose packages have to be of the versions that this jax asks for."""


class Finding(NamedTuple):
    """One line: what was looked at, how it is (OK, NOTE, FAULT), what was seen, and what to do."""

    name: str
    level: str
    seen: str
    mend: str = ""


def packages() -> Iterator[Finding]:
    """Versions, those of jax's own parts among them, against what this package and jax ask for."""
    wrong = [*_unmet("vlkd_jax"), *(line for extra in EXTRAS for line in _unmet("jax", extra))]
    told = ", ".join(f"{name} {number}" for name, number in cluster.versions().items() if number != "none")
    if wrong:
        wanted = " ".join(f"'{requirement}'" for requirement, _ in wrong)
        seen = few([f"{requirement.name} {number}" for requirement, number in wrong])
        yield Finding("packages", FAULT, f"{seen} ({told})", f"pip install {wanted}")
    else:
        yield Finding("packages", OK, told)


def _unmet(package: str, extra: str = "") -> list[tuple[Requirement, str]]:
    """Requirements of a package that the installed versions do not meet; of an extra, only those that are installed."""
    unmet = []
    for requirement in map(Requirement, requires(package) or ()):
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        if extra and not requirement.marker:
            continue
        try:
            number = version(requirement.name)
        except PackageNotFoundError:
            if not extra:
                unmet.append((requirement, "missing"))
            continue
        if not requirement.specifier.contains(number, prereleases=True):
            unmet.append((_plain(requirement), number))
    return unmet


def _plain(requirement: Requirement) -> Requirement:
    return Requirement(f"{requirement.name}{requirement.specifier}")


def start(together: Sequence[Any]) -> Iterator[Finding]:
    """Whether this is one of several processes, and whether they come together; values of `PROCESSES`."""
    pod, found = cluster.jobset(), cluster.surroundings()
    cluster.initialize(*together)
    if jax.distributed.is_initialized():
        how = "by --coordinator" if together[0] else "of a JobSet" if pod else f"found through {found}"
        yield Finding("processes", OK, f"{jax.process_count()} {how}; their versions are the same")
    else:
        yield Finding("processes", OK, "one; no SLURM, Open MPI, JobSet or TPU pod around it")


def devices() -> Iterator[Finding]:
    """What jax computes on, and accelerators that it does not see."""
    try:
        kinds = [device.device_kind for device in jax.devices()]
    except Exception as error:  # of several kinds, by platform
        reason = str(error).strip().partition("\n")[0]
        mend = "end what holds the device (one process at a time), or set JAX_PLATFORMS=cpu"
        yield Finding("devices", FAULT, f"jax finds none ({reason})", mend)
        return
    here = f", {jax.local_device_count()} of them in this process" if jax.process_count() > 1 else ""
    memory = _device_memory()
    each = f", {memory / GIB:.1f} GiB each" if memory else ""
    yield Finding("devices", OK, f"{len(kinds)} x {kinds[0]}{each}{here}")
    if jax.default_backend() != "cpu":
        return
    asked = os.environ.get("JAX_PLATFORMS")
    for what, extra, is_there in (
        ("NVIDIA GPU", "cuda12] or jax[cuda13", glob.glob("/dev/nvidia[0-9]*")),
        ("TPU", "tpu", cluster.tpu_chips()),
    ):
        if is_there:
            mend = f"unset JAX_PLATFORMS, which is {asked}" if asked else f"pip install jax[{extra}]"
            yield Finding("devices", FAULT, f"there is a {what} and jax computes on the CPU", mend)


def _device_memory() -> int | None:
    """Bytes of the smallest device of this process; None: its platform does not say."""
    limits = [(device.memory_stats() or {}).get("bytes_limit") for device in jax.local_devices()]
    return min(limits) if all(limits) else None


def mesh(config: ConfigDict) -> Iterator[Finding]:
    """The mesh that the config would make, and whether its batch can be split."""
    check_config(config)
    made = sharding.make_mesh(config.mesh)
    check_batch_size(config, made)
    axes, unused = " x ".join(f"{axis} {size}" for axis, size in made.shape.items()), jax.device_count() - made.size
    rows = f"{config.batch_size // sharding.row_shards(made)} of {config.batch_size} rows a device"
    if unused:
        yield Finding(
            "mesh", NOTE, f"{axes}; {rows}; {unused} devices are not used", "set one axis of config.mesh to -1"
        )
    else:
        yield Finding("mesh", OK, f"{axes}; {rows}")


def memory(config: ConfigDict) -> Iterator[Finding]:
    """What a step of the config takes, from compiling it, against what there is."""
    print("compiling the train step (minutes for large models)", file=sys.stderr, flush=True)
    result = plan(config, LOCAL, 1.0)
    limit, needed, where = _device_memory(), result["bytes_per_chip"], "a device"
    if limit is None:  # CPU devices share this machine's
        limit, needed, where = _host_memory(), needed * jax.local_device_count(), "this machine"
    seen = f"a step takes {needed / GIB:.1f} GiB of {limit / GIB:.1f} on {where}"
    if needed > limit:
        mend = "raise config.accumulate or set config.remat=True; vlkd plan says what each costs"
        yield Finding("memory", FAULT, seen, mend)
    elif needed > 0.9 * limit:
        yield Finding("memory", NOTE, seen, "it may not fit beside what else is there")
    else:
        yield Finding("memory", OK, seen)


def _host_memory() -> int:
    """Bytes that this process may still take: the machine's, or those of its control group where they are fewer."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        limits.append(int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) * 1024)
    with contextlib.suppress(OSError, ValueError):  # "max": none
        limits.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(limits)


def port(coordinator: str | None) -> Iterator[Finding]:
    """Whether the coordinator's port is free on this machine, or that machine can be reached."""
    if jax.distributed.is_initialized():
        return  # the processes have met there
    host, number = (
        cluster.parse_address(coordinator)
        if coordinator
        else ("", int(os.environ.get("JAX_COORDINATOR_PORT", cluster.PORT)))
    )
    if host and not _is_here(host):
        try:
            socket.create_connection((host, number), timeout=CONNECT_SECONDS).close()
        except ConnectionRefusedError:
            yield Finding("port", OK, f"{coordinator} can be reached; nothing listens there yet")
        except OSError as error:
            mend = f"open port {number} in the firewall between the machines, or name another with --coordinator"
            yield Finding("port", FAULT, f"{coordinator} cannot be reached ({error.strerror or error})", mend)
        else:
            yield Finding("port", OK, f"{coordinator} answers")
        return
    try:
        with cluster.listen(number):
            yield Finding("port", OK, f"{number} is free here, should this be process 0")
    except UserError:
        mend = "name another in every process's --coordinator, or JAX_COORDINATOR_PORT; or end what holds it"
        yield Finding("port", NOTE, f"{number}, the coordinator's, is taken on this machine", mend)


def _is_here(host: str) -> bool:
    return host in ("localhost", "127.0.0.1", "::1", socket.gethostname(), platform.node())


def disk(workdir: str | None, config: ConfigDict | None) -> Iterator[Finding]:
    """Room for the checkpoints of a run."""
    needed = 0
    if config:
        task = planned_task(config)
        optimizer = make_optimizer(config.optim, config.steps, task.new)
        state = abstract_state(task, optimizer, sharding.make_mesh(config.mesh))
        each = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
        needed = each * (config.keep + 1)  # the next is written before the oldest goes
    if workdir and is_remote(workdir):
        yield Finding("disk", NOTE, f"{workdir} is an object store; {needed / GIB:.1f} GiB will lie there")
        return
    place = Path(workdir or ".").absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    seen = f"{free / GIB:.1f} GiB free at {place}"
    seen += f"; config.keep={config.keep} checkpoints take {needed / GIB:.1f}" if config else ""
    if not os.access(place, os.W_OK):
        yield Finding(
            "disk", FAULT, f"{place} cannot be written in", "name another --workdir, or correct its permissions"
        )
    elif free < max(needed, GIB):
        yield Finding("disk", FAULT, seen, "free some, name another --workdir, or lower config.keep")
    else:
        yield Finding("disk", OK, seen)


def shared_memory() -> Iterator[Finding]:
    """/dev/shm, which NCCL uses between the GPUs of a machine; readers here are threads and need none."""
    place = Path("/dev/shm")
    if not place.is_dir():
        yield Finding("/dev/shm", NOTE, "there is none; NCCL wants one where a machine has several GPUs")
        return
    size = shutil.disk_usage(place).total
    seen = f"{size / GIB:.2f} GiB"
    if size < SHARED_MEMORY and jax.default_backend() == "gpu" and jax.local_device_count() > 1:
        yield Finding(
            "/dev/shm", FAULT, seen, "give the container more: docker --shm-size=8g, an emptyDir of medium Memory"
        )
    else:
        yield Finding("/dev/shm", OK, seen)


def compile_cache() -> Iterator[Finding]:
    """The persistent compilation cache: with one, a run that starts again compiles nothing."""
    if jax.process_count() == 1:  # as every command does
        use_cache()
    place = jax.config.jax_compilation_cache_dir
    if not place:
        mend = (
            "set JAX_COMPILATION_CACHE_DIR to a directory that stays, for several processes one that all machines see"
        )
        yield Finding("compile cache", NOTE, "none: every start of several processes compiles anew", mend)
    elif is_remote(place):
        yield Finding("compile cache", OK, place)
    elif os.access(place, os.W_OK) or not os.path.exists(place):
        yield Finding("compile cache", OK, f"{place}, {len(glob.glob(glob.escape(place) + '/*'))} files")
    else:
        yield Finding("compile cache", FAULT, f"{place} cannot be written in", "name another JAX_COMPILATION_CACHE_DIR")


def examine(config: ConfigDict | None, workdir: str | None, together: Sequence[Any]) -> Iterator[Finding]:
    """All findings, in the order in which a run would meet them.

    Args:
      config: of a run to come; None: what hangs on one is left out.
      workdir: its directory.
      together: values of `PROCESSES`.
    """
    planned = config if config and config.objective == "vlkd" else None  # the others have no plan
    checks: list[tuple[str, Callable[[], Iterator[Finding]]]] = [
        ("packages", packages),
        ("processes", lambda: start(together)),
        ("devices", devices),
        *([("mesh", lambda: mesh(config))] if config else []),
        ("port", lambda: port(together[0])),
        ("disk", lambda: disk(workdir, planned)),
        ("/dev/shm", shared_memory),
        ("compile cache", compile_cache),
        *([("memory", lambda: memory(planned))] if planned else []),
    ]
    for name, check in checks:
        try:
            findings = list(check())
        except UserError as error:
            findings = [Finding(name, FAULT, str(error))]
        yield from findings
        if name in ("processes", "devices", "mesh") and any(finding.level == FAULT for finding in findings):
            return  # what comes after would only say the same again


def line(finding: Finding) -> str:
    """As it is printed."""
    return f"{finding.level:5} {finding.name:13} {finding.seen}" + (f"; {finding.mend}" if finding.mend else "")


def main(values: SimpleNamespace) -> None:
    """Entry point."""
    told: list[dict[str, Any]] = []
    together = [getattr(values, option.name) for option in PROCESSES]
    for finding in examine(values.config, values.workdir, together):
        told.append(finding._asdict())
        if not values.json:
            say(line(finding), everywhere=finding.level == FAULT)
    if not values.config and not values.json:
        say("      --config=NAME also looks at its mesh, its memory and its checkpoints")
    if values.json and processes.is_first():
        print(json.dumps(told))
    faults = [finding["name"] for finding in told if finding["level"] == FAULT]
    if faults:
        raise UserError(f"{len(faults)} of {len(told)} findings stand in a run's way: {', '.join(faults)}")


if __name__ == "__main__":
    entry.run(main, COMMANDS["doctor"])
