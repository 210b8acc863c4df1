"""CLIP and BART as frozen dataclasses, read from and written to Hugging Face's JSON files.

Their sizes are in config.json, CLIP's way from pictures to pixels in preprocessor_config.json.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from vlkd_jax.errors import UserError
from vlkd_jax.models.fields import LARGEST_IMAGE, MOST_LAYERS, Fields, check_model_type, part_of
from vlkd_jax.models.preprocessing import Preprocessing

ACTIVATIONS = ("gelu", "gelu_new", "quick_gelu", "relu")
# What transformers' CLIPConfig and BartConfig assume for an absent key (the same in versions 4 and 5).
CLIP_TEXT_DEFAULTS = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "bos_token_id": 49406,
    "eos_token_id": 49407,
    "pad_token_id": 1,
}
CLIP_VISION_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
    "num_channels": 3,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
OPEN_CLIP_TEXT_DEFAULTS = {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12}
OPEN_CLIP_PIXELS_DEFAULTS = {
    "interpolation": "bicubic",
    "resize_mode": "shortest",
    "mean": (0.48145466, 0.4578275, 0.40821073),
    "std": (0.26862954, 0.26130258, 0.27577711),
}
BART_DEFAULTS = {
    "vocab_size": 50265,
    "d_model": 1024,
    "encoder_layers": 12,
    "decoder_layers": 12,
    "encoder_attention_heads": 16,
    "decoder_attention_heads": 16,
    "encoder_ffn_dim": 4096,
    "decoder_ffn_dim": 4096,
    "max_position_embeddings": 1024,
    "activation_function": "gelu",
    "scale_embedding": False,
    "dropout": 0.1,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_bos_token_id": None,
    "forced_eos_token_id": 2,
    "tie_word_embeddings": True,
}


def _clip_part(config: dict, name: str, defaults: dict) -> Any:
    """One tower's keys. `*_config_dict`, written by early versions, wins over `*_config` with its own defaults."""
    part, legacy = config.get(name), config.get(f"{name}_dict")
    part = {} if part is None else part
    if isinstance(part, dict) and isinstance(legacy, dict):
        return {**part, **defaults, **legacy}
    return part


@dataclasses.dataclass(frozen=True)
class ClipVisionConfig:
    """CLIP's image tower. `image_size` and `patch_size` in pixels; images are square with three channels."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    image_size: int
    patch_size: int
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    @property
    def num_tokens(self) -> int:
        """N: the class token and one token per patch."""
        return (self.image_size // self.patch_size) ** 2 + 1

    @classmethod
    def from_hf(cls, config: Any, source: str) -> ClipVisionConfig:
        """Read `vision_config`; absent keys take Hugging Face's defaults. UserError names `source` and field."""
        fields = Fields(config, CLIP_VISION_DEFAULTS, source, "vision_config.")
        fields.exactly("num_channels", 3, "images are RGB")
        fields.divisible("hidden_size", "num_attention_heads")
        result = cls(
            hidden_size=fields.integer("hidden_size"),
            intermediate_size=fields.integer("intermediate_size"),
            num_hidden_layers=fields.integer("num_hidden_layers", maximum=MOST_LAYERS),
            num_attention_heads=fields.integer("num_attention_heads"),
            image_size=fields.integer("image_size", maximum=LARGEST_IMAGE),
            patch_size=fields.integer("patch_size", maximum=LARGEST_IMAGE),
            hidden_act=fields.one_of("hidden_act", ACTIVATIONS),
            layer_norm_eps=fields.number("layer_norm_eps"),
        )
        if result.patch_size > result.image_size:
            fields.fail("patch_size", f"at most image_size ({result.image_size})")
        return result

    def to_hf(self) -> dict:
        """The `vision_config` object of config.json."""
        return {"model_type": "clip_vision_model", **dataclasses.asdict(self), "num_channels": 3}


