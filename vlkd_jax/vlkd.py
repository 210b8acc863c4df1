"""`VLKD`: a usable student, with everything that answering, evaluating and exporting it takes."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict
from PIL import Image

from vlkd_jax import predict, processes, sharding
from vlkd_jax.checkpoint import Checkpoints
from vlkd_jax.config import with_defaults
from vlkd_jax.configs.suites import CAPTION, QUESTION
from vlkd_jax.data.images import open_image, to_rgb
from vlkd_jax.data.sources import read_json
from vlkd_jax.data.text import BartText, ClipText
from vlkd_jax.decoding import Decoding
from vlkd_jax.errors import UserError
from vlkd_jax.hf.names import parameter_shapes
from vlkd_jax.hf.student import CLIP_TOKENIZER, load_student, read_student_config
from vlkd_jax.identity import (
    MODELS,
    check_inputs,
    hash_directory,
    hash_inputs,
    kept_model,
    read_inputs,
    with_absolute_paths,
)
from vlkd_jax.models.bart import Bart
from vlkd_jax.models.clip import Clip
from vlkd_jax.models.configs import BartConfig, ClipConfig, Preprocessing
from vlkd_jax.models.vlkd import Student, StudentConfig
from vlkd_jax.sharding import one_device
from vlkd_jax.storage import locate
from vlkd_jax.tasks import make_task
from vlkd_jax.tasks.task import Frozen, Task
from vlkd_jax.types import Params
from vlkd_jax.workdir import CONFIG_FILE

Picture = str | Path | Image.Image | np.ndarray
"""A path, a PIL image, or uint8 [height, width, 3]."""


@dataclasses.dataclass(frozen=True)
class VLKD:
    """A student with its teacher, on the devices.

    >>> model = VLKD.from_run("runs/shapes")
    >>> model.answer(["photo.jpg"], ["what color is the car?"])
    ['red']

    Attributes:
      bart, bart_params: the student's BART; bart_text: its tokenizer.
      student, params: BART and the linears; None where there is only a BART.
      teacher, clip_params: CLIP; clip_text: its tokenizer; None where there is only a BART.
      configs: "bart" and "clip", as their directories have them.
      mesh: the devices that hold the parameters; batches are spread over them.
      config: what an export says of the student; None where there is only a BART.
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
    identity: dict[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, task: Task, params: Params, frozen: Frozen, mesh: Mesh, identity: dict[str, Any] | None = None) -> VLKD:
        """What a task trains, with these parameters on `mesh`: a student, or the BART of a text-only task.

        Raises:
          UserError: the task trains neither.
        """
        if "bart" not in task.configs:
            raise UserError("this run trains a CLIP; only a run of objective vlkd or bart_denoise can be used here")
        bart = Bart(task.configs["bart"], dtype=task.module.dtype)
        common = {"bart": bart, "bart_text": task.encoder.bart_text, "configs": task.configs, "mesh": mesh}
        common["identity"] = dict(identity or {})
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
            **common,
        )

    @classmethod
    def from_run(
        cls,
        directory: str | Path,
        at_start: bool = False,
        clip: str | Path | None = None,
        bart: str | Path | None = None,
        mesh: Mesh | None = None,
    ) -> VLKD:
        """The student of a training run's newest checkpoint; with `at_start` as it was before the first step.

        Args:
          clip, bart: where the models of the run's start lie now, if not where it found them.
          mesh: the devices to use, as `sharding.make_mesh` gives them, whatever the run was trained on; default: one.

        Raises:
          UserError: no run there, no checkpoint yet, the models have moved or changed, or the run is not of objective
            vlkd.
        """
        mesh = one_device() if mesh is None else mesh
        task, params, step = load_run(directory, clip, bart, mesh)
        if task.teacher is None:
            raise UserError(f"{directory}: that run trains no student; give a run of objective vlkd")
        layout, frozen_layout = (sharding.shardings(part, mesh) for part in task.abstract())
        if at_start:
            set_at_start = {name: value for name, value in params.items() if name in task.fixed}
            params, step = task.load_params(layout) | set_at_start, 0
        identity = {"directory": os.fspath(locate(directory)), "step": step, "inputs": read_inputs(directory)}
        if not at_start:
            with Checkpoints(locate(directory) / "checkpoints") as checkpoints:
                identity["sha256"] = processes.on_first(functools.partial(checkpoints.sha256, step))
        return cls.of(task, params, task.load_frozen(frozen_layout), mesh, identity)

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
            identity={
                "directory": os.fspath(directory.absolute()),
                "inputs": {"export": hash_directory(directory)},
                "preprocessing_sha256": _sha256_of(config.clip.preprocessing),
            },
        )

    def answer(self, images: Sequence[Picture], questions: Sequence[str], max_new_tokens: int = 10) -> list[str]:
        """Zero-shot answers, one for each picture and its question.

        Raises:
          UserError: a question that is too long.
          RecordError: a picture that cannot be read.
        """
        return self._generate(images, ({"question": question} for question in questions), "question", max_new_tokens)

    def caption(self, images: Sequence[Picture], max_new_tokens: int = 20) -> list[str]:
        """Zero-shot captions, without the prompt `a picture of`. Raises RecordError for a picture it cannot read."""
        return self._generate(images, ({} for _ in images), "caption", max_new_tokens)

    def _generate(self, images: Iterable[Picture], fields: Iterable[dict], name: str, max_new_tokens: int) -> list[str]:
        prompts = {"question": QUESTION, "caption": CAPTION}[name]
        encoder, decoder = prompts[f"{name}_encoder"], prompts[f"{name}_decoder"]
        requests = (
            predict.Request(
                self.bart_text.encode_template(encoder, **values),
                self.bart_text.encode_template(decoder, **values),
                image=open_picture(image),
            )
            for image, values in zip(images, fields, strict=True)
        )
        return [text for (text,) in predict.generate(self, requests, Decoding(max_new_tokens=max_new_tokens))]

    def embed_images(self, images: Iterable[Picture]) -> np.ndarray:
        """The teacher's image embeddings [n, E], L2-normalised. Raises RecordError for a picture it cannot read."""
        return predict.embed_images(self, map(open_picture, images))

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """The student's sentence embeddings [n, E], L2-normalised. Raises UserError for a text that is too long."""
        return predict.embed_texts(self, texts)


