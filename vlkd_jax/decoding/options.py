"""How texts are chosen: the fields of a suite's `decoding` group."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, TypedDict

from vlkd_jax.errors import UserError

METHODS = ("greedy", "beam", "sample")


class DecodingOptions(TypedDict, total=False):
    """The fields of `Decoding`, as they are given by name."""

    method: Literal["greedy", "beam", "sample"]
    max_new_tokens: int
    min_new_tokens: int
    no_repeat_ngram: int
    returns: int
    beams: int
    length_penalty: float
    early_stopping: bool
    temperature: float
    top_k: int
    top_p: float
    seed: int


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How a text is chosen. Fields that the method does not use are ignored. Names and meanings are Hugging Face's.

    Attributes:
      method: greedy: the most likely token each time; beam: the best of `beams` hypotheses; sample: drawn at random.
      max_new_tokens: after the forced prefix, `</s>` included, which the last of them is if the text has not ended.
      min_new_tokens: no `</s>` before so many others.
      no_repeat_ngram: no run of so many tokens twice, the forced prefix included; 0: anything may repeat.
      returns: texts for each prompt, the best first; greedy has one.
      beams, length_penalty, early_stopping: of beam search; a finished hypothesis scores its log-likelihood divided by
        its number of new tokens (`<s>` among them where no more than that is forced) to the power of `length_penalty`;
        with early stopping a prompt is done when `beams` hypotheses have ended, without when none of the open ones
        would score better if it ended now.
      temperature, top_k, top_p, seed: of sampling, among the `top_k` likeliest tokens (0: all) and of these the fewest
        whose probabilities add up to `top_p`.
    """

    method: str = "greedy"
    max_new_tokens: int = 20
    min_new_tokens: int = 0
    no_repeat_ngram: int = 0
    returns: int = 1
    beams: int = 5
    length_penalty: float = 1.0
    early_stopping: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    @property
    def rows(self) -> int:
        """Texts that are decoded beside one another for each prompt."""
        return {"greedy": 1, "beam": self.beams, "sample": self.returns}[self.method]

    def check(self, where: str) -> None:
        """Raises UserError naming the field of group `where` that has no meaning."""
        if self.method not in METHODS:
            raise UserError(f"{where}.method is {self.method!r}; it is one of {', '.join(METHODS)}")
        needed = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "min_new_tokens": (0 <= self.min_new_tokens < self.max_new_tokens, "from 0 to less than max_new_tokens"),
            "no_repeat_ngram": (self.no_repeat_ngram >= 0, "at least 0"),
            "beams": (self.beams >= 1, "at least 1"),
            "returns": (1 <= self.returns <= max(self.rows, 1), "from 1 to the number of beams; 1 for greedy"),
            "temperature": (self.temperature > 0, "above 0; the method greedy takes the likeliest token"),
            "top_k": (self.top_k >= 0, "at least 0"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
        }
        for field, (good, meaning) in needed.items():
            if not good:
                raise UserError(f"{where}.{field} is {getattr(self, field)}; it must be {meaning}")

    def record(self) -> dict[str, Any]:
        """What the method uses, for a result."""
        used = ["method", "max_new_tokens", "min_new_tokens", "no_repeat_ngram", "returns"]
        used += {"beam": ["beams", "length_penalty", "early_stopping"]}.get(self.method, [])
        used += {"sample": ["temperature", "top_k", "top_p", "seed"]}.get(self.method, [])
        return {field: getattr(self, field) for field in used}
