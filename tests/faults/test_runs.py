"""Runs that are cut off, damaged, contradicted or doubled: what they end in, against a run that nothing befell."""

import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from running import MIXED, cases, metrics_of, poison, poisonable, same_bits, share_programs, states_by_step, steps_of
from tiny import ROOT, arguments, environment, tiny_config

from vlkd_jax import ckpt, entry
from vlkd_jax.errors import UserError
from vlkd_jax.train import NanGuard, train

STEPS = 16
FIGURES = ("loss", "ttdm", "itcl", "icti", "denoise", "l2", "grad_norm", "lr")
RUN = {**MIXED, "steps": STEPS, "save_every": 3}
SLOWED = """
import sys, time
from vlkd_jax import entry, train
from vlkd_jax.commands import COMMANDS
log = train._Loop._log
train._Loop._log = lambda *arguments: (log(*arguments), time.sleep(0.05))
entry.run(train.main, COMMANDS["train"])
"""


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
    with pytest.MonkeyPatch.context() as patch:
        share_programs(patch, poisonable)
        yield


@pytest.fixture(scope="module")
def whole(assets, tmp_path_factory):
    """(workdir, final state) of a run that nothing befell."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    return workdir, train(tiny_config(assets, **RUN), workdir)


def figures(workdir):
    """{step: every line of it}: figures to the last bit."""
    told = {}
    for line in metrics_of(workdir):
        told.setdefault(line["step"], set()).add(tuple(line[name] for name in FIGURES))
    return told


def started(assets, workdir, **changes):
    """A process that trains and takes its time, so that it can be met at a step."""
    command = [sys.executable, "-c", SLOWED, *arguments(assets, workdir, **RUN | changes)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, **pipes, text=True, env=environment(), cwd=ROOT)


def wait_for(run, step):
    for line in run.stdout:
        if line.startswith(f"step {step}/"):
            return
    raise AssertionError(run.communicate()[1])


@cases(2, 20)
def test_a_run_killed_at_a_random_step_ends_in_the_bits_of_one_that_was_not(whole, assets, tmp_path, case):
    """Parameters, moments, counters and with them the random numbers; the order of the data; every line's figures."""
    chance = random.Random(case)
    run = started(assets, tmp_path / "run")
    wait_for(run, chance.randrange(2, STEPS))
    time.sleep(chance.uniform(0, 0.1))
    run.kill()
    run.communicate()
    same_bits(train(tiny_config(assets, **RUN), tmp_path / "run"), whole[1])
    told = figures(tmp_path / "run")
    assert all(lines == figures(whole[0])[step] for step, lines in told.items())
    assert STEPS in told and metrics_of(tmp_path / "run", "goodput")[-1]["lost"] >= 0


DAMAGES = ("flip", "truncation", "missing file", "empty step directory", "missing part")


def damage(step, kind, chance):
    """Damages a step's directory in one way at a random place."""
    files = sorted(path for path in step.rglob("*") if path.is_file() and path.stat().st_size)
    file = chance.choice(files)
    content = bytearray(file.read_bytes())
    if kind == "flip":
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        file.write_bytes(content)
    elif kind == "truncation":
        file.write_bytes(content[: chance.randrange(len(content))])
    elif kind == "missing file":
        file.unlink()
    else:
        target = step if kind == "empty step directory" else chance.choice([p for p in step.iterdir() if p.is_dir()])
        shutil.rmtree(target)
        target.mkdir()


@cases(5, 50)
def test_a_damaged_checkpoint_is_noticed_and_the_one_before_taken(whole, assets, tmp_path, capsys, case):
    shutil.copytree(whole[0], tmp_path / "run")
    before, newest = sorted((tmp_path / "run" / "checkpoints").iterdir())
    damage(newest, DAMAGES[case % len(DAMAGES)], random.Random(case))
    looks = list(ckpt.look(tmp_path / "run", hashes=True))
    assert [told["fault"] is None for told in looks] == [True, False]
    same_bits(train(tiny_config(assets, **RUN), tmp_path / "run"), whole[1])
    captured = capsys.readouterr()
    assert f"warning: checkpoint {newest} passed over" in captured.err
    assert f"step {int(before.name[5:])} of {STEPS}" in captured.out
    assert [told["step"] for told in ckpt.look(tmp_path / "run", hashes=True) if told["fault"] is None][-1] == STEPS


