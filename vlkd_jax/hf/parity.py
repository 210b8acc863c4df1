"""Compares an export in PyTorch with the same files in JAX: `python -m vlkd_jax.hf.parity HF [--json]`.

Tensors, the parts of both models, the three losses, and the token ids of `PROMPTS` prompts about pictures of the
built-in world. Writes HF/parity.json and the model card's section of it. PyTorch runs the package's own
`modeling_vlkd`, never code that lies in HF.
"""

from __future__ import annotations

import dataclasses
import json
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np

from vlkd_jax import console, entry
from vlkd_jax.commands import COMMANDS
from vlkd_jax.configs.suites import CAPTION, QUESTION
from vlkd_jax.console import say
from vlkd_jax.data.images import resize_and_crop
from vlkd_jax.data.pipeline import Encoder
from vlkd_jax.decoding import Decoding
from vlkd_jax.errors import UserError
from vlkd_jax.evaluate import circumstances
from vlkd_jax.hf import names
from vlkd_jax.hf.card import with_parity
from vlkd_jax.hf.files import CONFIG
from vlkd_jax.hf.save import write_json
from vlkd_jax.hf.student import MODELING, is_student
from vlkd_jax.losses import finish
from vlkd_jax.models.clip import normalize_pixels
from vlkd_jax.models.vlkd import Student
from vlkd_jax.predict import Request, generate_ids
from vlkd_jax.runtime import tell
from vlkd_jax.shapes import world
from vlkd_jax.shapes.sources import ShapesPairs
from vlkd_jax.storage import write_atomic
from vlkd_jax.tasks.distill import Distillation, distill_terms, teacher_outputs
from vlkd_jax.types import Array, Batch
from vlkd_jax.vlkd import VLKD

PARITY = "parity.json"
PROMPTS = 100
PAIRS = 8
"""Image-caption pairs that parts and losses are compared on."""
ROWS = 20
"""Prompts of a padded batch."""
NEW_TOKENS = 16
METHODS = {"greedy": Decoding(max_new_tokens=NEW_TOKENS), "beam": Decoding("beam", NEW_TOKENS, beams=5)}
TOLERANCE = 1e-4
"""Of float32 sums in another order, relative to the largest number of a part where that is above 1."""


@dataclasses.dataclass(frozen=True)
class Prompts:
    """What both sides are asked: questions first, then captions.

    Attributes:
      images: uint8 [height, width, 3] of each prompt.
      questions: of the first of them.
    """

    images: list[np.ndarray]
    questions: list[str]

    def requests(self, model: VLKD) -> list[Request]:
        """As the predict functions take them."""
        templates = [
            (QUESTION["question_encoder"], QUESTION["question_decoder"], {"question": q}) for q in self.questions
        ]
        captions = len(self.images) - len(self.questions)
        templates += [(CAPTION["caption_encoder"], CAPTION["caption_decoder"], {})] * captions
        encode = model.bart_text.encode_template
        return [
            Request(encode(source, **fields), encode(prefix, **fields), image=image)
            for image, (source, prefix, fields) in zip(self.images, templates, strict=True)
        ]


