"""The file that a benchmark's server (EvalAI) takes, from predictions; or a check of such a file.

`python -m vlkd_jax.submission --suite=vqav2 --predictions=FILE --questions=FILE [--output=upload.json]`.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from vlkd_jax import entry
from vlkd_jax.commands import COMMANDS
from vlkd_jax.console import say
from vlkd_jax.data.files import read_json
from vlkd_jax.errors import UserError, few
from vlkd_jax.evals.predictions import FIELDS, read_predictions
from vlkd_jax.evals.scoring import KINDS
from vlkd_jax.evals.vqa_files import read_questions
from vlkd_jax.storage import write_atomic


def submission(suite: str, predictions: Path, questions: Path) -> list[dict[str, Any]]:
    """The list to upload, in the order of the split.

    Raises:
      UserError: why the server would reject it: ids that are no whole numbers, missing, unknown or there twice; a
        prediction that is no text.
    """
    kind = KINDS[suite]
    said, (key, field) = read_predictions(predictions, kind), FIELDS[kind]
    asked = _questions(questions) if kind == "vqa" else _images(questions)
    not_whole = [entry_id for entry_id in said if not isinstance(entry_id, int)]
    if not_whole:
        raise UserError(
            f"{predictions}: would be rejected: {key} {not_whole[0]!r} is not a whole number ({len(not_whole):,} of "
            f"{len(said):,}); the server wants the ids of {questions}"
        )
    missing = [entry_id for entry_id in asked if entry_id not in said]
    unknown = said.keys() - set(asked)
    for told, ids in (("no prediction for", missing), ("not of the split:", sorted(unknown))):
        if ids:
            raise UserError(
                f"{predictions}: would be rejected: {told} {key} {few([str(i) for i in ids])} ({len(ids):,}; "
                f"{questions} has {len(asked):,})"
            )
    return [{key: entry_id, field: said[entry_id]} for entry_id in asked]


def _questions(path: Path) -> list[Any]:
    return [entry["question_id"] for entry in read_questions(path)[1]]


def _images(path: Path) -> list[Any]:
    data = read_json(path)
    images = data.get("images") if isinstance(data, dict) else None
    if not isinstance(images, list) or not all(isinstance(i, dict) and "id" in i for i in images) or not images:
        raise UserError(f"{path}: no list 'images' with ids; give the split's own file")
    return list(dict.fromkeys(image["id"] for image in images))


def main(values: SimpleNamespace) -> None:
    """Entry point."""
    entries = submission(values.suite, Path(values.predictions), Path(values.questions))
    empty = sum(not text.strip() for entry in entries for text in entry.values() if isinstance(text, str))
    if empty:
        say(f"{empty:,} of {len(entries):,} are empty texts: accepted, and wrong")
    if not values.output:
        say(f"{values.predictions}: fits {values.questions}, {len(entries):,} entries; --output writes the file")
        return
    write_atomic(values.output, (json.dumps(entries) + "\n").encode())
    say(f"wrote {values.output}: {len(entries):,} entries, each of {values.questions} once")


if __name__ == "__main__":
    entry.run(main, COMMANDS["submission"])
