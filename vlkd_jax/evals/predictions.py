"""What models said, read from files: our predictions.jsonl, the benchmarks' own result files, or plain lines of text.

Plain or gzipped. A benchmark's file is one JSON list: {"question_id", "answer"} each, or {"image_id", "caption"}.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vlkd_jax.data.files import read_json, read_text
from vlkd_jax.errors import UserError
from vlkd_jax.evals.suite import MISS, Row

FIELDS = {"vqa": ("question_id", "answer"), "caption": ("image_id", "caption")}
"""Of the entries of a benchmark's result file, by kind of suite."""
SAID = {"question_id": "answers to questions", "image_id": "captions"}


def read_predictions(path: Path, kind: str) -> dict[Any, str]:
    """{id of the question, the picture or the line: what was said}, in the file's order.

    Rows of predictions.jsonl whose picture could not be used are left out, but for those that count as a miss.

    Args:
      kind: "vqa", "caption" or "summary".

    Raises:
      UserError: the file is missing, cut off, of another kind of suite or holds nothing; an id that occurs twice; a
        prediction that is not a text.
    """
    if _is_jsonl(path):
        pairs = _of_rows(path, kind)
    elif kind == "summary":
        pairs = [(f"line {k + 1}", k, line) for k, line in enumerate(read_lines(path))]
    else:
        pairs = _of_results(path, kind)
    said: dict[Any, str] = {}
    for where, key, text in pairs:
        if not isinstance(key, (int, str)) or isinstance(key, bool):
            raise UserError(f"{path} {where}: the id {key!r:.80} is neither a number nor a text; correct it")
        if not isinstance(text, str):
            raise UserError(f"{path} {where}: the prediction {text!r:.80} is not a text; correct it")
        if key in said:
            raise UserError(f"{path} {where}: {key} has a prediction already; keep one of them")
        said[key] = text
    if not said:
        raise UserError(f"{path}: no predictions in it")
    return said


def read_lines(path: Path) -> list[str]:
    """The lines of a file of texts. Raises UserError for none, and for JSON."""
    text = read_text(path)
    if not text.strip():
        raise UserError(f"{path}: no text in it; a line holds one text")
    if text.lstrip()[:2] in ("[{", '{"'):
        raise UserError(f"{path}: JSON, and summaries are one text a line (or a predictions.jsonl)")
    return [line.strip() for line in text.removesuffix("\n").split("\n")]


def _is_jsonl(path: Path) -> bool:
    return path.name.removesuffix(".gz").endswith((".jsonl", ".jsonl.part"))


def read_jsonl(path: Path) -> list[Row]:
    """The rows of a predictions.jsonl. Raises UserError naming the line that is none."""
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as e:
            raise UserError(f"{path} line {number}: not JSON ({getattr(e, 'msg', e)}); is the file cut off?") from e
        if (
            not isinstance(row, dict)
            or not isinstance(row.get("task"), str)
            or not isinstance(row.get("id"), int | str)
        ):
            raise UserError(f"{path} line {number}: no row with task and id, as vlkd evaluate writes them")
        rows.append(row)
    return rows


def _of_rows(path: Path, kind: str) -> list[tuple[str, Any, Any]]:
    pairs = []
    for number, row in enumerate(read_jsonl(path), 1):
        if row["task"] != kind:
            raise UserError(f"{path} line {number}: a row of task {row['task']!r}, not {kind!r}: of another suite")
        if "fault" not in row:
            pairs.append((f"line {number}", row["id"], row.get("raw")))
        elif row.get("unusable") == MISS:
            pairs.append((f"line {number}", row["id"], ""))
    return pairs


def _of_results(path: Path, kind: str) -> list[tuple[str, Any, Any]]:
    entries, (key, field) = read_json(path), FIELDS[kind]
    form = f'a result file is one JSON list of {{"{key}": ..., "{field}": TEXT}}'
    if not isinstance(entries, list):
        raise UserError(f"{path}: not a list; {form}")
    pairs = []
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise UserError(f"{path} entry {number}: not an object; {form}")
        if key not in entry or field not in entry:
            other = next((name for name in SAID if name != key and name in entry and key not in entry), None)
            told = (
                f"a file of {SAID[other]}, of another suite"
                if other
                else f"no field {key if key not in entry else field}"
            )
            raise UserError(f"{path} entry {number}: {told}; {form}")
        pairs.append((f"entry {number}", entry[key], entry[field]))
    return pairs
