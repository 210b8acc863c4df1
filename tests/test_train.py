"""The training loop, in this process and through its command line: figures, resumption, kills, NaNs, early stopping."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
import tensorboardX
from PIL import Image
from running import MIXED, metrics_of, poison, poisonable, same_bits, share_programs, states_by_step, steps_of
from tiny import ROOT, arguments, environment, tiny_config

from vlkd_jax import entry
from vlkd_jax import train as module
from vlkd_jax.checks import check_config
from vlkd_jax.errors import UserError
from vlkd_jax.optim import schedule
from vlkd_jax.shapes.sources import ShapesPairs
from vlkd_jax.tasks import make_task
from vlkd_jax.train import STOPPED, NanGuard, train


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
    """Runs with the same options share their task and step function, so that only the first of them compiles."""
    with pytest.MonkeyPatch.context() as patch:
        share_programs(patch, poisonable)
        yield


def digest(directory):
    files = sorted(path for path in Path(directory).rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


class WholeRun(NamedTuple):
    workdir: Path
    state: Any
    frozen_before: Any
    frozen_after: Any


@pytest.fixture(scope="module")
def whole_run(assets, tmp_path_factory):
    """An uninterrupted run of six steps: its workdir, its final state, and what is frozen before and after."""
    workdir = tmp_path_factory.mktemp("whole")
    frozen = []

    def run(loop, *arguments):
        frozen.append(jax.tree.map(np.array, loop.frozen))
        state = original(loop, *arguments)
        frozen.append(jax.tree.map(np.array, loop.frozen))
        return state

    original, files = module._Loop.run, digest(assets)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module._Loop, "run", run)
        state = train(tiny_config(assets, **MIXED), workdir)
    assert digest(assets) == files
    return WholeRun(workdir, state, *frozen)


def test_the_teacher_is_bit_equal_after_training(whole_run, assets):
    same_bits(whole_run.frozen_before, whole_run.frozen_after)
    same_bits(whole_run.frozen_after, jax.tree.map(np.asarray, make_task(tiny_config(assets, **MIXED)).load_frozen()))


def test_what_a_run_leaves(whole_run):
    workdir, state = whole_run.workdir, whole_run.state
    assert int(state.step) == 6 and int(state.skipped) == 0
    assert steps_of(workdir) == [3, 6]
    kept = {"config.json", "inputs.json", "metrics.jsonl", "tensorboard", "checkpoints", "parents"}
    assert kept == set(os.listdir(workdir))
    assert list((workdir / "tensorboard").glob("events.out.tfevents.*"))
    lines = metrics_of(workdir)
    assert [line["step"] for line in lines] == [2, 3, 4, 5, 6]  # the first step compiles: its rate would mislead
    for line in lines:
        assert {"images_per_second", "data_wait", "lr", "loss", "ttdm", "itcl", "icti", "denoise", "grad_norm"} <= set(
            line
        )
        assert line["skipped"] == 0 and 0 <= line["data_wait"] <= 1
        total = line["ttdm"] + line["itcl"] + line["icti"] + 0.5 * line["denoise"] + 0.1 * line["l2"]
        assert line["loss"] == pytest.approx(total, rel=1e-5)


def test_the_teacher_is_in_no_checkpoint(whole_run, assets):
    """Neither by name nor by size: parameters and moments are the student's alone."""
    workdir, state = whole_run.workdir, whole_run.state
    student = make_task(tiny_config(assets, **MIXED)).load_params()
    size = sum(leaf.size for leaf in jax.tree.leaves(student))
    assert set(state.params) == set(student)
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim or leaf.dtype == np.float32]
    assert sum(leaf.size for leaf in moments) == 2 * size
    manifest = (workdir / "checkpoints" / "step_00000006" / "vlkd_manifest.jsonl").read_text().splitlines()[1]
    names = [name for part in json.loads(manifest)["tree"].values() for name in part]
    assert len(names) == len(jax.tree.leaves(state))
    assert not any(word in name for name in names for word in ("vision", "clip", "text_model", "frozen"))


class Cut(Exception):
    """Stands for whatever ends a run."""


