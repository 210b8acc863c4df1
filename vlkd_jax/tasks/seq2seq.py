"""Fine-tuning to write a text: a document's summary, a picture's caption, or the answer to a question about a picture.

Prompts are those by which the suites ask, so what is trained is what is evaluated.
"""

from __future__ import annotations

import dataclasses
import functools
import string
from typing import Any

import jax.numpy as jnp
import numpy as np

from vlkd_jax import losses
from vlkd_jax.config import model_directory
from vlkd_jax.data.pipeline import pixels_of, too_long
from vlkd_jax.data.sources import Record
from vlkd_jax.data.text import BartText, ClipText, pad
from vlkd_jax.errors import RecordError
from vlkd_jax.hf.files import CLIP_TOKENIZER
from vlkd_jax.hf.load import load_bart
from vlkd_jax.hf.names import parameter_shapes
from vlkd_jax.hf.student import load_student, read_student_config
from vlkd_jax.models.bart import Bart
from vlkd_jax.models.clip import Clip
from vlkd_jax.models.preprocessing import Preprocessing
from vlkd_jax.models.vlkd import Student
from vlkd_jax.tasks.denoise import bart_terms, dropout_rngs, read_texts, restoring_terms, target_states
from vlkd_jax.tasks.distill import encode_pixels, select_tokens, student_denoise_terms
from vlkd_jax.tasks.parents import (
    DTYPES,
    check_lengths,
    choose,
    read_bart,
    remat_policy,
    require,
    text_encoder,
    with_training_rates,
)
from vlkd_jax.tasks.task import Frozen, Rng, Shardings, Task, Terms
from vlkd_jax.types import Batch, ConfigDict, Params

SUMMARY = {"source": "{document}", "prefix": "", "cut": "document"}
"""How the suite of summaries asks."""


@dataclasses.dataclass(frozen=True)
class Prompted:
    """Turns a record into one row: what the encoder reads, and the text that is to be written behind a given start.

    Attributes:
      source, prefix: prompts with `<mask>` and `{name}`, which `Record.fields` fills in; the prefix carries no loss.
      text_length, source_length: tokens there is room for (L, S).
      cut: the field of the source that may be cut at its end; "": none.
      truncate: cut what is too long, that field and the text, instead of raising.
      clip_text: of the model's teacher, which reads no text here.
      preprocessing, smallest_crop, flip: of pictures, as in `pipeline.Encoder`; None: there are none.

    Raises (on a call):
      RecordError: a text is too long, a field that a prompt asks for is not there, or a picture does not decode; it
        names the record.
    """

    bart_text: BartText
    source: str
    prefix: str
    text_length: int
    source_length: int
    cut: str = ""
    truncate: bool = False
    clip_text: ClipText | None = None
    preprocessing: Preprocessing | None = None
    smallest_crop: float = 1.0
    flip: bool = False

    def __call__(self, record: Record, rng: np.random.Generator) -> dict[str, Any]:
        self._check_fields(record)
        row: dict[str, Any] = {}
        if self.preprocessing:
            row["pixels"] = pixels_of(record, rng, self.preprocessing, self.smallest_crop, self.flip)
        cut, room = self.cut if self.truncate else "", self.source_length - 2
        source = self.bart_text.encode_prompt(self.source, record.fields, cut, room)[0]
        prefix, text = self._written(record)
        if self.truncate:
            text = text[: max(self.text_length - 2 - len(prefix), 1)]
        for name, ids in (("source", source), ("text", prefix + text)):
            whole, length = self.bart_text.wrap(ids), getattr(self, f"{name}_length")
            if len(whole) > length:
                raise too_long(record, name, len(whole), "BART's", length, f"data.{name}_length")
            (row[f"{name}_ids"],), (row[f"{name}_mask"],) = pad([whole], length, self.bart_text.pad)
        given = 1 + len(prefix) if prefix else 0
        row["target_mask"] = row["text_mask"] & (np.arange(self.text_length) >= given)
        return row

    def _check_fields(self, record: Record) -> None:
        for _, name, _, _ in string.Formatter().parse(self.source + self.prefix):
            if name and name not in record.fields:
                told = (
                    f"{record.name}: no {name}, for which {self.source!r} asks; config.data.source is of another kind"
                )
                raise RecordError(f"no {name}", told)

    def _written(self, record: Record) -> tuple[list[int], list[int]]:
        """The ids that are given, and those that are to come."""
        prefix = self.bart_text.encode_template(self.prefix, **record.fields)
        return prefix, self.bart_text.encode(f" {record.text}" if prefix else record.text)

    def limits(self) -> dict[str, int]:
        """Room for what is read and for what is written, in BART's tokens, the two ends included."""
        return {"BART": self.text_length, "read": self.source_length}

    def lengths(self, record: Record) -> dict[str, int]:
        """Tokens of both, before any cut."""
        self._check_fields(record)
        read = self.bart_text.encode_template(self.source, **record.fields)
        return {"BART": 2 + sum(map(len, self._written(record))), "read": 2 + len(read)}


