"""Documents with their summaries, as XSum is passed on: JSONL, Parquet, or two files of lines."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlkd_jax.data.files import read_text
from vlkd_jax.data.sources import Record
from vlkd_jax.errors import UserError

FIELDS = ("document", "summary")
LINES = (".source", ".target")
"""Of the two files of lines, the documents' and the summaries'."""
TABLES = (".jsonl", ".parquet")


class Documents:
    """Documents and summaries of files: `Record`s whose `text` is the summary.

    Args:
      paths: JSONL or Parquet files with `document` and `summary`, one after the other; or FILE.source, beside which
        FILE.target lies.

    Raises:
      UserError: naming the file, the line and the field: missing, not readable, an empty text, no rows.
    """

    def __init__(self, paths: list[Path]):
        self.rows = [(f"{path} line {number}", *row) for path in paths for number, row in _rows(path)]
        self.path = paths[0]
        if not self.rows:
            raise UserError(f"{self.path}: no documents in it")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Record:
        where, document, summary = self.rows[index]
        return Record(summary, fields={"document": document}, name=where)

    def key(self, index: int) -> str:
        """What must not lie on both sides of a split."""
        return self.rows[index][1]


def document_files(directory: str | Path, split: str) -> list[Path]:
    """The files of a split in a folder: SPLIT.jsonl, SPLIT.parquet, SPLIT-*.parquet or SPLIT.source; [] for none."""
    folder = Path(directory)
    files = sorted(path for ending in TABLES for path in folder.glob(f"{split}[.-]*{ending}"))
    files += [path for ending in TABLES if (path := folder / f"{split}{ending}").is_file() and path not in files]
    lines = folder / f"{split}{LINES[0]}"
    return files or [lines] * lines.is_file()


def read_column(path: Path, field: str) -> list[str]:
    """A column of a JSONL or Parquet file, or the lines of any other. Raises UserError as `Documents` does."""
    if path.suffix == ".jsonl":
        return [_text(row, field, f"{path} line {number}") for number, row in _json_lines(path)]
    if path.suffix == ".parquet":
        return [_text(row, field, f"{path} row {number}") for number, row in _parquet(path, [field])]
    lines = [line.strip() for line in read_text(path).removesuffix("\n").split("\n")]
    if "" in lines:
        raise UserError(f"{path} line {lines.index('') + 1}: empty; a line holds one text")
    return lines


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(number from 1, [document, summary]) of each row."""
    if path.suffix == LINES[0]:
        columns = [read_column(file, "") for file in (path, path.with_suffix(LINES[1]))]
        if len(columns[0]) != len(columns[1]):
            told = f"{len(columns[0])} lines, and {len(columns[1])} in {path.with_suffix(LINES[1])}"
            raise UserError(f"{path}: {told}; give the files of one split")
        yield from enumerate(map(list, zip(*columns, strict=True)), 1)
        return
    rows = _json_lines(path) if path.suffix == ".jsonl" else _parquet(path, list(FIELDS))
    for number, row in rows:
        yield number, [_text(row, field, f"{path} line {number}") for field in FIELDS]


def _text(row: Any, field: str, where: str) -> str:
    value = row.get(field) if isinstance(row, dict) else None
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: {field} is {str(value)[:40]!r}; it must be a text that is not empty")
    return " ".join(value.split())


def _json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as e:
                raise UserError(f"{path} line {number}: not JSON ({getattr(e, 'msg', e)}); correct the line") from e


def _parquet(path: Path, columns: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
        missing = [name for name in columns if name not in table.column_names]
        if missing:
            raise UserError(f"{path}: no column {missing[0]}; it has {', '.join(table.column_names)}")
        rows = table.select(columns).to_pylist()
    except (OSError, ValueError, pyarrow.ArrowException) as e:  # texts that are not UTF-8 among them
        told = " ".join(str(e).split())
        raise UserError(f"{path}: not a Parquet file that can be read ({told}); copy it again") from e
    yield from enumerate(rows, 1)
