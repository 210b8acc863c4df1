"""The student in PyTorch, for Hugging Face transformers 4.57 and 5: configuration, model, processor.

This file stands alone: `vlkd export` puts a copy of it beside the weights. Either way it is used:

    from vlkd_jax.hf.modeling_vlkd import VLKDForConditionalGeneration, VLKDProcessor   # from the package
    AutoModel.from_pretrained(DIR, trust_remote_code=True)                              # from the directory alone

    model, processor = VLKDForConditionalGeneration.from_pretrained(DIR), VLKDProcessor.from_pretrained(DIR)
    inputs = processor(images=[picture], questions=["what color is the car?"])
    processor.decode_answers(model.generate(**inputs, max_new_tokens=10))
"""

import copy

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoProcessor,
    BartConfig,
    BartForConditionalGeneration,
    CLIPConfig,
    CLIPModel,
    PretrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.feature_extraction_utils import BatchFeature
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput

IMAGE_TOKENS = ("projected", "hidden", "penultimate", "pooled")


class VLKDConfig(PretrainedConfig):
    """CLIP, BART and what the student makes of them.

    Args:
      clip_config, bart_config: of the two models.
      image_tokens: which of CLIP's image tokens the decoder reads: "projected" [N, E], "hidden" or "penultimate"
        [N, CLIP's width], "pooled" [1, E].
      whiten: whether a fixed affine map stands before the image projection.
      sentence_position: "eos" or "bos", the encoder's state that stands for a sentence.
      contrastive_scale: "learned" or "clip", whose logit scale the contrastive loss took.
      ttdm: "normalised" or "raw", the vectors whose distance the text-text loss took.
      start_token_ids: what every decoded text begins with.
      token_count: ids from here on have no token and are never generated.
    """

    model_type = "vlkd"
    is_composition = True
    sub_configs = {"clip_config": CLIPConfig, "bart_config": BartConfig}

    def __init__(
        self,
        clip_config=None,
        bart_config=None,
        image_tokens="projected",
        whiten=False,
        sentence_position="eos",
        contrastive_scale="learned",
        ttdm="normalised",
        start_token_ids=(2, 0),
        token_count=None,
        **kwargs,
    ):
        if image_tokens not in IMAGE_TOKENS:
            raise ValueError(f"image_tokens is {image_tokens!r}; it is one of {', '.join(IMAGE_TOKENS)}")
        self.clip_config = CLIPConfig(**clip_config) if isinstance(clip_config, dict) else clip_config or CLIPConfig()
        self.bart_config = BartConfig(**bart_config) if isinstance(bart_config, dict) else bart_config or BartConfig()
        self.image_tokens, self.whiten, self.sentence_position = image_tokens, whiten, sentence_position
        self.contrastive_scale, self.ttdm, self.start_token_ids = contrastive_scale, ttdm, list(start_token_ids)
        self.token_count = token_count
        kwargs.setdefault("is_encoder_decoder", True)
        super().__init__(**kwargs)

    def get_text_config(self, *args, **kwargs):
        """The language model's configuration, which generation looks at."""
        return self.bart_config


class Whitening(nn.Module):
    """A fixed affine map in float32."""

    def __init__(self, width):
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(width), requires_grad=False)
        self.matrix = nn.Parameter(torch.eye(width), requires_grad=False)

    def forward(self, tokens):
        return (tokens.float() - self.mean.float()) @ self.matrix.float()


class FrozenBatchNorm(nn.Module):
    """Normalisation of channels by the statistics of training."""

    def __init__(self, width, eps=1e-5):
        super().__init__()
        self.weight, self.bias = (nn.Parameter(torch.zeros(width), requires_grad=False) for _ in range(2))
        self.running_mean, self.running_var = (nn.Parameter(torch.zeros(width), requires_grad=False) for _ in range(2))
        self.eps = eps

    def forward(self, x):
        parts = (self.running_mean, self.running_var, self.weight, self.bias)
        return F.batch_norm(x.float(), *(part.float() for part in parts), eps=self.eps).to(x.dtype)


