"""Students as Hugging Face directories: the same numbers in PyTorch, the same bytes back, everything that travels."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from PIL import Image
from read_export import outputs
from tiny import ROOT, arguments, command_line, environment, make_assets, tiny_config, write_pictures
from transformers import BartForConditionalGeneration, BartTokenizer

from vlkd_jax import identity
from vlkd_jax.data.images import open_image, resize_and_crop
from vlkd_jax.errors import UserError
from vlkd_jax.evaluate import circumstances
from vlkd_jax.hf import names, parity
from vlkd_jax.hf.card import with_parity
from vlkd_jax.hf.export import RUN, export
from vlkd_jax.hf.import_ import import_export
from vlkd_jax.hf.modeling_vlkd import VLKDConfig, VLKDForConditionalGeneration, VLKDProcessor
from vlkd_jax.hf.student import load_student, read_student_config, save_student
from vlkd_jax.sharding import one_device
from vlkd_jax.tasks import make_task
from vlkd_jax.vlkd import VLKD

VARIANTS = {
    "as the paper": {},
    "hidden": {"image_tokens": "hidden", "whiten": 8, "sentence_position": "bos"},
    "penultimate": {"image_tokens": "penultimate", "logit_scale": "clip"},
    "pooled": {"image_tokens": "pooled", "whiten": 8, "ttdm": "raw"},
}
"""Options of `config.student` that change what is computed."""


def make_student(assets: Path, seed: int = 0, **options) -> VLKD:
    """Every parameter drawn anew, so that nothing equal hides a mistake and words vary."""
    config = tiny_config(assets, **{f"student__{name}": value for name, value in options.items()})
    task, rng = make_task(config), np.random.default_rng(seed)

    def draw(path, x):
        if x.ndim > 1 and path[-1].key == "matrix":  # of the whitening
            return np.eye(len(x), dtype=np.float32) + 0.1 * rng.standard_normal(x.shape, np.float32)
        name = "/".join(key.key for key in path)
        centre = 1.0 if path[-1].key == "scale" else 0.5 if "logit_scale" in name else 0.0
        width = 0.5 if "decoder" in name or "shared" in name else 0.2
        return np.float32(centre + width * rng.standard_normal(x.shape, np.float32))

    params, frozen = (jax.tree_util.tree_map_with_path(draw, part) for part in task.abstract())
    return VLKD.of(task, params, frozen, one_device())


def whole(model: VLKD) -> dict:
    return {"student": model.params, "clip": model.clip_params}


def assert_same(left, right):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(left), jax.device_get(right))


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return make_student(make_assets(tmp_path_factory.getbasetemp()))


@pytest.fixture(scope="module")
def exported(student, tmp_path_factory):
    directory = tmp_path_factory.mktemp("export") / "HF"
    export(student, directory, run=tiny_config(Path("models")).to_dict(), command="vlkd export --checkpoint=RUN")
    return directory


@pytest.mark.parity
@pytest.mark.parametrize("variant", VARIANTS)
def test_torch_computes_what_jax_does(assets, tmp_path, variant):
    """Tensors, parts, losses, and texts of both kinds of prompt, greedy and by beam search."""
    model = make_student(assets, **VARIANTS[variant])
    export(model, tmp_path / "HF")
    result = parity.measure(tmp_path / "HF", parity.make_prompts(8))
    assert parity.faults(result) == []
    assert result["prompts"] == result["greedy_equal"] == result["beam_equal"] == result["prompt_ids_equal"] == 8
    assert result["processor_max_abs_difference"] < 1e-6
    assert result["tensors"]["n"] > 200 and set(result["losses"]) == {"ttdm", "itcl", "icti"}


@pytest.mark.parity
def test_texts_without_a_forced_end(student, tmp_path):
    """Where the model's configuration forces no `</s>`, neither side does."""
    config = dataclasses.replace(student.config.bart, forced_eos_token_id=None)
    free = dataclasses.replace(
        student,
        config=dataclasses.replace(student.config, bart=config),
        bart=student.bart.clone(config=dataclasses.replace(student.bart.config, forced_eos_token_id=None)),
    )
    export(free, tmp_path / "HF")
    result = parity.measure(tmp_path / "HF", parity.make_prompts(8))
    assert result["greedy_equal"] == result["beam_equal"] == 8


