"""How the processes of one run come together, and part.

JAX's own start ends in an abort of its C++ runtime when a port is taken, a process is missing or the counts disagree.
So the processes first meet at the coordinator's address with plain sockets, where each of these is one line
(`_take_roll`, `_answer_roll`); then JAX starts on the same port. Pods of a JobSet know that address from their
surroundings. Where JAX finds the others by itself (SLURM, Open MPI, TPU) there is no such meeting, only the time limit.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import platform
import re
import socket
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import jax

from vlkd_jax import runtime
from vlkd_jax.errors import UserError, few
from vlkd_jax.processes import check_alike, differences

Told = dict[str, Any]

PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "vlkd_jax")
"""What has to be of one version in all processes, beside Python."""
PORT = 8476
"""Of a JobSet's coordinator, where JAX_COORDINATOR_PORT names no other; firewalls of TPU networks open it."""
JOBSET = ("JOBSET_COORDINATOR", "JOBSET_JOBS", "JOBSET_JOB_INDEX", "JOBSET_PODS", "JOB_COMPLETION_INDEX")
"""What a pod of launch/gke_jobset.yaml is told: coordinator's host, jobs, its job, pods a job, its pod in that job."""
SHUTDOWN_SECONDS = 24 * 3600
"""How long the processes that are done wait for one that still writes; one that is gone is noticed by its heartbeat."""
GREETING_BYTES, GREETING_SECONDS = 1 << 16, 5.0
"""What a connection to process 0 may send, and how soon: others than our processes may knock at a port."""
RETRY_SECONDS = 0.5
LOST = re.compile(
    r"(UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED)\b|(UNKNOWN|INTERNAL|FAILED_PRECONDITION)\b.*"
    r"\b(gloo|nccl|peer|connection|socket|coordination|heartbeat|megascale|remote process)\b",
    re.IGNORECASE | re.DOTALL,
)
"""How an error of JAX's runtime begins that comes of another process; out of memory, for one, is this one's own."""


def initialize(
    coordinator: str | None,
    processes: int | None,
    process: int | None,
    seconds: float,
    heartbeat: int,
    check_devices: Callable[[], object] = jax.devices,
) -> None:
    """Starts JAX over several processes where there are several; no device may have been touched before.

    Args:
      coordinator: HOST:PORT, process 0's; without it JAX finds the others in its surroundings, if there are any.
      processes: how many there are.
      process: which of them this is, from 0.
      seconds: how long each waits for the others.
      heartbeat: after how many seconds without a sign of life JAX gives a process up. A compile that takes every core
        may starve the sign.
      check_devices: touches the devices, whereupon the processes tell one another of theirs.

    Raises:
      UserError: the three are not given together; the coordinator cannot be reached in time; its port is taken; counts
        or versions differ; surroundings that contradict themselves.
    """
    if coordinator is processes is process is None:
        coordinator, processes, process = jobset() or (None, None, None)
    given = {"--coordinator": coordinator, "--processes": processes, "--process": process}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == 3:
        cluster = surroundings()
        if cluster:
            port = os.environ.get("JAX_COORDINATOR_PORT", "of JAX's choice, JAX_COORDINATOR_PORT names another")
            where = f"the coordinator that JAX found through {cluster} (port {port})"
            _start(where, seconds, heartbeat, check_devices)
            check_alike(versions())
        return
    if missing:
        raise UserError(f"{' and '.join(missing)} missing; --coordinator, --processes and --process are given together")
    host, port = parse_address(coordinator)
    if process >= processes:
        raise UserError(f"--process={process} does not exist with --processes={processes}; count from 0")
    runtime.set_process(process)
    began = time.monotonic()
    told = {"process": process, "processes": processes, "place": f"{socket.gethostname()} (pid {os.getpid()})"}
    told["versions"] = versions()
    if process == 0:
        _take_roll(port, told, coordinator, seconds)
    else:
        _answer_roll(host, port, told, coordinator, seconds)
    left = max(seconds - (time.monotonic() - began), 1.0)
    where = f"--coordinator={coordinator}, where all processes had met"
    address = (coordinator, processes, process)
    _start(where, left, heartbeat, check_devices, *address, cluster_detection_method="deactivate")


def check_started() -> None:
    """Raises UserError where JAX knows of other processes and has not been started with them."""
    if jax.process_count() > 1 and not jax.distributed.is_initialized():
        raise UserError(
            f"this is one of {jax.process_count()} machines whose devices work together only; run the command on each "
            "with --coordinator, --processes and --process"
        )