def cut_at(monkeypatch, step):
    """The next run ends in the middle of `step`, after the update and before its checkpoint."""
    original = module._Loop._log

    def log(loop, at, *rest):
        if at == step:
            raise Cut
        return original(loop, at, *rest)

    monkeypatch.setattr(module._Loop, "_log", log)
    return lambda: monkeypatch.setattr(module._Loop, "_log", original)


def test_resumed_is_uninterrupted(whole_run, assets, tmp_path, monkeypatch, capsys):
    expected = whole_run.state
    config = tiny_config(assets, **MIXED, save_every=2)
    restore = cut_at(monkeypatch, 5)
    with pytest.raises(Cut):
        train(config, tmp_path / "run")
    restore()
    assert steps_of(tmp_path / "run") == [2, 4]
    same_bits(train(config, tmp_path / "run"), expected)
    assert "step 4 of 6" in capsys.readouterr().out
    same_bits(train(config, tmp_path / "run"), expected)  # once more: complete, and the same state
    assert "this run is complete at step 6" in capsys.readouterr().out


def test_another_length_of_the_run_is_told(whole_run, assets, tmp_path, capsys):
    """The learning rate of a resumed run bends where `steps` changes: one line says so, and from what to what."""
    shutil.copytree(whole_run.workdir, tmp_path / "run")
    train(tiny_config(assets, **MIXED, steps=8, log_every=2), tmp_path / "run")
    out = capsys.readouterr().out
    table = {row.split()[1]: [cell.strip() for cell in row.split("|")[2:6]] for row in re.findall(r"\| \w+/.*", out)}
    assert table["sentence_projection/kernel"] == ["(32, 24)", "float32", "768", "(None, ('fsdp', 'model'))"]
    assert len(table) == len(jax.tree.leaves(whole_run.state.params)) - 1  # the logit scale has no slash
    assert "config.json: log_every: 1 -> 2, steps: 6 -> 8" in out
    optim = tiny_config(assets).optim
    rates = [float(schedule(optim, optim.lr, 8)(k)) for k in (6, 7)]
    assert "config.steps is 8 and was 6: the cosine schedule now ends there" in out
    assert f"the learning rate goes on with {rates[0]:.3g} instead of 0 at step 6" in out
    assert metrics_of(tmp_path / "run")[-1]["lr"] == pytest.approx(rates[1])


def test_bad_records_are_passed_over_and_told(assets, tmp_path, capsys):
    """One picture of 16 does not decode: the run names it, replaces it, counts it and goes on."""
    lines = []
    for i in range(16):
        record = ShapesPairs(0, "train")[i]
        Image.effect_noise((60, 60), 90).save(tmp_path / f"{i}.png")
        lines.append(f"{i}.png\t{record.text}\n")
    whole = (tmp_path / "5.png").read_bytes()
    (tmp_path / "5.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "captions.tsv").write_text("".join(lines))
    folder = {"data__source": "folder", "data__captions": f"{tmp_path}/captions.tsv", "data__images": str(tmp_path)}
    config = tiny_config(assets, **folder, **MIXED | {"loss__denoise": 0.0}, steps=4, data__max_unusable=0.1)
    state = train(config, tmp_path / "run")
    out = capsys.readouterr().out
    assert int(state.step) == 4 and int(state.skipped) == 0
    assert "captions.tsv line 6: field image" in out and "5.png: the image does not decode" in out
    assert "records passed over: image does not decode 1" in out
    assert metrics_of(tmp_path / "run")[-1]["unusable_records"] == 1
    lengths = r"BART tokens: median (\d+), 99% up to \d+, longest (\d+), room for 40; CLIP tokens: "
    told = re.search(r"(\d+) pairs to train on; " + lengths, out)
    assert told and 12 <= int(told[1]) < 16 and 3 < int(told[2]) <= int(told[3]) <= 40


SLOWED = """
import time
from vlkd_jax import entry, train
from vlkd_jax.commands import COMMANDS
log = train._Loop._log
train._Loop._log = lambda *arguments: (log(*arguments), time.sleep(0.2))
entry.run(train.main, COMMANDS["train"])
"""


def test_killed_and_started_again(whole_run, assets, tmp_path, capsys):
    """SIGKILL while a checkpoint is written; the run goes on and ends in the bits of the uninterrupted one."""
    expected = whole_run.state
    argv = arguments(assets, tmp_path / "run", **MIXED, save_every=2)
    command = [sys.executable, "-c", SLOWED, *argv]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment(), cwd=ROOT)
    for line in run.stdout:
        if line.startswith("step 5/6"):
            run.send_signal(signal.SIGKILL)
            break
    run.communicate()
    assert run.returncode == -signal.SIGKILL
    assert (tmp_path / "run" / "run.lock").exists()
    capsys.readouterr()
    same_bits(train(tiny_config(assets, **MIXED, save_every=2), tmp_path / "run"), expected)
    out = capsys.readouterr().out
    assert "this run is complete" not in out
    progress = [line for line in out.splitlines() if line.startswith("step 6/6")]
    number = r"-?[\d.]+(?:e[+-]?\d+)?"
    names = ["lr", "grad_norm", "icti", "itcl", "itcl_accuracy", "l2", "loss", "denoise", "ttdm"]
    assert len(progress) == 1
    assert re.match(r"step 6/6  eta 0:00  [\d.]+ images/s  data \d+%  lr ", progress[0])
    assert sorted(re.findall(rf"([a-z_0-9]+) {number}(?=  |$)", progress[0].split("%  ")[1])) == sorted(names)


