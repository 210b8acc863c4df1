"""Fine-tuning: fifty AdamW steps as PyTorch takes them with Hugging Face's models, and what each objective reads."""

import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image
from tiny import make_mesh, tiny_config

from vlkd_jax import predict, sharding
from vlkd_jax.data.glue import GLUE
from vlkd_jax.data.streams import train_sources, train_stream
from vlkd_jax.errors import UserError
from vlkd_jax.hf import names
from vlkd_jax.hf.save import save_classifier
from vlkd_jax.optim import decayed, make_optimizer, schedule
from vlkd_jax.shapes import world
from vlkd_jax.shapes.sources import ShapesTexts
from vlkd_jax.step import make_train_step, terms_in_parts
from vlkd_jax.tasks import make_task
from vlkd_jax.tasks.classify import encode_pair
from vlkd_jax.train import start_state, train
from vlkd_jax.use.prompts import prompts
from vlkd_jax.vlkd import VLKD

STEPS, BATCH = 50, 8
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


def torch_losses(config, task, model, params, names, inputs, loss_of=lambda output, values: output.loss):
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
        values = {name: torch.tensor(np.asarray(value)) for name, value in values.items()}
        loss = loss_of(model(**values), values)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip_norm)
        optimizer.step()
        losses.append(loss.item())
    return np.array(losses)


def paths_of(task):
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
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_fifty_steps_of_summaries_are_pytorchs(assets, folders, smoothing):
    from transformers import BartForConditionalGeneration
    from transformers.trainer_pt_utils import LabelSmoother

    config = config_of(assets, folders, "documents", loss__label_smoothing=smoothing)
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
    smoothed = {"loss_of": lambda output, values: LabelSmoother(smoothing)(output, values["labels"])}
    theirs = torch_losses(config, task, model, params, paths_of(task), inputs, **smoothed if smoothing else {})
    np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=1e-4)
    assert ours[-5:].mean() < 0.9 * ours[:5].mean()


@pytest.mark.parity
def test_a_classifier_gives_pytorchs_logits_for_texts_of_any_length(assets, folders, tmp_path):
    """Through training, checkpoint, prediction and export; pairs are tokenised, and cut, as Hugging Face does it."""
    import torch
    from transformers import BartForSequenceClassification, BartTokenizer

    config = config_of(assets, folders, "mnli", steps=3, save_every=3, optim__lr=1e-2)
    train(config, tmp_path / "run")
    model = VLKD.from_run(tmp_path / "run")
    model.save_pretrained(tmp_path / "hf")
    peer = BartForSequenceClassification.from_pretrained(tmp_path / "hf").eval()
    assert peer.config.id2label == dict(enumerate(GLUE["mnli"].labels))
    tokenizer = BartTokenizer.from_pretrained(tmp_path / "hf")
    some = texts(12)
    pairs = list(zip([" ".join(some[k : k + 1 + 3 * (k % 3)]) for k in range(8)], some[4:]))
    pairs += [(text, "") for text in some[:3]]
    room = model.bart.config.max_position_embeddings
    for pair, ours in zip(pairs, predict.classify(model, pairs, 4), strict=True):
        given = tokenizer(*filter(None, pair), truncation="longest_first", max_length=room, return_tensors="pt")
        assert encode_pair(model.bart_text, *pair, room) == given["input_ids"][0].tolist()
        with torch.no_grad():
            theirs = peer(**given).logits[0].numpy()
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


@pytest.fixture(scope="module")
def start(assets, tmp_path_factory):
    """An export of a student that learned nothing."""
    directory = tmp_path_factory.mktemp("start") / "hf"
    VLKD.from_pair(assets / "clip", assets / "bart", seed=3).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """Files of VQA v2's form about twelve pictures, three questions each, ten answers, of which six agree."""
    folder, questions, annotations = tmp_path_factory.mktemp("asked"), [], []
    for image in range(12):
        scene = world.make_scene(1, "train", image)
        Image.fromarray(world.render(scene)).save(folder / f"p{image:03d}.png")
        for kind in ("color", "count", "position"):
            question = world.ask(scene, kind, world.generator(1, "train", image, 9))
            if question is None:
                continue
            number = len(questions)
            questions.append({"question_id": number, "image_id": image, "question": question.question})
            answers = ["odd"] * 4 + [question.answer] * 6
            annotations.append({"question_id": number, "image_id": image, "answers": [{"answer": a} for a in answers]})
    (folder / "questions.json").write_text(json.dumps({"questions": questions}))
    (folder / "annotations.json").write_text(json.dumps({"annotations": annotations}))
    return folder


