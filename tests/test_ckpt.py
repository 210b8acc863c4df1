"""`vlkd ckpt`: what it lists, what it finds, and a copy that goes on as the run itself."""

import json
import shutil

import jax
import pytest
from running import MIXED, same_bits, share_programs, steps_of
from tiny import tiny_config

from vlkd_jax import ckpt
from vlkd_jax.errors import UserError
from vlkd_jax.runs import load_run
from vlkd_jax.train import train


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
    with pytest.MonkeyPatch.context() as patch:
        share_programs(patch)
        yield


@pytest.fixture(scope="module")
def whole(assets, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    return workdir, train(tiny_config(assets, **MIXED), workdir)


@pytest.fixture
def run(whole, tmp_path):
    return shutil.copytree(whole[0], tmp_path / "run")


def call(action, run, new=None, step=None, as_json=False):
    ckpt.main(type("Values", (), {"action": action, "run": run, "new": new, "step": step, "json": as_json}))


def test_a_list_for_people_and_for_programs(run, whole, capsys):
    (run / "checkpoints" / "step_00000009").mkdir()
    call("ls", run)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line.strip()[:1].isdigit()] == ["3", "6", "9"]
    assert "complete" in lines[-2] and "incomplete, it has no" in lines[-1]
    call("ls", run, as_json=True)
    third, sixth, ninth = json.loads(capsys.readouterr().out)
    assert (third["step"], third["of_steps"], third["fault"]) == (3, 6, None) and ninth["fault"]
    assert sixth["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(whole[1].params))
    files = [path for path in (run / "checkpoints" / "step_00000006").rglob("*") if path.is_file()]
    assert sixth["bytes"] == sum(p.stat().st_size for p in files if p.name != "vlkd_manifest.jsonl")


def test_every_byte_is_read(run, capsys):
    call("verify", run)
    assert capsys.readouterr().out.count("every byte as written") == 2
    file = max((run / "checkpoints" / "step_00000003").rglob("*"), key=lambda p: p.stat().st_size * p.is_file())
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)
    call("ls", run)  # sizes alone
    assert "has changed" not in capsys.readouterr().out
    with pytest.raises(UserError, match="step 3 cannot be used; vlkd train goes on from the newest that is whole"):
        call("verify", run)
    assert f"the content of {file.relative_to(run / 'checkpoints' / 'step_00000003')} has changed" in (
        capsys.readouterr().out
    )
    call("verify", run, step=6)
    with pytest.raises(UserError, match="has changed since it was written; nothing is copied"):
        call("cp", run, run.parent / "new", step=3)
    assert not (run.parent / "new").exists()


def test_a_copy_goes_on_as_the_run(run, whole, assets, tmp_path, capsys):
    call("cp", run, tmp_path / "new", step=3)
    assert "every byte verified" in capsys.readouterr().out and steps_of(tmp_path / "new") == [3]
    assert load_run(tmp_path / "new")[2] == 3
    shutil.rmtree(run)
    same_bits(train(tiny_config(assets, **MIXED), tmp_path / "new"), whole[1])
    assert "step 3 of 6" in capsys.readouterr().out


def test_the_newest_that_is_whole_is_copied(run, tmp_path, capsys):
    (run / "checkpoints" / "step_00000006" / "vlkd_manifest.jsonl").unlink()
    call("cp", run, tmp_path / "new", as_json=True)
    assert json.loads(capsys.readouterr().out) == {"copied": str(tmp_path / "new" / "checkpoints" / "step_00000003")}


@pytest.mark.parametrize(
    "action, new, step, words",
    [
        ("ls", "new", None, "ls and verify take RUN alone"),
        ("cp", None, None, "vlkd ckpt cp RUN NEW"),
        ("verify", None, 4, "no checkpoint of step 4; there are 3, 6"),
        ("cp", ".", None, "not empty"),
    ],
)
def test_mistakes(run, action, new, step, words):
    with pytest.raises(UserError, match=words):
        call(action, run, new and run / new, step)
    with pytest.raises(UserError, match="no checkpoints there; give the --workdir of a training run"):
        call("ls", run / "parents")
