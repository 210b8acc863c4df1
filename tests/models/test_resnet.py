"""CLIP's residual networks against a rewrite in torch, under the names that OpenAI gave their tensors."""

import json
import math
import shutil

import jax
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny import make_mesh, tiny_config
from torch import nn

from vlkd_jax import sharding
from vlkd_jax.data.text import ClipText
from vlkd_jax.errors import UserError
from vlkd_jax.hf import names, parity
from vlkd_jax.hf.export import export
from vlkd_jax.hf.files import files_read
from vlkd_jax.hf.import_ import import_export
from vlkd_jax.hf.load import load_clip, read_clip_config
from vlkd_jax.hf.save import copy_tokenizer, save_clip
from vlkd_jax.models.clip import Clip
from vlkd_jax.models.configs import ClipConfig
from vlkd_jax.tasks import make_task
from vlkd_jax.train import train
from vlkd_jax.vlkd import VLKD

WIDTH, LAYERS, SIZE, JOINT = 8, (2, 1, 3, 2), 64, 24
TEXT = {"context_length": 40, "width": 32, "heads": 2, "layers": 2}


class Block(nn.Module):
    """As OpenAI's: convolutions of stride 1, and the stride as a mean in both branches."""

    def __init__(self, channels, planes, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, planes, 1, bias=False), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False), nn.BatchNorm2d(planes)
        self.conv3, self.bn3 = nn.Conv2d(planes, planes * 4, 1, bias=False), nn.BatchNorm2d(planes * 4)
        self.stride = stride
        if stride > 1 or channels != planes * 4:
            self.downsample = nn.Sequential(nn.Conv2d(channels, planes * 4, 1, bias=False), nn.BatchNorm2d(planes * 4))

    def forward(self, x):
        y = torch.relu(self.bn1(self.conv1(x)))
        y = torch.relu(self.bn2(self.conv2(y)))
        shortcut = x
        if self.stride > 1:
            y, shortcut = nn.functional.avg_pool2d(y, self.stride), nn.functional.avg_pool2d(x, self.stride)
        if hasattr(self, "downsample"):
            shortcut = self.downsample(shortcut)
        return torch.relu(self.bn3(self.conv3(y)) + shortcut)


class Pool(nn.Module):
    """Attention pooling through torch's own function, every position a query."""

    def __init__(self, cells, width, heads, joint):
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.zeros(cells + 1, width))
        self.k_proj, self.q_proj, self.v_proj = (
            nn.Linear(width, width),
            nn.Linear(width, width),
            nn.Linear(width, width),
        )
        self.c_proj, self.heads = nn.Linear(width, joint), heads

    def forward(self, grid):
        x = grid.flatten(2).permute(2, 0, 1)
        states = torch.cat([x.mean(0, keepdim=True), x])
        x = states + self.positional_embedding[:, None]
        out, _ = nn.functional.multi_head_attention_forward(
            *(x, x, x, x.shape[-1], self.heads, None),
            torch.cat([self.q_proj.bias, self.k_proj.bias, self.v_proj.bias]),
            *(None, None, False, 0.0, self.c_proj.weight, self.c_proj.bias),
            use_separate_proj_weight=True,
            q_proj_weight=self.q_proj.weight,
            k_proj_weight=self.k_proj.weight,
            v_proj_weight=self.v_proj.weight,
            training=False,
        )
        return states.transpose(0, 1), out.transpose(0, 1)


