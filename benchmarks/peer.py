"""The same distillation in PyTorch, of Hugging Face's modules: what the benchmarks compare with.

Written to be fast: SDPA attention, fused AdamW, a bfloat16 teacher without gradients, the student under autocast, both
texts in one encoder call. The teacher runs under `no_grad`: tensors of `inference_mode` cannot be kept for the
student's gradient.
"""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from transformers import BartForConditionalGeneration, CLIPModel
from transformers.modeling_outputs import BaseModelOutput

from vlkd_jax.decoding import Decoding
from vlkd_jax.models.preprocessing import Preprocessing
from vlkd_jax.optim import MAX_LOGIT_SCALE

Tensors = dict[str, torch.Tensor]


def tensors(arrays: dict[str, np.ndarray | None], device: torch.device) -> Tensors:
    """The arrays of a batch or of prompts by their names; ids are int64, as torch indexes with."""
    values = {name: torch.tensor(value, device=device) for name, value in arrays.items() if value is not None}
    return {name: value.long() if name.endswith("ids") else value for name, value in values.items()}


class Teacher(torch.nn.Module):
    """CLIP without gradients, all of it in `dtype`: pixels and captions to tokens [B, N, E] and embeddings [B, E]."""

    def __init__(self, directory: Path, dtype: torch.dtype, preprocessing: Preprocessing):
        super().__init__()
        self.clip = CLIPModel.from_pretrained(directory, dtype=dtype, attn_implementation="sdpa").eval()
        self.clip.requires_grad_(False)
        self.scale = preprocessing.rescale
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(getattr(preprocessing, name)))

    def image_tokens(self, pixels: torch.Tensor) -> torch.Tensor:
        """Tokens [B, N, E] of uint8 [B, height, width, 3]; channels stay last in memory."""
        normalised = ((pixels * self.scale - self.mean) / self.std).to(self.clip.dtype)
        states = self.clip.vision_model(pixel_values=normalised.permute(0, 3, 1, 2)).last_hidden_state
        return self.clip.visual_projection(self.clip.vision_model.post_layernorm(states))

    def text(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        pooled = self.clip.text_model(input_ids=ids, attention_mask=mask).pooler_output
        return F.normalize(self.clip.text_projection(pooled).float(), dim=-1)


class Student(torch.nn.Module):
    """BART, two bias-free linears and the logit scale; float32 parameters."""

    def __init__(self, directory: Path, sentence: torch.Tensor, image: torch.Tensor, logit_scale: float):
        """`sentence` [E, D] and `image` [D, E]: the linears' weights."""
        super().__init__()
        self.bart = BartForConditionalGeneration.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="sdpa"
        )
        self.sentence_projection = torch.nn.Parameter(sentence.clone())
        self.image_projection = torch.nn.Parameter(image.clone())
        self.logit_scale = torch.nn.Parameter(torch.tensor(logit_scale))
        self.infilling = infilling

    def forward(self, batch: Tensors, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Sentence embeddings [B, E] and the infilling loss."""
        ids = torch.cat([batch["text_ids"], batch["source_ids"]])
        mask = torch.cat([batch["text_mask"], batch["source_mask"]])
        clean, source = self.bart.model.encoder(ids, attention_mask=mask).last_hidden_state.chunk(2)
        ends = batch["text_mask"].sum(1) - 1
        with torch.autocast(ids.device.type, enabled=False):
            state = clean[torch.arange(len(ends), device=ends.device), ends].float()
            sentence = F.normalize(F.linear(state, self.sentence_projection), dim=-1)
        memory, memory_mask = join(F.linear(tokens, self.image_projection), source, batch["source_mask"])
        inputs = batch["text_ids"].roll(1, 1)
        inputs[:, 0] = self.bart.config.decoder_start_token_id
        logits = self.bart(
            encoder_outputs=BaseModelOutput(last_hidden_state=memory),
            attention_mask=memory_mask,
            decoder_input_ids=inputs,
            use_cache=False,
        ).logits
        targets = batch["text_ids"].masked_fill(~batch["target_mask"], -100)
        return sentence, self.infilling(logits, targets)


def join(prefix: torch.Tensor, hidden: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Image prefix before text states, and their mask."""
    keep = torch.ones(prefix.shape[:2], dtype=torch.bool, device=mask.device)
    return torch.cat([prefix.to(hidden.dtype), hidden], 1), torch.cat([keep, mask], 1)


def infilling(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """`icti` of logits [B, T, V] and targets [B, T], which are -100 where they do not count."""
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def losses(teacher: Teacher, student: Student, batch: Tensors, autocast: bool) -> Tensors:
    """`ttdm`, `itcl` and `icti`, means over the batch."""
    with torch.no_grad():
        tokens = teacher.image_tokens(batch["pixels"])
        image = F.normalize(tokens[:, 0].float(), dim=-1)
        text = teacher.text(batch["clip_ids"], batch["clip_mask"])
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=autocast):
        sentence, icti = student(batch, tokens)
    logits = student.logit_scale.exp() * image @ sentence.T
    target = torch.arange(len(logits), device=logits.device)
    itcl = 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))
    return {"ttdm": (sentence - text).square().sum(1).mean(), "itcl": itcl, "icti": icti}


