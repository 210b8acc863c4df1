"""CLIP against Hugging Face's torch implementation, per sub-module and whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from vlkd_jax.errors import UserError
from vlkd_jax.hf.load import load_clip
from vlkd_jax.models.attention import Attention
from vlkd_jax.models.clip import Clip, ClipLayer, ClipTextTower, ClipVisionTower

MODULE, WHOLE = 1e-5, 1e-4
LENGTHS = np.array([5, 12, 9])


@pytest.fixture(params=["tiny_clip", "legacy_clip"])
def both(request):
    """(torch model, config, Flax parameters) for each end-of-text convention and activation."""
    reference = request.getfixturevalue(request.param)
    return reference.model, *load_clip(reference.directory)


@pytest.fixture
def tiny(tiny_clip):
    return tiny_clip.model, *load_clip(tiny_clip.directory)


def close(ours, theirs, tolerance):
    ours, theirs = np.asarray(ours), theirs.detach().numpy()
    assert ours.shape == theirs.shape
    assert np.abs(theirs).max() > 1e-2  # a reference of zeros would prove nothing
    assert np.abs(ours - theirs).max() <= tolerance


def layer_of(stacked, index):
    return jax.tree.map(lambda leaf: leaf[index], stacked)


def captions(config, rng, padded=True):
    """Ids that end in the end token (98, the largest) and go on with padding; mask [3, 12]."""
    ids = rng.integers(3, 97, (3, 12))
    lengths = LENGTHS if padded else np.full(3, 12)
    mask = np.arange(12) < lengths[:, None]
    ids[np.arange(3), lengths - 1] = 98
    return np.where(mask, ids, config.text.pad_token_id), mask


def pixels(config, rng):
    size = config.vision.image_size
    return rng.normal(size=(3, size, size, 3)).astype(np.float32)


def to_torch(array):
    array = np.asarray(array)
    return torch.tensor(array.transpose(0, 3, 1, 2) if array.ndim == 4 else array)


def torch_mask(mask, causal):
    """Hugging Face's additive mask [B, 1, L, L]."""
    keep = np.broadcast_to(mask[:, None, None, :], (*mask.shape[:1], 1, mask.shape[1], mask.shape[1]))
    keep = np.tril(keep) if causal else keep
    return torch.where(torch.tensor(keep.copy()), 0.0, torch.finfo(torch.float32).min)


@pytest.mark.parity
def test_vision_embeddings(both, rng, apply):
    model, config, params = both
    images = pixels(config, rng)
    tower = ClipVisionTower(config.vision, jnp.float32, None)
    ours = apply(tower, params["vision_model"], images, method="embed")
    close(ours, model.vision_model.embeddings(to_torch(images)), MODULE)


@pytest.mark.parity
def test_text_embeddings(tiny, rng, apply):
    model, config, params = tiny
    ids, _ = captions(config, rng)
    tower = ClipTextTower(config.text, jnp.float32, None)
    ours = apply(tower, params["text_model"], ids, method="embed")
    close(ours, model.text_model.embeddings(to_torch(ids)), MODULE)


@pytest.mark.parity
def test_attention_under_a_causal_padding_mask(tiny, rng, apply):
    model, _, params = tiny
    x = rng.normal(size=(3, 12, 32)).astype(np.float32)
    mask = np.arange(12) < LENGTHS[:, None]
    keep = np.tril(np.broadcast_to(mask[:, None, None, :], (3, 1, 12, 12)))
    ours = apply(Attention(32, 4), layer_of(params["text_model"]["layers"]["self_attn"], 1), x, x, keep)
    theirs = model.text_model.encoder.layers[1].self_attn(to_torch(x), torch_mask(mask, causal=True))[0]
    close(ours, theirs, MODULE)


@pytest.mark.parity
def test_one_layer(both, rng, apply):
    model, config, params = both
    x = rng.normal(size=(2, 7, 40)).astype(np.float32)
    layer = ClipLayer(config.vision, jnp.float32)
    (ours, before), _ = apply(layer, layer_of(params["vision_model"]["layers"], 2), (x, None), None)
    np.testing.assert_array_equal(before, x)
    close(ours, model.vision_model.encoder.layers[2](to_torch(x), None), MODULE)


@pytest.mark.parity
def test_image_tower_and_projection_of_every_token(both, rng, apply):
    model, config, params = both
    images = pixels(config, rng)
    ours = apply(Clip(config), params, images, method="encode_images")
    output = model.vision_model(to_torch(images), output_hidden_states=True)
    states = output.last_hidden_state
    tokens = model.visual_projection(model.vision_model.post_layernorm(states))
    assert ours.tokens.shape == (3, config.vision.num_tokens, 16)
    close(ours.last_hidden_state, states, MODULE)
    close(ours.penultimate, output.hidden_states[-2], MODULE)
    close(ours.tokens, tokens, MODULE)
    close(ours.embedding, torch.nn.functional.normalize(tokens[:, 0], dim=-1), MODULE)


