"""What a run writes to an object store: over a made-up one, with the code that serves local paths.

Orbax's own way to a store is not among it: here it writes to the directory in which the made-up store keeps its
objects.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import fake_store
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fake_store import ROOT, FakeStore, backing
from tiny import tiny_config

from vlkd_jax import checkpoint, metrics, storage, workdir
from vlkd_jax.checkpoint import Checkpoints, check_directory
from vlkd_jax.errors import UserError
from vlkd_jax.evals.runner import read_rows, write_rows
from vlkd_jax.identity import check_inputs, hash_inputs, read_inputs, record_inputs
from vlkd_jax.manifest import MANIFEST, Damaged, hash_files, verify_all, write_manifest
from vlkd_jax.metrics import MetricWriter
from vlkd_jax.storage import check_reachable, locate, make_directory, write_atomic
from vlkd_jax.workdir import CONFIG_FILE, LOCK_FILE, claim, output_directory

RUN = "gs://bucket/a/run"
CONFIG = {"seed": 0, "steps": 100}
FAST = {"BEAT_SECONDS": 0.1, "STALE_SECONDS": 1.0, "SETTLE_SECONDS": 0.3}

OWNER = """
import sys, time
import fake_store
from vlkd_jax import workdir
from vlkd_jax.errors import UserError
fake_store.install()
workdir.BEAT_SECONDS, workdir.STALE_SECONDS, workdir.SETTLE_SECONDS = map(float, sys.argv[2:])
print("ready", flush=True)
sys.stdin.readline()
try:
    with workdir.claim(sys.argv[1], {"seed": 0, "steps": 100}):
        print("owner", flush=True)
        time.sleep(120)
except UserError as error:
    print("refused", error, flush=True)