def surroundings() -> str | None:
    """The name of what has started this as one of several processes that JAX can find by itself; None: nothing has."""
    if _number("OMPI_COMM_WORLD_SIZE") > 1:
        return "Open MPI"
    if _number("SLURM_STEP_NUM_TASKS") > 1 and "SLURM_PROCID" in os.environ:  # else a shell within an allocation
        return "SLURM"
    platforms = os.environ.get("JAX_PLATFORMS")
    if platforms and "tpu" not in platforms.split(","):
        return None
    hosts = os.environ.get("TPU_PROCESS_ADDRESSES") or os.environ.get("TPU_WORKER_HOSTNAMES") or _tpu_vms()
    return "TPU" if "," in hosts or _number("MEGASCALE_NUM_SLICES") > 1 else None


def jobset() -> tuple[str, int, int] | None:
    """Coordinator, number of processes and index of this pod of a JobSet; None: it is none.

    Raises:
      UserError: a variable of `JOBSET` is missing or no number, or the TPU's own figures (MEGASCALE_*) are others, as
        after a pod was replaced: this one would wait for slices that never come.
    """
    if "JOBSET_COORDINATOR" not in os.environ:
        return None
    host, *counts = (os.environ.get(name, "") for name in JOBSET)
    wrong = [name for name, value in zip(JOBSET[1:], counts) if not value.isdecimal()]
    if wrong or not host:
        raise UserError(f"{', '.join(wrong) or JOBSET[0]} missing beside {JOBSET[0]}; see launch/gke_jobset.yaml")
    jobs, job, pods, pod = map(int, counts)
    for name, value, ours in (("MEGASCALE_NUM_SLICES", jobs, JOBSET[1]), ("MEGASCALE_SLICE_ID", job, JOBSET[2])):
        told = os.environ.get(name)
        if told and told != str(value):
            raise UserError(f"{name} is {told} and the JobSet's {ours} is {value}; restart the JobSet as a whole")
    return f"{host}:{os.environ.get('JAX_COORDINATOR_PORT', PORT)}", jobs * pods, job * pods + pod


def _number(variable: str) -> int:
    value = os.environ.get(variable, "")
    return int(value) if value.isdecimal() else 0


def _tpu_vms() -> str:
    """The addresses of a slice's virtual machines, as Google Compute Engine tells them to each; empty elsewhere."""
    if "TPU_SKIP_MDS_QUERY" in os.environ or not tpu_chips():
        return ""
    server = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
    url = f"http://{server}/computeMetadata/v1/instance/attributes/worker-network-endpoints"
    try:
        request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
        with urllib.request.urlopen(request, timeout=5) as answer:
            return answer.read().decode()
    except OSError:
        return ""


def tpu_chips() -> list[str]:
    """The device files of this machine's TPU chips."""
    return glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*")


def parse_address(coordinator: str) -> tuple[str, int]:
    """Host and port of --coordinator. Raises UserError for what is none."""
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"--coordinator={coordinator} is no HOST:PORT; name process 0's machine and a free port on it")
    return host.strip("[]"), int(port)


def _start(
    where: str,
    seconds: float,
    heartbeat: int,
    check_devices: Callable[[], object],
    *address: Any,
    **settings: Any,
) -> None:
    """Starts JAX; where that fails or lasts, one line and exit code 2."""
    who = runtime.whose()
    mend = (
        "is every process running, its number of processes the same, and the coordinator's port open in the firewall? "
        "--coordinator, --processes and --process name them where JAX does not find them"
    )
    runtime.answer_aborts(f"error: {who}JAX could not start with {where} (its message is above); {mend}", 2)
    late = f"error: {who}JAX did not start within {seconds:g} s with {where}; {mend} --start_seconds=N waits longer"
    timer = threading.Timer(seconds, runtime.leave, (late, 2))
    timer.daemon = True
    timer.start()
    try:
        _start_jax(where, mend, seconds, *address, heartbeat_timeout_seconds=heartbeat, **settings)
        check_devices()
        runtime.set_process(jax.process_index())
    finally:
        timer.cancel()
    lost = f"{runtime.whose()}JAX's runtime ended this process, mostly as another one was lost (its message is above)"
    runtime.answer_aborts(f"{lost}; {runtime.GOES_ON}", runtime.LOST)


def _start_jax(where: str, mend: str, seconds: float, *address: Any, **settings: Any) -> None:
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM from `runtime.watched`
    try:
        jax.distributed.initialize(
            *address,
            initialization_timeout=int(seconds) + 60,  # at its own limit it aborts
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
            **settings,
        )
    except Exception as e:
        raise UserError(f"JAX could not start with {where} ({type(e).__name__}: {e}); {mend}") from e


def finish() -> None:
    """At the end of a command: waits for the other processes, so that none takes the coordinator from the rest."""
    if runtime.process_index() is not None:
        jax.distributed.shutdown()