def nearly(ours, theirs):
    for one, other in zip(*map(jax.tree.leaves, (ours, theirs))):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_eight_devices_are_one(whole_run, assets, tmp_path, capsys):
    """The same losses, parameters and moments; and a run that begins on eight devices goes on with one."""
    assert jax.device_count() >= 8, "8 fake devices are needed: run through launch/test.sh"
    state = train(tiny_config(assets, **MIXED, mesh__data=8), tmp_path / "eight")
    assert all(len(leaf.sharding.device_set) == 8 for leaf in jax.tree.leaves(state))
    nearly(state.params, whole_run.state.params)
    nearly(state.opt_state, whole_run.state.opt_state)
    lines = [metrics_of(workdir) for workdir in (tmp_path / "eight", whole_run.workdir)]
    for one, other in zip(*lines, strict=True):
        for name in ("loss", "ttdm", "itcl", "icti", "denoise", "grad_norm"):
            assert one[name] == pytest.approx(other[name], rel=1e-5), (one["step"], name)
    shutil.rmtree(tmp_path / "eight" / "checkpoints" / "step_00000006")
    nearly(train(tiny_config(assets, **MIXED), tmp_path / "eight").params, whole_run.state.params)
    assert "step 3 of 6" in capsys.readouterr().out


def test_a_step_that_is_not_finite_changes_nothing(assets, tmp_path, monkeypatch, capsys):
    poison(monkeypatch, {3: np.nan, 4: np.inf, 6: np.nan})
    seen = states_by_step(monkeypatch)
    config = tiny_config(assets, **MIXED, nan_limit=3)
    state = train(config, tmp_path / "run")
    assert int(state.step) == 6 and int(state.skipped) == 3 and int(state.skipped_in_row) == 1
    assert [seen[k][0] for k in range(2, 7)] == [0, 1, 2, 2, 3]
    for bad, good in ((3, 2), (4, 2), (6, 5)):
        same_bits(seen[bad][1:], seen[good][1:])
    kernels = [seen[k][1]["sentence_projection"]["kernel"] for k in (2, 5)]
    assert (kernels[0] != kernels[1]).any()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    out = capsys.readouterr().out
    assert [int(k) for k in re.findall(r"step (\d+): the loss or its gradient is not finite", out)] == [3, 4, 6]
    lines = metrics_of(tmp_path / "run")
    assert [line["skipped"] for line in lines] == [0, 1, 2, 2, 3]
    rates = [float(schedule(config.optim, config.optim.lr, config.steps)(k)) for k in range(6)]
    counts = {int(x) for x in jax.tree.leaves(state.opt_state) if x.dtype == np.int32}
    assert counts == {3}  # updates applied: the optimizer's schedule stands where the logged rate says
    assert [line["lr"] for line in lines] == pytest.approx([rates[k] for k in (1, 2, 2, 2, 3)])