class Trainer:
    """One train step after another, with the optimizer that the package makes of the same numbers."""

    def __init__(self, teacher: Teacher, student: Student, optimizer: SimpleNamespace, autocast: bool):
        self.teacher, self.student, self.autocast = teacher, student.train(), autocast
        self.clip_norm = optimizer.clip_norm
        self.optimizer = torch.optim.AdamW(
            _groups(student, optimizer), betas=(optimizer.b1, optimizer.b2), eps=optimizer.eps, fused=True
        )
        self.mode = "eager"

    def compile(self) -> None:
        """From now on every layer and the vocabulary's cross-entropy run compiled.

        Nearly all there is to fuse lies in them, and as the layers of a tower share their program, this takes a small
        part of the time in which the whole is compiled.
        """
        self.mode = "compiled"
        clip, bart = self.teacher.clip, self.student.bart.model
        towers = (clip.vision_model.encoder, clip.text_model.encoder, bart.encoder, bart.decoder)
        for layer in (layer for tower in towers for layer in tower.layers):
            layer.compile(dynamic=False)
        self.student.infilling = torch.compile(infilling, dynamic=False)

    def step(self, batch: Tensors) -> Tensors:
        """An optimizer step: the losses and `grad_norm` before it."""
        self.optimizer.zero_grad(set_to_none=True)
        terms = losses(self.teacher, self.student, batch, self.autocast)
        sum(terms.values()).backward()
        norm = torch.nn.utils.clip_grad_norm_(self.student.parameters(), self.clip_norm, foreach=True)
        self.optimizer.step()
        with torch.no_grad():
            self.student.logit_scale.clamp_(max=math.log(MAX_LOGIT_SCALE))
        return {**terms, "grad_norm": norm}


def _groups(student: Student, optimizer: SimpleNamespace) -> list[dict]:
    """BART and the linears at their rates; matrices decay, vectors do not."""
    groups = []
    for parameters, rate in (
        (list(student.bart.parameters()), optimizer.lr),
        ([student.sentence_projection, student.image_projection, student.logit_scale], optimizer.lr_linears),
    ):
        for decays in (True, False):
            members = [parameter for parameter in parameters if (parameter.ndim > 1) == decays]
            groups.append({"params": members, "lr": rate, "weight_decay": optimizer.weight_decay if decays else 0.0})
    return groups


class Reader:
    """Answers about pictures with Hugging Face's `generate`; teacher and BART in one dtype."""

    def __init__(self, teacher: Teacher, student: Student, dtype: torch.dtype, directory: Path):
        self.teacher = teacher
        self.bart = BartForConditionalGeneration.from_pretrained(directory, dtype=dtype, attn_implementation="sdpa").to(
            student.image_projection.device
        )
        self.bart.eval()
        self.image_projection = student.image_projection.detach().to(dtype)

    @torch.inference_mode()
    def image_prefix(self, pixels: torch.Tensor) -> torch.Tensor:
        """What the decoder reads of pictures [B, N, D]."""
        return F.linear(self.teacher.image_tokens(pixels), self.image_projection)

    @torch.inference_mode()
    def answer(self, image: torch.Tensor, prompts: Tensors, options: Decoding) -> torch.Tensor:
        """The best tokens [B, max_new_tokens], greedy or of beam search; only the last of them may be `</s>`."""
        new_tokens = options.max_new_tokens
        hidden = self.bart.model.encoder(prompts["source_ids"], attention_mask=prompts["source_mask"])
        memory, mask = join(image, hidden.last_hidden_state, prompts["source_mask"])
        ids = self.bart.generate(
            encoder_outputs=BaseModelOutput(last_hidden_state=memory),
            attention_mask=mask,
            decoder_input_ids=prompts["prefix_ids"],
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens - 1,
            do_sample=False,
            num_beams=options.rows,
            length_penalty=options.length_penalty,
            early_stopping=options.early_stopping,
        )
        return ids[:, prompts["prefix_ids"].shape[1] :]
