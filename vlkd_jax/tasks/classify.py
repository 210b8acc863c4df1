"""Fine-tuning to classify texts: GLUE's nine tasks, one of which is a score."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vlkd_jax.config import model_directory
from vlkd_jax.data.glue import GLUE
from vlkd_jax.data.pipeline import too_long
from vlkd_jax.data.sources import Record
from vlkd_jax.data.text import BartText, pad
from vlkd_jax.errors import RecordError
from vlkd_jax.hf.load import load_bart
from vlkd_jax.models.classifier import Classifier, ClassifierConfig
from vlkd_jax.tasks.denoise import dropout_rngs
from vlkd_jax.tasks.parents import DTYPES, check_lengths, choose, read_bart, remat_policy, with_training_rates
from vlkd_jax.tasks.task import Frozen, Rng, Shardings, Task, Terms
from vlkd_jax.types import Array, Batch, ConfigDict, Key, Params


@dataclasses.dataclass(frozen=True)
class Labelled:
    """Turns a record into one row: the text, or both of a pair as `<s> A </s></s> B </s>`, and its label.

    Attributes:
      source_length: tokens there is room for (S).
      truncate: cut the longer text of a pair until both fit, instead of raising.
      label_type: int32 of classes, float32 of scores.
      preprocessing: there are no pictures.

    Raises (on a call):
      RecordError: a text is too long, or has no label; it names the record.
    """

    bart_text: BartText
    source_length: int
    truncate: bool
    label_type: type
    preprocessing: None = None

    def __call__(self, record: Record, rng: np.random.Generator) -> dict[str, Any]:
        if record.label is None:
            raise RecordError("no label", f"{record.name}: no label; give labelled texts")
        ids = encode_pair(self.bart_text, record.text, record.second, self.source_length if self.truncate else None)
        if len(ids) > self.source_length:
            raise too_long(record, "text", len(ids), "BART's", self.source_length, "data.source_length")
        (source,), (mask,) = pad([ids], self.source_length, self.bart_text.pad)
        return {"source_ids": source, "source_mask": mask, "labels": self.label_type(record.label)}

    def limits(self) -> dict[str, int]:
        """Room for a text or a pair, in BART's tokens, the ends included."""
        return {"BART": self.source_length}

    def lengths(self, record: Record) -> dict[str, int]:
        """Tokens of it, before any cut."""
        return {"BART": len(encode_pair(self.bart_text, record.text, record.second))}


def encode_pair(text: BartText, first: str, second: str = "", room: int | None = None) -> list[int]:
    """`<s> A </s>`, or `<s> A </s></s> B </s>`, of at most `room` ids: the longer text, or B, is cut at its end."""
    a, b = text.encode(first), text.encode(second) if second else []
    between = [text.eos, text.eos] if second else []
    while room is not None and a and len(a) + len(b) + len(between) + 2 > room:
        (b if len(b) >= len(a) else a).pop()
    return text.wrap([*a, *between, *b])


def make_task(config: ConfigDict) -> Task:
    """BART with a head on it, trained to classify. Raises UserError: see `vlkd_jax.tasks.make_task`."""
    labels = choose(config, "data.task", GLUE).labels
    bart_config, text = read_bart(config)
    whole = ClassifierConfig(bart_config, labels)
    classifier = Classifier(
        with_training_rates(bart_config, config),
        whole.outputs,
        dtype=choose(config, "dtype", DTYPES),
        remat=remat_policy(config),
    )
    check_lengths(config, bart_config.max_position_embeddings)
    ids = jnp.zeros((1, 2), jnp.int32)
    return Task(
        module=classifier,
        configs={"bart": bart_config},
        encoder=Labelled(text, config.data.source_length, config.data.truncate, np.int32 if labels else np.float32),
        terms=functools.partial(class_terms if labels else score_terms, classifier),
        weights={"cross_entropy" if labels else "squared_error": 1.0},
        read_params=functools.partial(_read_params, config, classifier),
        example=(ids, ids == 0),
        needs_images=False,
        classifier=whole,
        new=("classification_head",),
    )


def _read_params(config: ConfigDict, classifier: Classifier, shardings: Shardings) -> Params:
    """BART's parameters as given; the head is drawn from `config.seed`."""

    def draw(key: Key[Array, ""]) -> Params:
        ids = jnp.zeros((1, 2), jnp.int32)
        params = classifier.init(key, ids, ids == 0)["params"]
        return {name: value for name, value in params.items() if name != "bart"}

    drawn = dict(shardings or {})
    bart = load_bart(model_directory(config.bart), drawn.pop("bart", None))[1]
    return {"bart": bart, **jax.jit(draw, out_shardings=drawn or None)(jax.random.key(config.seed))}


def class_terms(classifier: Classifier, params: Params, frozen: Frozen, batch: Batch, rng: Rng) -> Terms:
    """`cross_entropy` of the classes, and `accuracy`."""
    logits, count = _logits(classifier, params, batch, rng), jnp.float32(len(batch.labels))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
    right = jnp.sum(jnp.argmax(logits, -1) == batch.labels, dtype=jnp.float32)
    return {"cross_entropy": (jnp.sum(losses), count), "accuracy": (right, count)}


def score_terms(classifier: Classifier, params: Params, frozen: Frozen, batch: Batch, rng: Rng) -> Terms:
    """`squared_error` of the scores."""
    scores = _logits(classifier, params, batch, rng)[:, 0]
    return {"squared_error": (jnp.sum(jnp.square(scores - batch.labels)), jnp.float32(len(batch.labels)))}


def _logits(classifier: Classifier, params: Params, batch: Batch, rng: Rng) -> Array:
    texts = batch.source_ids, batch.source_mask
    return classifier.apply({"params": params}, *texts, deterministic=rng is None, rngs=dropout_rngs(rng))