@dataclasses.dataclass(frozen=True)
class ClipResNetConfig:
    """A residual network as CLIP's image tower, of RN50 to RN50x64; Hugging Face's CLIP has none.

    Attributes:
      layers: blocks of its four stages.
      width: channels behind the stem.
      image_size: pixels a side, a multiple of 32.
    """

    layers: tuple[int, int, int, int]
    width: int
    image_size: int

    @property
    def hidden_size(self) -> int:
        """Dv: channels of the last stage."""
        return 32 * self.width

    @property
    def num_attention_heads(self) -> int:
        """Of the attention pooling."""
        return self.hidden_size // 64

    @property
    def num_tokens(self) -> int:
        """N: the mean and one token per cell of the last stage's grid."""
        return (self.image_size // 32) ** 2 + 1

    @classmethod
    def of(cls, layers: Any, width: Any, image_size: Any, source: str) -> ClipResNetConfig:
        """From a file's values. UserError names `source` and the field."""
        four = isinstance(layers, list | tuple) and len(layers) == 4 and all(type(n) is int and n > 0 for n in layers)
        if not four:
            raise UserError(f"{source}: layers is {layers!r}; it must be four numbers of blocks")
        for name, value, step in (("width", width, 2), ("image_size", image_size, 32)):
            if type(value) is not int or value < 1 or value % step:
                raise UserError(f"{source}: {name} is {value!r}; it must be a multiple of {step}")
        return cls(tuple(layers), width, image_size)

    def to_hf(self) -> dict:
        """The `vision_config` object of config.json; no release of transformers builds a model from it."""
        return {
            "model_type": "clip_vision_model",
            "resnet_layers": list(self.layers),
            "resnet_width": self.width,
            "image_size": self.image_size,
            "hidden_size": self.hidden_size,
            "num_attention_heads": self.num_attention_heads,
            "num_hidden_layers": 0,
        }


@dataclasses.dataclass(frozen=True)
class ClipTextConfig:
    """CLIP's text tower. `eos_token_id` also chooses where the sentence is pooled (see models/clip.py)."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    bos_token_id: int | None = 49406
    eos_token_id: int = 49407
    pad_token_id: int | None = 1

    @classmethod
    def from_hf(cls, config: Any, source: str) -> ClipTextConfig:
        """Read `text_config`; absent keys take Hugging Face's defaults. UserError names `source` and field."""
        fields = Fields(config, CLIP_TEXT_DEFAULTS, source, "text_config.")
        fields.divisible("hidden_size", "num_attention_heads")
        return cls(
            vocab_size=fields.integer("vocab_size"),
            hidden_size=fields.integer("hidden_size"),
            intermediate_size=fields.integer("intermediate_size"),
            num_hidden_layers=fields.integer("num_hidden_layers", maximum=MOST_LAYERS),
            num_attention_heads=fields.integer("num_attention_heads"),
            max_position_embeddings=fields.integer("max_position_embeddings"),
            hidden_act=fields.one_of("hidden_act", ACTIVATIONS),
            layer_norm_eps=fields.number("layer_norm_eps"),
            bos_token_id=fields.optional_integer("bos_token_id"),
            eos_token_id=fields.integer("eos_token_id", 0),
            pad_token_id=fields.optional_integer("pad_token_id"),
        )

    def to_hf(self) -> dict:
        """The `text_config` object of config.json."""
        return {"model_type": "clip_text_model", **dataclasses.asdict(self)}


@dataclasses.dataclass(frozen=True)
class ClipConfig:
    """Both towers of CLIP and the joint space: `projection_dim` is E.

    `preprocessing` lies in a file of its own; None, where there is no such file, becomes OpenAI's for `image_size`.
    """

    vision: ClipVisionConfig | ClipResNetConfig
    text: ClipTextConfig
    projection_dim: int
    logit_scale_init_value: float = 2.6592
    preprocessing: Preprocessing | None = None

    def __post_init__(self):
        if self.preprocessing is None:
            size = self.vision.image_size
            object.__setattr__(self, "preprocessing", Preprocessing(size, size))  # how a frozen dataclass sets a field

    @classmethod
    def from_hf(cls, config: Any, source: str) -> ClipConfig:
        """Read config.json of a `CLIPModel`, as transformers 4 or 5 writes it.

        Absent keys, also whole absent towers, take Hugging Face's defaults. Attention dropout is not read: the
        teacher is never trained. Raises UserError naming `source` and the field.
        """
        check_model_type(config, "clip", source)
        fields = Fields(config, {"projection_dim": 512, "logit_scale_init_value": 2.6592}, source)
        vision = _clip_part(config, "vision_config", CLIP_VISION_DEFAULTS)
        if isinstance(vision, dict) and "resnet_layers" in vision:
            values = (vision.get(name) for name in ("resnet_layers", "resnet_width", "image_size"))
            tower = ClipResNetConfig.of(*values, f"{source}: vision_config")
        else:
            tower = ClipVisionConfig.from_hf(vision, source)
        return cls(
            vision=tower,
            text=ClipTextConfig.from_hf(_clip_part(config, "text_config", CLIP_TEXT_DEFAULTS), source),
            projection_dim=fields.integer("projection_dim"),
            logit_scale_init_value=fields.number("logit_scale_init_value"),
        )

    @classmethod
    def from_open_clip(cls, values: Any, source: str) -> ClipConfig:
        """Read open_clip_config.json of a CLIP with a residual network. Raises UserError naming `source` and the field.

        Source: OpenCLIP's `CLIPVisionCfg`, `CLIPTextCfg` and preprocessing, whose defaults an absent key takes.
        """
        model, where = part_of(values, "model_cfg", source), f"{source}: model_cfg"
        vision, text = (part_of(model, name, where) for name in ("vision_cfg", "text_cfg"))
        if not isinstance(vision.get("layers"), list):
            raise UserError(f"{where}.vision_cfg is no residual network; give the model in Hugging Face's format")
        tower = ClipResNetConfig.of(vision["layers"], vision.get("width", 64), vision.get("image_size", 224), where)
        if "hf_model_name" in text:
            raise UserError(
                f"{where}.text_cfg.hf_model_name is {text['hf_model_name']!r}; only CLIP's own text tower is read"
            )
        words = Fields(text, OPEN_CLIP_TEXT_DEFAULTS, source, "model_cfg.text_cfg.")
        words.divisible("width", "heads")
        width = words.integer("width")
        pixels = Fields(values.get("preprocess_cfg", {}), OPEN_CLIP_PIXELS_DEFAULTS, source, "preprocess_cfg.")
        pixels.exactly("interpolation", "bicubic", "nothing else is done here")
        pixels.exactly("resize_mode", "shortest", "pictures are cropped")
        means = pixels.three_numbers("mean"), pixels.three_numbers("std")
        return cls(
            vision=tower,
            text=ClipTextConfig(
                words.integer("vocab_size"),
                width,
                4 * width,
                words.integer("layers", maximum=MOST_LAYERS),
                words.integer("heads"),
                words.integer("context_length"),
                "quick_gelu" if model.get("quick_gelu") else "gelu",
                bos_token_id=words.integer("vocab_size") - 2,
                eos_token_id=words.integer("vocab_size") - 1,  # the largest id, at which OpenCLIP pools
            ),
            projection_dim=Fields(model, {}, source, "model_cfg.").integer("embed_dim"),
            preprocessing=Preprocessing(tower.image_size, tower.image_size, mean=means[0], std=means[1]),
        )

    def to_hf(self) -> dict:
        """A complete config.json for `CLIPModel`."""
        return {
            "model_type": "clip",
            "architectures": ["CLIPModel"],
            "dtype": "float32",
            "projection_dim": self.projection_dim,
            "logit_scale_init_value": self.logit_scale_init_value,
            "vision_config": {**self.vision.to_hf(), "projection_dim": self.projection_dim},
            "text_config": {**self.text.to_hf(), "projection_dim": self.projection_dim},
        }


@dataclasses.dataclass(frozen=True)
class BartConfig:
    """BART. `d_model` is D, `vocab_size` V; `forced_*` are None where nothing is forced."""

    vocab_size: int
    d_model: int
    encoder_layers: int
    decoder_layers: int
    encoder_attention_heads: int
    decoder_attention_heads: int
    encoder_ffn_dim: int
    decoder_ffn_dim: int
    max_position_embeddings: int = 1024
    activation_function: str = "gelu"
    scale_embedding: bool = False
    dropout: float = 0.1
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    pad_token_id: int = 1
    bos_token_id: int = 0
    eos_token_id: int = 2
    decoder_start_token_id: int = 2
    forced_bos_token_id: int | None = 0
    forced_eos_token_id: int | None = 2

    @classmethod
    def from_hf(cls, config: Any, source: str) -> BartConfig:
        """Read config.json of a BART, as transformers 4 or 5 writes it.

        Absent keys take Hugging Face's defaults; for `forced_bos_token_id` that is None, unless the old
        `force_bos_token_to_be_generated` asks for it. Layer drop is not read. UserError names `source` and field.
        """
        check_model_type(config, "bart", source)
        fields = Fields(config, BART_DEFAULTS, source)
        fields.exactly("tie_word_embeddings", True, "the output layer shares the token embedding")
        fields.divisible("d_model", "encoder_attention_heads")
        fields.divisible("d_model", "decoder_attention_heads")
        if config.get("forced_bos_token_id") is None and config.get("force_bos_token_to_be_generated") is True:
            fields.values["forced_bos_token_id"] = fields.values["bos_token_id"]
        sizes = (
            *("vocab_size", "d_model", "encoder_attention_heads"),
            *("decoder_attention_heads", "encoder_ffn_dim", "decoder_ffn_dim", "max_position_embeddings"),
        )
        rates = ("dropout", "attention_dropout", "activation_dropout")
        ids = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")
        forced = ("forced_bos_token_id", "forced_eos_token_id")
        return cls(
            **{name: fields.integer(name) for name in sizes},
            **{name: fields.integer(name, maximum=MOST_LAYERS) for name in ("encoder_layers", "decoder_layers")},
            **{name: fields.number(name, below=1.0) for name in rates},
            **{name: fields.integer(name, 0) for name in ids},
            **{name: fields.optional_integer(name) for name in forced},
            activation_function=fields.one_of("activation_function", ACTIVATIONS),
            scale_embedding=fields.boolean("scale_embedding"),
        )

    def to_hf(self) -> dict:
        """A complete config.json for `BartForConditionalGeneration`."""
        return {
            "model_type": "bart",
            "architectures": ["BartForConditionalGeneration"],
            "dtype": "float32",
            "is_encoder_decoder": True,
            "tie_word_embeddings": True,
            **dataclasses.asdict(self),
        }