def lost_peer(error: BaseException | None) -> runtime.LostPeer | None:
    """What this exception means where it comes of the loss of another process; None: it is this one's own fault."""
    while error is not None:
        if isinstance(error, runtime.LostPeer):
            return error
        if isinstance(error, jax.errors.JaxRuntimeError) and LOST.match(str(error)):
            return runtime.LostPeer(str(error).strip().partition("\n")[0])
        error = error.__cause__ or error.__context__
    return None


def _take_roll(port: int, told: Told, coordinator: str, seconds: float) -> None:
    """Process 0 waits for every other to connect, compares what they tell, and tells them all whether to go on."""
    present, fault, deadline = {0: told}, None, time.monotonic() + seconds
    with listen(port) as door, contextlib.ExitStack() as connections:
        lines: list[socket.socket] = []
        while len(present) < told["processes"] and not fault:
            door.settimeout(max(deadline - time.monotonic(), 0.01))
            try:
                line, _ = door.accept()
            except TimeoutError:
                absent = few([str(i) for i in range(told["processes"]) if i not in present])
                fault = (
                    f"process 0 waited {seconds:g} s at --coordinator={coordinator} for process {absent} "
                    f"of {told['processes']}; start each with this address, open the port in the "
                    "firewall, or wait longer with --start_seconds=N"
                )
                break
            connections.enter_context(line)
            other = _receive(line, GREETING_SECONDS)
            if not told.keys() <= other.keys():  # somebody else knocked
                continue
            lines.append(line)
            fault = _intruder(present, other)
            present.setdefault(other["process"], other)
        fault = fault or differences([present[i]["versions"] for i in sorted(present)])
        for line in lines:
            with contextlib.suppress(OSError):  # it has left; JAX's own limit holds then
                line.sendall(_line({"fault": fault}))
                line.settimeout(GREETING_SECONDS)
                line.recv(1)  # until it has closed its end: the port is to be free at once
    if fault:
        raise UserError(fault)


def _intruder(present: dict[int, Told], other: Told) -> str | None:
    """Why a process that has connected cannot be one of these."""
    first = present[0]
    if other["processes"] != first["processes"]:
        return (
            f"process 0 on {first['place']} was started with --processes={first['processes']}, process "
            f"{other['process']} on {other['place']} with --processes={other['processes']}; give all the same number"
        )
    same = present.get(other["process"], other)
    if same["place"] != other["place"]:
        return (
            f"process {other['process']} was started twice, on {same['place']} and on {other['place']}; give each its "
            f"own --process, 0 to {first['processes'] - 1}"
        )
    return None


@contextlib.contextmanager
def listen(port: int) -> Iterator[socket.socket]:
    """Holds a port of this machine. Raises UserError when another program does."""
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        door = socket.create_server(("", port), family=family, dualstack_ipv6=both, backlog=1024)
    except OSError as e:
        raise UserError(
            f"process 0 cannot listen at port {port} of --coordinator ({os.strerror(e.errno)}); name a free port in "
            "every process's --coordinator, or end what holds this one, such as an earlier run"
        ) from e
    with door:
        yield door


def _answer_roll(host: str, port: int, told: Told, coordinator: str, seconds: float) -> None:
    """Another process than 0 connects, tells of itself and waits for process 0's word."""
    deadline, reason = time.monotonic() + seconds, ""
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection((host, port), timeout=left) as line:
                line.sendall(_line(told))
                reason = "process 0 answers there, and waits for others"
                answer = _receive(line, max(deadline - time.monotonic(), 0.01))
        except OSError as e:  # process 0 may start later, and its name may not be known before
            reason = e.strerror or str(e)
            answer = {}
        if "fault" in answer:
            if answer["fault"]:
                raise UserError(answer["fault"])
            return
        time.sleep(RETRY_SECONDS)
    raise UserError(
        f"process {told['process']} could not meet process 0 at --coordinator={coordinator} within {seconds:g} s "
        f"({reason}); is process 0 running, the port open in its firewall, and --coordinator the same for all? "
        "--start_seconds=N waits longer"
    )


def _line(value: Told) -> bytes:
    return json.dumps(value).encode() + b"\n"


def _receive(line: socket.socket, seconds: float) -> Told:
    """The JSON object that the other end sends as one line within this time; {} where it sends anything else."""
    data, deadline = b"", time.monotonic() + seconds
    try:
        while not data.endswith(b"\n") and len(data) < GREETING_BYTES:
            line.settimeout(max(deadline - time.monotonic(), 0.01))
            part = line.recv(4096)
            if not part:
                break
            data += part
        value = json.loads(data)
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def versions() -> dict[str, str]:
    """What this process runs on, by package."""
    return {"Python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"
