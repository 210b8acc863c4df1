"""What is trained, as a static description: modules, what a batch holds, loss terms. Arrays come from its methods."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

from vlkd_jax.data.pipeline import Encode, Encoder
from vlkd_jax.losses import Pairs, SumAndCount
from vlkd_jax.models.classifier import ClassifierConfig
from vlkd_jax.models.clip import Clip
from vlkd_jax.models.vlkd import StudentConfig
from vlkd_jax.types import Array, Batch, Key, Params

Frozen = dict[str, Params]
"""What the losses read and nothing changes: {"clip": the teacher}, {"start": BART as the run begins}, or nothing."""
Terms = dict[str, SumAndCount | Pairs]
"""Loss name -> (sum, count), which add up over parts of a batch, or what `losses.finish` makes it from."""
TEACHER = "teacher"
"""`jax.ad_checkpoint` name of the frozen teacher's outputs: what is rematerialised need not run the teacher again."""
Rng = Key[Array, ""] | None
"""A random key; None: no dropout."""
Shardings = Any
"""A nested dict of `jax.sharding.Sharding`, one for each parameter; None: whole, on one device."""
TermsFunction = Callable[[Params, Frozen, Batch, Rng], Terms]
"""(params, frozen, batch, rng) -> terms."""


def _nothing(shardings: Shardings) -> Frozen:
    return {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A model to train and what it is trained on.

    Attributes:
      module: the Flax module of the trained parameters.
      configs: configurations by name, "clip" and "bart", as their directories have them.
      encoder: what a batch holds.
      terms: the loss terms of a batch or of part of one; without a weight in `weights` a term is only reported.
      weights: loss name -> its weight in the total.
      read_params: shardings -> the parameters that training starts from, read or drawn: global arrays, or with None
        the numpy or jax arrays of this host.
      read_frozen: the same for `Frozen`.
      abstract_frozen: shapes of what `read_frozen` gives.
      example: arguments for `module.init`, of which the shapes count.
      needs_images: whether its records must have pictures.
      teacher: the module of `Frozen["clip"]`.
      student: what the student is, whole, as an export says it; None: there is no student.
      classifier: what a classifier of texts is, whole; None: it is none.
      denoise_terms: the terms of a text-only batch, by which the text abilities are measured; None: it has none.
      replay_encoder: what a text-only batch beside the pairs holds; mixes_replay: whether training mixes such in.
      new: top-level parameters that start from nothing and take the larger learning rate.
      fixed: top-level parameters that no gradient reaches.
      whiten: images from which the fixed whitening of the image tokens is set at the start; 0: there is none.
    """

    module: nn.Module
    configs: dict[str, Any]
    encoder: Encode | None
    terms: TermsFunction
    weights: dict[str, float]
    read_params: Callable[[Shardings], Params]
    read_frozen: Callable[[Shardings], Frozen] = _nothing
    abstract_frozen: Frozen = dataclasses.field(default_factory=dict)
    example: tuple[Any, ...]
    needs_images: bool = True
    teacher: Clip | None = None
    student: StudentConfig | None = None
    classifier: ClassifierConfig | None = None
    denoise_terms: TermsFunction | None = None
    replay_encoder: Encoder | None = None
    mixes_replay: bool = False
    new: tuple[str, ...] = ()
    fixed: tuple[str, ...] = ()
    whiten: int = 0

    def abstract(self) -> tuple[Params, Frozen]:
        """`jax.ShapeDtypeStruct` trees of the parameters and of what is frozen, from the configurations alone."""
        return jax.eval_shape(self.module.init, jax.random.key(0), *self.example)["params"], self.abstract_frozen

    def load_params(self, shardings: Any = None) -> Params:
        """The parameters that training starts from, float32.

        Args:
          shardings: a `jax.sharding.Sharding` for each parameter of `abstract()`, or one for all: no process reads more
            of the weights than its devices hold, part by part. None: whole, on one device.

        Raises:
          UserError: a directory or its weights cannot be read.
        """
        return _load(self.read_params, shardings, self.abstract()[0])

    def load_frozen(self, shardings: Any = None) -> Frozen:
        """What is frozen, placed as `load_params` does. Raises UserError as it does."""
        return _load(self.read_frozen, shardings, self.abstract_frozen)


def _load(read: Callable[[Shardings], Any], shardings: Any, abstract: Any) -> Any:
    if shardings is None:
        return jax.device_put(read(None))
    return read(jax.tree.broadcast(shardings, abstract))
