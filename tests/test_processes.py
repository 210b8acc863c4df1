"""Several processes of one run: how they meet, what they tell one another, and how each ends when another is gone."""

import http.server
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import jax
import pytest
from test_runtime import catches_sigterm
from tiny import ROOT, environment, without_gloo

from vlkd_jax import cluster, processes, runtime
from vlkd_jax.errors import UserError

PROGRAM = """
import os, signal, sys, time
import numpy as np
from vlkd_jax import entry, processes, runtime
from vlkd_jax.commands import COMMANDS, PROCESSES
from vlkd_jax.errors import UserError
from vlkd_jax.options import Command, text


def payload(process, size):
    return np.random.default_rng([process, 7]).bytes(size).hex()


def message(work):
    try:
        work()
    except (UserError, RuntimeError) as error:
        return type(error).__name__, str(error)


def tell(index):
    for size in (0, 1, 700, 3_000_000):
        for process, text in enumerate(processes.share(payload(index, size * (index + 1)))):
            assert text == payload(process, size * (process + 1))
    assert processes.share({"é": [index, None, 0.1]}) == [{"é": [k, None, 0.1]} for k in range(2)]
    arrays = {dtype: np.random.default_rng(index).normal(0, 99, (3, 5)).astype(dtype) for dtype in ("f4", "i4", "?")}
    for dtype, array in processes.broadcast(arrays).items():
        assert np.array_equal(array, np.random.default_rng(0).normal(0, 99, (3, 5)).astype(dtype))
    assert processes.is_first() == (index == 0)
    assert processes.on_first(lambda: {"by": index}) == {"by": 0}

    def fail(kind):
        raise kind("it went wrong")

    prefix = "process 0: " if index else ""
    for kind in (UserError, RuntimeError):
        assert message(lambda: processes.on_first(lambda: fail(kind))) == (kind.__name__, prefix + "it went wrong")
    processes.check_alike({"a": 1, "b": [2]})
    differs = message(lambda: processes.check_alike({"a": 1, "b": index}))
    assert differs[0] == "UserError" and "b differs" in differs[1] and "0 in process 0, 1 in process 1" in differs[1]


def signalled(index):
    with runtime.deferred() as signal_number:
        number = None
        while not number:
            if index == 1:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.2)
            number = max(processes.share(signal_number() or 0))
        raise runtime.Interrupted(np.int32(number), "after step 3")


def loop(index):
    processes.share(0)  # compiles and connects
    with runtime.Watchdog(float(sys.argv[1]), "step") as watchdog:
        for step in range(10_000):
            processes.share(step)
            watchdog.beat(step)
            if step == 3:
                print("runs", flush=True)
            time.sleep(0.01)


def mistake(index):
    try:
        processes.on_first(lambda: entry.read_values(COMMANDS["train"].make_context("program", GIVEN)))
    finally:
        time.sleep(0.7 * index)


def fault(index):
    processes.share(index)  # connected, as in the middle of a run
    if index == 1:
        raise ValueError("a fault")
    loop(index)


GIVEN = ["--config=shapes_vlkd", "--workdir=x", "--unknown"]


def main(values):
    import jax
    index = jax.process_index()
    assert runtime.process_index() == index and jax.device_count() == 8 == 2 * jax.local_device_count()
    print("met", index, flush=True)
    for name in values.tasks.split(","):
        globals()[name](index)


tasks = text("tasks", "NAMES", "what to do", default="tell")
entry.run(main, Command("program", "", "", "", (*PROCESSES, tasks)), argv=["program", *sys.argv[2:]])
"""
SECONDS = 5
"""For which the watchdog waits here."""


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(*argv: str, **variables: str) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    settings = environment() | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"} | variables
    return subprocess.Popen([sys.executable, "-c", PROGRAM, str(SECONDS), *argv], **pipes, env=settings, cwd=ROOT)


@contextmanager
def running(*each: tuple[list[str], dict[str, str]]) -> Iterator[list[subprocess.Popen]]:
    """A process for each (arguments, variables); none is left when the block ends."""
    started = [start(*argv, **variables) for argv, variables in each]
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.communicate()


def endings(started: list[subprocess.Popen]) -> list[tuple[int, list[str], str]]:
    """(exit code, lines of output without gloo's, errors) of each."""
    outputs = [process.communicate(timeout=120) for process in started]
    return [(process.returncode, without_gloo(out), err) for process, (out, err) in zip(started, outputs, strict=True)]