"""


@pytest.fixture(autouse=True)
def store(tmp_path, monkeypatch):
    """The local directory in which the store keeps its objects."""
    root = tmp_path / "store"
    root.mkdir()
    monkeypatch.setenv(ROOT, str(root))
    for name, seconds in FAST.items():
        monkeypatch.setattr(workdir, name, seconds)
    fake_store.install()
    yield root
    fake_store.uninstall()


def objects(root: Path) -> set[str]:
    return {file.relative_to(root).as_posix() for file in root.rglob("*") if file.is_file()}


def start_owner(**seconds) -> subprocess.Popen:
    """A process that claims RUN once it reads a line."""
    options = [str(value) for value in (FAST | seconds).values()]
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, RUN, *options],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": paths, "JAX_PLATFORMS": "cpu"},
    )
    assert owner.stdout.readline() == "ready\n"
    return owner


def let_go(owner: subprocess.Popen) -> None:
    print(file=owner.stdin, flush=True)


def claim_error(config=CONFIG) -> str:
    with pytest.raises(UserError) as caught, claim(RUN, config):
        pytest.fail("claimed")
    assert "\n" not in str(caught.value) and RUN in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "given, meant",
    [
        ("gs://bucket/a/run/", "gs://bucket/a/run"),
        (Path("gs://bucket/a/run"), "gs://bucket/a/run"),  # which by then is gs:/bucket/a/run
        ("s3://bucket", "s3://bucket"),
        ("a/../b", "HERE/a/../b"),
        (Path("/a//b"), "/a/b"),
        ("gs:", "HERE/gs:"),
    ],
)
def test_one_place_for_each_way_to_name_it(given, meant, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert os.fspath(locate(given)) == meant.replace("HERE", str(tmp_path))
    assert locate(locate(given)) == locate(given)


@pytest.mark.parametrize("path", ["http://host/run", "az://bucket/run", "a/b://c", "://x", "/gs/bucket/run"])
def test_what_is_no_place_is_refused(path):
    with pytest.raises(UserError, match=r"begins with gs://, s3://|through a link") as caught:
        check_directory(path)
    assert str(caught.value).startswith(path) and "\n" not in str(caught.value)


@pytest.mark.parametrize("scheme, module, package", [("gs", "gcsfs", "epath-gcs"), ("s3", "s3fs", "epath-s3")])
def test_a_store_without_its_package_is_told(monkeypatch, scheme, module, package):
    fake_store.uninstall()
    monkeypatch.setitem(sys.modules, module, None)
    for use in (check_directory, lambda place: claim(place, CONFIG).__enter__(), Checkpoints):
        with pytest.raises(UserError) as caught:
            use(f"{scheme}://bucket/run")
        assert f"pip install 'etils[{package}]'" in str(caught.value) and "\n" not in str(caught.value)


def test_a_store_that_does_not_answer_is_told(monkeypatch):
    def no_credentials(*_, **__):
        raise RuntimeError("no credentials")

    monkeypatch.setattr(FakeStore, "exists", no_credentials)
    for use in (check_directory, lambda place: make_directory(locate(place))):
        with pytest.raises(UserError, match=r"gs://bucket/a/run: cannot be reached \(no credentials\)"):
            use(RUN)
    check_reachable(locate("/nowhere"))


def test_commands_that_write_locally_refuse_a_url():
    with pytest.raises(UserError, match=r"gs://bucket/a: --output is a local directory"):
        output_directory("gs://bucket/a", "--output")


def test_listings_are_not_kept_in_memory():
    locate(RUN)
    from fsspec.config import conf

    assert conf["gcs"]["use_listings_cache"] is False


def test_write_atomic_replaces_the_whole_object(store, monkeypatch):
    place = locate(RUN) / "file"
    for data in (b"old", os.urandom(100_000)):
        write_atomic(place, data)
        assert place.read_bytes() == data == backing(place).read_bytes()

    def fail(_):
        raise OSError("connection lost")

    with monkeypatch.context() as patch:
        patch.setattr(fake_store.Upload, "close", fail)
        with pytest.raises(OSError, match="connection lost"):
            write_atomic(place, b"new")
    assert place.read_bytes() == data and objects(store) == {"bucket/a/run/file"}


def test_a_claim_writes_the_config_and_later_ones_compare(store):
    for _ in range(2):
        with claim(RUN, CONFIG) as directory:
            assert os.fspath(directory) == RUN
            assert json.loads((directory / CONFIG_FILE).read_text()) == CONFIG
            assert objects(store) == {f"bucket/a/run/{CONFIG_FILE}", f"bucket/a/run/{LOCK_FILE}"}
            assert "this process already runs there" in claim_error()
        assert objects(store) == {f"bucket/a/run/{CONFIG_FILE}"}
    assert "seed: 0 -> 1" in claim_error(CONFIG | {"seed": 1})
    assert objects(store) == {f"bucket/a/run/{CONFIG_FILE}"}
    with claim(RUN, CONFIG | {"steps": 200}, allowed=("steps",)) as directory:
        assert json.loads((directory / CONFIG_FILE).read_text())["steps"] == 200


def test_a_live_owner_is_respected_and_a_dead_one_replaced(capsys):
    owner = start_owner()
    let_go(owner)
    assert owner.stdout.readline() == "owner\n"
    began = time.monotonic()
    assert f"process {owner.pid} on" in claim_error()
    assert time.monotonic() - began < FAST["STALE_SECONDS"]
    owner.kill()
    owner.wait()
    lock = locate(RUN) / LOCK_FILE
    left, began = lock.read_bytes(), time.monotonic()
    with claim(RUN, CONFIG):
        assert time.monotonic() - began >= FAST["STALE_SECONDS"] + FAST["SETTLE_SECONDS"]
        assert json.loads(lock.read_bytes())["pid"] == os.getpid() != json.loads(left)["pid"]
    assert f"left by process {owner.pid} on" in capsys.readouterr().out
    assert not lock.exists()


def test_of_many_that_start_together_one_wins():
    runs = [start_owner(SETTLE_SECONDS=2.0, STALE_SECONDS=30.0) for _ in range(3)]
    for run in runs:
        let_go(run)
    words = sorted(next(line.split()[0] for line in run.stdout if "left by" not in line) for run in runs)
    for run in runs:
        run.kill()
        run.communicate()
    assert words == ["owner"] + ["refused"] * 2


def test_of_two_that_saw_no_lock_the_last_to_write_has_it():
    lock = locate(RUN) / LOCK_FILE
    first, second = workdir._LockObject(lock), workdir._LockObject(lock)
    later = threading.Timer(FAST["SETTLE_SECONDS"] / 3, second.write, [{"pid": 2}])
    later.start()
    with pytest.raises(UserError, match="process 2 on"):
        first.write({"pid": 1})
    later.join()
    assert second.owner()["pid"] == 2


def test_an_owner_that_stood_still_ends_when_another_took_over():
    owner = start_owner()
    let_go(owner)
    assert owner.stdout.readline() == "owner\n"
    owner.send_signal(signal.SIGSTOP)
    with claim(RUN, CONFIG):
        owner.send_signal(signal.SIGCONT)
        _, err = owner.communicate(timeout=30)
        assert owner.returncode == 2 and err.count("\n") == 1
        assert err.startswith(f"error: {RUN}: process {os.getpid()} on ") and "took it over" in err
        time.sleep(3 * FAST["BEAT_SECONDS"])
        assert json.loads((locate(RUN) / LOCK_FILE).read_bytes())["pid"] == os.getpid()


def test_the_owner_counts_on_and_a_failed_beat_does_no_harm(monkeypatch):
    lock = locate(RUN) / LOCK_FILE
    with claim(RUN, CONFIG):
        seen = {lock.read_bytes() for _ in range(10) if time.sleep(FAST["BEAT_SECONDS"]) is None}
        assert len(seen) > 4
        with monkeypatch.context() as patch:
            patch.setattr(workdir, "write_atomic", lambda *_: 1 / 0)
            time.sleep(3 * FAST["BEAT_SECONDS"])
        before = lock.read_bytes()
        time.sleep(5 * FAST["BEAT_SECONDS"])
        assert lock.read_bytes() != before


def test_a_lock_taken_from_us_is_not_removed():
    """The beat has not found out yet."""
    lock, other = locate(RUN) / LOCK_FILE, b'{"run": "another", "pid": 1}'
    file = workdir._LockObject(lock)
    file.write({"pid": os.getpid()})
    lock.write_bytes(other)
    file.remove()
    assert lock.read_bytes() == other


def lines(directory) -> list[dict]:
    text = (locate(directory) / metrics.METRICS_FILE).read_text()
    return [{name: value for name, value in json.loads(line).items() if name != "time"} for line in text.splitlines()]


def write_metrics(directory, numbers) -> None:
    with MetricWriter(locate(directory)) as writer:
        for number in numbers:
            writer.write(number, "train", {"loss": number / 8})


def test_metrics_in_a_store_are_those_of_a_local_run(tmp_path, store, monkeypatch):
    """Also after a second start, which keeps the lines of the first; no temporary directory stays."""
    monkeypatch.setattr(storage.tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    for numbers in (range(3), range(3, 5)):
        time.sleep(1.1)  # TensorBoard's files are named after the second
        write_metrics(RUN, numbers)
        write_metrics(tmp_path / "local", numbers)
    expected = [{"step": n, "kind": "train", "loss": n / 8} for n in range(5)]
    assert lines(RUN) == lines(tmp_path / "local") == expected
    boards = [sorted((place / "tensorboard").iterdir()) for place in (backing(RUN), tmp_path / "local")]
    assert [len(files) for files in boards] == [2, 2]
    assert [file.stat().st_size for file in boards[0]] == [file.stat().st_size for file in boards[1]]
    assert os.listdir(tmp_path / "temporary") == []


@pytest.fixture
def clock(monkeypatch):
    """The time that `Mirror` sees, which stands still but for what a test adds."""
    time_now = SimpleNamespace(now=0.0)
    monkeypatch.setattr(storage, "time", SimpleNamespace(monotonic=lambda: time_now.now))
    return time_now


def test_metrics_are_copied_at_intervals_and_at_an_exception(store, clock):
    with pytest.raises(KeyError), MetricWriter(locate(RUN)) as writer:
        writer.write(1, "train", {"loss": 1.0})
        assert not objects(store)
        clock.now = storage.COPY_SECONDS
        writer.write(2, "train", {"loss": 2.0})
        assert [line["step"] for line in lines(RUN)] == [1, 2]
        (events,) = (backing(RUN) / "tensorboard").iterdir()
        clock.now += storage.COPY_SECONDS - 1
        writer.write(3, "train", {"loss": 3.0})
        assert len(lines(RUN)) == 2
        raise KeyError("in the run")
    assert len(lines(RUN)) == 3 and events.read_bytes().count(b"train/loss") == 3


def test_an_unchanged_file_is_not_copied_again(store, monkeypatch):
    closed = []
    close = fake_store.Upload.close
    monkeypatch.setattr(fake_store.Upload, "close", lambda self: (closed.append(self.target.name), close(self)))
    with storage.Mirror(locate(RUN)) as mirror:
        for name in ("one", "two"):
            (mirror.local / name).write_text(name)
        mirror.copy()
        (mirror.local / "one").write_text("one more")
        mirror.copy()
    assert {name: closed.count(name) for name in ("one", "two")} == {"one": 2, "two": 1}
    assert (backing(RUN) / "one").read_text() == "one more"


def some_rows(seed: int = 0) -> list[dict]:
    rng = np.random.default_rng(seed)
    words = ["", "a cat", "\ud83d half", "日本", 'a "quote"\n', "\u2028"]
    return [{"id": int(rng.integers(1000)), "answer": words[rng.integers(len(words))]} for _ in range(20)]


def test_predictions_in_a_store_are_those_of_a_local_run(tmp_path, store):
    for seed in (1, 2):  # the second time over the first's
        rows = some_rows(seed)
        assert write_rows(tmp_path / "local", iter(rows)) == rows
        write_rows(locate(RUN), iter(rows))
        assert objects(store) == {"bucket/a/run/predictions.jsonl"}
        assert (backing(RUN) / "predictions.jsonl").read_bytes() == (tmp_path / "local/predictions.jsonl").read_bytes()
        assert read_rows(locate(RUN)) == rows


def test_predictions_of_a_cut_off_suite_stay_in_part(store, clock):
    rows = some_rows()

    def cut_off(count):
        for index, row in enumerate(rows[:count]):
            if index == 5:
                part = backing(RUN) / "predictions.jsonl.part"
                assert part.read_bytes() == b""  # there from the start, and no copy was due yet
                clock.now += storage.COPY_SECONDS
            if index == 6:
                assert part.read_bytes().count(b"\n") == 6
            yield row
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_rows(locate(RUN), cut_off(9))
    assert objects(store) == {"bucket/a/run/predictions.jsonl.part"}
    assert (backing(RUN) / "predictions.jsonl.part").read_bytes().count(b"\n") == 9
    assert write_rows(locate(RUN), rows) == rows
    assert objects(store) == {"bucket/a/run/predictions.jsonl"}


def test_the_files_of_a_run_are_recorded_and_compared(assets):
    config = tiny_config(assets)
    assert read_inputs(RUN) == {}
    check_inputs(RUN, config, hash_inputs(config))
    record_inputs(RUN, hash_inputs(config))
    assert read_inputs(RUN) == hash_inputs(config) and "model.safetensors" in read_inputs(RUN)["clip"]
    check_inputs(RUN, config, hash_inputs(config))
    now = hash_inputs(config)
    now["bart"]["model.safetensors"] = "0" * 64
    with pytest.raises(UserError, match=rf"{RUN}: not what this run started with: .*model\.safetensors"):
        check_inputs(RUN, config, now)


def test_a_manifest_finds_every_change(store):
    step = locate(RUN) / "step_00000001"
    rng = np.random.default_rng(3)
    for name in ("params/d/0", "params/_METADATA", "opt_state/d/0", "top"):
        (step / name).write_bytes(rng.bytes(5000))
    (backing(step) / "params" / "empty").mkdir()
    write_manifest(step, {"format": 2, "files": hash_files(step)})
    verify_all(step, hashes=True)
    names = objects(backing(step))
    assert set(hash_files(step)) == names - {MANIFEST} and len(names) == 5
    for name in names:
        content = (step / name).read_bytes()
        (step / name).write_bytes(content[:-1])
        with pytest.raises(Damaged):
            verify_all(step, hashes=False)
        (step / name).write_bytes(content[:-1] + bytes([content[-1] ^ 4]))
        with pytest.raises(Damaged):
            verify_all(step, hashes=True)
        (step / name).unlink()
        with pytest.raises(Damaged):
            verify_all(step, hashes=False)
        (step / name).write_bytes(content)
    verify_all(step, hashes=True)


@pytest.fixture
def orbax_behind_the_store(monkeypatch):
    """Orbax, which here cannot write to a store, writes to the directory behind it."""
    names = ("save_checkpointables_async", "load_checkpointables", "checkpointables_metadata")
    functions = {name: getattr(checkpoint.ocp, name) for name in names}
    moved = {
        name: lambda path, *rest, function=function: function(backing(path), *rest)
        for name, function in functions.items()
    }
    monkeypatch.setattr(checkpoint, "ocp", SimpleNamespace(**moved))


def test_checkpoints_are_sealed_kept_passed_over_and_deleted(store, orbax_behind_the_store, capsys):
    make = jax.jit(lambda step: {"params": {"w": jnp.arange(64.0) * step}, "progress": step})
    shapes = jax.eval_shape(make, 0)
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), shapes)
    directory = f"{RUN}/checkpoints"
    with Checkpoints(directory, keep=2) as checkpoints:
        assert checkpoints.latest() is None
        for step in (1, 2, 3):
            checkpoints.save(step, make(step), {"step": step}, wait=True)
        names = sorted(path.name for path in backing(directory).iterdir() if objects(path))
        assert names == ["step_00000002", "step_00000003"]
    file = max((backing(directory) / "step_00000003" / "params").rglob("d/*"), key=lambda path: path.stat().st_size)
    file.write_bytes(file.read_bytes()[::-1])
    with Checkpoints(directory, keep=2) as checkpoints:
        step, parts, meta = checkpoints.restore(wanted)
        assert step == 2 and meta == {"step": 2} and np.array_equal(parts["params"]["w"], np.arange(64.0) * 2)
        assert f"{directory}/step_00000003 passed over" in capsys.readouterr().err
        checkpoints.save(3, make(3), {}, wait=True)
        assert np.array_equal(checkpoints.restore(wanted)[1]["params"]["w"], np.arange(64.0) * 3)
    assert objects(backing(directory) / "step_00000003.damaged-1")


def test_a_deletion_cut_off_leaves_nothing_that_looks_complete(store, orbax_behind_the_store, monkeypatch):
    def cut_off(_):
        raise OSError("cut off")

    make, path = jax.jit(lambda step: {"params": jnp.arange(64.0) * step}), locate(RUN) / "step_00000001"
    with Checkpoints(RUN, keep=1) as checkpoints:
        checkpoints.save(1, make(1), {}, wait=True)
        with monkeypatch.context() as patch:
            patch.setattr(type(path), "rmtree", cut_off)
            checkpoints._delete(path)
        assert objects(backing(path)) and checkpoints.latest() is None
        checkpoints.save(2, make(2), {}, wait=True)
        assert not objects(backing(path)) and checkpoints.latest() == 2