@pytest.mark.parity
def test_the_check_can_fail(exported, tmp_path):
    """A weight of the file that changes by a little is found by name; so are other words."""
    result = parity.measure(exported, parity.make_prompts(4))
    assert parity.faults(result) == []
    assert parity.faults(result | {"beam_equal": 3}) == ["beam_equal is 3 of 4"]
    worse = result["losses"] | {"itcl": {"max_abs": 0.1, "relative": 0.01}}
    assert parity.faults(result | {"losses": worse}) == ["loss itcl differs by 0.1"]
    unknown = result["parts"] | {"logits": {"max_abs": np.nan, "relative": np.nan}}
    assert parity.faults(result | {"parts": unknown}) == ["part logits differs by nan"]
    shutil.copytree(exported, tmp_path / "HF")
    stock = BartForConditionalGeneration.from_pretrained(tmp_path / "HF" / "bart")
    with torch.no_grad():
        stock.model.decoder.layers[1].fc1.bias[3] += 1e-6
    stock.save_pretrained(tmp_path / "HF" / "bart")
    result = parity.measure(tmp_path / "HF", parity.make_prompts(2))
    assert parity.faults(result) == ["tensor bart/model.decoder.layers.1.fc1.bias differs"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtypes(student, tmp_path, dtype):
    """Weights are rounded once; what a low precision would spoil stays float32; PyTorch loads it as it says."""
    whitened = make_student(student.clip_text.directory.parent, whiten=8)
    export(whitened, tmp_path / "HF", dtype)
    model = VLKDForConditionalGeneration.from_pretrained(tmp_path / "HF", dtype="auto")
    assert model.dtype == model.bart.dtype == getattr(torch, dtype)
    assert model.image_whitening.matrix.dtype == torch.float32
    stock = BartForConditionalGeneration.from_pretrained(tmp_path / "HF" / "bart", dtype="auto")
    assert stock.dtype == getattr(torch, dtype)
    config, params = load_student(tmp_path / "HF")
    rounded = {"float32": np.float32, "float16": np.float16, "bfloat16": jax.numpy.bfloat16}[dtype]

    def expected(path, x):
        kept = any(key.key in ("image_whitening", "logit_scale") for key in path)
        return x if kept else np.asarray(x).astype(rounded).astype(np.float32)

    assert config == whitened.config
    assert_same(params, jax.tree_util.tree_map_with_path(expected, jax.device_get(whole(whitened))))
    pixels = torch.zeros(1, 3, 24, 24, dtype=model.dtype)
    assert model.generate(pixels, input_ids=torch.tensor([[0, 2]]), max_new_tokens=3).shape == (1, 3)


def test_shards(student, tmp_path):
    """Large weights are spread over files that both sides read."""
    save_student(
        tmp_path, student.config, jax.device_get(whole(student)), student.bart_text.vocab_size, shard_bytes=40000
    )
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 2 and all(file.stat().st_size < 60000 or len(names_in(file)) == 1 for file in files)
    assert_same(load_student(tmp_path)[1], whole(student))
    model, info = VLKDForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    np.testing.assert_array_equal(
        model.sentence_projection.weight.detach().numpy().T, student.params["sentence_projection"]["kernel"]
    )


def names_in(file: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(file, "numpy") as opened:
        return list(opened.keys())


def test_nothing_is_missing_and_nothing_left_over(exported):
    _, info = VLKDForConditionalGeneration.from_pretrained(exported, output_loading_info=True)
    assert not any(info.values())
    _, info = BartForConditionalGeneration.from_pretrained(exported / "bart", output_loading_info=True)
    assert not any(info.values())
    config = read_student_config(exported)
    tensors = set(names_in(exported / "model.safetensors"))
    assert tensors == {name for row in names.student_rows(config) for name in row.names()}


def test_the_stock_bart_is_stock(exported, student):
    """It loads without any code of ours, with its tokenizer and its generation settings."""
    model = BartForConditionalGeneration.from_pretrained(exported / "bart")
    tokenizer = BartTokenizer.from_pretrained(exported / "bart")
    text = "a large red circle"
    assert tokenizer(text)["input_ids"] == student.bart_text.wrap(student.bart_text.encode(text))
    assert model.generation_config.decoder_start_token_id == student.config.bart.decoder_start_token_id
    assert "auto_map" not in json.loads((exported / "bart" / "config.json").read_text())


def test_generate_reads_the_picture_and_the_text(exported):
    """Both reach the decoder; input_ids are no decoder's prompt; several returns follow one another."""
    model = VLKDForConditionalGeneration.from_pretrained(exported).eval()
    processor = VLKDProcessor.from_pretrained(exported)
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (30, 40, 3), np.uint8)) for _ in range(2)]
    questions = ["what color is the circle?", "how many objects are there in the picture?"]
    inputs = processor(images=images, questions=questions)
    ids = model.generate(**inputs, max_new_tokens=8)
    assert ids.shape[0] == 2 and ids.shape[1] <= 8 and len(processor.decode_answers(ids)) == 2
    without = {k: v for k, v in inputs.items() if not k.startswith("decoder")}
    other = without | {"pixel_values": without["pixel_values"].flip(0)}
    assert not torch.equal(model(**other, labels=ids).logits, model(**without, labels=ids).logits)
    states = model.generate(**without, max_new_tokens=8)
    assert not torch.equal(states[:, :2], inputs["input_ids"][:, :2])
    several = model.generate(**inputs, max_new_tokens=8, num_beams=3, num_return_sequences=2)
    best = model.generate(**inputs, max_new_tokens=8, num_beams=3)
    assert len(several) == 4
    for k in range(2):
        length = min(several.shape[1], best.shape[1])
        assert torch.equal(several[2 * k, :length], best[k, :length])
    with pytest.raises(ValueError, match="give decoder_input_ids or labels"):
        model(**without)
    with pytest.raises(ValueError, match="image_tokens is 'patches'"):
        VLKDConfig(image_tokens="patches")