def student_config(assets, start, asked, objective, **changes):
    sources = {
        "answer": {
            "data__source": "questions",
            "data__questions": str(asked / "questions.json"),
            "data__annotations": str(asked / "annotations.json"),
            "data__images": str(asked),
            "data__image_name": "p{image_id:03d}.png",
            "data__validation_every": 4,
        },
        "caption": {"data__source": "shapes"},
    }
    given = {"objective": objective, "start": str(start), "clip": "", "bart": ""}
    return tiny_config(assets, **given | sources[objective] | changes)


@pytest.mark.parametrize("objective", ["answer", "caption"])
def test_the_loss_of_a_student_is_how_unlikely_it_finds_the_text(assets, start, asked, objective):
    """Teacher-forced in a batch with padding, and one by one over the decoder's cache: the same number."""
    config = student_config(assets, start, asked, objective)
    task = make_task(config)
    params, frozen, source = task.load_params(), task.load_frozen(), train_sources(config, task)[0]
    batch = next(train_stream(config, task, 0))
    terms = task.terms(params, frozen, batch.replace(index=None), None)
    model, total = VLKD.from_export(start), 0.0
    for index in batch.index:
        record = source[int(index)]
        prompt = "question" if objective == "answer" else "caption"
        fields = [dict(record.fields)]
        (request,) = prompts(model.bart_text, model.prompts, [record.image], fields, prompt)
        ((score,),) = predict.candidate_scores(model, [request], [record.text], 1)
        total -= float(score)
    loss, count = terms["lm"]
    np.testing.assert_allclose(float(loss), total, rtol=1e-5)
    words = sum(len(model.bart_text.encode(f" {source[int(k)].text}")) + 1 for k in batch.index)
    assert int(count) == words  # the text and its </s>; nothing that was given


@pytest.mark.parametrize("objective", ["answer", "caption"])
def test_a_student_is_fine_tuned_exported_and_asked(assets, start, asked, tmp_path, objective):
    """And goes on where it was stopped; what it began with may be gone afterwards, and is never changed."""
    place = shutil.copytree(start, tmp_path / "start")
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    for steps in (4, 6):
        changes = {"steps": steps, "save_every": 2, "optim__lr": 1e-2, "loss__denoise": 0.3}
        state = train(student_config(assets, place, asked, objective, **changes), tmp_path / "run")
    assert int(state.step) == 6 and {path: path.read_bytes() for path in before} == before
    shutil.rmtree(place)
    model, before = VLKD.from_run(tmp_path / "run"), VLKD.from_run(tmp_path / "run", at_start=True)
    model.save_pretrained(tmp_path / "hf")
    back, first = VLKD.from_export(tmp_path / "hf"), VLKD.from_export(start)
    same = jax.tree.map(np.array_equal, jax.device_get(model.params), jax.device_get(back.params))
    assert all(jax.tree.leaves(same))
    unchanged = jax.tree.map(np.array_equal, jax.device_get(before.params), jax.device_get(first.params))
    assert all(jax.tree.leaves(unchanged))
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, model.clip_params, first.clip_params)))
    moved = jax.tree.map(np.array_equal, jax.device_get(model.params["bart"]), jax.device_get(first.params["bart"]))
    assert not any(jax.tree.leaves(moved["decoder"]["layers"]))
    assert isinstance(back.answer(asked / "p000.png", "what color is it?"), str)


def test_a_run_that_fine_tunes_a_student_needs_one(assets, asked, tmp_path):
    with pytest.raises(UserError, match=r"config.start is empty; set it to the export of a student"):
        make_task(student_config(assets, "", asked, "answer"))
    with pytest.raises(UserError, match="not an exported student"):
        make_task(student_config(assets, assets / "bart", asked, "answer"))


