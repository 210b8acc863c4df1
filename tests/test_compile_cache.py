"""Compiled programs are kept between runs of a command, where nothing else is asked for and there is a place."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from tiny import ROOT, environment

from vlkd_jax import compile_cache
from vlkd_jax.shapes import world


@pytest.fixture
def caption(tmp_path):
    """Runs `vlkd caption` with these settings; the settings that the tests themselves run with do not count."""
    Image.fromarray(world.render(world.make_scene(1, "test", 0))).save(tmp_path / "a.png")

    def run(**settings):
        given = {
            name: value for name, value in environment().items() if not name.startswith(("JAX_C", "JAX_PERS", "XDG"))
        }
        command = [sys.executable, "-m", "vlkd_jax", "caption", str(tmp_path / "a.png")]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=given | settings)
        assert done.returncode == 0, done.stderr
        assert "large yellow circle" in done.stdout
        return done.stderr

    return run


def test_what_was_compiled_once_is_there_the_next_time(caption, tmp_path):
    settings = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    caption(**settings)
    programs = {path.name for path in tmp_path.glob("cache/vlkd_jax/programs-*/*-cache")}
    assert programs
    log = caption(**settings, JAX_LOGGING_LEVEL="DEBUG")
    assert {path.name for path in tmp_path.glob("cache/vlkd_jax/programs-*/*-cache")} == programs
    assert "Persistent compilation cache hit" in log


@pytest.mark.parametrize("settings", [{"JAX_COMPILATION_CACHE_DIR": ""}, {"HOME": "/nonexistent"}])
def test_none_where_it_is_turned_off_or_there_is_no_place(caption, tmp_path, settings):
    caption(**{"HOME": str(tmp_path)} | settings)
    assert not list(tmp_path.rglob("*-cache"))


def test_ones_own_place_counts(caption, tmp_path):
    caption(HOME=str(tmp_path), JAX_COMPILATION_CACHE_DIR=str(tmp_path / "mine"))
    assert not (tmp_path / ".cache").exists()


def test_each_kind_of_processor_has_its_own(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    here = compile_cache.cache_directory()
    assert here.parent == Path("/somewhere/vlkd_jax") and os.path.basename(here).startswith("programs-")
    monkeypatch.setattr(compile_cache.platform, "machine", lambda: "another")
    assert compile_cache.cache_directory() != here
