"""The one table between Hugging Face tensor names and Flax parameter paths, read in both directions."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vlkd_jax.errors import few
from vlkd_jax.models.bart import Bart
from vlkd_jax.models.classifier import ClassifierConfig
from vlkd_jax.models.clip import Clip
from vlkd_jax.models.configs import BartConfig, ClipConfig, ClipResNetConfig, ClipVisionConfig
from vlkd_jax.models.vlkd import StudentConfig

ModelConfig = ClipConfig | BartConfig | StudentConfig | ClassifierConfig
HEAD = "classification_head"
Path = tuple[str, ...]
Index = tuple[slice, ...]
"""A slice of each axis."""


def _patches_to_flax(weight: np.ndarray) -> np.ndarray:
    """A convolution [D, 3, P, P] as a matrix over flattened [P, P, 3] patches: [P * P * 3, D]."""
    return weight.transpose(2, 3, 1, 0).reshape(-1, weight.shape[0])


def _patches_to_hf(kernel: np.ndarray) -> np.ndarray:
    patch = math.isqrt(kernel.shape[0] // 3)
    return kernel.reshape(patch, patch, 3, -1).transpose(3, 2, 0, 1)


class Transform(NamedTuple):
    """A change of layout.

    Attributes:
      to_flax: of a Hugging Face tensor, or of the part of one that `reads` names.
      to_hf: of a Flax parameter's layer.
      reads: index of a part of the Flax layer -> (index of what the Hugging Face tensor has of it, index of the part in
        what `to_flax` makes of that).
    """

    to_flax: Callable[[np.ndarray], np.ndarray]
    to_hf: Callable[[np.ndarray], np.ndarray]
    reads: Callable[[Index], tuple[Index, Index]]


def _convolution(size: int) -> Transform:
    """A convolution [D, C, size, size] as a matrix [size * size * C, D], its rows as those of a patch."""

    def to_hf(kernel: np.ndarray) -> np.ndarray:
        return kernel.reshape(size, size, -1, kernel.shape[-1]).transpose(3, 2, 0, 1)

    return Transform(_patches_to_flax, to_hf, lambda index: (index[1:], index[:1]))


TRANSFORMS = {
    "same": Transform(lambda x: x, lambda x: x, lambda index: (index, ())),
    "transpose": Transform(lambda x: x.T, lambda x: x.T, lambda index: (index[::-1], ())),
    "patches": Transform(_patches_to_flax, _patches_to_hf, lambda index: (index[1:], index[:1])),
    "convolution1": _convolution(1),
    "convolution3": _convolution(3),
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One parameter: Hugging Face's name, `{}` standing for the layer, the Flax path, and the change of layout.

    `layers` is None for a single tensor, else the number of tensors stacked on the Flax parameter's first axis.
    """

    hf: str
    path: Path
    transform: str = "same"
    layers: int | None = None

    def names(self) -> list[str]:
        """Every Hugging Face name of this row, in layer order."""
        return [self.hf] if self.layers is None else [self.hf.format(layer) for layer in range(self.layers)]


def _linear(hf: str, path: Path, layers: int | None = None, bias: bool = True) -> list[Row]:
    rows = [Row(f"{hf}.weight", (*path, "kernel"), "transpose", layers)]
    return rows + ([Row(f"{hf}.bias", (*path, "bias"), "same", layers)] if bias else [])


def _norm(hf: str, path: Path, layers: int | None = None) -> list[Row]:
    return [
        Row(f"{hf}.weight", (*path, "scale"), "same", layers),
        Row(f"{hf}.bias", (*path, "bias"), "same", layers),
    ]


def _embedding(hf: str, path: Path) -> list[Row]:
    return [Row(f"{hf}.weight", (*path, "embedding"))]


def _layers(hf: str, path: Path, layers: int, attentions: list[str], linears: list[str], norms: list[str]) -> list[Row]:
    """The rows of a stack of layers, whose sub-module names are the same on both sides."""
    rows = []
    linears = [f"{attention}.{part}_proj" for attention in attentions for part in ("q", "k", "v", "out")] + linears
    for name in linears:
        rows += _linear(f"{hf}.{{}}.{name}", (*path, *name.split(".")), layers)
    for name in norms:
        rows += _norm(f"{hf}.{{}}.{name}", (*path, name), layers)
    return rows