@pytest.mark.parity
@pytest.mark.parametrize("padded", [True, False])
def test_text_tower_and_projection(both, rng, padded, apply):
    model, config, params = both
    ids, mask = captions(config, rng, padded)
    tower = ClipTextTower(config.text, jnp.float32, None)
    states = apply(tower, params["text_model"], ids, mask)
    reference = model.text_model(input_ids=to_torch(ids), attention_mask=to_torch(mask.astype(int)))
    close(np.asarray(states)[mask], reference.last_hidden_state[torch.tensor(mask)], MODULE)
    ours = apply(Clip(config), params, ids, mask, method="encode_texts")
    projected = model.text_projection(reference.pooler_output)
    close(ours, torch.nn.functional.normalize(projected, dim=-1), MODULE)


@pytest.mark.parity
@pytest.mark.parametrize("padded", [True, False])
def test_whole_model(both, rng, padded, apply):
    model, config, params = both
    images, (ids, mask) = pixels(config, rng), captions(config, rng, padded)
    image, text, scale = apply(Clip(config), params, images, ids, mask)
    reference = model(pixel_values=to_torch(images), input_ids=to_torch(ids), attention_mask=to_torch(mask.astype(int)))
    close(scale * image @ text.T, reference.logits_per_image, WHOLE)
    close(image, reference.image_embeds, MODULE)
    close(text, reference.text_embeds, MODULE)


def test_pooling_takes_the_first_end_token_and_ignores_what_follows(tiny, rng, apply):
    _, config, params = tiny
    ids, mask = captions(config, rng)
    other = np.where(mask, ids, rng.integers(3, 97, ids.shape))
    first, second = (apply(Clip(config), params, x, mask, method="encode_texts") for x in (ids, other))
    np.testing.assert_array_equal(first, second)


def test_embeddings_are_unit_vectors_in_float32_under_bfloat16(tiny, rng, apply):
    _, config, params = tiny
    images, (ids, mask) = pixels(config, rng), captions(config, rng)
    exact = apply(Clip(config), params, images, ids, mask)
    image, text, scale = apply(Clip(config, dtype=jnp.bfloat16), params, images, ids, mask)
    for ours, reference in zip((image, text), exact, strict=False):
        assert ours.dtype == jnp.float32
        np.testing.assert_allclose(np.linalg.norm(ours, axis=-1), 1, atol=1e-5)
        assert 0 < np.abs(ours - reference).max() < 0.1
    assert scale.dtype == jnp.float32


def test_remat_changes_nothing(tiny, rng):
    _, config, params = tiny
    ids, mask = captions(config, rng)

    def loss(params, remat):
        tower = ClipTextTower(config.text, jnp.float32, remat)
        return jnp.sum(jnp.sin(tower.apply({"params": params}, ids, mask)))

    gradient = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    plain, *others = (gradient(params["text_model"], remat) for remat in (None, "nothing", "dots"))
    for other in others:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), plain, other)


def test_initial_parameters_have_the_loaded_shapes(tiny):
    _, config, params = tiny
    size = config.vision.image_size
    inputs = jnp.zeros((1, size, size, 3)), jnp.zeros((1, 4), jnp.int32), jnp.ones((1, 4), bool)
    initial = jax.jit(Clip(config).init)(jax.random.key(0), *inputs)["params"]
    assert jax.tree.map(jnp.shape, initial) == jax.tree.map(jnp.shape, params)
    assert float(initial["logit_scale"]) == pytest.approx(config.logit_scale_init_value)
    layers = initial["vision_model"]["layers"]["self_attn"]["q_proj"]["kernel"]
    assert np.std(layers) == pytest.approx(40**-0.5 * 6**-0.5, rel=0.1)
    assert not np.array_equal(layers[0], layers[1])


def test_wrong_sizes_are_user_errors(tiny, apply):
    _, config, params = tiny
    with pytest.raises(UserError, match=r"this CLIP reads \(24, 24, 3\)"):
        apply(Clip(config), params, jnp.zeros((1, 32, 32, 3)), method="encode_images")
    with pytest.raises(UserError, match=r"21 CLIP tokens.*max_position_embeddings is 20"):
        ids = jnp.zeros((1, 21), jnp.int32)
        apply(Clip(config), params, ids, ids == 0, method="encode_texts")