def by_flags(port: int, tasks: str, *more: str) -> list[tuple[list[str], dict[str, str]]]:
    address = [f"--coordinator=localhost:{port}", "--processes=2", f"--tasks={tasks}", *more]
    return [([*address, f"--process={index}"], {}) for index in range(2)]


def by_slurm(port: int) -> list[tuple[list[str], dict[str, str]]]:
    step = {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "localhost", "JAX_COORDINATOR_PORT": str(port)}
    step |= {"SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2"}
    return [([], step | {"SLURM_PROCID": str(index), "SLURM_LOCALID": str(index)}) for index in range(2)]


def by_open_mpi(port: int) -> list[tuple[list[str], dict[str, str]]]:
    world = {"OMPI_MCA_orte_hnp_uri": "4096.0;tcp://127.0.0.1:34911", "JAX_COORDINATOR_PORT": str(port)}
    world |= {"OMPI_COMM_WORLD_SIZE": "2"}
    names = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK")
    return [([], world | dict.fromkeys(names, str(index))) for index in range(2)]


def by_jobset(port: int) -> list[tuple[list[str], dict[str, str]]]:
    """Two jobs of one pod each, as launch/gke_jobset.yaml tells them."""
    world = {"JOBSET_COORDINATOR": "localhost", "JOBSET_JOBS": "2", "JOBSET_PODS": "1", "JOB_COMPLETION_INDEX": "0"}
    world |= {"JAX_COORDINATOR_PORT": str(port), "MEGASCALE_NUM_SLICES": "2"}
    return [([], world | dict.fromkeys(("JOBSET_JOB_INDEX", "MEGASCALE_SLICE_ID"), str(index))) for index in range(2)]


@pytest.mark.parametrize("surroundings", [by_slurm, by_open_mpi, by_jobset])
def test_processes_that_jax_finds_by_itself_and_what_they_tell_one_another(surroundings, port):
    with running(*surroundings(port)) as started:
        assert endings(started) == [(0, ["met 0"], ""), (0, ["met 1"], "")]


def test_a_signal_to_one_process_ends_all(port):
    """And it comes to `runtime.watched`, not to JAX, which takes SIGTERM where one lets it."""
    with running(*by_flags(port, "signalled")) as started:
        line = "stopped by SIGTERM after step 3\n"
        assert endings(started) == [(143, ["met 0"], line), (143, ["met 1"], line)]


def test_a_mistake_that_all_know_of_is_one_line_in_each(port):
    """Process 0 holds the coordinator until the others have left, which JAX would abort otherwise."""
    with running(*by_flags(port, "mistake")) as started:
        (code, _, err), (other_code, _, other_err) = endings(started)
    assert (code, other_code) == (2, 2)
    assert err.startswith("error: no such option --unknown") and err.count("\n") == 1
    assert other_err == err.replace("error: ", "error: process 0: ")


def test_a_fault_of_one_process_ends_the_other(port):
    with running(*by_flags(port, "fault")) as started:
        (code, _, err), (other_code, _, other_err) = endings(started)
    assert other_code == 1 and "ValueError: a fault" in other_err and "Traceback" in other_err
    assert other_err.splitlines()[-1].startswith("process 1: this is a fault of the program; ")
    assert code == 4 and "Traceback" not in err and err.startswith("process 0: lost another process (")


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_process_that_lost_another_leaves_in_time(number, victim, port):
    with running(*by_flags(port, "loop")) as started:
        for process in started:
            assert any(line == "runs\n" for line in process.stdout), process.stderr.read()
        started[victim].send_signal(number)
        since = time.monotonic()
        [(code, _, err)] = endings([started[1 - victim]])
        seconds = time.monotonic() - since
    own = [line for line in err.splitlines() if line.startswith(f"process {1 - victim}: ")]
    assert code == 4 and len(own) == 1 and "Traceback" not in err, err
    assert own[0].endswith("the same command again goes on from the last checkpoint")
    if number == signal.SIGSTOP:
        assert SECONDS - 1 < seconds < SECONDS + runtime.GRACE + 20
        assert re.search(rf": no step for {SECONDS} s, the last was step \d+; ", own[0]), err
        assert re.search(r"Thread 0x\w+ \(most recent call first\):\n(  File .*\n)*  File .* in loop\n", err), err
    else:  # JAX's runtime adds why it gives up when its coordinator is gone
        assert seconds < 20 and (err.count("\n") == 1 or victim == 0), err