def clip_rows(config: ClipConfig) -> list[Row]:
    """Every parameter of `CLIPModel`; with a residual network, under the names that its authors gave it."""
    text = "text_model"
    return [
        Row("logit_scale", ("logit_scale",)),
        *(_resnet_rows if isinstance(config.vision, ClipResNetConfig) else _vision_rows)(config.vision),
        *_linear("text_projection", ("text_projection",), bias=False),
        *_embedding(f"{text}.embeddings.token_embedding", (text, "token_embedding")),
        *_embedding(f"{text}.embeddings.position_embedding", (text, "position_embedding")),
        *_layers(f"{text}.encoder.layers", (text, "layers"), config.text.num_hidden_layers, **CLIP_LAYER),
        *_norm(f"{text}.final_layer_norm", (text, "final_layer_norm")),
    ]


CLIP_LAYER = {"attentions": ["self_attn"], "linears": ["mlp.fc1", "mlp.fc2"], "norms": ["layer_norm1", "layer_norm2"]}


def _vision_rows(config: ClipVisionConfig) -> list[Row]:
    vision = "vision_model"
    return [
        *_linear("visual_projection", ("visual_projection",), bias=False),
        Row(f"{vision}.embeddings.class_embedding", (vision, "class_embedding")),
        Row(f"{vision}.embeddings.patch_embedding.weight", (vision, "patch_embedding", "kernel"), "patches"),
        *_embedding(f"{vision}.embeddings.position_embedding", (vision, "position_embedding")),
        *_norm(f"{vision}.pre_layrnorm", (vision, "pre_layrnorm")),
        *_layers(f"{vision}.encoder.layers", (vision, "layers"), config.num_hidden_layers, **CLIP_LAYER),
        *_norm(f"{vision}.post_layernorm", (vision, "post_layernorm")),
    ]


def _resnet_rows(config: ClipResNetConfig) -> list[Row]:
    vision = "vision_model"
    pairs = [(f"conv{k}", f"bn{k}", (f"conv{k}",), (f"bn{k}",), 3) for k in (1, 2, 3)]
    for stage, blocks in enumerate(config.layers, 1):
        for block in range(blocks):
            hf, path = f"layer{stage}.{block}", f"layer{stage}_{block}"
            pairs += [
                (f"{hf}.conv{k}", f"{hf}.bn{k}", (path, f"conv{k}"), (path, f"bn{k}"), 3 if k == 2 else 1)
                for k in (1, 2, 3)
            ]
            if not block:  # where the channels change
                down = f"{hf}.downsample"
                pairs.append((f"{down}.0", f"{down}.1", (path, "downsample_conv"), (path, "downsample_bn"), 1))
    rows = []
    for convolution, norm, convolution_path, norm_path, size in pairs:
        kernel = (vision, *convolution_path, "kernel")
        rows.append(Row(f"{vision}.{convolution}.weight", kernel, f"convolution{size}"))
        rows += _norm(f"{vision}.{norm}", (vision, *norm_path))
        rows += [Row(f"{vision}.{norm}.running_{part}", (vision, *norm_path, part)) for part in ("mean", "var")]
    pool = (vision, "attention_pool")
    rows.append(Row(f"{vision}.attnpool.positional_embedding", (*pool, "position_embedding", "embedding")))
    for part in ("q", "k", "v", "c"):
        rows += _linear(
            f"{vision}.attnpool.{part}_proj", (*pool, "attention", "out_proj" if part == "c" else f"{part}_proj")
        )
    return rows


def bart_rows(config: BartConfig) -> list[Row]:
    """Every parameter of `BartForConditionalGeneration`."""
    rows = [*_embedding("model.shared", ("shared",)), Row("final_logits_bias", ("final_logits_bias",))]
    sides = {
        "encoder": (config.encoder_layers, ["self_attn"]),
        "decoder": (config.decoder_layers, ["self_attn", "encoder_attn"]),
    }
    for side, (layers, attentions) in sides.items():
        norms = [f"{name}_layer_norm" for name in attentions] + ["final_layer_norm"]
        rows += _embedding(f"model.{side}.embed_positions", (side, "embed_positions"))
        rows += _norm(f"model.{side}.layernorm_embedding", (side, "layernorm_embedding"))
        rows += _layers(f"model.{side}.layers", (side, "layers"), layers, attentions, ["fc1", "fc2"], norms)
    return rows


