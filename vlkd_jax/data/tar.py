"""Members of a tar archive, in order and as bytes: nothing is unpacked, and damage is never taken for the end.

The standard library's reader takes a damaged header behind the first for the end of the archive, and what follows is
lost without a word; so this one reads the format (POSIX pax and ustar, GNU's long names) itself.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

BLOCK = 512
MAX_MEMBER = 1 << 28
"""Bytes of a member that is read; a longer one is passed over, as a damaged size would be."""
_REGULAR, _LONG_NAME, _PAX = (b"0", b"\0", b"7"), b"L", b"x"


class TarDamage(Exception):
    """The archive cannot be read on from here: what is behind is lost."""


def members(path: str | Path) -> Iterator[tuple[str, bytes | None]]:
    """(name, content) of every regular file of an archive, plain or gzipped; None: larger than `MAX_MEMBER`.

    Directories, links and devices are passed over.

    Raises:
      TarDamage: a header that is none, an archive that is cut off.
      OSError: a file that cannot be opened.
    """
    with open(path, "rb") as file:
        is_gzip = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        stream = gzip.GzipFile(fileobj=file) if is_gzip else file
        try:
            yield from _members(stream)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise TarDamage(f"its compression is damaged or cut off ({error})") from error


def _members(stream: BinaryIO) -> Iterator[tuple[str, bytes | None]]:
    name, size = "", -1  # what an extended header says of the next member
    while True:
        header = _read(stream, BLOCK)
        if not header.strip(b"\0"):
            return
        kind, own_name, own_size = _parse(header)
        length = own_size if size < 0 else size
        if kind in (_LONG_NAME, _PAX):
            content = _read_padded(stream, length)
            if content is None:
                raise TarDamage("a name that is too long")
            if kind == _LONG_NAME:
                name = content.rstrip(b"\0").decode("utf-8", "replace")
            else:
                records = _pax_records(content)
                name, size = records.get("path", name), _size_of(records.get("size"))
            continue
        if kind in _REGULAR:
            yield name or own_name, _read_padded(stream, length)
        else:
            _skip(stream, length)
        name, size = "", -1


def _parse(header: bytes) -> tuple[bytes, str, int]:
    """(kind, name, size) of a member."""
    try:
        told = int(header[148:156].strip(b" \0") or b"0", 8)
    except ValueError as error:
        raise TarDamage("a header that is none") from error
    if told != sum(header[:148]) + 8 * ord(" ") + sum(header[156:]):
        raise TarDamage("a header whose checksum is wrong")
    field = header[124:136]
    if field[0] & 0x80:  # GNU's base 256, for members above 8 GiB
        size = int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    else:
        try:
            size = int(field.strip(b" \0") or b"0", 8)
        except ValueError as error:
            raise TarDamage("a header without a size") from error
    name = header[:100].split(b"\0")[0]
    if header[257:262] == b"ustar" and (prefix := header[345:500].split(b"\0")[0]) and header[257:265] != b"ustar  \0":
        name = prefix + b"/" + name
    return header[156:157], name.decode("utf-8", "replace"), size


def _pax_records(content: bytes) -> dict[str, str]:
    """`LENGTH KEY=VALUE` lines of an extended header."""
    records, rest = {}, content
    while rest.strip(b"\0"):
        length, space, _ = rest.partition(b" ")
        if not space or not length.isdigit() or not 0 < int(length) <= len(rest):
            raise TarDamage("an extended header that is none")
        key, _, value = rest[len(length) + 1 : int(length) - 1].partition(b"=")
        records[key.decode("utf-8", "replace")] = value.decode("utf-8", "replace")
        rest = rest[int(length) :]
    return records


def _size_of(text: str | None) -> int:
    return int(text) if text and text.isdecimal() else -1


def _read(stream: BinaryIO, count: int) -> bytes:
    data = stream.read(count)
    if len(data) < count:
        raise TarDamage("it is cut off" if data else "it ends without its end mark")
    return data


def _read_padded(stream: BinaryIO, length: int) -> bytes | None:
    if length > MAX_MEMBER:
        _skip(stream, length)
        return None
    content = _read(stream, length)
    _read(stream, -length % BLOCK)
    return content


def _skip(stream: BinaryIO, length: int) -> None:
    """Passes over a member's blocks."""
    rest = length + -length % BLOCK
    while rest:
        rest -= len(_read(stream, min(rest, 1 << 20)))
