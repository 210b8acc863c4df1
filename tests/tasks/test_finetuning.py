"""Fine-tuning: fifty AdamW steps as PyTorch takes them with Hugging Face's models, and what each objective reads."""

import json

import jax
import numpy as np
import pytest
from tiny import make_mesh, tiny_config

from vlkd_jax.data.streams import train_stream
from vlkd_jax.hf.save import save_classifier
from vlkd_jax.optim import decayed, make_optimizer, schedule
from vlkd_jax.shapes.sources import ShapesTexts
from vlkd_jax.step import make_train_step
from vlkd_jax.tasks import make_task
from vlkd_jax.train import start_state

STEPS, BATCH = 50, 8
COLUMNS = {"mnli": "sentence1\tsentence2\tgold_label", "rte": "index\tsentence1\tsentence2\tlabel"}
OPTIONS = {
    "data__source_length": 48,
    "data__text_length": 24,
    "data__truncate": True,
    "optim__lr": 1e-3,
    "optim__lr_linears": 2e-3,
    "optim__weight_decay": 0.1,
    "optim__warmup": 10,
    "optim__schedule": "linear",
    "steps": STEPS,
    "batch_size": BATCH,
}


def texts(count):
    """Captions of the built-in world and descriptions of its scenes."""
    source = ShapesTexts(0, "train")
    return [record.text for record in (source[k] for k in range(count))]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder for each source: pairs in MNLI's form, scores in STS-B's, documents with summaries."""
    folder, rng = tmp_path_factory.mktemp("texts"), np.random.default_rng(5)
    first, second = texts(60), texts(120)[60:]
    labels = rng.choice(["entailment", "neutral", "contradiction"], 60)
    for name, head, cells in (
        ("mnli", "index\tsentence1\tsentence2\tlabel1\tgold_label", [f"x\t{label}" for label in labels]),
        ("stsb", "index\tsentence1\tsentence2\tscore", [f"{score:.3f}" for score in rng.uniform(0, 5, 60)]),
    ):
        (folder / name).mkdir()
        rows = [f"{k}\t{a}\t{b}\t{cell}" for k, (a, b, cell) in enumerate(zip(first, second, cells, strict=True))]
        for split in ("train", "dev_matched" if name == "mnli" else "dev"):
            (folder / name / f"{split}.tsv").write_text("\n".join([head, *rows]) + "\n")
    (folder / "documents").mkdir()
    lines = [json.dumps({"document": f"{a} {b}", "summary": b[:40]}) for a, b in zip(first, second, strict=True)]
    (folder / "documents" / "train.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def config_of(assets, folder, kind, **changes):
    objective = "summarize" if kind == "documents" else "classify"
    source = {"data__source": "documents" if kind == "documents" else "glue", "data__directory": str(folder / kind)}
    task = {} if kind == "documents" else {"data__task": kind}
    return tiny_config(assets, objective=objective, **OPTIONS | source | task | changes)


def our_losses(config, task, params):
    """The total loss of each step, and the batches."""
    optimizer = make_optimizer(config.optim, config.steps, task.new)
    step, mesh = jax.jit(make_train_step(task, optimizer, 0.0, 0)), make_mesh()
    with jax.set_mesh(mesh):
        state, losses, batches = start_state(jax.device_put(params), optimizer, mesh), [], []
        for _, batch in zip(range(config.steps), train_stream(config, task, 0)):
            batches.append(batch.replace(index=None))
            state, metrics = step(state, {}, batches[-1])
            losses.append(float(metrics["loss"]))
    return np.array(losses), batches


def torch_losses(config, task, model, params, names, inputs):
    """The same of a torch model; `names`: Hugging Face name -> path in our tree, which says how it is trained."""
    import torch

    flat = jax.tree_util.tree_leaves_with_path(decayed(params))
    is_decayed = {tuple(key.key for key in path): value for path, value in flat}
    rates = {
        kind: schedule(config.optim, config.optim[rate], config.steps)
        for kind, rate in (("model", "lr"), ("linears", "lr_linears"))
    }
    groups = {}
    for name, parameter in model.named_parameters():
        path = names[name]
        key = "linears" if path[0] in task.new else "model", is_decayed[path]
        groups.setdefault(key, []).append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": some, "weight_decay": config.optim.weight_decay * key[1]} for key, some in groups.items()],
        betas=(config.optim.b1, config.optim.b2),
        eps=config.optim.eps,
    )
    losses = []
    for step, values in enumerate(inputs):
        for group, (kind, _) in zip(optimizer.param_groups, groups, strict=True):
            group["lr"] = float(rates[kind](step))
        optimizer.zero_grad()
        loss = model(**{name: torch.tensor(np.asarray(value)) for name, value in values.items()}).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip_norm)
        optimizer.step()
        losses.append(loss.item())
    return np.array(losses)


def paths_of(task):
    from vlkd_jax.hf import names

    rows = names.rows_for(task.classifier or task.configs["bart"])
    return {name: row.path for row in rows for name in row.names()}


@pytest.mark.parity
@pytest.mark.parametrize("kind", ["mnli", "stsb"])
def test_fifty_steps_of_a_classifier_are_pytorchs(assets, folders, tmp_path, kind):
    import torch
    from transformers import BartForSequenceClassification

    config = config_of(assets, folders, kind)
    task = make_task(config)
    params = jax.device_get(task.load_params())
    save_classifier(tmp_path, task.classifier, params)
    model = BartForSequenceClassification.from_pretrained(tmp_path, dropout=0.0).train()
    ours, batches = our_losses(config, task, params)
    inputs = [
        {
            "input_ids": np.int64(batch.source_ids),
            "attention_mask": batch.source_mask,
            "labels": np.int64(batch.labels) if kind == "mnli" else batch.labels,
        }
        for batch in batches
    ]
    torch.manual_seed(0)
    theirs = torch_losses(config, task, model, params, paths_of(task), inputs)
    np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=1e-4)
    assert ours[-5:].mean() < 0.8 * ours[:5].mean()  # it learned


@pytest.mark.parity
def test_fifty_steps_of_summaries_are_pytorchs(assets, folders):
    from transformers import BartForConditionalGeneration

    config = config_of(assets, folders, "documents")
    task = make_task(config)
    params = jax.device_get(task.load_params())
    model = BartForConditionalGeneration.from_pretrained(assets / "bart", dropout=0.0).train()
    ours, batches = our_losses(config, task, params)
    inputs = [
        {
            "input_ids": np.int64(batch.source_ids),
            "attention_mask": batch.source_mask,
            "labels": np.where(batch.target_mask, batch.text_ids, -100).astype(np.int64),
        }
        for batch in batches
    ]
    theirs = torch_losses(config, task, model, params, paths_of(task), inputs)
    np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=1e-4)
    assert ours[-5:].mean() < 0.9 * ours[:5].mean()
