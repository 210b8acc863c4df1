"""`VLKD`: a usable student, with everything that answering, evaluating and exporting it takes."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vlkd_jax import predict, processes, sharding
from vlkd_jax.config import BUILTIN, HUB, model_directory, with_defaults
from vlkd_jax.configs.base import PROMPTS
from vlkd_jax.data.images import resize_and_crop
from vlkd_jax.data.text import BartText, ClipText
from vlkd_jax.decoding import Decoding, DecodingOptions
from vlkd_jax.errors import UserError
from vlkd_jax.hf.files import CLIP_TOKENIZER
from vlkd_jax.hf.names import parameter_shapes
from vlkd_jax.hf.student import is_student, load_student, read_prompts, read_student_config
from vlkd_jax.identity import (
    MODELS,
    hash_directory,
    hash_inputs,
    read_inputs,
    with_absolute_paths,
)
from vlkd_jax.manifest import CHECKPOINTS
from vlkd_jax.models.bart import Bart
from vlkd_jax.models.classifier import Classifier, ClassifierConfig
from vlkd_jax.models.clip import Clip
from vlkd_jax.models.configs import BartConfig, ClipConfig
from vlkd_jax.models.preprocessing import Preprocessing
from vlkd_jax.models.vlkd import Student, StudentConfig
from vlkd_jax.predict import Scored
from vlkd_jax.sharding import one_device
from vlkd_jax.storage import locate
from vlkd_jax.tasks import make_task
from vlkd_jax.tasks.task import Frozen, Task
from vlkd_jax.types import Params
from vlkd_jax.use.attended import Attended, attended
from vlkd_jax.use.given import Picture, Pictures, decoding_of, is_picture, open_picture, paired, picture_list
from vlkd_jax.use.prompts import prompts, with_masks
from vlkd_jax.workdir import CONFIG_FILE

Said = str | Scored | list[str] | list[Scored]
"""What is said of one item: a text, with its score where asked, or several where `returns` is above 1."""
BUILTIN_STUDENT = f"{BUILTIN}shapes/student"
"""Trained by `launch/demo.sh`."""


@dataclasses.dataclass(frozen=True)
class VLKD:
    """A student with its teacher, on the devices. Several threads may use one.

    >>> model = VLKD.from_pretrained("runs/shapes")
    >>> model.answer("photo.jpg", "what color is the car?")
    'red'

    A program is compiled for every size of batch (powers of two up to 64) and every room for texts (multiples of 16
    tokens) that is met, once each.

    Attributes:
      bart, bart_params: the student's BART; bart_text: its tokenizer.
      student, params: BART and the linears; None where there is only a BART.
      teacher, clip_params: CLIP; clip_text: its tokenizer; None where there is only a BART.
      configs: "bart" and "clip", as their directories have them.
      mesh: the devices that hold the parameters; batches are spread over them.
      config: what an export says of the student; None where there is only a BART.
      classifier: BART and the head of a classifier of texts, whose parameters are `params`, and classifier_config: what
        its export says of it; None where there is none.
      prompts: of questions and captions, `config.prompts` of the training run; others by `dataclasses.replace`.
      identity: where it comes from: {"directory", "step", "sha256" of the checkpoint, "inputs": sha256 of the files it
        began with, "preprocessing_sha256" of how pictures become pixels}.
    """

    bart: Bart
    bart_params: Params
    bart_text: BartText
    configs: dict[str, BartConfig | ClipConfig]
    mesh: Mesh
    student: Student | None = None
    params: Params | None = None
    teacher: Clip | None = None
    clip_params: Params | None = None
    clip_text: ClipText | None = None
    config: StudentConfig | None = None
    classifier: Classifier | None = None
    classifier_config: ClassifierConfig | None = None
    prompts: dict[str, str] = dataclasses.field(default_factory=lambda: dict(PROMPTS))
    identity: dict[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(
        cls,
        task: Task,
        params: Params,
        frozen: Frozen,
        mesh: Mesh,
        identity: dict[str, Any] | None = None,
        prompts: Mapping[str, str] = PROMPTS,
    ) -> VLKD:
        """What a task trains, with these parameters on `mesh`: a student, the BART of a text-only task, a classifier.

        Raises:
          UserError: the task trains none of them.
        """
        if "bart" not in task.configs:
            raise UserError("this run trains a CLIP, which can neither be asked nor exported here")
        bart = Bart(task.configs["bart"], dtype=task.module.dtype)
        common = {"bart": bart, "bart_text": task.encoder.bart_text, "configs": task.configs, "mesh": mesh}
        common["identity"] = dict(identity or {})
        if task.classifier is not None:
            of_head = {"classifier": task.module, "classifier_config": task.classifier}
            return cls(bart_params=params["bart"], params=params, **of_head, **common)
        if task.teacher is None:
            return cls(bart_params=params, **common)
        common["identity"]["preprocessing_sha256"] = _sha256_of(task.teacher.config.preprocessing)
        return cls(
            bart_params=params["bart"],
            student=task.module,
            params=params,
            teacher=task.teacher,
            clip_params=frozen["clip"],
            clip_text=task.encoder.clip_text,
            config=task.student,
            prompts=dict(prompts),
            **common,
        )

    @classmethod
    def from_pretrained(cls, name: str | Path | None = None, mesh: Mesh | None = None) -> VLKD:
        """The student that lies somewhere, ready to be used.

        Args:
          name: a directory that `vlkd export` wrote, the workdir of a training run, or `hf:OWNER/NAME`, an export on
            the Hugging Face hub, which is then downloaded. None: the student that comes with the package, which knows
            pictures of coloured shapes and nothing else; a line on standard error says so.
          mesh: the devices to use, as `sharding.make_mesh` gives them; default: one.

        Raises:
          UserError: nothing of these there, or a file that cannot be used.
        """
        if name is None:
            name = BUILTIN_STUDENT
            print(f"no model given: taking {name}, which knows pictures of coloured shapes alone", file=sys.stderr)
        if isinstance(name, str) and name.startswith((HUB, BUILTIN)):
            name = model_directory(name)
        if is_student(name):
            return cls.from_export(name, mesh)
        if not (locate(name) / CONFIG_FILE).is_file():
            raise UserError(
                f"{name}: no export and no run of training there; give the --output of vlkd export, the "
                "--workdir of vlkd train, or hf:OWNER/NAME"
            )
        return cls.from_run(name, mesh=mesh)

    @classmethod
    def from_run(
        cls,
        directory: str | Path,
        at_start: bool = False,
        clip: str | Path | None = None,
        bart: str | Path | None = None,
        mesh: Mesh | None = None,
    ) -> VLKD:
        """What a training run's newest checkpoint holds, or with `at_start` what its first step began with.

        Args:
          clip, bart: where the models of the run's start lie now, if not where it found them.
          mesh: the devices to use, as `sharding.make_mesh` gives them, whatever the run was trained on; default: one.

        Raises:
          UserError: no run there, no checkpoint yet, the models have moved or changed, or the run trains a CLIP.
        """
        from vlkd_jax.checkpoint import Checkpoints  # Orbax takes a second, and an export needs none of it
        from vlkd_jax.runs import load_run, run_config

        mesh = one_device() if mesh is None else mesh
        task, params, step = load_run(directory, clip, bart, mesh)
        layout, frozen_layout = (sharding.shardings(part, mesh) for part in task.abstract())
        if at_start:
            set_at_start = {name: value for name, value in params.items() if name in task.fixed}
            params, step = task.load_params(layout) | set_at_start, 0
        identity = {"directory": os.fspath(locate(directory)), "step": step, "inputs": read_inputs(directory)}
        if not at_start:
            with Checkpoints(locate(directory) / CHECKPOINTS) as checkpoints:
                identity["sha256"] = processes.on_first(functools.partial(checkpoints.sha256, step))
        prompts = run_config(directory).prompts
        return cls.of(task, params, task.load_frozen(frozen_layout), mesh, identity, prompts)

    @classmethod
    def from_pair(cls, clip: str | Path, bart: str | Path, mesh: Mesh | None = None, seed: int = 0) -> VLKD:
        """The student that two Hugging Face directories are before distillation: its two linears are random.

        Args:
          mesh: the devices to use; default: one.
          seed: of the linears.

        Raises:
          UserError: a directory that cannot be read.
        """
        mesh = one_device() if mesh is None else mesh
        given = {"clip": os.fspath(clip), "bart": os.fspath(bart), "seed": seed}
        config = with_absolute_paths(ConfigDict(with_defaults(given)))
        task = make_task(config)
        layout, frozen_layout = (sharding.shardings(part, mesh) for part in task.abstract())
        identity = {"clip": config.clip, "bart": config.bart, "seed": seed, "inputs": hash_inputs(config, MODELS)}
        return cls.of(task, task.load_params(layout), task.load_frozen(frozen_layout), mesh, identity)

    @classmethod
    def from_bart(cls, directory: str | Path, mesh: Mesh | None = None) -> VLKD:
        """A BART alone, of a Hugging Face directory: it reads no pictures. Raises UserError when it cannot be read."""
        mesh = one_device() if mesh is None else mesh
        config = with_absolute_paths(
            ConfigDict(with_defaults({"objective": "bart_denoise", "bart": os.fspath(directory)}))
        )
        task = make_task(config)
        identity = {"bart": config.bart, "inputs": hash_inputs(config, MODELS)}
        return cls.of(task, task.load_params(sharding.shardings(task.abstract()[0], mesh)), {}, mesh, identity)

    @classmethod
    def from_export(cls, directory: str | Path, mesh: Mesh | None = None) -> VLKD:
        """The student that `vlkd export` wrote. Raises UserError when a file cannot be used."""
        mesh, directory = one_device() if mesh is None else mesh, Path(directory)
        config = read_student_config(directory)
        bart_text, clip_text = BartText(directory), ClipText(directory / CLIP_TOKENIZER)
        shapes = parameter_shapes(config)
        layout = {name: sharding.shardings(shapes[name], mesh) for name in shapes}
        params = load_student(directory, layout)[1]
        student = config.module()
        return cls(
            bart=Bart(student.config),
            bart_params=params["student"]["bart"],
            bart_text=bart_text,
            configs={"bart": config.bart, "clip": config.clip},
            mesh=mesh,
            student=student,
            params=params["student"],
            teacher=Clip(config.clip),
            clip_params=params["clip"],
            clip_text=clip_text,
            config=config,
            prompts=read_prompts(directory),
            identity={
                "directory": os.fspath(directory.absolute()),
                "inputs": {"export": hash_directory(directory)},
                "preprocessing_sha256": _sha256_of(config.clip.preprocessing),
            },
        )

    def answer(
        self,
        images: Pictures,
        questions: str | Sequence[str],
        *,
        scores: bool = False,
        **options: Unpack[DecodingOptions],
    ) -> Said | list[Said]:
        """Zero-shot answers to questions about pictures.

        >>> model.answer("photo.jpg", "what color is the car?")
        'red'
        >>> model.answer("photo.jpg", ["what color is the car?", "is it day?"], scores=True)
        [Scored(text='red', score=-0.41), Scored(text='yes', score=-0.92)]

        Args:
          images: one picture or several: paths, PIL images, uint8 arrays [height, width, 3].
          questions: one or several. One picture has all of them, one question is asked about all pictures, otherwise
            each picture has its own.
          scores: give each answer with its log-likelihood, the sum over its tokens and `</s>`.
          **options: how an answer is chosen, the fields of `vlkd_jax.decoding.Decoding`: method ("greedy", "beam",
            "sample"), max_new_tokens (10), min_new_tokens, no_repeat_ngram, returns; beams, length_penalty,
            early_stopping; temperature, top_k, top_p, seed.

        Returns:
          For one picture and one question a text, otherwise a list of texts in order; with `scores` each is a
          `Scored(text, score)`; with `returns` above 1 each is a list of so many, the best first.

        Raises:
          UserError: numbers of pictures and questions that do not go together, a question that is too long, an option
            that there is not or that its method does not use.
          RecordError: a picture that cannot be read.
        """
        one = is_picture(images) and isinstance(questions, str)
        pictures, asked = paired(picture_list(images), [questions] if isinstance(questions, str) else list(questions))
        fields = [{"question": question} for question in asked]
        said = self._say(pictures, fields, "question", scores, {"max_new_tokens": 10, **options})
        return said[0] if one else said

    def caption(
        self, images: Pictures, *, scores: bool = False, **options: Unpack[DecodingOptions]
    ) -> Said | list[Said]:
        """Zero-shot captions of pictures, without their prompt.

        >>> model.caption("photo.jpg", method="beam", beams=5, returns=3)
        ['a red car on a street', 'a red car', 'a car that is parked']

        Args:
          images, scores, **options: as for `answer`; max_new_tokens is 20.

        Returns:
          For one picture a text, for several a list, as `answer` gives them.

        Raises:
          UserError: an option that there is not or that its method does not use.
          RecordError: a picture that cannot be read.
        """
        pictures = picture_list(images)
        said = self._say(pictures, [{} for _ in pictures], "caption", scores, {"max_new_tokens": 20, **options})
        return said[0] if is_picture(images) else said

    def generate_text(
        self, texts: str | Sequence[str], *, scores: bool = False, **options: Unpack[DecodingOptions]
    ) -> Said | list[Said]:
        """What the student's BART makes of texts alone: it writes each anew, with words in the place of `<mask>`.

        >>> model.generate_text("the car is <mask>.")
        'the car is red.'

        Args:
          texts: one or several; a literal `<mask>` in one is the mask, other special tokens are plain text.
          scores, **options: as for `answer`; max_new_tokens is 60.

        Returns:
          For one text a text, for several a list, as `answer` gives them.

        Raises:
          UserError: a text that is too long, an option that there is not or that its method does not use.
        """
        listed = [texts] if isinstance(texts, str) else list(texts)
        room = self.bart.config.max_position_embeddings - 2
        decoding = decoding_of({"max_new_tokens": min(60, room), **options})
        requests = [predict.Request(with_masks(self.bart_text, text), []) for text in listed]
        said = self._texts(requests, decoding, scores)
        return said[0] if isinstance(texts, str) else said

    def rank(
        self, images: Pictures, texts: Sequence[str], questions: str | Sequence[str] | None = None
    ) -> list[Scored] | list[list[Scored]]:
        """Texts in the order in which they fit pictures, the best first.

        >>> model.rank("photo.jpg", ["a red car", "a dog"])
        [Scored(text='a red car', score=0.31), Scored(text='a dog', score=0.12)]
        >>> model.rank("photo.jpg", ["yes", "no"], "is there a car?")
        [Scored(text='yes', score=-0.2), Scored(text='no', score=-1.9)]

        Args:
          images: as for `answer`.
          texts: what to choose from, for all pictures.
          questions: with one or several, as for `answer`, texts are answers and their scores log-likelihoods; without,
            scores are cosines of the picture's and the texts' embeddings.

        Returns:
          For one picture (and one question) a list of `Scored(text, score)`, otherwise a list of such lists.

        Raises:
          UserError: no text, an empty or too long one, numbers that do not go together.
          RecordError: a picture that cannot be read.
        """
        pictures, texts = picture_list(images), list(texts)
        if not texts:
            raise UserError("no texts to choose from; give one at least")
        if questions is None:
            one = is_picture(images)
            scores = self.embed_images(pictures) @ self.embed_texts(texts).T if pictures else []
        else:
            one = is_picture(images) and isinstance(questions, str)
            pictures, asked = paired(pictures, [questions] if isinstance(questions, str) else list(questions))
            self.needs_pictures()
            fields = [{"question": question} for question in asked]
            requests = prompts(self.bart_text, self.prompts, pictures, fields, "question")
            scores = predict.candidate_scores(self, requests, texts, _bucket(len(pictures)))
        ranked = [
            [Scored(texts[k], float(row[k])) for k in np.argsort(-np.asarray(row), kind="stable")] for row in scores
        ]
        return ranked[0] if one else ranked

    def attention(self, image: Picture, question: str, answer: str) -> Attended:
        """Which parts of a picture each token of an answer was read from, by the decoder's cross-attention.

        Weights are the mean over layers and heads: where the decoder looked, which need not be why it answered so.

        Args:
          answer: such as `answer` gave; any other is looked at too.

        Raises:
          UserError: a model whose image is one token, a text that is too long.
          RecordError: a picture that cannot be read.
        """
        self.needs_pictures()
        (request,) = prompts(self.bart_text, self.prompts, [image], [{"question": question}], "question")
        ids = self.bart_text.encode(f" {answer.strip()}") if answer.strip() else []
        tokens = [*(self.bart_text.decode([token]) for token in ids), "</s>"]
        seen = resize_and_crop(request.image, self.teacher.config.preprocessing)
        return attended(tokens, predict.attention(self, request, ids), seen)

    def embed_images(self, images: Pictures) -> np.ndarray:
        """The teacher's image embeddings [n, E], float32, L2-normalised; one picture is a row too.

        Raises:
          RecordError: a picture that cannot be read.
        """
        self.needs_pictures()
        pictures = picture_list(images)
        if not pictures:
            return np.zeros((0, self.teacher.config.projection_dim), np.float32)
        return predict.embed_images(self, map(open_picture, pictures), _bucket(len(pictures)))

    def embed_texts(self, texts: str | Sequence[str]) -> np.ndarray:
        """The student's sentence embeddings [n, E], float32, L2-normalised; one text is a row too.

        Raises:
          UserError: a text that is too long.
        """
        self.needs_pictures()
        listed = [texts] if isinstance(texts, str) else list(texts)
        if not listed:
            return np.zeros((0, self.teacher.config.projection_dim), np.float32)
        return predict.embed_texts(self, listed, _bucket(len(listed)))

    def needs_pictures(self) -> None:
        """Raises UserError where there is no student, which alone reads pictures."""
        if self.student is None:
            raise UserError(
                f"{self.identity.get('directory', 'this model')}: a text model, which reads no pictures; give a student"
            )

    def save_pretrained(self, directory: str | Path, dtype: str = "float32") -> None:
        """Writes the student as Hugging Face directories, as `vlkd export` does; `from_pretrained` reads them.

        Args:
          directory: new or empty.
          dtype: of the weights: float32, bfloat16 or float16.

        Raises:
          UserError: something lies there already, or it cannot be written.
        """
        from vlkd_jax.hf.export import export  # which imports this module

        export(self, Path(directory), dtype)

    def push_to_hub(self, repository: str, dtype: str = "float32", private: bool = True) -> str:
        """Uploads what `save_pretrained` writes to `OWNER/NAME` on the Hugging Face hub; returns its address.

        You must be logged in (`hf auth login`). Nothing else here uploads anything.

        Raises:
          UserError: no login, no such owner, or no answer.
        """
        from vlkd_jax.hf.hub import upload

        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(Path(folder) / "export", dtype)
            return upload(Path(folder) / "export", repository, private)

    def _say(
        self, pictures: list[Picture], fields: list[dict[str, str]], name: str, scores: bool, options: DecodingOptions
    ) -> list[Said]:
        self.needs_pictures()
        requests = prompts(self.bart_text, self.prompts, pictures, fields, name)
        return self._texts(requests, decoding_of(options), scores, len(pictures))

    def _texts(
        self, requests: Iterable[predict.Request], decoding: Decoding, scores: bool, count: int | None = None
    ) -> list[Said]:
        count = len(requests) if count is None else count
        generate = predict.generate_scored if scores else predict.generate
        rows = generate(self, requests, decoding, _bucket(count))
        return [list(row) if decoding.returns > 1 else row[0] for row in rows]


def _sha256_of(preprocessing: Preprocessing) -> str:
    return hashlib.sha256(json.dumps(preprocessing.to_hf(), sort_keys=True).encode()).hexdigest()


def _bucket(count: int) -> int:
    """Rows of a batch for so many items: few sizes, so that few are compiled."""
    return min(predict.BATCH_SIZE, 1 << max(count - 1, 0).bit_length())