def ask(coordinator: str, count: int, index: int, seconds: float = 10, **changes: object) -> str:
    """What process `index` of `count` is told at the meeting; empty: to go on."""
    told = {"process": index, "processes": count, "place": f"machine{index}", "versions": {"jax": "1"}} | changes
    host, port = cluster.parse_address(coordinator)
    try:
        if index == 0:
            cluster._take_roll(port, told, coordinator, seconds)
        else:
            cluster._answer_roll(host, port, told, coordinator, seconds)
    except UserError as error:
        assert "\n" not in str(error)
        return str(error)
    return ""


def meet(port: int, *calls: dict, delays: tuple[float, ...] = ()) -> list[str]:
    """What each of these processes, threads here, is told; `calls` are arguments of `ask`."""

    def late(call, delay):
        time.sleep(delay)
        return ask(**{"coordinator": f"localhost:{port}", "count": len(calls), **call})

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(late, calls, delays or [0.0] * len(calls)))


@pytest.mark.parametrize("late", [0, 1])
def test_processes_meet_in_any_order_and_the_port_is_free_afterwards(late, port):
    for count in (1, 2, 7):
        delays = tuple(0.7 * (index == late) for index in range(count))
        assert meet(port, *({"index": index} for index in range(count)), delays=delays) == [""] * count
        with cluster.listen(port):
            pass


def test_strangers_at_the_port_do_not_disturb(port, monkeypatch):
    monkeypatch.setattr(cluster, "GREETING_SECONDS", 0.5)
    strangers = []

    def knock():
        for data in (b"", b"GET / HTTP/1.1\r\n\r\n", b"[1]\n", b'{"process": 1}\n', b"\xff" * 100_000):
            while True:
                try:
                    strangers.append(socket.create_connection(("localhost", port), timeout=5))
                    break
                except ConnectionRefusedError:
                    time.sleep(0.01)
            strangers[-1].sendall(data)

    thread = threading.Thread(target=knock)
    thread.start()
    assert meet(port, {"index": 0}, {"index": 1}, delays=(0.2, 1.0)) == ["", ""]
    thread.join()
    for stranger in strangers:
        stranger.close()


@pytest.mark.parametrize(
    ("calls", "told"),
    [
        (
            [{"index": 0}, {"index": 1, "count": 3}],
            "started with --processes=2, process 1 on machine1 with --processes=3",
        ),
        (
            [{"index": 0, "count": 3}, {"index": 1, "count": 3}, {"index": 1, "count": 3, "place": "machine2"}],
            r"process 1 was started twice, on machine\d and on machine\d; give each its own --process, 0 to 2",
        ),
        (
            [{"index": 0}, {"index": 1, "versions": {"jax": "2"}}],
            "jax differs between the processes: 1 in process 0, 2 in",
        ),
    ],
)
def test_processes_that_do_not_fit_are_told_so_at_once(calls, told, port):
    since = time.monotonic()
    lines = meet(port, *calls)
    assert len(set(lines)) == 1 and re.search(told, lines[0]) and time.monotonic() - since < 8


def test_a_process_that_does_not_come(port):
    lines = meet(port, *({"index": index, "count": 4, "seconds": 2 + index} for index in range(2)))
    assert lines[0] == lines[1] and f"waited 2 s at --coordinator=localhost:{port} for process 2, 3 of 4;" in lines[0]
    assert "firewall" in lines[0] and "--start_seconds" in lines[0]


@pytest.mark.parametrize("host", ["localhost", "nowhere.invalid"])
def test_a_coordinator_that_cannot_be_reached(host, port):
    since = time.monotonic()
    line = ask(f"{host}:{port}", 2, 1, seconds=1)
    assert line.startswith(f"process 1 could not meet process 0 at --coordinator={host}:{port} within 1 s (")
    assert "firewall" in line and "same" in line and time.monotonic() - since < 8
    assert ("Connection refused" in line) == (host == "localhost")