@pytest.mark.parametrize(
    ("kind", "changes", "told"),
    [
        (
            "mnli",
            {"loss__label_smoothing": 0.1},
            "config.loss.label_smoothing is 0.1, a loss that classify does not have",
        ),
        ("mnli", {"loss__denoise": 0.3}, "config.loss.denoise is 0.3, a loss that classify does not have"),
        ("documents", {"loss__l2": 1e-3}, "config.loss.l2 is 0.001, a loss that summarize does not have; set it to 0"),
    ],
)
def test_a_loss_that_an_objective_does_not_have_is_refused(assets, folders, kind, changes, told):
    with pytest.raises(UserError, match=told):
        make_task(config_of(assets, folders, kind, **changes))


@pytest.mark.parametrize(
    ("objective", "source", "told"),
    [
        ("summarize", "shapes_texts", "no document"),
        ("answer", "shapes", "no question"),
        ("classify", "shapes_texts", "no label"),
        ("caption", "glue", "which has no pictures; set it to shapes or folder or tfds or questions"),
    ],
)
def test_records_of_another_kind_are_refused(assets, start, tmp_path, objective, source, told):
    config = tiny_config(assets, objective=objective, data__source=source, start=str(start), data__max_unusable=0.0)
    with pytest.raises(UserError, match=told):
        train(config, tmp_path)


def test_few_examples_are_drawn_once_and_told(assets, folders, tmp_path):
    """As many of each class, the same for the same seed, and nothing else is ever read."""
    config = config_of(assets, folders, "mnli", data__examples=4, steps=6)
    task = make_task(config)
    source, *_ = train_sources(config, task)
    assert [source[k].label for k in range(len(source))] == [0] * 4 + [1] * 4 + [2] * 4
    assert source.indices == train_sources(config, task)[0].indices
    other = config_of(assets, folders, "mnli", data__examples=4, seed=1)
    assert source.indices != train_sources(other, make_task(other))[0].indices
    train(config, tmp_path)
    told = json.loads((tmp_path / "examples.json").read_text())
    assert [row["index"] for row in told] == source.indices
    assert told[0]["name"] == f"{folders}/mnli/train.tsv line {source.indices[0] + 2}"
    read = {int(k) for _, batch in zip(range(9), train_stream(config, task, 0)) for k in batch.index}
    assert read == set(range(12))
    with pytest.raises(UserError, match=r"config.data.examples is 40, and there are \d+ records of class 0"):
        train_sources(config_of(assets, folders, "mnli", data__examples=40), task)


@pytest.mark.parametrize(("kind", "smoothing"), [("mnli", 0.0), ("documents", 0.1)])
def test_eight_devices_fine_tune_as_one(assets, folders, kind, smoothing):
    """Parameters are split; a classifier's head is whole on every device."""
    config = config_of(assets, folders, kind, steps=5, loss__label_smoothing=smoothing)
    task = make_task(config)
    params = jax.device_get(task.load_params())
    one, _ = our_losses(config, task, params)
    mesh = make_mesh(2, 2, 2)
    optimizer = make_optimizer(config.optim, config.steps, task.new)
    with jax.set_mesh(mesh):
        state = start_state(task.load_params(sharding.shardings(task.abstract()[0], mesh)), optimizer, mesh)
        step, losses = jax.jit(make_train_step(task, optimizer, 0.0, 0)), []
        for _, batch in zip(range(5), train_stream(config, task, 0)):
            state, metrics = step(state, {}, sharding.put(mesh, batch.replace(index=None)))
            losses.append(float(metrics["loss"]))
    np.testing.assert_allclose(losses, one, rtol=1e-5)


def test_parts_of_a_batch_and_dropout(assets, folders):
    """Accumulated over parts the loss is the same; dropout changes it."""
    config = config_of(assets, folders, "documents", steps=1)
    task = make_task(config)
    params, batch = task.load_params(), next(train_stream(config, task, 0)).replace(index=None)
    whole, parts = (terms_in_parts(task.terms, n)(params, {}, batch, None)["lm"] for n in (1, 4))
    np.testing.assert_allclose([float(x) for x in whole], [float(x) for x in parts], rtol=1e-6)
    noisy = make_task(config_of(assets, folders, "documents", dropout=0.3))
    assert float(noisy.terms(params, {}, batch, jax.random.key(0))["lm"][0]) != pytest.approx(float(whole[0]))
