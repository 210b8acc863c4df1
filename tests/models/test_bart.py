"""BART against Hugging Face's torch implementation: sub-modules, whole, gradients and training."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from vlkd_jax.errors import UserError
from vlkd_jax.hf import names
from vlkd_jax.hf.load import load_bart
from vlkd_jax.models.attention import Attention
from vlkd_jax.models.bart import Bart, BartDecoder, BartEncoder, DecoderLayer, EncoderLayer, shift_right

MODULE, WHOLE = 1e-5, 1e-4
SOURCE, TARGET, IMAGE, WIDTH = 10, 8, 5, 32
PAD = 1


@pytest.fixture(params=["tiny_bart", "scaled_bart"])
def both(request):
    """(torch model, config, Flax parameters): gelu and unscaled, quick_gelu and scaled embeddings."""
    reference = request.getfixturevalue(request.param)
    return reference.model, *load_bart(reference.directory)


@pytest.fixture
def tiny(tiny_bart):
    return tiny_bart.model, *load_bart(tiny_bart.directory)


def close(ours, theirs, tolerance):
    ours, theirs = np.asarray(ours), np.asarray(theirs.detach())
    assert ours.shape == theirs.shape
    assert np.abs(theirs).max() > 1e-2  # a reference of zeros would prove nothing
    assert np.abs(ours - theirs).max() <= tolerance


def layer_of(stacked, index):
    return jax.tree.map(lambda leaf: leaf[index], stacked)


def texts(rng, length, padded=True):
    """Random ids [3, length] and mask, right-padded."""
    lengths = np.array([length, length - 4, length - 1]) if padded else np.full(3, length)
    mask = np.arange(length) < lengths[:, None]
    return np.where(mask, rng.integers(3, 99, mask.shape), PAD), mask


def additive(mask):
    return torch.where(torch.tensor(np.asarray(mask).copy()), 0.0, torch.finfo(torch.float32).min)


def memory_of(rng, rows=3):
    """A random memory [rows, M, D] and its mask, every row ending differently."""
    length = IMAGE + SOURCE
    memory = rng.normal(size=(rows, length, WIDTH)).astype(np.float32)
    return memory, np.arange(length) < (length - np.arange(rows) * 3)[:, None]


@pytest.mark.parity
def test_embeddings(both, rng, apply):
    model, config, params = both
    ids, _ = texts(rng, SOURCE)
    embedding = model.get_input_embeddings()(torch.tensor(ids))
    close(apply(Bart(config), params, ids, method="_embed"), embedding, MODULE)
    for name, kind in (("encoder", BartEncoder), ("decoder", BartDecoder)):
        inputs = embedding.detach().numpy(), np.arange(SOURCE)
        ours = apply(kind(config, jnp.float32, None), params[name], *inputs, method="embed")
        side = getattr(model.model, name)
        theirs = side.layernorm_embedding(embedding + side.embed_positions(torch.tensor(ids)))
        close(ours, theirs, MODULE)


@pytest.mark.parity
@pytest.mark.parametrize("kind", ["self_attn", "encoder_attn"])
def test_attention(tiny, rng, kind, apply):
    model, _, params = tiny
    x = rng.normal(size=(3, TARGET, WIDTH)).astype(np.float32)
    memory, mask = memory_of(rng)
    if kind == "self_attn":
        memory, mask = x, np.ones((3, TARGET), bool)
    attention = getattr(model.model.decoder.layers[1], kind)
    ours = apply(Attention(WIDTH, 8), layer_of(params["decoder"]["layers"][kind], 1), x, memory, mask[:, None, None])
    bias = additive(np.broadcast_to(mask[:, None, None], (3, 1, TARGET, mask.shape[1])))
    close(ours, attention(torch.tensor(x), torch.tensor(memory), attention_mask=bias)[0], MODULE)


@pytest.mark.parity
def test_one_encoder_layer(both, rng):
    model, config, params = both
    x = rng.normal(size=(3, SOURCE, WIDTH)).astype(np.float32)
    _, mask = texts(rng, SOURCE)
    layer = {"params": layer_of(params["encoder"]["layers"], 1)}
    ours, _ = EncoderLayer(config, jnp.float32).apply(layer, x, mask[:, None, None], True)
    bias = additive(np.broadcast_to(mask[:, None, None], (3, 1, SOURCE, SOURCE)))
    close(ours, model.model.encoder.layers[1](torch.tensor(x), bias), MODULE)


@pytest.mark.parity
def test_one_decoder_layer(both, rng):
    model, config, params = both
    x = rng.normal(size=(3, TARGET, WIDTH)).astype(np.float32)
    memory, mask = memory_of(rng)
    causal = np.tril(np.ones((1, 1, TARGET, TARGET), bool))
    layer = {"params": layer_of(params["decoder"]["layers"], 1)}
    ours, _ = DecoderLayer(config, jnp.float32).apply(layer, x, memory, causal, mask[:, None, None], True)
    theirs = model.model.decoder.layers[1](
        torch.tensor(x),
        additive(np.broadcast_to(causal, (3, 1, TARGET, TARGET))),
        torch.tensor(memory),
        encoder_attention_mask=additive(np.broadcast_to(mask[:, None, None], (3, 1, TARGET, mask.shape[1]))),
    )
    close(ours, theirs, MODULE)


@pytest.mark.parity
@pytest.mark.parametrize("padded", [True, False])
def test_encoder_decoder_head_and_whole(both, rng, padded, apply):
    model, config, params = both
    (ids, mask), (target, _) = texts(rng, SOURCE, padded), texts(rng, TARGET, padded)
    bart = Bart(config)
    decoder_ids = shift_right(target, config.decoder_start_token_id)
    keep, inputs = torch.tensor(mask.astype(int)), torch.tensor(np.asarray(decoder_ids))

    encoded = model.model.encoder(torch.tensor(ids), attention_mask=keep).last_hidden_state
    close(apply(bart, params, ids, mask, method="encode"), encoded, MODULE)
    hidden = model.model.decoder(inputs, encoder_hidden_states=encoded, encoder_attention_mask=keep).last_hidden_state
    close(apply(bart, params, decoder_ids, encoded.detach().numpy(), mask, method="decode"), hidden, MODULE)
    head = model.lm_head(hidden) + model.final_logits_bias
    close(apply(bart, params, hidden.detach().numpy(), method="logits"), head, MODULE)
    logits = model(input_ids=torch.tensor(ids), attention_mask=keep, decoder_input_ids=inputs).logits
    close(apply(bart, params, ids, mask, decoder_ids), logits, WHOLE)


@pytest.mark.parity
def test_shift_right_is_hugging_faces():
    from transformers.models.bart.modeling_bart import shift_tokens_right

    ids = np.array([[0, 7, 2, 1], [0, 5, 6, 2]])
    assert shift_right(ids, 2).tolist() == shift_tokens_right(torch.tensor(ids), 1, 2).tolist()


def infilling_batch(rng):
    """(image prefix [B, N, D], corrupted ids and mask, target ids and mask), padded on both sides."""
    prefix = rng.normal(size=(3, IMAGE, WIDTH)).astype(np.float32)
    return prefix, *texts(rng, SOURCE), *texts(rng, TARGET)


@functools.partial(jax.jit, static_argnums=(0, 1))
@functools.partial(jax.value_and_grad, argnums=2)
def infilling_gradient(config, remat, params, batch):
    """Teacher-forced cross-entropy per target token, the decoder reading [prefix, encoder(text)], and its gradient."""
    prefix, ids, mask, target, target_mask = batch
    bart, variables = Bart(config, remat=remat), {"params": params}
    encoded = bart.apply(variables, ids, mask, False, method="encode")
    memory = jnp.concatenate([prefix, encoded], axis=1)
    memory_mask = jnp.concatenate([jnp.ones(prefix.shape[:2], bool), mask], axis=1)
    hidden = bart.apply(variables, shift_right(target, 2), memory, memory_mask, False, method="decode")
    logits = bart.apply(variables, hidden, method="logits")
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, target)
    return jnp.sum(losses * target_mask) / jnp.sum(target_mask)


def torch_infilling_loss(model, batch):
    prefix, ids, mask, target, target_mask = (torch.tensor(np.asarray(part)) for part in batch)
    encoded = model.model.encoder(ids, attention_mask=mask.int()).last_hidden_state
    hidden = model.model.decoder(
        torch.tensor(np.asarray(shift_right(target.numpy(), 2))),
        encoder_hidden_states=torch.cat([prefix, encoded], dim=1),
        encoder_attention_mask=torch.cat([torch.ones(prefix.shape[:2]), mask], dim=1).int(),
    ).last_hidden_state
    logits = model.lm_head(hidden) + model.final_logits_bias
    return torch.nn.functional.cross_entropy(logits[target_mask], target[target_mask])


def without_dropout(config):
    return dataclasses.replace(config, dropout=0.0, attention_dropout=0.0, activation_dropout=0.0)


@pytest.mark.parity
def test_gradient_of_every_parameter(both, rng):
    model, config, params = both
    config, batch = without_dropout(config), infilling_batch(rng)
    model.zero_grad()
    reference = torch_infilling_loss(model, batch)
    reference.backward()
    loss, gradient = infilling_gradient(config, None, params, batch)
    assert float(loss) == pytest.approx(reference.item(), abs=MODULE)

    ours = names.to_hf(names.bart_rows(config), gradient)
    theirs = {name: value.grad.numpy() for name, value in model.named_parameters()}
    assert not ours.pop("final_logits_bias").any()  # a buffer in torch
    assert set(ours) == set(theirs)
    largest = max(np.abs(value).max() for value in theirs.values())
    for name, value in theirs.items():
        if name.endswith("k_proj.bias"):  # adds one constant to all of a query's scores: softmax cancels it
            assert max(np.abs(value).max(), np.abs(ours[name]).max()) <= 1e-6 * largest, name
        else:
            assert np.abs(ours[name] - value).max() <= 1e-4 * np.abs(value).max(), name


@pytest.mark.parity
def test_twenty_adamw_steps_follow_torch(save_torch, tiny_bart, rng):
    model = save_torch(type(tiny_bart.model), tiny_bart.model.config, seed=4)
    config, params = load_bart(model.directory)
    config, model, batch = without_dropout(config), model.model, infilling_batch(rng)
    torch_optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.98), eps=1e-8, weight_decay=0.01)
    theirs = []
    for _ in range(20):
        torch_optimizer.zero_grad()
        loss = torch_infilling_loss(model, batch)
        loss.backward()
        torch_optimizer.step()
        theirs.append(loss.item())

    optimizer = optax.adamw(1e-3, b1=0.9, b2=0.98, eps=1e-8, weight_decay=0.01)

    update, state, ours = jax.jit(optimizer.update), optimizer.init(params), []
    for _ in range(20):
        loss, gradient = infilling_gradient(config, None, params, batch)
        updates, state = update(gradient, state, params)
        params = jax.tree.map(np.add, params, updates)
        ours.append(float(loss))
    assert theirs[-1] < 0.7 * theirs[0]
    assert np.abs(np.array(ours) - np.array(theirs)).max() <= 1e-4


def test_remat_changes_nothing(tiny, rng):
    _, config, params = tiny
    config, batch = without_dropout(config), infilling_batch(rng)
    plain, *others = (infilling_gradient(config, remat, params, batch) for remat in (None, "nothing", "dots"))
    for other in others:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), plain, other)


def test_a_row_that_may_read_nothing_stays_finite(tiny, rng, apply):
    _, config, params = tiny
    batch = list(infilling_batch(rng))
    batch[2] = np.array(batch[2])
    batch[2][1] = False
    memory, mask = memory_of(rng)
    mask[0] = False
    hidden = apply(Bart(config), params, batch[3], memory, mask, method="decode")
    assert np.isfinite(hidden).all()
    _, gradient = infilling_gradient(without_dropout(config), None, params, tuple(batch))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_masked_memory_and_padding_are_not_read(tiny, rng, apply):
    _, config, params = tiny
    bart = Bart(config)
    ids, mask = texts(rng, SOURCE)
    memory = np.asarray(apply(bart, params, ids, mask, method="encode"))
    other = np.asarray(apply(bart, params, np.where(mask, ids, 50), mask, method="encode"))
    np.testing.assert_array_equal(memory[mask], other[mask])
    target, _ = texts(rng, TARGET)
    plain = apply(bart, params, target, memory, mask, method="decode")
    noisy = apply(bart, params, target, np.where(mask[..., None], memory, 9.0), mask, method="decode")
    np.testing.assert_array_equal(plain, noisy)


@pytest.mark.parametrize("rate", ["dropout", "attention_dropout", "activation_dropout"])
def test_each_dropout_rate_acts_only_in_training(tiny, rng, rate):
    _, config, params = tiny
    bart = Bart(dataclasses.replace(without_dropout(config), **{rate: 0.5}))
    ids, mask = texts(rng, SOURCE)

    @functools.partial(jax.jit, static_argnums=0)
    def encode(deterministic, seed):
        rngs = {"dropout": jax.random.key(seed)}
        return bart.apply({"params": params}, ids, mask, deterministic, method="encode", rngs=rngs)

    np.testing.assert_array_equal(encode(True, 0), encode(True, 1))
    np.testing.assert_array_equal(encode(False, 0), encode(False, 0))
    assert np.abs(encode(False, 0) - encode(False, 1)).max() > 0.1


def test_bfloat16_activations_and_float32_logits(tiny, rng, apply):
    _, config, params = tiny
    ids, mask = texts(rng, SOURCE)
    exact = apply(Bart(config), params, ids, mask, ids)
    bart = Bart(config, dtype=jnp.bfloat16)
    assert jax.eval_shape(lambda: bart.apply({"params": params}, ids, mask, method="encode")).dtype == jnp.bfloat16
    logits = apply(bart, params, ids, mask, ids)
    assert logits.dtype == jnp.float32
    assert 0 < np.abs(logits - exact).max() < 0.05 * np.abs(exact).max()


def test_initial_parameters_have_the_loaded_shapes(tiny):
    _, config, params = tiny
    ids = jnp.zeros((1, 4), jnp.int32)
    initial = jax.jit(Bart(config).init)(jax.random.key(0), ids, ids == 0, ids)["params"]
    assert jax.tree.map(jnp.shape, initial) == jax.tree.map(jnp.shape, params)
    layers = initial["decoder"]["layers"]["encoder_attn"]["q_proj"]
    assert np.std(layers["kernel"]) == pytest.approx(0.02, rel=0.1)
    assert not np.any(layers["bias"])
    assert not np.array_equal(layers["kernel"][0], layers["kernel"][1])


def test_texts_longer_than_the_position_table_are_user_errors(tiny, apply):
    _, config, params = tiny
    ids = jnp.zeros((1, 25), jnp.int32)
    memory = jnp.zeros((1, 2, WIDTH)), jnp.ones((1, 2), bool)
    with pytest.raises(UserError, match=r"25 BART tokens.*max_position_embeddings is 24"):
        apply(Bart(config), params, ids, ids == 0, method="encode")
    with pytest.raises(UserError, match=r"25 BART tokens.*max_position_embeddings is 24"):
        apply(Bart(config), params, ids, *memory, method="decode")


@pytest.mark.parity
def test_attention_weights_of_the_decoder(both, rng):
    """Sown for whoever asks, of every layer; nothing is kept otherwise."""
    model, config, params = both
    ids, _ = texts(rng, TARGET, padded=False)
    memory, mask = memory_of(rng)
    _, kept = Bart(config).apply({"params": params}, ids, memory, mask, method="decode", mutable=["intermediates"])
    (ours,) = kept["intermediates"]["decoder"]["layers"]["encoder_attn"]["weights"]
    model.set_attn_implementation("eager")
    theirs = model.model.decoder(
        torch.tensor(ids),
        encoder_hidden_states=torch.tensor(memory),
        encoder_attention_mask=torch.tensor(mask),
        output_attentions=True,
    ).cross_attentions
    close(ours, torch.stack(theirs), MODULE)
    assert Bart(config).apply({"params": params}, ids, memory, mask, method="decode", mutable=["other"])[1] == {}