def test_a_port_that_is_taken_or_no_answer_of_ours(port):
    with cluster.listen(port) as holder:
        line = ask(f"localhost:{port}", 2, 0)
        assert line.startswith(f"process 0 cannot listen at port {port} of --coordinator (Address already in use);")
        assert "free port" in line
        held = ask(f"localhost:{port}", 2, 1, seconds=1)
        assert "within 1 s (process 0 answers there, and waits for others)" in held
        holder.listen()


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (("localhost:1", 2, None), "--process missing; --coordinator, --processes and --process are given together"),
        ((None, None, 0), "--coordinator and --processes missing"),
        (("localhost:1", 2, 2), "--process=2 does not exist with --processes=2; count from 0"),
        *(
            (((address, 2, 0), f"--coordinator={address} is no HOST:PORT"))
            for address in ("a", "a:", ":1", "a:0", "a:x")
        ),
    ],
)
def test_flags_that_do_not_fit(given, told, monkeypatch):
    monkeypatch.setattr(cluster, "_start", lambda *_, **__: pytest.fail("it started"))
    with pytest.raises(UserError, match=re.escape(told)):
        cluster.initialize(*given, 1, 300)
    assert runtime.process_index() is None


def test_mistakes_of_a_start_are_one_line_and_exit_code_2(port):
    alone = by_flags(port, "tell", "--start_seconds=1")[1], (["--start_seconds=2"], by_slurm(port)[1][1])
    with running(*alone) as started:
        (code, out, err), (found_code, found_out, found_err) = endings(started)
    assert (code, out, err.count("\n")) == (2, [], 1) == (found_code, found_out, found_err.count("\n"))
    assert err.startswith("error: process 1 could not meet process 0 at --coordinator=localhost:")
    assert found_err.startswith("error: JAX did not start within 2 s with the coordinator that JAX found through SLURM")


def test_a_signal_ends_the_wait_for_others(port):
    """Also while JAX waits, which it does in C++."""
    with running(by_flags(port, "tell")[1], by_slurm(port)[1]) as started:
        for process in started:
            while not catches_sigterm(process.pid):
                time.sleep(0.1)
        time.sleep(3)  # both wait by then; earlier they end in the same way
        for process in started:
            process.send_signal(signal.SIGTERM)
        assert endings(started) == [(143, [], "stopped by SIGTERM\n")] * 2


POD = {"JOBSET_COORDINATOR": "run-workers-0-0.run", "JOBSET_JOBS": "3", "JOBSET_JOB_INDEX": "2", "JOBSET_PODS": "4"}
POD |= {"JOB_COMPLETION_INDEX": "1"}


def test_a_pod_of_a_jobset(monkeypatch, nothing_around):
    """Pods are counted job by job, as TPU slices are."""
    assert cluster.jobset() is None
    for name, value in POD.items():
        monkeypatch.setenv(name, value)
    assert cluster.jobset() == ("run-workers-0-0.run:8476", 12, 9)
    monkeypatch.setenv("JAX_COORDINATOR_PORT", "8482")
    assert cluster.jobset() == ("run-workers-0-0.run:8482", 12, 9)
    with pytest.raises(
        UserError, match=r"process 9 could not meet process 0 at --coordinator=run-workers-0-0\.run:8482"
    ):
        cluster.initialize(None, None, None, 1, 300)  # its name is not known (yet)
    runtime._Process.index = None


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"MEGASCALE_NUM_SLICES": "4"}, "MEGASCALE_NUM_SLICES is 4 and the JobSet's JOBSET_JOBS is 3; restart the"),
        ({"MEGASCALE_SLICE_ID": "0"}, "MEGASCALE_SLICE_ID is 0 and the JobSet's JOBSET_JOB_INDEX is 2; restart the"),
        ({"JOBSET_PODS": ""}, "JOBSET_PODS missing beside JOBSET_COORDINATOR; see launch/gke_jobset.yaml"),
        ({"JOBSET_COORDINATOR": ""}, "JOBSET_COORDINATOR missing beside"),
    ],
)
def test_a_pod_with_figures_that_do_not_fit(changes, told, monkeypatch, nothing_around):
    """As a pod has that replaces another one of an earlier, smaller or larger run."""
    for name, value in (POD | changes).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=told):
        cluster.initialize(None, None, None, 1, 300)