MUTATIONS = {
    **{"seed": 7, "batch_size": 16, "accumulate": 2, "dtype": "bfloat16", "dropout": 0.2, "remat": True},
    **{"remat_policy": "dots", "nan_limit": 7, "data.twins": 2, "data.complete": 0.5, "data.smallest_crop": 0.5},
    **{"data.flip": True, "data.text_length": 41, "data.source_length": 41, "data.replay_length": 63},
    **{"data.truncate": True, "corruption.ratio": 0.4, "corruption.poisson": 2.0, "corruption.mask_all": 0.2},
    **{"student.sentence_position": "bos", "student.logit_scale": "clip", "student.ttdm": "raw"},
    **{"student.image_tokens": "hidden", "student.whiten": 8, "loss.ttdm": 0.5, "loss.l2": 0.2, "loss.icti": 2.0},
    **{"optim.lr": 1e-3, "optim.schedule": "linear", "optim.warmup": 3, "optim.b2": 0.9, "optim.clip_norm": 2.0},
    **{"eval.questions": 5},
}
"""Fields of a config, and a value that the run was not started with."""


@pytest.mark.parametrize("field", MUTATIONS)
def test_another_configuration_is_refused_field_by_field(whole, assets, field):
    before = json.loads((whole[0] / "config.json").read_text())
    old = before
    for name in field.split("."):
        old = old[name]
    wanted = f"{field}: {json.dumps(old)} -> {json.dumps(MUTATIONS[field])}"
    with pytest.raises(UserError) as refused:
        train(tiny_config(assets, **RUN | {field.replace(".", "__"): MUTATIONS[field]}), whole[0])
    assert wanted in str(refused.value) and str(refused.value).count(" -> ") == 1
    assert json.loads((whole[0] / "config.json").read_text()) == before


@cases(2, 20)
def test_batches_that_are_not_finite_change_nothing(assets, tmp_path, monkeypatch, case):
    """So many skipped as were bad, nothing moved by them, and an end after too many in a row."""
    chance, steps = random.Random(case), 10
    bad = {step: chance.choice((np.nan, np.inf)) for step in range(2, steps + 1) if chance.random() < 0.5}
    limit = chance.randrange(2, 5)
    in_row, end = 0, None
    for step in range(1, steps + 1):
        in_row = in_row + 1 if step in bad else 0
        if in_row == limit:
            end = step
            break
    poison(monkeypatch, bad)
    seen = states_by_step(monkeypatch)
    config = tiny_config(assets, **MIXED, steps=steps, save_every=steps, nan_limit=limit)
    if end is None:
        state = train(config, tmp_path / "run")
        assert int(state.skipped) == len(bad)
    else:
        with pytest.raises(entry.Diverged, match=f"{limit} updates in a row.*step {end} "):
            train(config, tmp_path / "run")
    for step, (skipped, *state) in seen.items():
        assert skipped == sum(b <= step for b in bad)
        if step > 2 and step in bad:
            same_bits(tuple(state), seen[step - 1][1:])
        elif step > 2:
            assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (state[0], seen[step - 1][1]))))


SIZES = (1, 2, 4, 8)


