"""A student as a model of lmms-eval: `lmms-eval --model vlkd --model_args pretrained=DIR --tasks ...`.

The harness finds `MODEL` by the entry point `lmms_eval.models`; it is no requirement of this package.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from PIL import Image
from tqdm import tqdm

from vlkd_jax.errors import UserError
from vlkd_jax.vlkd import VLKD

MODEL = ModelManifest(model_id="vlkd", simple_class_path=f"{__name__}.VLKDModel")


class VLKDModel(lmms):
    """A student that the harness asks.

    The harness writes to chat models: its question is the context's first line, and lines below it that say how to
    answer are left out, for this student never saw any. Tasks of captions are captioned with the student's own prompt.

    Args:
      pretrained: what `VLKD.from_pretrained` takes; None: the package's own student.
      batch_size: pictures or questions at once.
      captions: parts of the names of tasks that ask for captions, with + between.
      whole_context: whether the question is all of the context.
      device, max_batch_size: the harness gives them; jax chooses the device.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str | None = None,
        batch_size: int | str | None = 64,
        captions: str = "cap+flickr30k",
        whole_context: bool = False,
        device: str | None = None,
        max_batch_size: int | None = None,
    ):
        super().__init__()
        self._model = VLKD.from_pretrained(pretrained)
        self._batch_size = 64 if batch_size in (None, "auto") else int(batch_size)
        self._captions, self._whole_context = tuple(captions.split("+")), whole_context

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """A text for each request (context, options, function that gives the pictures, document, task, split).

        Of the options `max_new_tokens`, `num_beams`, `do_sample`, `temperature`, `top_p`, `until` and
        `length_penalty` are read. Raises UserError for a document with other than one picture.
        """
        said: dict[int, str] = {}
        kinds: dict[tuple, list[int]] = {}
        for number, request in enumerate(requests):
            kinds.setdefault(self._kind(request), []).append(number)
        with tqdm(total=len(requests), desc="vlkd") as bar:
            for (is_caption, options), numbers in kinds.items():
                for first in range(0, len(numbers), self._batch_size):
                    some = numbers[first : first + self._batch_size]
                    texts = self._texts([requests[number] for number in some], is_caption, dict(options))
                    said |= zip(some, texts, strict=True)
                    bar.update(len(some))
        return [until(said[number], request.args[1].get("until")) for number, request in enumerate(requests)]

    def _texts(self, requests: list[Instance], is_caption: bool, options: dict[str, Any]) -> list[str]:
        pictures = [self._picture(*request.args[2:]) for request in requests]
        room = self._model.bart.config.max_position_embeddings // 2
        if "max_new_tokens" in options:
            options["max_new_tokens"] = min(options["max_new_tokens"], room)
        if is_caption:
            return self._model.caption(pictures, **options)
        return self._model.answer(pictures, [self._question(request.args[0]) for request in requests], **options)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """(log-likelihood of the continuation and `</s>`, whether greedy decoding gives it) for each request."""
        told = []
        for request in tqdm(requests, desc="vlkd"):
            if len(request.args) != 6:
                raise UserError("vlkd answers about a picture, and a task of this kind has none")
            context, target, *place = request.args
            picture, question = self._picture(*place), self._question(context)
            text = (target if isinstance(target, str) else target(self._document(*place[1:]))).strip()
            (scored,) = self._model.rank(picture, [text], question)
            told.append((scored.score, self._model.answer(picture, question) == text))
        return told

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Raises UserError: this student has no conversations."""
        raise UserError("vlkd answers one question about one picture; tasks of several rounds are not for it")

    def _kind(self, request: Instance) -> tuple[bool, tuple[tuple[str, Any], ...]]:
        _, options, _, _, task, _ = request.args
        return any(part in task for part in self._captions), tuple(sorted(decoding_options(options).items()))

    def _document(self, number: int, task: str, split: str) -> Any:
        return self.task_dict[task][split][number]

    def _picture(self, pictures_of: Any, number: int, task: str, split: str) -> Image.Image:
        pictures = list(pictures_of(self._document(number, task, split)))
        if len(pictures) != 1 or not isinstance(pictures[0], Image.Image):
            raise UserError(f"{task}, document {number}: {len(pictures)} pictures or videos; vlkd reads one picture")
        return pictures[0]

    def _question(self, context: str) -> str:
        lines = context.strip().splitlines() or [""]
        return context.strip() if self._whole_context else lines[0].strip()


def decoding_options(options: dict[str, Any]) -> dict[str, Any]:
    """`VLKD`'s options of the harness's, which are Hugging Face's."""
    chosen: dict[str, Any] = {}
    if options.get("max_new_tokens"):
        chosen["max_new_tokens"] = int(options["max_new_tokens"])
    beams = int(options.get("num_beams") or 1)
    if options.get("do_sample") and (options.get("temperature") or 0) > 0:
        chosen |= {"method": "sample", "temperature": float(options["temperature"])}
        chosen |= {"top_p": float(options["top_p"])} if options.get("top_p") else {}
    elif beams > 1:
        chosen |= {"method": "beam", "beams": beams}
        chosen |= {"length_penalty": float(options["length_penalty"])} if options.get("length_penalty") else {}
    return chosen


def until(text: str, ends: str | Sequence[str] | None) -> str:
    """A text up to the first of some ends."""
    ends: Iterable[str] = [ends] if isinstance(ends, str) else ends or []
    for end in filter(None, ends):
        text = text.split(end)[0]
    return text