class Visual(nn.Module):
    def __init__(self, layers, width, size, joint):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, width // 2, 3, 2, 1, bias=False), nn.BatchNorm2d(width // 2)
        self.conv2, self.bn2 = nn.Conv2d(width // 2, width // 2, 3, 1, 1, bias=False), nn.BatchNorm2d(width // 2)
        self.conv3, self.bn3 = nn.Conv2d(width // 2, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        channels = width
        for k, count in enumerate(layers):
            blocks = []
            for index in range(count):
                blocks.append(Block(channels, width * 2**k, 2 if k > 0 and index == 0 else 1))
                channels = width * 2**k * 4
            self.add_module(f"layer{k + 1}", nn.Sequential(*blocks))
        self.attnpool = Pool((size // 32) ** 2, channels, channels // 64, joint)

    def forward(self, x):
        for k in (1, 2, 3):
            x = torch.relu(getattr(self, f"bn{k}")(getattr(self, f"conv{k}")(x)))
        x = nn.functional.avg_pool2d(x, 2)
        for k in (1, 2, 3, 4):
            x = getattr(self, f"layer{k}")(x)
        return self.attnpool(x)


class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class Resblock(nn.Module):
    def __init__(self, width, heads, activation):
        super().__init__()
        self.attn, self.ln_1, self.ln_2 = nn.MultiheadAttention(width, heads), nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, 4 * width))
        self.mlp.add_module("gelu", activation())
        self.mlp.add_module("c_proj", nn.Linear(4 * width, width))

    def forward(self, x):
        y = self.ln_1(x)
        causal = torch.full((len(x), len(x)), -math.inf).triu(1)
        x = x + self.attn(y, y, y, attn_mask=causal, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class Reference(nn.Module):
    """A whole CLIP; its state_dict has OpenAI's names and layouts."""

    def __init__(self, vocabulary, activation):
        super().__init__()
        self.visual = Visual(LAYERS, WIDTH, SIZE, JOINT)
        self.transformer = nn.Module()
        blocks = [Resblock(TEXT["width"], TEXT["heads"], activation) for _ in range(TEXT["layers"])]
        self.transformer.resblocks = nn.Sequential(*blocks)
        self.token_embedding = nn.Embedding(vocabulary, TEXT["width"])
        self.positional_embedding = nn.Parameter(torch.zeros(TEXT["context_length"], TEXT["width"]))
        self.ln_final = nn.LayerNorm(TEXT["width"])
        self.text_projection = nn.Parameter(torch.zeros(TEXT["width"], JOINT))
        self.logit_scale = nn.Parameter(torch.tensor(2.5))

    def encode_text(self, ids):
        x = (self.token_embedding(ids) + self.positional_embedding[: ids.shape[1]]).transpose(0, 1)
        x = self.ln_final(self.transformer.resblocks(x)).transpose(0, 1)
        return x[torch.arange(len(ids)), ids.argmax(-1)] @ self.text_projection


def randomise(model):
    """Statistics of training too; scales that keep the activations of a deep network finite."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if not value.is_floating_point() or name == "logit_scale":
                continue
            noise = torch.randn(value.shape, generator=generator)
            if name.endswith("running_var"):
                value.copy_(0.5 + noise.abs())
            elif value.ndim == 1:
                value.copy_((1.0 if name.endswith("weight") else 0.0) + 0.2 * noise)
            else:
                value.copy_(noise * value[0].numel() ** -0.5 * (1 if value.ndim == 4 else 2))


def write_network(assets, directory, activation):
    """(the torch model, `directory`, which holds it as OpenCLIP does, with the tiny CLIP's tokenizer)."""
    directory.mkdir()
    copy_tokenizer(assets / "clip", directory)
    vocabulary = ClipText(directory).vocab_size
    model = Reference(vocabulary, QuickGELU if activation == "quick_gelu" else nn.GELU).eval()
    randomise(model)
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(state, directory / "open_clip_model.safetensors")
    vision = {"layers": list(LAYERS), "width": WIDTH, "image_size": SIZE, "patch_size": None}
    settings = {"embed_dim": JOINT, "vision_cfg": vision, "text_cfg": TEXT | {"vocab_size": vocabulary}}
    settings |= {"quick_gelu": True} if activation == "quick_gelu" else {}
    pixels = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "interpolation": "bicubic", "resize_mode": "shortest"}
    (directory / "open_clip_config.json").write_text(json.dumps({"model_cfg": settings, "preprocess_cfg": pixels}))
    return model, directory


@pytest.fixture(scope="module")
def network(assets, tmp_path_factory):
    return write_network(assets, tmp_path_factory.mktemp("resnet") / "clip", "quick_gelu")


@pytest.mark.parity
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_the_whole_is_the_reference(assets, tmp_path, activation, rng, apply):
    model, directory = write_network(assets, tmp_path / "clip", activation)
    config, params = load_clip(directory)
    pixels = rng.normal(size=(3, SIZE, SIZE, 3)).astype(np.float32)
    ours = apply(Clip(config), params, pixels, method="encode_images")
    with torch.no_grad():
        states, tokens = model.visual(torch.tensor(pixels.transpose(0, 3, 1, 2)))
    assert ours.tokens.shape == (3, config.vision.num_tokens, JOINT) == (3, 5, 24)
    assert tokens.std() > 0.1 and states.std() > 0.1
    np.testing.assert_allclose(ours.last_hidden_state, states, rtol=0, atol=1e-5 * float(states.abs().max()))
    np.testing.assert_allclose(ours.tokens, tokens, rtol=0, atol=1e-5 * float(tokens.abs().max()))
    pooled = nn.functional.normalize(tokens[:, 0], dim=-1)
    np.testing.assert_allclose(ours.embedding, pooled, rtol=0, atol=1e-5)
    end = config.text.eos_token_id
    ids = rng.integers(3, end, (3, 12))
    ids[np.arange(3), [5, 11, 8]] = end
    mask = np.arange(12) <= np.array([5, 11, 8])[:, None]
    ours = apply(Clip(config), params, ids, mask, method="encode_texts")
    with torch.no_grad():
        theirs = nn.functional.normalize(model.encode_text(torch.tensor(np.where(mask, ids, 0))), dim=-1)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)
    assert params["logit_scale"] == np.float32(2.5)


@pytest.mark.parametrize("shape", [{"fsdp": 8}, {"model": 4, "data": 2}])
def test_parts_are_read_alone(network, shape):
    """A device reads its part of fused, transposed and convolution tensors; together they are the whole."""
    directory = network[1]
    config = read_clip_config(directory)
    layout = sharding.shardings(names.parameter_shapes(config), make_mesh(**shape))
    parts, whole = load_clip(directory, layout)[1], load_clip(directory)[1]
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(parts), whole)
    split = [x for x in jax.tree.leaves(parts) if x.addressable_shards[0].data.size < x.size]
    assert sum(x.size for x in split) > 0.9 * sum(x.size for x in jax.tree.leaves(parts))


def test_saved_as_our_own_it_comes_back(network, tmp_path):
    config, params = load_clip(network[1])
    save_clip(tmp_path, config, params)
    again, same = load_clip(tmp_path)
    assert again == config
    jax.tree.map(np.testing.assert_array_equal, same, params)


def rows_of(name):
    """Sizes of OpenAI's releases."""
    layers, width, size, joint, text = {
        "RN50": ([3, 4, 6, 3], 64, 224, 1024, (512, 8)),
        "RN101": ([3, 4, 23, 3], 64, 224, 512, (512, 8)),
        "RN50x4": ([4, 6, 10, 6], 80, 288, 640, (640, 10)),
        "RN50x16": ([6, 8, 18, 8], 96, 384, 768, (768, 12)),
        "RN50x64": ([3, 15, 36, 10], 128, 448, 1024, (1024, 16)),
    }[name]
    vision = {"layers": layers, "width": width, "image_size": size}
    model = {"embed_dim": joint, "vision_cfg": vision, "text_cfg": {"width": text[0], "heads": text[1]}}
    return ClipConfig.from_open_clip({"model_cfg": model | {"quick_gelu": True}}, "test")


@pytest.mark.parametrize(
    ("name", "total", "image"),
    [
        ("RN50", 102.01, 38.32),
        ("RN101", 119.69, 56.26),
        ("RN50x4", 178.3, 87.14),
        ("RN50x16", 290.98, 167.33),
        ("RN50x64", 623.26, 420.38),
    ],
)
def test_sizes_are_those_that_openclip_publishes(name, total, image):
    """Millions of parameters; statistics of batch normalisation are none."""

    def millions(tree):
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return sum(math.prod(x.shape) for path, x in leaves if path[-1].key not in ("mean", "var")) / 1e6

    config = rows_of(name)
    shapes = names.parameter_shapes(config)
    assert millions(shapes) == pytest.approx(total, abs=0.006)
    assert millions(shapes["vision_model"]) == pytest.approx(image, abs=0.006)
    assert {row.path for row in names.clip_rows(config)} == {
        tuple(key.key for key in path) for path, _ in jax.tree_util.tree_leaves_with_path(shapes)
    }


@pytest.mark.parity
@pytest.mark.parametrize("image_tokens", ["projected", "hidden", "pooled"])
def test_a_student_of_it_in_torch(network, assets, tmp_path, image_tokens):
    task = make_task(tiny_config(assets, clip=str(network[1]), student__image_tokens=image_tokens))
    model = VLKD.of(task, task.load_params(), task.load_frozen(), sharding.one_device())
    export(model, tmp_path / "HF")
    result = parity.measure(tmp_path / "HF", parity.make_prompts(2))
    assert parity.faults(result) == []


def test_a_student_is_trained_and_comes_back(network, assets, tmp_path):
    """As with any other teacher: the run has its copy, the export gives every tensor back."""
    train(tiny_config(assets, clip=str(network[1]), steps=2), tmp_path / "run")
    model = VLKD.from_run(tmp_path / "run")
    assert set(files_read(tmp_path / "run" / "parents" / "clip")) >= {"open_clip_config.json", "vocab.json"}
    export(model, tmp_path / "HF")
    import_export(tmp_path / "HF", tmp_path / "again")
    again = VLKD.from_run(tmp_path / "again")
    assert again.config == model.config
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(again.clip_params), jax.device_get(model.clip_params))
    picture = Image.new("RGB", (80, 70), "red")
    assert again.caption([picture]) == model.caption([picture])