def test_too_many_in_a_row_end_the_run(assets, tmp_path, monkeypatch):
    poison(monkeypatch, dict.fromkeys((2, 4, 5, 6), np.nan))
    closed = []
    monkeypatch.setattr(tensorboardX.SummaryWriter, "close", lambda *_: closed.append(1))
    with pytest.raises(entry.Diverged) as caught:
        train(tiny_config(assets, **MIXED, nan_limit=3, save_every=1), tmp_path / "run")
    message = str(caught.value)
    assert message.startswith("3 updates in a row")
    for step in (4, 5, 6):
        first = 8 * (step - 1)  # the built-in world is read in order
        assert f"step {step} (records {', '.join(map(str, range(first, first + 8)))})" in message
    assert "step 2" not in message and "optim.lr" in message and "checkpoint" in message
    assert steps_of(tmp_path / "run") == [4, 5]
    assert closed  # the events are flushed also then


class Flag:
    """Stands for a step's flag on the device: says when it was waited for."""

    def __init__(self, value, waited):
        self.value, self.waited = value, waited

    def __int__(self):
        self.waited.append(self)
        return self.value


def test_a_step_is_waited_for_when_the_next_has_started(capsys):
    waited, guard = [], NanGuard(3)
    flags = [Flag(value, waited) for value in (0, 1, 0, 1, 2, 0, 1, 2, 3)]
    for step, flag in enumerate(flags[:7], 1):
        guard.add(step, flag, np.arange(9) + 10 * step)
        guard.look(but_last=True)
        assert waited == flags[: step - 1]
    guard.look(but_last=False)
    assert waited == flags[:7]
    for step in (8, 9):
        guard.add(step, flags[step - 1], np.arange(2) + 10 * step)
    with pytest.raises(entry.Diverged) as caught:
        guard.look(but_last=False)
    message = str(caught.value)
    assert message.startswith(
        "3 updates in a row were not finite: step 7 (records 70, 71, 72, 73, 74, 75, 76, 77, ...);"
    )
    assert "step 8 (records 80, 81); step 9 (records 90, 91);" in message
    told = re.findall(r"step (\d+): the loss or its gradient is not finite", capsys.readouterr().out)
    assert told == ["2", "4", "5", "7", "8", "9"]


class Figures:
    """Held-out figures as a script says: retention by step, read from the state's own counter of calls."""

    def __init__(self, values):
        self.values, self.calls = values, 0

    def __call__(self, params):
        self.calls += 1
        return {"held_out/icti": 1.0, "retention/text_qa": self.values[self.calls - 1]}


STOPPING = {"eval__every": 2, "early_stop__metric": "retention/text_qa", "early_stop__max_drop": 0.05, **MIXED}


def test_early_stopping_keeps_the_last_good_state(assets, tmp_path, monkeypatch, capsys):
    """Steps 0, 2, 4 are within the limit, 6 is not; what lies between two evaluations must not stand."""
    figures = Figures([0.9, 0.86, 0.88, 0.84])
    monkeypatch.setattr(module, "HeldOut", lambda *_: figures)
    seen = states_by_step(monkeypatch)
    config = tiny_config(assets, **STOPPING, save_every=1)
    state = train(config, tmp_path / "run")
    assert int(state.step) == 4 and figures.calls == 4 and max(seen) == 6
    same_bits(jax.tree.map(np.array, state.params), seen[4][1])
    assert "stopped at step 6" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / STOPPED).read_text()) == {"stopped_at": 6, "checkpoint": 4}
    assert max(steps_of(tmp_path / "run")) == 4
    again = train(config, tmp_path / "run")
    assert "this run is complete at step 4" in capsys.readouterr().out and figures.calls == 4
    same_bits(again, state)


def test_stopping_at_the_first_look_gives_the_start_back(assets, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "HeldOut", lambda *_: Figures([0.9, 0.1]))
    config = tiny_config(assets, **STOPPING)
    state = train(config, tmp_path / "run")
    assert int(state.step) == 0
    same_bits(jax.tree.map(np.asarray, state.params), jax.tree.map(np.asarray, make_task(config).load_params()))


def test_the_figure_at_the_start_outlives_an_interruption(assets, tmp_path, monkeypatch):
    figures = Figures([0.9, 0.88, 0.86, 0.80])
    monkeypatch.setattr(module, "HeldOut", lambda *_: figures)
    restore = cut_at(monkeypatch, 5)
    with pytest.raises(Cut):
        train(tiny_config(assets, **STOPPING), tmp_path / "run")
    restore()
    state = train(tiny_config(assets, **STOPPING), tmp_path / "run")
    assert int(state.step) == 4 and figures.calls == 4  # 0.80 is judged by 0.9, not by what came after the restart