def _sha256_of(preprocessing: Preprocessing) -> str:
    return hashlib.sha256(json.dumps(preprocessing.to_hf(), sort_keys=True).encode()).hexdigest()


def open_picture(picture: Picture) -> Image.Image | np.ndarray:
    """A picture as `resize_and_crop` takes it. Raises RecordError when it cannot be read."""
    if isinstance(picture, Image.Image):
        return to_rgb(picture)
    return picture if isinstance(picture, np.ndarray) else open_image(picture)


def run_config(directory: str | Path) -> ConfigDict:
    """The configuration of a training run. Raises UserError when there is none."""
    path = locate(directory) / CONFIG_FILE
    if not path.is_file():
        raise UserError(f"{directory}: no {CONFIG_FILE} there; it is no --workdir of a training run")
    return ConfigDict(with_defaults(read_json(path)))


def load_run(
    directory: str | Path,
    clip: str | Path | None = None,
    bart: str | Path | None = None,
    mesh: Mesh | None = None,
) -> tuple[Task, Params, int]:
    """(task, trained parameters, step) of a training run's newest checkpoint; its optimizer is not read.

    Args:
      clip, bart: where the models of the run's start lie now, if not where it found them.
      mesh: as for `VLKD.from_run`.

    Raises:
      UserError: no run there, no checkpoint yet, or the models it names have moved or changed.
    """
    config = run_config(directory)
    for name, given in (("clip", clip), ("bart", bart)):
        config[name] = str(given or kept_model(directory, name) or config[name])
    check_inputs(directory, config, hash_inputs(config, MODELS), MODELS)
    task = make_task(config)
    params = sharding.laid_out(task.abstract()[0], one_device() if mesh is None else mesh)
    with Checkpoints(locate(directory) / "checkpoints") as checkpoints:
        step, parts, _ = checkpoints.restore({"params": params})
    return task, parts["params"], step
