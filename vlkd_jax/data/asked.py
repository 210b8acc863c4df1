"""Questions about pictures with their answers, to be trained on: VQA v2's official files, or a user's own like them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from vlkd_jax.data.images import check_picture
from vlkd_jax.data.sources import Record, raise_if_too_many
from vlkd_jax.errors import RecordError, UserError
from vlkd_jax.evals.vqa_files import check_same_split, human_answers, read_annotations, read_questions


class Questions:
    """Every question with the answer that most people gave, of several the one given first; ten of them in VQA v2.

    Args:
      questions, annotations: the files; images: the folder of the pictures.
      image_name: of a picture, with {image_id}.
      max_unusable: the largest share of questions whose picture is missing or damaged.

    Raises:
      UserError: a file that cannot be used, files of different splits, a question without an answer, a name that does
        not fit; more pictures that cannot be used than that.
      RecordError (on reading an item): its picture cannot be used.
    """

    def __init__(self, questions: Path, annotations: Path, images: Path, image_name: str, max_unusable: float):
        self.path, self.images = questions, images
        (data, entries), (told, annotated) = read_questions(questions), read_annotations(annotations)
        check_same_split((questions, data, entries), (annotations, told, annotated))
        answers = {
            entry["question_id"]: Counter(human_answers(annotations, entry)).most_common(1)[0][0] for entry in annotated
        }
        self.rows: list[tuple[int | str, str, str, str]] = []
        for entry in entries:
            number = entry["question_id"]
            if number not in answers:
                raise UserError(f"{annotations}: no answer for question {number}; give the files of one split")
            self.rows.append((number, _named(image_name, entry["image_id"]), entry["question"], answers[number]))
        self.faults: dict[str, RecordError] = {}
        for name in dict.fromkeys(row[1] for row in self.rows):
            try:
                check_picture(images / name)
            except RecordError as e:
                self.faults[name] = RecordError(e.reason, f"{questions}: {e} (config.data.image_name is {image_name})")
        faulty = [self.faults[row[1]] for row in self.rows if row[1] in self.faults]
        raise_if_too_many(faulty, len(self.rows), max_unusable)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Record:
        number, name, question, answer = self.rows[index]
        if name in self.faults:
            raise self.faults[name]
        return Record(answer, self.images / name, fields={"question": question}, name=f"{self.path} question {number}")

    def key(self, index: int) -> str:
        """What must not lie on both sides of a split: the picture."""
        return self.rows[index][1]


def _named(template: str, image_id: int | str) -> str:
    try:
        return template.format(image_id=image_id)
    except (LookupError, ValueError, TypeError, AttributeError) as e:
        told = f"config.data.image_name {template!r} does not fit image_id {image_id!r} ({e})"
        raise UserError(f"{told}; it can hold {{image_id}}, such as COCO_train2014_{{image_id:012d}}.jpg") from e