def make_summary_task(config: ConfigDict) -> Task:
    """BART, trained to write documents' summaries. Raises UserError: see `vlkd_jax.tasks.make_task`."""
    bart_config, text = read_bart(config)
    bart = Bart(
        with_training_rates(bart_config, config), dtype=choose(config, "dtype", DTYPES), remat=remat_policy(config)
    )
    ids = jnp.zeros((1, 2), jnp.int32)
    return Task(
        module=bart,
        configs={"bart": bart_config},
        read_params=lambda shardings: load_bart(model_directory(config.bart), shardings)[1],
        example=(ids, ids == 0, ids),
        needs_images=False,
        denoise_terms=functools.partial(bart_terms, bart),
        **_written(config, text, bart_config.max_position_embeddings, bart, SUMMARY),
    )


def make_caption_task(config: ConfigDict) -> Task:
    """A student, trained on pictures' captions. Raises UserError: see `vlkd_jax.tasks.make_task`."""
    return _student_task(config, "caption")


def make_answer_task(config: ConfigDict) -> Task:
    """A student, trained on answers to questions about pictures. Raises UserError as `make_caption_task` does."""
    return _student_task(config, "question")


def _student_task(config: ConfigDict, asked: str) -> Task:
    require(config, "start", "the export of a student, which vlkd export writes")
    directory = model_directory(config.start)
    whole, text = read_student_config(directory), BartText(directory)
    student = dataclasses.replace(
        whole.module(choose(config, "dtype", DTYPES)),
        config=with_training_rates(whole.bart, config),
        remat=remat_policy(config),
    )
    teacher = Clip(whole.clip, dtype=student.dtype)
    prompts = {"source": config.prompts[f"{asked}_encoder"], "prefix": config.prompts[f"{asked}_decoder"]}
    pictures = {"clip_text": ClipText(directory / CLIP_TOKENIZER), "preprocessing": whole.clip.preprocessing}
    terms = {"teacher": teacher, "image_tokens": whole.image_tokens}

    def read(part: str, shardings: Shardings) -> Params:
        layout = None if shardings is None else {part: shardings}
        return load_student(directory, layout, (part,))[1][part]

    return Task(
        module=student,
        configs={"clip": whole.clip, "bart": whole.bart},
        read_params=functools.partial(read, "student"),
        read_frozen=lambda shardings: {"clip": read("clip", shardings and shardings["clip"])},
        abstract_frozen={"clip": parameter_shapes(whole.clip)},
        example=student.example_inputs(),
        teacher=teacher,
        student=whole,
        denoise_terms=functools.partial(student_denoise_terms, student),
        fixed=("image_whitening",),
        **_written(config, text, whole.bart.max_position_embeddings, student, prompts | pictures, **terms),
    )


def _written(
    config: ConfigDict, text: BartText, positions: int, module: Bart | Student, prompts: dict[str, Any], **terms: Any
) -> dict[str, Any]:
    """The fields of a `Task` that all of them share."""
    check_lengths(config, positions)
    data, loss = config.data, config.loss
    others = {name: loss[name] for name in ("denoise", "label_smoothing") if loss[name]}
    replay_encoder = text_encoder(config, text, positions, context_length=data.context_length)
    return {
        "encoder": Prompted(
            text, text_length=data.text_length, source_length=data.source_length, truncate=data.truncate, **prompts
        ),
        "terms": functools.partial(written_terms, module, smooth="label_smoothing" in others, **terms),
        "weights": {"lm": 1.0} | others,
        "replay_encoder": dataclasses.replace(replay_encoder, source_length=data.replay_length),
        "mixes_replay": bool(config.loss.denoise),
    }


def written_terms(
    module: Bart | Student,
    params: Params,
    frozen: Frozen,
    batch: Batch,
    rng: Rng,
    teacher: Clip | None = None,
    image_tokens: str = "",
    smooth: bool = False,
) -> Terms:
    """`lm`, the cross-entropy of the text behind its prefix, and `token_accuracy`; with texts beside it `denoise`.

    Args:
      teacher, image_tokens: of a student, which reads pictures: see `distill.select_tokens`.
      smooth: with `losses.label_smoothing`, under that name.
    """
    tokens = (
        None if teacher is None else select_tokens(encode_pixels(teacher, frozen["clip"], batch.pixels), image_tokens)
    )

    def forward(module: Bart | Student) -> Terms:
        bart = module if tokens is None else module.bart
        texts = [(batch.source_ids, batch.source_mask)]
        texts += read_texts(batch.replay) if batch.replay is not None else []
        states, *replayed = bart.encode_all(texts, deterministic=rng is None)
        memory = states, batch.source_mask
        if tokens is not None:
            memory = module.memory(module.image_prefix(tokens), *memory)
        hidden = target_states(bart, batch, memory, rng)
        scored = hidden, *bart.output_table(), batch.text_ids, batch.target_mask
        terms = dict(zip(("lm", "token_accuracy"), losses.icti(*scored), strict=True))
        if smooth:
            terms["label_smoothing"] = losses.label_smoothing(*scored)
        if batch.replay is not None:
            terms["denoise"] = restoring_terms(bart, batch.replay, replayed, rng)["denoise"]
        return terms

    return module.apply({"params": params}, rngs=dropout_rngs(rng), method=forward)
