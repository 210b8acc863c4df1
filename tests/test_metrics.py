"""Where a run's time goes, as its lines tell, over kills and restarts; lines that are cut off."""

import json
import time

import pytest
from running import MIXED, metrics_of, share_programs
from tiny import tiny_config

from vlkd_jax import train as module
from vlkd_jax.metrics import Goodput, MetricWriter, goodput, goodput_line, read_metrics
from vlkd_jax.train import train


def test_the_kinds_add_up_to_the_time():
    since, spent = time.monotonic(), Goodput()
    time.sleep(0.02)
    spent.started()
    with spent.spent("save"):
        time.sleep(0.03)
    time.sleep(0.01)
    spent.seconds["lost"] = 100.0
    told = spent.told()
    assert 0.02 <= told["start"] < 0.03 <= told["save"] and told["steps"] >= 0.01
    total = sum(told[kind] for kind in Goodput.KINDS) - told["lost"]
    assert total == pytest.approx(time.monotonic() - since, abs=0.01)
    assert told["began"] == pytest.approx(time.time(), abs=5)


def test_processes_of_a_run_add_up_by_their_last_lines():
    def line(began, **seconds):
        return {"step": 1, "kind": "goodput", "began": began, **dict.fromkeys(Goodput.KINDS, 0.0), **seconds}

    whole = goodput(
        [line(1.0, steps=1.0), {"kind": "train"}, line(1.0, steps=6.0, data=1.0), line(2.0, steps=2.0, lost=1.0)]
    )
    assert whole == dict.fromkeys(Goodput.KINDS, 0.0) | {"steps": 8.0, "data": 1.0, "lost": 1.0}
    assert goodput_line(whole) == "steps 80.0% of 0:10, lost 10.0%, data 10.0%"
    assert goodput([]) == {}


def test_a_line_that_was_cut_off(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "kind": "train", "time": 5.0}\n{"step": 2, "ki')
    with MetricWriter(tmp_path) as writer:
        writer.write(3, "train", {"loss": 1.0})
    lines, unreadable = read_metrics(path)
    assert [line["step"] for line in lines] == [1, 3] and unreadable == 1
    assert read_metrics(tmp_path / "none") == ([], 0)


def test_a_run_tells_where_its_time_went_and_what_was_lost(assets, tmp_path, monkeypatch, capsys):
    share_programs(monkeypatch)
    original = module._Loop._log

    def cut(loop, step, *rest):
        original(loop, step, *rest)
        time.sleep(0.05)
        if step == 5:
            raise KeyboardInterrupt

    config = tiny_config(assets, **MIXED, save_every=3, eval__every=3)
    monkeypatch.setattr(module._Loop, "_log", cut)
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path)
    monkeypatch.setattr(module._Loop, "_log", original)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    lost = lines[-1]["time"] - [line["time"] for line in lines if line["step"] <= 3][-1]
    train(config, tmp_path)
    last = metrics_of(tmp_path, "goodput")[-1]
    assert last["lost"] == pytest.approx(lost, abs=1e-3) and last["lost"] >= 0.05
    assert all(last[kind] > 0 for kind in ("start", "compile", "steps", "data", "evaluate", "save"))
    assert "time  steps " in capsys.readouterr().out
    assert len({line["began"] for line in metrics_of(tmp_path, "goodput")}) == 2
