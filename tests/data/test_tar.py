"""Tar archives: every member as the standard library reads it, and damage that is never taken for the end."""

import gzip
import io
import tarfile

import numpy as np
import pytest

from vlkd_jax.data import tar

NAMES = [
    "000.jpg",
    "000.txt",
    "dir/001.jpg",
    "é/" + "n" * 180 + ".txt",
    "p" * 90 + "/" + "q" * 90,
    "empty",
    "../out",
    "/root",
]


def archive(path, form, seed=0, compressed=False) -> dict[str, bytes]:
    """Writes an archive with links and directories among its files; what its files hold."""
    rng = np.random.default_rng(seed)
    contents = {name: rng.bytes(0 if name == "empty" else int(rng.integers(1, 3000))) for name in NAMES}
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as file:
        for number, (name, data) in enumerate(contents.items()):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
            other = tarfile.TarInfo(f"other{number}")
            other.type = (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE)[number % 3]
            other.linkname = "/etc/passwd"
            file.addfile(other)
    data = buffer.getvalue()
    path.write_bytes(gzip.compress(data) if compressed else data)
    return contents


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_members_are_those_that_were_put_in(form, compressed, tmp_path):
    contents = archive(tmp_path / "a.tar", form, compressed=compressed)
    assert dict(tar.members(tmp_path / "a.tar")) == contents


def test_an_empty_archive_and_a_large_member(tmp_path, monkeypatch):
    tarfile.open(tmp_path / "a.tar", "w").close()
    assert list(tar.members(tmp_path / "a.tar")) == []
    contents = archive(tmp_path / "b.tar", tarfile.PAX_FORMAT)
    monkeypatch.setattr(tar, "MAX_MEMBER", 600)
    read = dict(tar.members(tmp_path / "b.tar"))
    assert read == {name: data if len(data) <= 600 else None for name, data in contents.items()}
    assert None in read.values()


@pytest.mark.parametrize("compressed", [False, True])
def test_an_archive_that_is_cut_off_is_never_silent(compressed, tmp_path):
    """Wherever it is cut before its end mark: what was whole is read, then it is told."""
    contents = archive(tmp_path / "a.tar", tarfile.PAX_FORMAT, compressed=compressed)
    data, rng = (tmp_path / "a.tar").read_bytes(), np.random.default_rng(1)
    end = len(data) - 9 if compressed else len(data.rstrip(b"\0"))
    for cut in sorted({0, 1, 511, 512, *rng.integers(0, end, 100)}):
        (tmp_path / "cut.tar").write_bytes(data[:cut])
        read = []
        with pytest.raises(tar.TarDamage):
            for item in tar.members(tmp_path / "cut.tar"):
                read.append(item)
        assert read == list(contents.items())[: len(read)]


def test_a_damaged_header_is_never_silent(tmp_path):
    """64 bytes anywhere: an exception, or every member is there (the damage is in a content, a name or a padding)."""
    contents = archive(tmp_path / "a.tar", tarfile.GNU_FORMAT)
    data, rng, told = (tmp_path / "a.tar").read_bytes(), np.random.default_rng(2), 0
    for place in rng.integers(0, len(data.rstrip(b"\0")), 200):
        damaged = data[:place] + rng.bytes(64) + data[place + 64 :]
        (tmp_path / "b.tar").write_bytes(damaged)
        read = []
        try:
            for item in tar.members(tmp_path / "b.tar"):
                read.append(item)
        except tar.TarDamage:
            told += 1
        else:
            assert [len(content) for _, content in read] == [len(content) for content in contents.values()]
    assert 20 < told < 180


@pytest.mark.parametrize("junk", [b"", b"<html>", b"\x1f\x8b", b"\x1f\x8bxxxxxxxxxxxxxxx", b"PK\3\4" * 200])
def test_what_is_no_archive(junk, tmp_path):
    (tmp_path / "a.tar").write_bytes(junk)
    with pytest.raises(tar.TarDamage):
        list(tar.members(tmp_path / "a.tar"))