def test_ids_without_a_token_are_never_written(student, tmp_path):
    """A vocabulary that is padded for the hardware has rows that no token has."""
    export(student, tmp_path / "HF")
    path = tmp_path / "HF" / "config.json"
    values = json.loads(path.read_text())
    model = VLKDForConditionalGeneration.from_pretrained(tmp_path / "HF").eval()
    inputs = {"pixel_values": torch.zeros(1, 3, 24, 24), "input_ids": torch.tensor([[0, 5, 2]])}
    written = model.generate(**inputs, max_new_tokens=10).max().item()
    assert written > 10
    path.write_text(json.dumps(values | {"token_count": written}))
    fewer = VLKDForConditionalGeneration.from_pretrained(tmp_path / "HF").eval()
    assert fewer.generate(**inputs, max_new_tokens=10).max() < written


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "P", "L", "I;16", "CMYK"])
def test_the_processor_reads_pictures_as_jax_does(exported, student, tmp_path, mode):
    rng = np.random.default_rng(1)
    if mode == "I;16":
        picture = Image.fromarray(rng.integers(0, 65536, (40, 31)).astype(np.uint16))
    else:
        picture = Image.fromarray(rng.integers(0, 256, (40, 31, 4), np.uint8), "RGBA")
        picture = picture if mode == "RGBA" else picture.convert("RGB" if mode in ("CMYK", "P") else mode).convert(mode)
    kind = "tif" if mode == "CMYK" else "png"
    picture.save(tmp_path / f"a.{kind}")
    image = open_image((tmp_path / f"a.{kind}").read_bytes())
    ours = parity._torch_pixels(student, resize_and_crop(image, student.config.clip.preprocessing)[None])
    with Image.open(tmp_path / f"a.{kind}") as opened:
        theirs = VLKDProcessor.from_pretrained(exported)(images=opened)["pixel_values"]
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "question", ["what is {question}?", "is it a </s> or a <mask>?", "  two  spaces ", "größe 图 {0}"]
)
def test_questions_are_plain_text(exported, student, question):
    """Whatever a question looks like, it is no template and holds no special token, on both sides."""
    processor = VLKDProcessor.from_pretrained(exported)
    inputs = processor(images=[Image.new("RGB", (24, 24))], questions=[question])
    encode = student.bart_text.encode_template
    prompts = "question: {question} answer: <mask>", "question: {question} answer:"
    source, prefix = (encode(template, question=question) for template in prompts)
    assert inputs["input_ids"][0].tolist() == student.bart_text.wrap(source)
    assert inputs["decoder_input_ids"][0].tolist()[2:] == prefix
    texts = processor(texts=[question])
    assert texts["input_ids"][0].tolist() == student.bart_text.wrap(student.bart_text.encode(question))


