"""Pairs in record files: a tensorflow-datasets directory of ArrayRecord, as `vlkd prepare` writes it. No TensorFlow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlkd_jax.data.sources import Record
from vlkd_jax.errors import RecordError, UserError

FIELDS = ("image", "caption")
"""What a record has; `key`, where there is one, names it in messages."""


class RecordPairs:
    """The pairs of a split, read by index; pictures stay as they are in the file until they are used.

    Args:
      directory: of the data set, with its dataset_info.json.
      split: as tensorflow-datasets writes it: train, train[:1%], train[5000:].

    Raises:
      UserError: no data set there, missing record files, an unknown split or an empty one, other fields.
      RecordError (on reading an item): a record that is damaged.
    """

    def __init__(self, directory: str | Path, split: str):
        import tensorflow_datasets as tfds

        self.path, self.split = Path(directory), split
        if not (self.path / "dataset_info.json").is_file():
            raise UserError(f"{self.path}: no dataset_info.json in it; name the --output of vlkd prepare")
        try:
            builder = tfds.builder_from_directory(str(self.path))
            missing = [name for name in FIELDS if name not in builder.info.features]
            if missing:
                there = ", ".join(builder.info.features)
                raise UserError(f"{self.path}: its records have no {' and no '.join(missing)}; they have {there}")
            self._check_files(builder)
            self.source = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
        except UserError:
            raise
        except Exception as error:  # tensorflow-datasets raises nearly anything for damaged descriptions
            reason = " ".join(str(error).split())
            raise UserError(f"{self.path}: split {split!r} cannot be read ({reason})") from error

    def _check_files(self, builder) -> None:
        for split in builder.info.splits.values():
            gone = [path for path in map(Path, split.filepaths) if not path.is_file()]
            if gone:
                raise UserError(f"{gone[0]}: the record file is not there; copy it again, or prepare the data again")

    def __len__(self) -> int:
        return len(self.source)

    def fields(self, index: int) -> dict[str, Any]:
        """A record as it stands in its file. Raises RecordError where it is damaged."""
        try:
            return self.source[index]
        except Exception as error:  # of the reader or of protocol buffers
            raise self._damaged(index, error) from error

    def __getitem__(self, index: int) -> Record:
        fields = self.fields(index)
        where = f"{self.path} {self.split} record {index}"
        try:
            caption = fields["caption"].decode()
            name = f"{where} ({fields['key'].decode()})" if "key" in fields else where
        except (UnicodeDecodeError, AttributeError) as error:
            raise self._damaged(index, error) from error
        return Record(caption, fields["image"], name=name)

    def _damaged(self, index: int, error: Exception) -> RecordError:
        reason = " ".join(str(error).split())
        where = f"{self.path} {self.split} record {index}"
        return RecordError("record damaged", f"{where}: {reason}; copy the file again")