def test_an_unknown_metric_to_stop_by_is_named(assets, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "HeldOut", lambda *_: Figures([0.9]))
    config = tiny_config(assets, **STOPPING | {"early_stop__metric": "retention/text_qq"})
    with pytest.raises(UserError, match=r"retention/text_qq.*retention/text_qa"):
        train(config, tmp_path / "run")
    assert steps_of(tmp_path / "run") == []


def test_held_out_figures(assets, tmp_path):
    """At the start, every so often and at the end: losses on held-out pairs, and what became of the text abilities."""
    train(tiny_config(assets, **MIXED, eval__every=4), tmp_path / "run")
    lines = metrics_of(tmp_path / "run", "eval")
    assert [line["step"] for line in lines] == [0, 4, 6]
    names = {f"held_out/{name}" for name in ("ttdm", "itcl", "icti")}
    names |= {"retention/denoise_loss", "retention/token_accuracy", "retention/text_qa"}
    for line in lines:
        assert names <= set(line)
        assert all(np.isfinite(line[name]) for name in names)
        assert 0 <= line["retention/text_qa"] <= 1 and 0 <= line["retention/token_accuracy"] <= 1
    assert lines[0]["held_out/ttdm"] != lines[-1]["held_out/ttdm"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": 0}, "config.steps is 0"),
        ({"nan_limit": 0}, "config.nan_limit is 0"),
        ({"data__twins": 0}, "config.data.twins is 0"),
        ({"data__validation_every": 1}, "config.data.validation_every is 1"),
        ({"eval__batches": 0}, "config.eval.batches is 0"),
        ({"corruption__ratio": 1.5}, "config.corruption.ratio is 1.5"),
        ({"corruption__mask_all": -0.1}, "config.corruption.mask_all is -0.1"),
        ({"corruption__poisson": 0.0}, "config.corruption.poisson is 0.0"),  # no span would ever have a length
        ({"corruption__ratio": float("nan")}, "config.corruption.ratio is nan"),
        ({"data__replay_length": 2}, "config.data.replay_length is 2"),
        ({"seed": -1}, "config.seed is -1"),
        ({"dropout": 1.0}, "config.dropout is 1.0; it must lie in [0, 1)"),
        ({"dropout": -0.1}, "config.dropout is -0.1"),
        ({"loss__itcl": -1.0}, "config.loss.itcl is -1.0"),
        ({"loss__l2": float("inf")}, "config.loss.l2 is inf"),
        ({"loss__label_smoothing": 1.0}, "config.loss.label_smoothing is 1.0; it must lie in [0, 1)"),
        ({"optim__lr": -1e-4}, "config.optim.lr is -0.0001"),
        ({"optim__lr_linears": float("nan")}, "config.optim.lr_linears is nan"),
        ({"optim__warmup": -1}, "config.optim.warmup is -1"),
        ({"optim__weight_decay": -0.1}, "config.optim.weight_decay is -0.1"),
        ({"optim__clip_norm": -1.0}, "config.optim.clip_norm is -1.0"),
        ({"optim__b2": 1.0}, "config.optim.b2 is 1.0"),
        ({"optim__eps": 0.0}, "config.optim.eps is 0.0"),
        ({"early_stop__max_drop": -0.1}, "config.early_stop.max_drop is -0.1"),
        ({"optim__schedule": "step"}, "config.optim.schedule is 'step'"),
        ({"early_stop__metric": "x"}, "config.early_stop.metric"),
    ],
)
def test_impossible_values_are_named(assets, changes, words):
    with pytest.raises(UserError, match=re.escape(words)):
        check_config(tiny_config(assets, **changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({f"loss__{name}": 0.0 for name in ("ttdm", "itcl", "icti", "denoise", "l2")}, "every weight in config.loss"),
        ({"data__source": "shapes_texts"}, "config.data.source is 'shapes_texts'"),
    ],
)
def test_what_does_not_fit_the_task_is_named(assets, tmp_path, changes, words):
    with pytest.raises(UserError, match=re.escape(words)):
        train(tiny_config(assets, **changes), tmp_path / "run")