@pytest.mark.parametrize(
    "saved, loaded",
    [
        pytest.param(a, b, marks=() if (a, b) in ((1, 8), (8, 1), (2, 4)) else pytest.mark.nightly)
        for a in SIZES
        for b in SIZES
        if a != b
    ],
)
def test_a_run_goes_on_on_other_devices(whole, assets, tmp_path, monkeypatch, saved, loaded):
    """The parameters are those that were saved, to the last bit; the data go on in their order."""
    order = []
    add = NanGuard.add
    monkeypatch.setattr(
        NanGuard, "add", lambda self, step, *rest: (order.append((step, *rest[1])), add(self, step, *rest))
    )
    half = RUN | {"steps": 4, "optim__schedule": "constant"}
    state = train(tiny_config(assets, **half, mesh__data=saved), tmp_path / "run")
    again = train(tiny_config(assets, **half, mesh__data=loaded), tmp_path / "run")  # complete: as it was restored
    same_bits(jax.tree.map(np.asarray, again), jax.tree.map(np.asarray, state))
    assert len(jax.tree.leaves(again.params)[0].sharding.device_set) == loaded
    train(tiny_config(assets, **half | {"steps": 6}, mesh__data=loaded), tmp_path / "run")
    assert [step for step, *_ in order] == list(range(1, 7))
    assert [k for _, *index in order for k in index] == list(range(8 * 6))  # the built-in world is read in order