@pytest.fixture(scope="module")
def exports(student, exported, tmp_path_factory):
    """Directories by name: as the paper, all that is special, and of parents with vocab.json and merges.txt alone."""
    directory, parents = tmp_path_factory.mktemp("special"), student.clip_text.directory.parent
    export(make_student(parents, **VARIANTS["hidden"]), directory / "HF", "bfloat16")
    shutil.copytree(parents, directory / "parents")
    for file in directory.glob("parents/*/tokenizer*.json"):
        file.unlink()
    export(make_student(directory / "parents"), directory / "bare")
    assert "local_files_only" not in (directory / "bare" / "tokenizer_config.json").read_text()
    return {"plain": exported, "special": directory / "HF", "bare": directory / "bare"}


@pytest.mark.parity
@pytest.mark.parametrize("how", ["class", "trust_remote_code"])
@pytest.mark.parametrize("release", ["4", "5"])
def test_both_transformers_read_it(exports, tmp_path, release, how):
    """In a process of its own, and with its own code only where that was asked for: the same numbers and texts."""
    environ = environment() | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "TRANSFORMERS_VERBOSITY": "error"}
    folder = Path(sys.prefix) / "transformers4"
    environ["PYTHONPATH"] = os.pathsep.join([*([str(folder)] if release == "4" else []), str(ROOT)])
    if how == "trust_remote_code":  # from the directory alone
        environ["PYTHONPATH"] = str(folder) if release == "4" else ""
    script = ROOT / "tests" / "hf" / "read_export.py"
    places = [f"{name}={directory}" for name, directory in exports.items()]
    command = [sys.executable, "-P", str(script), how, str(tmp_path / "out.npz"), *places]
    result = subprocess.run(command, capture_output=True, text=True, env=environ, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    read = np.load(tmp_path / "out.npz")
    assert str(read["release"]).split(".")[0] == release
    assert str(read["module"]).startswith("vlkd_jax" if how == "class" else "transformers_modules")
    for name, directory in exports.items():
        model = VLKDForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval()
        for part, value in outputs(model, VLKDProcessor.from_pretrained(directory), directory).items():
            np.testing.assert_allclose(read[f"{name} {part}"], value, rtol=1e-5, atol=1e-4, err_msg=f"{name} {part}")
        assert str(read[f"{name} as stored"]) == ("torch.bfloat16" if name == "special" else "torch.float32")


def test_the_class_is_known_to_the_auto_classes(exported):
    """Importing the module is enough: no remote code."""
    from transformers import AutoConfig, AutoModel, AutoProcessor

    assert type(AutoConfig.from_pretrained(exported)) is VLKDConfig
    assert type(AutoModel.from_pretrained(exported)) is VLKDForConditionalGeneration
    assert type(AutoProcessor.from_pretrained(exported)) is VLKDProcessor


def test_saved_again_by_transformers_it_is_the_same(exported, tmp_path):
    """What a torch user saves after fine-tuning comes back into JAX."""
    VLKDForConditionalGeneration.from_pretrained(exported).save_pretrained(tmp_path / "again")
    config, params = load_student(tmp_path / "again")
    before = read_student_config(exported)
    bart = dataclasses.replace(config.bart, forced_bos_token_id=before.bart.forced_bos_token_id)  # has no place there
    assert dataclasses.replace(config, clip=before.clip, bart=bart) == before
    assert_same(params, load_student(exported)[1])


def test_back_again(student, exported, tmp_path):
    """Every tensor with the same bytes: as an import, from the run that it wrote, and exported once more."""
    import_export(exported, tmp_path / "run")
    back, read = VLKD.from_run(tmp_path / "run"), VLKD.from_export(exported)
    for model in (back, read):
        assert model.config == student.config
        assert_same(whole(model), whole(student))
    export(back, tmp_path / "HF")
    for name in ("model.safetensors", "config.json", "bart/model.safetensors", "preprocessing.json", "tokenizer.json"):
        if (exported / name).is_file():
            assert (tmp_path / "HF" / name).read_bytes() == (exported / name).read_bytes(), name
    picture = Image.new("RGB", (30, 30), "red")
    answers = [model.answer([picture], ["what is it?"]) for model in (student, back, read)]
    assert answers[0] == answers[1] == answers[2]
    with pytest.raises(UserError, match="not empty; name another --output"):
        import_export(exported, tmp_path / "run")
    with pytest.raises(UserError, match="not empty; name another --output"):
        export(student, exported)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v | {"model_type": "bart"}, "not an exported student; vlkd export writes one"),
        (lambda v: v | {"image_tokens": "all"}, "image_tokens is 'all'; it is one of projected"),
        (lambda v: v | {"whiten": "no"}, "whiten is 'no'; it is one of False, True"),
        (lambda v: {k: x for k, x in v.items() if k != "bart_config"}, "bart_config"),
        (lambda v: v | {"whiten": True}, "image_whitening"),
    ],
)
def test_a_wrong_configuration_is_one_line(exported, tmp_path, change, message):
    shutil.copytree(exported, tmp_path / "HF")
    path = tmp_path / "HF" / "config.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(UserError, match=message) as error:
        load_student(tmp_path / "HF")
    assert str(tmp_path / "HF") in str(error.value) and "\n" not in str(error.value)


