"""The benchmarks compare like with like: the torch peer has our losses and our answers; arithmetic is counted right."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import levers, timing
from benchmarks.workload import OPTIMIZER, Workload, answer, image_memory
from vlkd_jax.decoding import Decoding
from vlkd_jax.hf.save import save_bart, save_clip
from vlkd_jax.workdir import flatten

ROWS, LENGTH = 5, 20


@pytest.fixture(scope="module")
def workload() -> Workload:
    return Workload.of("tiny", jnp.float32)


@pytest.fixture(scope="module")
def drawn(workload) -> tuple:
    """Parameters of a student that would end every answer at once, and of its teacher."""
    params, frozen = workload.draw(3)
    bias = params["bart"]["final_logits_bias"].at[0, workload.bart.eos_token_id].set(5.0)
    return params | {"bart": params["bart"] | {"final_logits_bias": bias}}, frozen


@pytest.fixture(scope="module")
def models(workload, drawn, tmp_path_factory):
    """(teacher, student, directory of BART) of the peer, with our parameters."""
    import torch

    from benchmarks import peer

    (params, frozen), directory = drawn, tmp_path_factory.mktemp("peer")
    save_clip(directory / "clip", workload.clip, frozen["clip"])
    save_bart(directory / "bart", workload.bart, params["bart"])
    teacher = peer.Teacher(directory / "clip", torch.float32, workload.clip.preprocessing)
    linears = [np.asarray(params[name]["kernel"]).T for name in ("sentence_projection", "image_projection")]
    return (
        teacher,
        peer.Student(directory / "bart", *map(torch.tensor, linears), float(params["logit_scale"])),
        directory,
    )


@pytest.mark.parity
@pytest.mark.parametrize("options", [Decoding(max_new_tokens=6), Decoding("beam", max_new_tokens=6, beams=3)], ids=str)
def test_answers_are_those_of_generate(workload, drawn, models, options):
    import torch

    from benchmarks import peer

    (params, frozen), (teacher, student, directory) = drawn, models
    prompts = workload.prompts(np.random.default_rng(4), ROWS, ask=True)
    image = image_memory(workload.student, workload.teacher, params, frozen["clip"], prompts.pixels)
    ours = np.asarray(answer(workload.student, params, image, prompts, options))
    reader = peer.Reader(teacher, student, torch.float32, directory / "bart")
    inputs = peer.tensors(prompts._asdict(), torch.device("cpu"))
    prefix = reader.image_prefix(inputs["pixels"])
    np.testing.assert_array_equal(ours, reader.answer(prefix, inputs, options).numpy())
    assert (ours[:, -1] == workload.bart.eos_token_id).all() and (ours[:, :-1] != workload.bart.eos_token_id).all()


@pytest.mark.parity
def test_steps_are_the_peers(drawn, models, monkeypatch):
    """Losses, gradient norms and what the optimizer makes of them, over steps with paddings of many lengths."""
    monkeypatch.setattr(OPTIMIZER, "weight_decay", 100.0)  # so much that one sees it after three steps
    workload = Workload.of("tiny", jnp.float32)
    import torch

    from benchmarks import peer

    (params, frozen), (teacher, student, _) = drawn, models
    trainer, rng = peer.Trainer(teacher, student, OPTIMIZER, autocast=False), np.random.default_rng(5)
    state, step = workload.state(params), jax.jit(workload.train_step())
    for _ in range(3):
        batch = workload.batch(rng, ROWS, LENGTH)
        state, metrics = step(state, frozen, batch)
        theirs = trainer.step(peer.tensors(vars(batch), torch.device("cpu")))
        for name, value in theirs.items():
            np.testing.assert_allclose(metrics[name], value.item(), rtol=1e-4, err_msg=name)
    pairs = {
        "image_projection": (state.params["image_projection"]["kernel"].T, student.image_projection),
        "shared": (state.params["bart"]["shared"]["embedding"], student.bart.model.shared.weight),
        "bias": (
            state.params["bart"]["decoder"]["layers"]["fc1"]["bias"][1],
            student.bart.model.decoder.layers[1].fc1.bias,
        ),
        "norm": (
            state.params["bart"]["encoder"]["layernorm_embedding"]["scale"],
            student.bart.model.encoder.layernorm_embedding.weight,
        ),
    }
    for name, (given, wanted) in pairs.items():
        change = np.abs(np.asarray(given) - wanted.detach().numpy())
        assert np.quantile(change, 0.99) < OPTIMIZER.lr / 10, name  # near no gradient at all, Adam's sign is chance


def test_contractions_are_counted_through_scans_and_gradients():
    x, kernels = jnp.ones((4, 8)), jnp.ones((3, 8, 8))

    def loss(kernels):
        return jnp.sum(jax.lax.scan(lambda x, kernel: (jnp.tanh(x @ kernel), None), x, kernels)[0])

    once = 2 * 4 * 8 * 8
    assert timing.matmul_flops(loss, kernels) == 3 * once
    # each of the three layers' gradients: of its kernel and of what it reads
    assert timing.matmul_flops(jax.jit(jax.grad(loss)), kernels) == 9 * once
    assert timing.matmul_flops(
        lambda a, b: jnp.einsum("bij,bkj->bik", a, b), jnp.ones((5, 2, 3)), jnp.ones((5, 4, 3))
    ) == (2 * 5 * 2 * 4 * 3)


def test_rivals_take_turns_and_the_first_round_does_not_count(monkeypatch):
    clock, order = iter(range(100)), []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock) ** 2)
    seconds = timing.alternate({name: lambda name=name: order.append(name) for name in "ab"}, 2)
    assert "".join(order) == "ababab" and seconds == {"a": [1, 9], "b": [5, 13]}
    assert timing.ratio(seconds, "b", "a") == (5 / 1 + 13 / 9) / 2


def test_the_study_of_levers_goes_on_where_it_was_cut_off(tmp_path, monkeypatch, capsys):
    """Every run sets its own lever alone; what is done is not done again, and all of it is in the table and drawn."""
    measured = []

    def measure(config, workdir):
        if len(measured) == 30:
            raise KeyboardInterrupt
        measured.append(config)
        asked = {"overall": min(config.optim.lr * 600, 1), "overall_interval": [0, 1], "n": 9}
        return {"step": config.steps, "vqa": asked, "text_qa": asked, "denoise_loss": config.optim.lr}

    monkeypatch.setattr(levers, "measure", measure)
    monkeypatch.setattr(levers, "denoise_loss", lambda: 0.1)
    monkeypatch.setattr(levers, "CAPTION_COUNT", 3)
    places = [f"--{name}={tmp_path / place}" for name, place in (("workdir", "runs"), ("figure", "levers.png"))]
    command = ["levers", "--steps=10", f"--output={tmp_path / 'levers.json'}", *places]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(KeyboardInterrupt):
        levers.main()
    done, measured[:] = list(measured), []
    levers.main()
    together = [config.to_json_best_effort() for config in done + measured]
    assert len(together) == len(set(together)) == 2 * len(levers.runs())
    off, *_ = (config for config in done if config.optim.lr == 3e-4)
    fields = [flatten(config.to_dict()) for config in [off, *done]]
    moved = [[name for name, value in levers.OFF.items() if of_run[name] != value] for of_run in fields]
    assert moved[0] == [] and off.early_stop.metric == "" and all(len(names) <= 1 for names in moved)
    captions = (tmp_path / "runs" / "1_captions.txt").read_text().splitlines()
    assert len(captions) == 3 and captions != (tmp_path / "runs" / "0_captions.txt").read_text().splitlines()
    out = capsys.readouterr().out
    assert out.count("\n| ") == len(levers.runs()) and "| 0.001 | captions replayed, weight 0.1 | 10, 10 | 60.0" in out
    assert (tmp_path / "levers.png").stat().st_size > 10_000
    monkeypatch.setattr(sys, "argv", [*command, "--steps=20"])
    with pytest.raises(SystemExit):
        levers.main()
    assert "of other settings" in capsys.readouterr().err