def _convolution(channels, width, size, stride=1):
    return nn.Conv2d(channels, width, size, stride, size // 2, bias=False)


class Bottleneck(nn.Module):
    """A residual block whose stride is a mean over squares."""

    def __init__(self, channels, planes, stride):
        super().__init__()
        self.conv1, self.bn1 = _convolution(channels, planes, 1), FrozenBatchNorm(planes)
        self.conv2, self.bn2 = _convolution(planes, planes, 3), FrozenBatchNorm(planes)
        self.conv3, self.bn3 = _convolution(planes, 4 * planes, 1), FrozenBatchNorm(4 * planes)
        self.pool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.downsample = None
        if stride > 1 or channels != 4 * planes:
            self.downsample = nn.Sequential(_convolution(channels, 4 * planes, 1), FrozenBatchNorm(4 * planes))

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn3(self.conv3(self.pool(F.relu(self.bn2(self.conv2(out))))))
        return F.relu(out + (x if self.downsample is None else self.downsample(self.pool(x))))


class AttentionPool(nn.Module):
    """Attention in which every cell of the grid, and their mean in front, asks all of them."""

    def __init__(self, tokens, width, heads, projection):
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.zeros(tokens, width))
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        self.c_proj, self.heads = nn.Linear(width, projection), heads

    def forward(self, states):
        x = states + self.positional_embedding
        projections = self.q_proj, self.k_proj, self.v_proj
        query, key, value = (linear(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for linear in projections)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.c_proj(mixed.transpose(1, 2).flatten(2))


class ResNetTower(nn.Module):
    """CLIP's image tower where it is a residual network: pixels to states [B, N, C] and tokens [B, N, E]."""

    def __init__(self, config, projection):
        super().__init__()
        width = config.resnet_width
        self.conv1, self.bn1 = _convolution(3, width // 2, 3, stride=2), FrozenBatchNorm(width // 2)
        self.conv2, self.bn2 = _convolution(width // 2, width // 2, 3), FrozenBatchNorm(width // 2)
        self.conv3, self.bn3 = _convolution(width // 2, width, 3), FrozenBatchNorm(width)
        channels = width
        for stage, blocks in enumerate(config.resnet_layers):
            planes, layers = width << stage, []
            for block in range(blocks):
                layers.append(Bottleneck(channels, planes, 2 if stage and not block else 1))
                channels = 4 * planes
            setattr(self, f"layer{stage + 1}", nn.Sequential(*layers))
        tokens = (config.image_size // 32) ** 2 + 1
        self.attnpool = AttentionPool(tokens, channels, config.num_attention_heads, projection)

    def forward(self, pixel_values):
        x = pixel_values.to(self.conv1.weight.dtype)
        for conv, norm in ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)):
            x = F.relu(norm(conv(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(F.avg_pool2d(x, 2)))))
        cells = x.flatten(2).transpose(1, 2)
        states = torch.cat([cells.mean(1, keepdim=True), cells], 1)
        return states, self.attnpool(states)


class VLKDForConditionalGeneration(PreTrainedModel):
    """A frozen CLIP and the BART that it taught: answers about pictures, captions, embeddings, text."""

    config_class = VLKDConfig
    base_model_prefix = "vlkd"
    main_input_name = "pixel_values"
    _keys_to_ignore_on_load_missing = [r"bart\.lm_head\.weight", r"bart\.model\.(en|de)coder\.embed_tokens\.weight"]

    def __init__(self, config):
        super().__init__(config)
        clip, bart = config.clip_config, config.bart_config
        self.clip, self.bart = CLIPModel(clip), BartForConditionalGeneration(bart)
        self.is_resnet = hasattr(clip.vision_config, "resnet_layers")
        if self.is_resnet:
            self.clip.vision_model = ResNetTower(clip.vision_config, clip.projection_dim)
            self.clip.visual_projection = None
        hidden = config.image_tokens in ("hidden", "penultimate")
        width = clip.vision_config.hidden_size if hidden else clip.projection_dim
        self.image_whitening = Whitening(width) if config.whiten else None
        self.image_projection = nn.Linear(width, bart.d_model, bias=False)
        self.sentence_projection = nn.Linear(bart.d_model, clip.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(0.0))
        if config.whiten:  # transformers 4 refuses the name of a module that is not there, so no attribute of the class
            self._keep_in_fp32_modules = self._keep_in_fp32_modules_strict = ["image_whitening"]
        self.post_init()

    def _init_weights(self, module):
        """Nothing: weights come from files."""

    def can_generate(self):
        """`generate` is this class's own."""
        return True

    def image_tokens(self, pixel_values):
        """The image tokens that the decoder reads [B, N, width]."""
        kind = self.config.image_tokens
        if self.is_resnet:
            states, projected = self.clip.vision_model(pixel_values)
            if kind == "hidden":
                return states
            return projected if kind == "projected" else F.normalize(projected[:, :1].float(), dim=-1)
        vision = self.clip.vision_model(pixel_values=pixel_values, output_hidden_states=kind == "penultimate")
        if kind == "penultimate":
            return vision.hidden_states[-2]
        if kind == "hidden":
            return vision.last_hidden_state
        states = self._layer_norm()(vision.last_hidden_state)
        projected = self.clip.visual_projection(states)
        return projected if kind == "projected" else F.normalize(projected[:, :1].float(), dim=-1)

    def _layer_norm(self):
        tower = self.clip.vision_model
        return (tower if hasattr(tower, "post_layernorm") else tower.vision_model).post_layernorm

    def image_prefix(self, pixel_values):
        """What the decoder reads of a picture [B, N, D]."""
        tokens = self.image_tokens(pixel_values)
        if self.image_whitening is not None:
            tokens = self.image_whitening(tokens)
        return self.image_projection(tokens.to(self.image_projection.weight.dtype))

    def memory(self, pixel_values=None, input_ids=None, attention_mask=None):
        """What the decoder reads: picture first, then the encoded text; states [B, M, D] and mask [B, M]."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        hidden = self.bart.model.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        if pixel_values is None:
            return hidden, attention_mask
        prefix = self.image_prefix(pixel_values).to(hidden.dtype)
        keep = attention_mask.new_ones(prefix.shape[:2])
        return torch.cat([prefix, hidden], 1), torch.cat([keep, attention_mask], 1)

    def embed_images(self, pixel_values):
        """L2-normalised image embeddings of CLIP [B, E]."""
        if self.is_resnet:
            return F.normalize(self.clip.vision_model(pixel_values)[1][:, 0].float(), dim=-1)
        states = self.clip.vision_model(pixel_values=pixel_values).last_hidden_state[:, 0]
        return F.normalize(self.clip.visual_projection(self._layer_norm()(states)).float(), dim=-1)

    def embed_texts(self, input_ids, attention_mask, normalize=True):
        """Sentence embeddings of the student [B, E], L2-normalised unless told otherwise."""
        hidden = self.bart.model.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        position = attention_mask.sum(-1) - 1 if self.config.sentence_position == "eos" else attention_mask.sum(-1) * 0
        state = hidden[torch.arange(len(hidden), device=hidden.device), position]
        projected = self.sentence_projection(state.to(self.sentence_projection.weight.dtype)).float()
        return F.normalize(projected, dim=-1) if normalize else projected

    def forward(
        self,
        pixel_values=None,
        input_ids=None,
        attention_mask=None,
        decoder_input_ids=None,
        decoder_attention_mask=None,
        labels=None,
        **kwargs,
    ):
        """Teacher-forced logits [B, T, V], with `labels` (-100: not counted) also the mean cross-entropy.

        Without `decoder_input_ids` the labels are shifted right behind the decoder's first token.
        """
        if decoder_input_ids is None:
            if labels is None:
                raise ValueError("give decoder_input_ids or labels; `generate` writes texts")
            filled = labels.masked_fill(labels == -100, self.bart.config.pad_token_id)
            start = torch.full_like(filled[:, :1], self.bart.config.decoder_start_token_id)
            decoder_input_ids = torch.cat([start, filled[:, :-1]], 1)
        states, mask = self.memory(pixel_values, input_ids, attention_mask)
        output = self.bart(
            encoder_outputs=BaseModelOutput(last_hidden_state=states),
            attention_mask=mask,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            use_cache=False,
        )
        loss = None
        if labels is not None:
            loss = F.cross_entropy(output.logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100)
        return Seq2SeqLMOutput(loss=loss, logits=output.logits)

    @torch.no_grad()
    def generate(
        self,
        pixel_values=None,
        input_ids=None,
        attention_mask=None,
        decoder_input_ids=None,
        decoder_attention_mask=None,
        **kwargs,
    ):
        """New token ids [B, at most max_new_tokens], without the prompt; `kwargs` are those of BART's `generate`.

        BART's own `generate` would read `input_ids` as the decoder's prompt, or encode them without the picture. Here
        `input_ids` [B, S] are what the encoder reads and `decoder_input_ids` [B, P] what the decoder is forced through;
        rows of unequal length are padded on the right, as `decoder_attention_mask` says. With num_return_sequences each
        row's texts follow one another.
        """
        states, mask = self.memory(pixel_values, input_ids, attention_mask)
        if decoder_input_ids is None:
            start = torch.tensor(self.config.start_token_ids, device=states.device)
            decoder_input_ids = start.expand(len(states), -1)
        if decoder_attention_mask is None:
            decoder_attention_mask = torch.ones_like(decoder_input_ids)
        if self.config.token_count is not None and self.config.token_count < self.config.bart_config.vocab_size:
            unused = range(self.config.token_count, self.config.bart_config.vocab_size)
            kwargs.setdefault("suppress_tokens", list(unused))
        kwargs.setdefault("forced_eos_token_id", self.config.bart_config.forced_eos_token_id)
        lengths, returns = decoder_attention_mask.sum(-1), kwargs.get("num_return_sequences", 1) or 1
        texts = [None] * (len(states) * returns)
        for length in lengths.unique().tolist():  # BART's positions do not know padding before a prompt
            rows = (lengths == length).nonzero()[:, 0]
            output = self.bart.generate(
                encoder_outputs=BaseModelOutput(last_hidden_state=states[rows]),
                attention_mask=mask[rows],
                decoder_input_ids=decoder_input_ids[rows, :length],
                **kwargs,
            )
            for k, text in enumerate(output[:, length:]):
                texts[int(rows[k // returns]) * returns + k % returns] = text
        pad = self.bart.config.pad_token_id
        return nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=pad)


def _to_rgb(image):
    """A picture of any mode as RGB, as the JAX side reads it: transparency lies on white, deep greys are scaled."""
    if image.mode in ("RGBA", "LA", "P", "PA"):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    elif image.mode.startswith("I") or image.mode == "F":
        deep = np.nan_to_num(np.asarray(image, np.float32)).clip(0)
        deep = deep / max(deep.max(), 65535 if deep.max() > 255 else 255) * 255
        image = Image.fromarray(deep.astype(np.uint8))
    return image.convert("RGB")


class VLKDProcessor(ProcessorMixin):
    """Pictures to pixels, questions and captions to prompts, ids to texts.

    Args:
      question_encoder, question_decoder: what the encoder reads, `<mask>` standing for the answer, and what the decoder
        is forced through; `{question}` is filled in as plain text, whatever it looks like.
      caption_encoder, caption_decoder: the same without a question.
    """

    attributes = ["image_processor", "tokenizer"]
    image_processor_class = "AutoImageProcessor"
    tokenizer_class = "AutoTokenizer"

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        question_encoder="question: {question} answer: <mask>",
        question_decoder="question: {question} answer:",
        caption_encoder="a picture of <mask>",
        caption_decoder="a picture of",
        **kwargs,
    ):
        self.question_encoder, self.question_decoder = question_encoder, question_decoder
        self.caption_encoder, self.caption_decoder = caption_encoder, caption_decoder
        super().__init__(image_processor, tokenizer, **kwargs)
        self._plain = None

    def _ids(self, template, **fields):
        """Ids of a template; `<mask>` is the mask token and takes the space before it, fields are plain text."""
        if self._plain is None:
            self._plain = copy.deepcopy(self.tokenizer.backend_tokenizer)
            self._plain.encode_special_tokens = True
            self._plain.no_truncation()
            self._plain.no_padding()
        parts, ids = template.split("<mask>"), []
        for k, part in enumerate(parts):
            ids += [self.tokenizer.mask_token_id] * (k > 0)
            text = (part if k == len(parts) - 1 else part.rstrip(" ")).format(**fields)
            ids += self._plain.encode(text, add_special_tokens=False).ids if text else []
        return ids

    def _padded(self, rows):
        ids = [torch.tensor(row) for row in rows]
        pad = self.tokenizer.pad_token_id
        mask = [torch.ones_like(row) for row in ids]
        sequence = nn.utils.rnn.pad_sequence
        return sequence(ids, batch_first=True, padding_value=pad), sequence(mask, batch_first=True)

    def __call__(self, images=None, questions=None, texts=None, **kwargs):
        """Inputs of `generate`, or with `texts` of `embed_texts`.

        Args:
          images: pictures, one for each question; without questions they are to be captioned.
        """
        bos, eos, inputs = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id, {}
        if images is not None:
            images = images if isinstance(images, (list, tuple)) else [images]
            pictures = [_to_rgb(image) if isinstance(image, Image.Image) else image for image in images]
            inputs["pixel_values"] = self.image_processor(pictures, return_tensors="pt")["pixel_values"]
        if texts is not None:
            ids, mask = self._padded([[bos, *self._ids("{text}", text=text), eos] for text in texts])
            return BatchFeature({**inputs, "input_ids": ids, "attention_mask": mask})
        if questions is not None:
            fields, kind = [{"question": question} for question in questions], "question"
        else:
            fields, kind = [{} for _ in images], "caption"
        encoder, decoder = getattr(self, f"{kind}_encoder"), getattr(self, f"{kind}_decoder")
        sources = [[bos, *self._ids(encoder, **values), eos] for values in fields]
        prompts = [[eos, bos, *self._ids(decoder, **values)] for values in fields]
        inputs["input_ids"], inputs["attention_mask"] = self._padded(sources)
        inputs["decoder_input_ids"], inputs["decoder_attention_mask"] = self._padded(prompts)
        return BatchFeature(inputs)

    def decode_answers(self, ids):
        """Texts of generated ids."""
        options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        return [self.tokenizer.decode(row.tolist(), **options).strip() for row in ids]


AutoConfig.register("vlkd", VLKDConfig, exist_ok=True)
AutoModel.register(VLKDConfig, VLKDForConditionalGeneration, exist_ok=True)
AutoProcessor.register(VLKDConfig, VLKDProcessor, exist_ok=True)