def test_the_model_card(student, tmp_path):
    """Parents with their licences, data, figures with intervals, what it is for, limits, and how it was made."""
    for name in ("clip", "bart"):
        shutil.copytree(student.clip_text.directory.parent / name, tmp_path / "models" / name)
    (tmp_path / "models" / "clip" / "README.md").write_text("---\ntags: [vision]\nlicense: mit\n---\n# A CLIP\n")
    student = make_student(tmp_path / "models")
    run = tiny_config(tmp_path / "models", data__source="folder", data__captions=str(tmp_path / "cc3m.tsv")).to_dict()
    figures = {"overall": 0.5, "overall_interval": [0.4, 0.6], "n": 100}
    evaluation = {"suites": {"vqav2": figures, "shapes": {"vqa": figures}}, **circumstances(3)}
    export(student, tmp_path / "HF", run=run, command="vlkd export --checkpoint=x", evaluation=evaluation)
    card = (tmp_path / "HF" / "README.md").read_text()
    assert "| clip | clip | mit |" in card and "| bart | bart | not stated there" in card
    assert "captions `cc3m.tsv`, 6 steps of 8 records, seed 0" in card
    assert "| vqav2 overall | 0.5000 | 0.4000 to 0.6000 | 100 |" in card and "| shapes vqa overall | 0.5000" in card
    assert "seed 3" in card and "    vlkd export --checkpoint=x" in card
    assert str(tmp_path) not in card and "Not checked yet" in card
    told = with_parity(card, {"prompts": 9, "greedy_equal": 9, "beam_equal": 8, "max_abs_difference": 1e-6})
    again = with_parity(told, {"prompts": 9, "greedy_equal": 9, "beam_equal": 9, "max_abs_difference": 1e-6})
    assert "Of 9 prompts 9 gave the same tokens greedily and 8 with beam search" in told
    assert "9 with beam search" in again and "8 with" not in again and again.count("## ") == card.count("## ")