def test_what_it_cannot_do_is_one_line(network, assets, tmp_path):
    directory = network[1]
    with pytest.raises(UserError, match="'penultimate', which a residual network does not have"):
        make_task(tiny_config(assets, clip=str(directory), student__image_tokens="penultimate"))
    with pytest.raises(UserError, match="it can only teach"):
        make_task(tiny_config(assets, clip=str(directory), objective="clip_contrastive"))
    for change, message in (
        (
            lambda v: v["model_cfg"]["vision_cfg"].update(layers=12),
            "no residual network; give the model in Hugging Face",
        ),
        (lambda v: v["model_cfg"]["vision_cfg"].update(layers=[1, 2]), "layers is .1, 2.; it must be four numbers"),
        (lambda v: v["model_cfg"]["vision_cfg"].update(image_size=70), "image_size is 70; it must be a multiple of 32"),
        (lambda v: v["model_cfg"]["text_cfg"].update(hf_model_name="roberta"), "only CLIP's own text tower is read"),
        (lambda v: v["model_cfg"].update(embed_dim="x"), "embed_dim is 'x'"),
        (lambda v: v.pop("model_cfg"), "model_cfg must be a JSON object"),
        (lambda v: v["preprocess_cfg"].update(resize_mode="squash"), "resize_mode"),
        (lambda v: v["model_cfg"].update(embed_dim=JOINT + 1), "the weights do not fit"),
    ):
        copy = tmp_path / "copy"
        shutil.copytree(directory, copy)
        values = json.loads((copy / "open_clip_config.json").read_text())
        change(values)
        (copy / "open_clip_config.json").write_text(json.dumps(values))
        with pytest.raises(UserError, match=message) as error:
            load_clip(copy)
        assert str(copy) in str(error.value) and "\n" not in str(error.value)
        shutil.rmtree(copy)