def make_prompts(count: int = PROMPTS) -> Prompts:
    """Half questions, half captions to write."""
    asked = list(world.question_set(0, "validation", count // 2))
    images = [world.render(scene) for _, scene, _ in asked]
    images += [ShapesPairs(0, "validation")[i].image for i in range(count - len(asked))]
    return Prompts(images, [question.question for _, _, question in asked])


def measure(directory: Path, prompts: Prompts) -> dict[str, Any]:
    """What parity.json holds; `directory` is an export.

    Raises:
      UserError: a file of it cannot be used.
    """
    import torch
    from transformers.utils import logging

    from vlkd_jax.hf.modeling_vlkd import VLKDForConditionalGeneration, VLKDProcessor

    logging.disable_progress_bar()
    with jax.default_matmul_precision("highest"), torch.inference_mode():
        model = VLKD.from_export(directory)
        twin = VLKDForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval()
        processor = VLKDProcessor.from_pretrained(directory)
        tensors = _tensor_differences(directory, model, twin)
        say(f"{len(tensors)} tensors compared")
        batch = _batch(model)
        ours, theirs = _jax_parts(model, batch), _torch_parts(model, twin, batch)
        parts = {name: _difference(ours[name], theirs[name]) for name in ours}
        ours, theirs = _jax_losses(model, batch), _torch_losses(model, twin, batch)
        losses = {name: {"jax": ours[name], "torch": theirs[name]} for name in ours}
        for name in losses:
            losses[name] |= _difference(np.float32(ours[name]), np.float32(theirs[name]))
        say(f"{len(parts)} parts and {len(losses)} losses compared")
        equal, inputs, pixels = _compare_texts(model, twin, processor, prompts)
    compared = [*parts.values(), *losses.values()]
    return {
        "prompts": len(prompts.images),
        **{f"{method}_equal": count for method, count in equal.items()},
        "prompt_ids_equal": inputs,
        "max_abs_difference": max([*tensors.values(), *(each["max_abs"] for each in compared)]),
        "max_relative_difference": max(each["relative"] for each in compared),
        "processor_max_abs_difference": pixels,
        "tensors": {"n": len(tensors), "different": sorted(name for name, gap in tensors.items() if gap)},
        "parts": parts,
        "losses": losses,
        "decoding": {method: decoding.record() for method, decoding in METHODS.items()},
        "pairs": PAIRS,
        "dtype": str(twin.dtype).removeprefix("torch."),
        **circumstances(0),
        "torch": torch.__version__,
        "safetensors": version("safetensors"),
    }


def faults(parity: dict[str, Any]) -> list[str]:
    """What is not as it should be; empty: both sides are the same model."""
    wrong = [f"tensor {name} differs" for name in parity["tensors"]["different"]]
    for kind in ("parts", "losses"):
        wrong += [
            f"{kind[:-1].replace('losse', 'loss')} {name} differs by {gap['max_abs']:.2g}"
            for name, gap in parity[kind].items()
            if not gap["relative"] <= TOLERANCE
        ]
    for what in ("greedy_equal", "beam_equal", "prompt_ids_equal"):
        if parity[what] < parity["prompts"]:
            wrong.append(f"{what} is {parity[what]} of {parity['prompts']}")
    return wrong


def _difference(ours: np.ndarray, theirs: np.ndarray) -> dict[str, float]:
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if ours.shape != theirs.shape:
        raise ValueError(f"shapes {ours.shape} and {theirs.shape}")
    gap = float(np.abs(ours - theirs).max())
    return {"max_abs": gap, "relative": gap / max(1.0, float(np.abs(theirs).max()))}


def _tensor_differences(directory: Path, model: VLKD, twin: Any) -> dict[str, float]:
    """The largest difference in each tensor, of the student and, as bart/..., of the stock BART beside it."""
    from transformers import BartForConditionalGeneration

    stock = BartForConditionalGeneration.from_pretrained(directory / "bart", dtype=twin.dtype)
    params = jax.device_get({"student": model.params, "clip": model.clip_params})
    differences = {}
    for prefix, rows, tree, module in (
        ("", names.student_rows(model.config), params, twin),
        ("bart/", names.bart_rows(model.config.bart), params["student"]["bart"], stock),
    ):
        state = {name: value.numpy() for name, value in module.state_dict().items()}
        for name, value in names.to_hf(rows, tree).items():
            differences[prefix + name] = _difference(value, state[_in_module(name, state)])["max_abs"]
    return differences


def _in_module(name: str, state: dict[str, Any]) -> str:
    """A tensor's name in memory: some releases nest CLIP's towers once more than the file does."""
    for tower in ("vision_model", "text_model"):
        nested = name.replace(f"{tower}.", f"{tower}.{tower}.", 1)
        if nested in state:
            return nested
    return name


def _batch(model: VLKD) -> Batch:
    """Pairs of the built-in world as training reads them."""
    positions = model.config.bart.max_position_embeddings
    encoder = Encoder(
        clip_text=model.clip_text,
        clip_length=model.config.clip.text.max_position_embeddings,
        bart_text=model.bart_text,
        text_length=min(64, positions),
        source_length=min(64, positions),
        preprocessing=model.config.clip.preprocessing,
        truncate=True,
    )
    source, rng = ShapesPairs(0, "validation"), np.random.default_rng(0)
    rows = [encoder(source[i], rng) for i in range(PAIRS)]
    return Batch(**{name: np.stack([row[name] for row in rows]) for name in rows[0]})


def _distillation(model: VLKD) -> Distillation:
    config = model.config
    return Distillation(
        model.student,
        model.teacher,
        config.image_tokens,
        unit=config.ttdm == "normalised",
        learned_scale=config.contrastive_scale == "learned",
        pull=False,
    )


def _jax_parts(model: VLKD, batch: Batch) -> dict[str, np.ndarray]:
    """Every part's output; where a mask says padding, zero."""

    def compute(params, clip_params):
        teacher = teacher_outputs(model.teacher, clip_params, batch, model.config.image_tokens)

        def read(student: Student) -> dict[str, Array]:
            prefix = student.image_prefix(teacher.tokens)
            clean = student.encode(batch.text_ids, batch.text_mask)
            corrupted = student.encode(batch.source_ids, batch.source_mask)
            logits = student.decode_logits(batch.text_ids, *student.memory(prefix, corrupted, batch.source_mask))
            return {
                "image tokens": teacher.tokens,
                "image embedding of the teacher": teacher.image,
                "text embedding of the teacher": teacher.text,
                "image prefix": prefix,
                "encoder states": clean * batch.text_mask[..., None],
                "sentence embedding": student.embed_sentence(clean, batch.text_mask),
                "logits": logits * batch.target_mask[..., None],
            }

        return model.student.apply({"params": params}, method=read)

    return jax.device_get(jax.jit(compute)(model.params, model.clip_params))


def _torch_inputs(model: VLKD, batch: Batch) -> dict[str, Any]:
    import torch

    fields = ("clip_ids", "clip_mask", "text_ids", "text_mask", "source_ids", "source_mask", "target_mask")
    inputs = {name: torch.from_numpy(getattr(batch, name)).long() for name in fields}
    return inputs | {"pixel_values": _torch_pixels(model, batch.pixels)}


def _torch_pixels(model: VLKD, pixels: np.ndarray) -> Any:
    import torch

    normalised = np.array(normalize_pixels(pixels, model.config.clip.preprocessing))
    return torch.from_numpy(normalised).permute(0, 3, 1, 2).contiguous()


def _torch_parts(model: VLKD, twin: Any, batch: Batch) -> dict[str, np.ndarray]:
    inputs = _torch_inputs(model, batch)
    encode = twin.bart.model.encoder
    clean = encode(input_ids=inputs["text_ids"], attention_mask=inputs["text_mask"]).last_hidden_state
    logits = _torch_forward(twin, inputs).logits
    parts = {
        "image tokens": twin.image_tokens(inputs["pixel_values"]),
        "image embedding of the teacher": twin.embed_images(inputs["pixel_values"]),
        "text embedding of the teacher": _torch_text_embedding(twin, inputs),
        "image prefix": twin.image_prefix(inputs["pixel_values"]),
        "encoder states": clean * inputs["text_mask"][..., None],
        "sentence embedding": twin.embed_texts(inputs["text_ids"], inputs["text_mask"]),
        "logits": logits * inputs["target_mask"][..., None],
    }
    return {name: value.numpy() for name, value in parts.items()}


def _torch_forward(twin: Any, inputs: dict[str, Any]) -> Any:
    return twin(
        pixel_values=inputs["pixel_values"],
        input_ids=inputs["source_ids"],
        attention_mask=inputs["source_mask"],
        labels=inputs["text_ids"].masked_fill(inputs["target_mask"] == 0, -100),
    )


def _torch_text_embedding(twin: Any, inputs: dict[str, Any]) -> Any:
    import torch

    pooled = twin.clip.text_model(inputs["clip_ids"], attention_mask=inputs["clip_mask"]).pooler_output
    return torch.nn.functional.normalize(twin.clip.text_projection(pooled).float(), dim=-1)


def _jax_losses(model: VLKD, batch: Batch) -> dict[str, float]:
    def compute(params, clip_params):
        terms = finish(distill_terms(_distillation(model), params, {"clip": clip_params}, batch, None))
        return {name: terms[name][0] / terms[name][1] for name in ("ttdm", "itcl", "icti")}

    return {name: float(value) for name, value in jax.jit(compute)(model.params, model.clip_params).items()}


def _torch_losses(model: VLKD, twin: Any, batch: Batch) -> dict[str, float]:
    """The same three as a reader of the paper would write them: means, whole matrices of logits."""
    import torch
    from torch.nn.functional import cross_entropy

    inputs, config = _torch_inputs(model, batch), model.config
    text, image = _torch_text_embedding(twin, inputs), twin.embed_images(inputs["pixel_values"])
    sentence = twin.embed_texts(inputs["text_ids"], inputs["text_mask"])
    near = twin.embed_texts(inputs["text_ids"], inputs["text_mask"], normalize=config.ttdm == "normalised")
    scale = (twin if config.contrastive_scale == "learned" else twin.clip).logit_scale.exp()
    logits, pairs = scale * image @ sentence.T, torch.arange(len(image))
    losses = {
        "ttdm": (near - text).square().sum(-1).mean(),
        "itcl": (cross_entropy(logits, pairs) + cross_entropy(logits.T, pairs)) / 2,
        "icti": _torch_forward(twin, inputs).loss,
    }
    return {name: float(value) for name, value in losses.items()}


def _compare_texts(model: VLKD, twin: Any, processor: Any, prompts: Prompts) -> tuple[dict[str, int], int, float]:
    """(prompts with the same new tokens by method, prompts with the same input tokens, difference of the pixels).

    PyTorch writes each text twice: with its neighbours, padded, and alone.
    """
    requests = prompts.requests(model)
    asked = len(prompts.questions)
    inputs = _by_row(processor(images=prompts.images[:asked], questions=prompts.questions))
    inputs += _by_row(processor(images=prompts.images[asked:]))
    first = [model.config.bart.decoder_start_token_id, model.bart_text.bos]
    same_inputs = sum(
        row["input_ids"].tolist() == model.bart_text.wrap(request.source)
        and row["decoder_input_ids"].tolist() == first + request.prefix
        for row, request in zip(inputs, requests, strict=True)
    )
    preprocessing, pixels = model.config.clip.preprocessing, 0.0
    for row, image in zip(inputs, prompts.images, strict=True):
        ours = _torch_pixels(model, resize_and_crop(image, preprocessing)[None])[0]
        pixels = max(pixels, float((row["pixel_values"] - ours).abs().max()))
        row["pixel_values"] = ours
    equal = {}
    for method, decoding in METHODS.items():
        ours = [ids[0] for ids in generate_ids(model, requests, decoding, ROWS)]
        options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "num_beams": 1}
        options |= {"num_beams": decoding.beams} if method == "beam" else {}
        padded = [ids for k in range(0, len(inputs), ROWS) for ids in _torch_ids(twin, inputs[k : k + ROWS], options)]
        say(f"{method}: {len(padded)} prompts in batches, next each by itself")
        alone = [_torch_ids(twin, [row], options)[0] for row in inputs]
        rows = zip(ours, padded, alone, strict=True)
        equal[method] = sum(np.array_equal(a, b) and np.array_equal(a, c) for a, b, c in rows)
        say(f"{method}: {equal[method]} of {len(inputs)} prompts have the same tokens")
    return equal, same_inputs, pixels


def _by_row(inputs: Any) -> list[dict[str, Any]]:
    """The processor's output cut into rows, without their padding."""
    return [
        {
            "pixel_values": inputs["pixel_values"][k],
            "input_ids": inputs["input_ids"][k][inputs["attention_mask"][k] == 1],
            "decoder_input_ids": inputs["decoder_input_ids"][k][inputs["decoder_attention_mask"][k] == 1],
        }
        for k in range(len(inputs["input_ids"]))
    ]


def _torch_ids(twin: Any, rows: list[dict[str, Any]], options: dict[str, Any]) -> list[np.ndarray]:
    """New ids of each row [NEW_TOKENS], padded."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    pad = twin.config.bart_config.pad_token_id
    inputs = {"pixel_values": torch.stack([row["pixel_values"] for row in rows])}
    for name, mask in (("input_ids", "attention_mask"), ("decoder_input_ids", "decoder_attention_mask")):
        inputs[name] = pad_sequence([row[name] for row in rows], batch_first=True, padding_value=pad)
        ones = [torch.ones_like(row[name]) for row in rows]
        inputs[mask] = pad_sequence(ones, batch_first=True)
    ids = np.full((len(rows), NEW_TOKENS), pad)
    new = twin.generate(**inputs, **options).numpy()
    ids[:, : new.shape[1]] = new
    return list(ids)


def main(values: SimpleNamespace) -> None:
    """Entry point."""
    directory = Path(values.hf)
    if not is_student(directory):
        raise UserError(f"{directory / CONFIG}: not an exported student; vlkd export writes one")
    if find_spec("torch") is None:
        raise UserError("vlkd parity needs torch, which is not installed: pip install torch")
    with console.aside(values.json):
        parity = measure(directory, make_prompts())
    write_json(directory / PARITY, parity)
    card = directory / "README.md"
    if card.is_file():
        write_atomic(card, with_parity(card.read_text(encoding="utf-8"), parity).encode())
    code = directory / f"{MODELING}.py"
    wrong = faults(parity)
    if not code.is_file() or code.read_bytes() != Path(__file__).with_name(f"{MODELING}.py").read_bytes():
        wrong.append(f"{code} is not the code of this package, which was compared")
    tell(json.dumps(parity) if values.json else _table(parity))
    if wrong:
        raise UserError(f"{directory}: PyTorch and JAX differ: {'; '.join(wrong)}")


def _table(parity: dict[str, Any]) -> str:
    rows = [(f"{parity['tensors']['n']} tensors, those that differ", str(len(parity["tensors"]["different"])))]
    for kind in ("parts", "losses"):
        rows += [(name, f"{gap['max_abs']:.2g}") for name, gap in parity[kind].items()]
    rows += [(f"prompts with the same tokens, {m}", f"{parity[f'{m}_equal']}/{parity['prompts']}") for m in METHODS]
    return console.table(rows, ("", "largest difference, or count"))


if __name__ == "__main__":
    entry.run(main, COMMANDS["parity"])