def test_a_run_outlives_its_models(tmp_path, assets):
    """Trained, then the directories are gone: evaluated, exported and imported by the commands."""
    shutil.copytree(assets, tmp_path / "models")
    lines = write_pictures(tmp_path / "images", 12)
    (tmp_path / "captions.tsv").write_text("\n".join(lines))
    data = {"data__source": "folder", "data__captions": tmp_path / "captions.tsv", "data__images": tmp_path / "images"}
    argv = arguments(tmp_path / "models", tmp_path / "run", steps=2, batch_size=4, **data)
    result = command_line("train", argv)
    assert result.returncode == 0, result.stderr
    shutil.rmtree(tmp_path / "models")
    run, exported = tmp_path / "run", tmp_path / "HF"
    result = command_line("hf.export", [f"--checkpoint={run}", f"--output={exported}"])
    assert result.returncode == 0 and result.stderr == "", result.stderr
    assert_same(whole(VLKD.from_export(exported)), whole(VLKD.from_run(run)))
    record = json.loads((exported / RUN).read_text())
    assert record["identity"]["step"] == 2 and record["config"]["steps"] == 2
    result = command_line("hf.import_", [str(exported), f"--output={tmp_path / 'again'}"])
    assert result.returncode == 0 and result.stderr == "", result.stderr
    suite = ["--config=suites:shapes", "--config.shapes.questions=3", "--config.shapes.captions=2"]
    suite += ["--config.shapes.text_questions=2", "--config.shapes.retrieval=3", "--config.shapes.baselines=False"]
    predictions = []
    for k, checkpoint in enumerate((run, exported)):
        out = tmp_path / f"evaluation{k}"
        result = command_line("evaluate", [*suite, f"--checkpoint={checkpoint}", f"--workdir={out}"])
        assert result.returncode == 0, result.stderr
        predictions.append((out / "shapes" / "predictions.jsonl").read_bytes())
    assert predictions[0] == predictions[1]


def test_models_are_kept_as_the_config_says(tmp_path, assets, capsys, monkeypatch):
    config = tiny_config(assets)
    identity.keep_models(tmp_path / "auto", config, anew=True)
    kept = {path.name for path in (tmp_path / "auto" / "parents" / "bart").iterdir()}
    assert kept == set(identity.files_read(assets / "bart")) and "model.safetensors" in kept
    assert Path(identity.kept_model(tmp_path / "auto", "bart")) == tmp_path / "auto" / "parents" / "bart"
    config.keep_teacher = "no"
    identity.keep_models(tmp_path / "no", config, anew=True)
    monkeypatch.setattr(identity, "KEPT_BYTES", 1000)
    config.keep_teacher = "auto"
    identity.keep_models(tmp_path / "no", config, anew=True)
    assert "not copied into the workdir" in capsys.readouterr().out
    assert not (tmp_path / "no").exists() and identity.kept_model(tmp_path / "no", "bart") == ""
    config.keep_teacher = "yes"
    identity.keep_models(tmp_path / "yes", config, anew=True)
    assert (tmp_path / "yes" / "parents" / "clip" / "model.safetensors").is_file()
    assert not list((tmp_path / "yes" / "parents").glob("*.tmp-*"))
    with pytest.raises(UserError, match=r"keep_teacher is yes: models are not read from gs://"):
        identity.keep_models("gs://bucket/run", config, anew=True)


def test_copies_are_those_of_the_start(tmp_path, assets):
    """A run that saved nothing may begin again with other models: then the copies are theirs; resumed, they stay."""
    for name in ("clip", "bart"):
        shutil.copytree(assets / name, tmp_path / name)
    config, other = tiny_config(tmp_path), b"another"
    identity.keep_models(tmp_path / "run", config, anew=True)
    (tmp_path / "bart" / "merges.txt").write_bytes(other)
    kept = Path(identity.kept_model(tmp_path / "run", "bart")) / "merges.txt"
    identity.keep_models(tmp_path / "run", config, anew=False)
    assert kept.read_bytes() != other
    identity.keep_models(tmp_path / "run", config, anew=True)
    assert kept.read_bytes() == other
    config.keep_teacher = "no"
    identity.keep_models(tmp_path / "run", config, anew=True)
    assert identity.kept_model(tmp_path / "run", "bart") == ""


@pytest.mark.parametrize(
    ("module", "argv", "message"),
    [
        ("hf.export", ["--checkpoint={}/none", "--output={}/HF"], "none"),
        ("hf.import_", ["{}/none", "--output={}/run"], "config.json: no such file"),
        ("hf.parity", ["{}/none"], "not an exported student; vlkd export writes one"),
    ],
)
def test_mistakes_are_one_line(tmp_path, module, argv, message):
    result = command_line(module, [argument.format(tmp_path) for argument in argv])
    assert result.returncode == 2 and result.stdout == ""
    assert message in result.stderr and result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