@cases(1, 10)
def test_a_second_run_in_the_same_workdir_is_refused(whole, assets, tmp_path, case):
    """It says who is there and changes nothing; what a killed one leaves behind keeps nobody out."""
    chance = random.Random(case)
    run = started(assets, tmp_path / "run")
    wait_for(run, chance.randrange(2, STEPS // 2))
    with pytest.raises(UserError, match=f"process {run.pid} on .* is running there"):
        train(tiny_config(assets, **RUN), tmp_path / "run")
    out, err = run.communicate()
    assert run.returncode == 0, (out, err)
    assert figures(tmp_path / "run") == figures(whole[0])
    shutil.rmtree(tmp_path / "run")
    run = started(assets, tmp_path / "run")
    wait_for(run, 2)
    run.kill()
    run.communicate()
    assert (tmp_path / "run" / "run.lock").exists()
    same_bits(train(tiny_config(assets, **RUN), tmp_path / "run"), whole[1])


@cases(1, 3)
def test_the_same_seed_gives_the_same_bits(assets, tmp_path, case):
    config = tiny_config(assets, **RUN | {"steps": 6}, seed=case)
    states = [train(config, tmp_path / name) for name in ("one", "other")]
    same_bits(*states)
    assert figures(tmp_path / "one") == figures(tmp_path / "other") and len(figures(tmp_path / "one")) == 5


# signals

QUESTIONS = ["--config.shapes.questions=40", "--config.shapes.captions=20", "--config.batch_size=20"]


def command_of(kind, assets, place):
    """(arguments after `python -m vlkd_jax`, what it leaves that must be the same however often it was stopped)."""
    if kind == "train":
        return ["train", *arguments(assets, place / "run", **RUN)], lambda: figures(place / "run")
    if kind == "prepare":
        images = assets.parent / "pictures"
        argv = ["prepare", str(images.with_suffix(".tsv")), f"--images={images}", f"--output={place / 'data'}"]
        return [*argv, "--rows=40", "--image=0", "--caption=1"], lambda: records(place / "data")
    argv = ["evaluate", "--config=suites:shapes", "--checkpoint=builtin:shapes/student", f"--workdir={place / 'out'}"]
    return [*argv, *QUESTIONS], lambda: (place / "out" / "shapes" / "predictions.jsonl").read_bytes()


def records(place):
    told = json.loads((place / "manifest.json").read_text())
    return {name: file["sha256"] for name, file in told["records"].items()}


@pytest.fixture(scope="module")
def unstopped(assets, tmp_path_factory):
    """{kind: (seconds, what it leaves)} of commands that nobody stops."""
    from tiny import write_pictures

    if not (assets.parent / "pictures").exists():
        lines = write_pictures(assets.parent / "pictures", 20)
        (assets.parent / "pictures.tsv").write_text("\n".join(lines * 20) + "\n")
    told = {}

    def get(kind):
        if kind not in told:
            place, since = tmp_path_factory.mktemp(kind), time.monotonic()
            argv, left = command_of(kind, assets, place)
            done = subprocess.run(
                [sys.executable, "-m", "vlkd_jax", *argv], env=environment(), cwd=ROOT, capture_output=True, text=True
            )
            assert done.returncode == 0, done
            told[kind] = time.monotonic() - since, left()
        return told[kind]

    return get


@cases(3, 30)
def test_sigterm_at_any_moment_ends_in_time_and_loses_nothing(unstopped, assets, tmp_path, case):
    """In start-up, compilation, training, evaluation and preparation: one line, exit code 143, and it goes on."""
    kind, chance = ("train", "evaluate", "prepare")[case % 3], random.Random(case)
    seconds, expected = unstopped(kind)
    argv, left = command_of(kind, assets, tmp_path)
    command = [sys.executable, "-m", "vlkd_jax", *argv]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment(), "cwd": ROOT}
    run = subprocess.Popen(command, **pipes)
    while not _answers_signals(run.pid):
        time.sleep(0.01)
    time.sleep(chance.uniform(0, seconds))
    since = time.monotonic()
    run.send_signal(signal.SIGTERM)
    _, err = run.communicate(timeout=30)
    # at its very end a process has given signals back to the system, whose answer a shell calls 143 too
    assert time.monotonic() - since < 30 and run.returncode in (143, 0, -signal.SIGTERM), (run.returncode, err)
    if run.returncode == 143:
        assert re.fullmatch(r"stopped by SIGTERM[^\n]*\n", err), err
    else:
        assert steps_of(tmp_path / "run")[-1] == STEPS if kind == "train" else left() == expected, err
    done = subprocess.run(
        command, **{k: v for k, v in pipes.items() if k not in ("stdout", "stderr")}, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    if kind == "train":  # the first step of a process, which compiles, has no line
        assert all(lines == expected[step] for step, lines in left().items())
        assert steps_of(tmp_path / "run")[-1] == STEPS
    else:
        assert left() == expected


def _answers_signals(pid):
    with open(f"/proc/{pid}/status") as file:
        return bool(int(re.search(r"SigCgt:\s*(\w+)", file.read())[1], 16) & 1 << (signal.SIGTERM - 1))


# a full disk

TMPFS = """
mount -t tmpfs -o size="$1" none "$2" || exit 9
place="$2" out="$3"
shift 3
"$@"
code=$?
cp -r "$place" "$out"
exit $code
"""


@pytest.fixture(scope="module")
def needs_mounts(tmp_path_factory):
    place = tmp_path_factory.mktemp("mount")
    command = ["unshare", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "none", str(place)]
    if shutil.which("unshare") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("this system lets nobody mount a small file system in a namespace of their own")


@cases(2, 10)
def test_a_disk_that_fills_leaves_the_checkpoints_before(whole, needs_mounts, assets, tmp_path, case):
    """A file system of its own, too small at another point in each case: one line, and what was saved is whole."""
    size = sum(path.stat().st_size for path in whole[0].rglob("*") if path.is_file())
    kept = sum(path.stat().st_size for path in (whole[0] / "checkpoints").rglob("*") if path.is_file()) // 2
    room = int(size - 2 * kept + kept * (0.6 + 0.25 * case))
    (tmp_path / "small").mkdir()
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", TMPFS, "sh", str(room), str(tmp_path / "small")]
    argv = arguments(assets, tmp_path / "small" / "run", **RUN | {"save_every": 1})
    command += [str(tmp_path / "out"), sys.executable, "-m", "vlkd_jax.train", *argv]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), cwd=ROOT)
    assert done.returncode == 2, done
    said = [line for line in done.stderr.splitlines() if not line.startswith("warning: ")]
    assert len(said) == 1 and said[0].startswith("error: ") and "space" in said[0], done.stderr
    run = tmp_path / "out" / "run"
    if (run / "checkpoints").is_dir() and steps_of(run):
        assert all(told["fault"] is None for told in ckpt.look(run, hashes=True))
        same_bits(train(tiny_config(assets, **RUN | {"save_every": 1}), run), whole[1])