def student_rows(config: StudentConfig) -> list[Row]:
    """Every parameter of an exported student: {"student": ..., "clip": ...}."""
    rows = [_inside(row, "bart.", ("student", "bart")) for row in bart_rows(config.bart)]
    rows += [_inside(row, "clip.", ("clip",)) for row in clip_rows(config.clip)]
    for name in ("sentence_projection", "image_projection"):
        rows += _linear(name, ("student", name), bias=False)
    rows.append(Row("logit_scale", ("student", "logit_scale")))
    if config.whiten:
        rows += [Row(f"image_whitening.{part}", ("student", "image_whitening", part)) for part in ("mean", "matrix")]
    return rows


def classifier_rows(config: ClassifierConfig) -> list[Row]:
    """Every parameter of `BartForSequenceClassification`, which has no `final_logits_bias`."""
    rows = [_inside(row, "", ("bart",)) for row in bart_rows(config.bart) if row.path != ("final_logits_bias",)]
    for name in ("dense", "out_proj"):
        rows += _linear(f"{HEAD}.{name}", (HEAD, name))
    return rows


def _inside(row: Row, prefix: str, path: Path) -> Row:
    return dataclasses.replace(row, hf=prefix + row.hf, path=(*path, *row.path))


def rows_for(config: ModelConfig) -> list[Row]:
    """The table for a model."""
    tables = {
        ClipConfig: clip_rows,
        BartConfig: bart_rows,
        StudentConfig: student_rows,
        ClassifierConfig: classifier_rows,
    }
    return tables[type(config)](config)


def parameter_shapes(config: ModelConfig) -> dict:
    """The parameter tree as `jax.ShapeDtypeStruct` leaves, float32; nothing is allocated."""
    if isinstance(config, StudentConfig):
        student = config.module()
        shapes = jax.eval_shape(student.init, jax.random.key(0), *student.example_inputs())["params"]
        return {"student": shapes, "clip": parameter_shapes(config.clip)}
    ids, mask = (jax.ShapeDtypeStruct((1, 1), dtype) for dtype in (jnp.int32, bool))
    if isinstance(config, ClipConfig):
        pixels = jax.ShapeDtypeStruct((1, config.vision.image_size, config.vision.image_size, 3), jnp.float32)
        model, inputs = Clip(config), (pixels, ids, mask)
    else:
        model, inputs = Bart(config), (ids, mask, ids)
    return jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]


def leaf(tree: Any, path: Path) -> Any:
    """The value at `path` of a nested dict; KeyError when absent."""
    for name in path:
        tree = tree[name]
    return tree


def hf_shape(row: Row, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of one Hugging Face tensor of `row`, from its Flax parameter's shape."""
    single = shape if row.layers is None else shape[1:]
    empty = np.broadcast_to(np.float32(0), single)
    return TRANSFORMS[row.transform].to_hf(empty).shape


def to_hf(rows: list[Row], params: dict) -> dict[str, np.ndarray]:
    """Flax parameters as {Hugging Face name: C-contiguous float32 array}. ValueError names parameters off the table."""
    known = {row.path for row in rows}
    given = {tuple(key.key for key in path) for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]}
    if known != given:
        wrong = few(sorted(".".join(path) for path in known ^ given))
        raise ValueError(f"parameters absent from the tree or unknown to the name table: {wrong}")
    tensors = {}
    for row in rows:
        value = np.asarray(leaf(params, row.path), np.float32)
        singles = [value] if row.layers is None else list(value)
        transform = TRANSFORMS[row.transform].to_hf
        for name, single in zip(row.names(), singles, strict=True):
            # ascontiguousarray would turn the scalar logit_scale into shape [1]
            tensors[name] = np.array(transform(single), np.float32, order="C")
    return tensors