SURROUNDINGS = [
    ({}, None),
    ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"}, "SLURM"),
    ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, None),
    ({"SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, None),  # the batch script itself
    ({"OMPI_COMM_WORLD_SIZE": "2"}, "Open MPI"),
    ({"OMPI_COMM_WORLD_SIZE": "1"}, None),
    ({"TPU_WORKER_HOSTNAMES": "a,b"}, "TPU"),
    ({"TPU_WORKER_HOSTNAMES": "a,b", "JAX_PLATFORMS": "cpu"}, None),
    ({"TPU_WORKER_HOSTNAMES": "a,b", "JAX_PLATFORMS": "tpu,cpu"}, "TPU"),
    ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
    ({"TPU_PROCESS_ADDRESSES": "a:1,b:1", "TPU_WORKER_HOSTNAMES": "a"}, "TPU"),
    ({"TPU_WORKER_HOSTNAMES": "localhost", "MEGASCALE_NUM_SLICES": "2"}, "TPU"),
    ({"TPU_WORKER_HOSTNAMES": "localhost", "MEGASCALE_NUM_SLICES": "1"}, None),
]


@pytest.fixture
def nothing_around(monkeypatch):
    for name in [*os.environ]:
        if name.startswith(("SLURM_", "OMPI_", "TPU_", "MEGASCALE_", "JOBSET_", "JAX_PLATFORMS")):
            monkeypatch.delenv(name)


@pytest.mark.parametrize(("variables", "expected"), SURROUNDINGS)
def test_what_has_started_this_process(variables, expected, nothing_around, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cluster.surroundings() == expected


@pytest.mark.parametrize(("workers", "expected"), [("10.0.0.1,10.0.0.2", "TPU"), ("10.0.0.1", None), (None, None)])
def test_virtual_machines_of_a_tpu_slice(workers, expected, nothing_around, monkeypatch):
    class Metadata(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            known = self.path.endswith("/instance/attributes/worker-network-endpoints") and workers
            self.send_response(200 if known and self.headers["Metadata-Flavor"] == "Google" else 404)
            self.end_headers()
            self.wfile.write((workers or "").encode())

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Metadata) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("GCE_METADATA_IP", f"127.0.0.1:{server.server_port}")
        assert cluster.surroundings() is None  # no chips, so nobody is asked
        monkeypatch.setattr(cluster, "tpu_chips", lambda: ["/dev/accel0"])
        assert cluster.surroundings() == expected
        server.shutdown()


def test_machines_that_were_not_started_together(monkeypatch):
    cluster.check_started()
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    with pytest.raises(UserError, match="this is one of 4 machines"):
        cluster.check_started()


def test_which_errors_tell_of_a_lost_process():
    def chained(outer, inner):
        outer.__cause__ = inner
        return outer

    gloo = jax.errors.JaxRuntimeError("UNKNOWN: Gloo AllGather failed: Connection closed by peer\n  at x")
    nccl = jax.errors.JaxRuntimeError("INTERNAL: NCCL operation ncclGroupEnd() failed: remote process exited")
    for error in (gloo, chained(ValueError("x"), gloo), cluster.lost_peer(gloo)):
        line = str(cluster.lost_peer(error))
        assert "lost another process (UNKNOWN: Gloo AllGather failed: Connection closed by peer); the same" in line
    assert cluster.lost_peer(nccl) and cluster.lost_peer(jax.errors.JaxRuntimeError("UNAVAILABLE: x"))
    for text in ("RESOURCE_EXHAUSTED: no connection", "INTERNAL: a compiler's fault", "INVALID_ARGUMENT: x"):
        own = jax.errors.JaxRuntimeError(text)
        assert cluster.lost_peer(own) is None and cluster.lost_peer(chained(ValueError("x"), own)) is None
    assert cluster.lost_peer(ValueError("UNAVAILABLE: x")) is None and cluster.lost_peer(None) is None


def test_what_differs():
    told = [{"a": 1, "b": [2], "c": "x"} for _ in range(9)]
    assert processes.differences(told) is None
    told[3] = json.loads('{"a": 1, "b": [3], "c": "x"}')
    told[4] = {"a": 1, "b": [2]}
    line = processes.differences(told)
    assert line.startswith(
        "b differs between the processes: [2] in process 0, 1, 2, 4, 5 and 3 more, [3] in process 3;"
    )
    told[3] = told[0]
    assert "c differs" in processes.differences(told) and "None in process 4" in processes.differences(told)


def test_versions_are_those_that_run():
    versions = cluster.versions()
    assert versions["jax"] == jax.__version__ and versions["Python"] == sys.version.split()[0]
    assert {"jaxlib", "flax", "optax", "orbax-checkpoint", "vlkd_jax"} < set(versions)
