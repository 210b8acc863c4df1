"""A CLIP's own preprocessor_config.json, in every path from a picture to the teacher; which file counts; refusals."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image
from tiny import IMAGE_SIZE, make_mesh, tiny_config

from vlkd_jax import decoding, losses, predict, sharding, whitening
from vlkd_jax.checkpoint import Checkpoints
from vlkd_jax.data.sources import Record
from vlkd_jax.errors import UserError
from vlkd_jax.hf.files import files_read
from vlkd_jax.hf.load import load_clip, read_clip_config
from vlkd_jax.hf.save import save_clip
from vlkd_jax.models.preprocessing import Preprocessing
from vlkd_jax.sharding import one_device
from vlkd_jax.tasks import make_task
from vlkd_jax.tasks.distill import teacher_outputs
from vlkd_jax.train import train
from vlkd_jax.types import Batch
from vlkd_jax.vlkd import VLKD

LAION = {"image_mean": [0.5, 0.45, 0.55], "image_std": [0.5, 0.4, 0.6], "resample": 2, "size": 31}
LAION |= {"crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE}, "image_processor_type": "CLIPImageProcessor"}
SHAPES = [(40, 60), (24, 24), (90, 31), (20, 25)]
CLOSE = 1e-4


def write(directory, values, name="preprocessor_config.json"):
    (directory / name).write_text(json.dumps(values))


@pytest.fixture(scope="module")
def models(assets, tmp_path_factory):
    """The tiny models; this CLIP has a preprocessing that is not OpenAI's."""
    place = tmp_path_factory.mktemp("preprocessing")
    for name in ("clip", "bart"):
        shutil.copytree(assets / name, place / name)
    write(place / "clip", LAION)
    return place


@pytest.fixture(scope="module")
def pictures():
    """RGB pictures of several sizes with structure in them."""
    rng = np.random.default_rng(5)
    small = [Image.fromarray(rng.integers(0, 256, (5, 4, 3), np.uint8)) for _ in SHAPES]
    return [image.resize(shape, Image.Resampling.BICUBIC) for image, shape in zip(small, SHAPES, strict=True)]


@pytest.fixture(scope="module")
def theirs(models, pictures):
    """(image embeddings, what the last vision layer reads) as transformers makes them of these files."""
    import torch
    from transformers import CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    pixels = CLIPImageProcessorPil.from_pretrained(str(models / "clip"))(pictures, return_tensors="pt")["pixel_values"]
    model = CLIPModel.from_pretrained(str(models / "clip")).eval()
    with torch.no_grad():
        output = model.vision_model(pixels, output_hidden_states=True)
        embedding = torch.nn.functional.normalize(model.visual_projection(output.pooler_output), dim=-1)
    return embedding.numpy(), output.hidden_states[-2].numpy()


def batch_of(task, pictures):
    """What training is given of these pictures."""
    rng = np.random.default_rng(0)
    rows = [task.encoder(Record("a large circle", np.asarray(image)), rng) for image in pictures]
    return Batch(**{name: np.stack([row[name] for row in rows]) for name in rows[0]})


def test_the_reference_differs_from_openais(models, pictures, theirs):
    config, params = load_clip(models / "clip")
    openai = dataclasses.replace(config, preprocessing=Preprocessing(IMAGE_SIZE, IMAGE_SIZE))
    task = make_task(tiny_config(models, student__image_tokens="penultimate"))
    teacher = dataclasses.replace(task.teacher, config=openai)
    batch = batch_of(
        dataclasses.replace(task, encoder=dataclasses.replace(task.encoder, preprocessing=openai.preprocessing)),
        pictures,
    )
    assert np.abs(teacher_outputs(teacher, params, batch, "penultimate")[1] - theirs[0]).max() > 100 * CLOSE


@pytest.mark.parity
def test_the_teacher_in_training(models, pictures, theirs):
    task = make_task(tiny_config(models, student__image_tokens="penultimate"))
    batch = batch_of(task, pictures)
    assert batch.pixels.dtype == np.uint8
    tokens, embedding, _ = teacher_outputs(task.teacher, task.load_frozen()["clip"], batch, "penultimate")
    np.testing.assert_allclose(embedding, theirs[0], atol=CLOSE)
    np.testing.assert_allclose(tokens, theirs[1], atol=CLOSE)


@pytest.mark.parity
def test_contrastive_training(models, pictures, theirs):
    """With one caption for all, the two directions of the loss follow from the image embeddings alone."""
    task = make_task(tiny_config(models, objective="clip_contrastive"))
    params = task.load_params()
    batch = batch_of(task, pictures)
    text = task.module.apply({"params": params}, batch.clip_ids, batch.clip_mask, method="encode_texts")
    logits = np.exp(params["logit_scale"]) * theirs[0] @ np.asarray(text).T
    both = jax.nn.log_softmax(logits, 1) + jax.nn.log_softmax(logits, 0)
    total, _ = losses.finish(task.terms(params, {}, batch, None))["itcl"]
    np.testing.assert_allclose(total, -0.5 * np.trace(both), rtol=CLOSE)


@pytest.mark.parity
def test_whitening(models, pictures, theirs):
    task = make_task(tiny_config(models, student__image_tokens="penultimate", student__whiten=len(pictures)))
    frozen, mesh = task.load_frozen(), make_mesh(1)
    statistics = whitening.estimate(task, frozen["clip"], iter([batch_of(task, pictures)]), mesh)
    np.testing.assert_allclose(statistics["mean"], theirs[1].mean((0, 1)), atol=CLOSE)


@pytest.mark.parity
def test_predictions(models, pictures, theirs):
    """Embeddings, and what the decoder reads of an image when it answers."""
    task = make_task(tiny_config(models, student__image_tokens="penultimate"))
    params = task.load_params()
    model = VLKD.of(task, params, task.load_frozen(), one_device())
    np.testing.assert_allclose(model.embed_images(pictures), theirs[0], atol=CLOSE)
    requests = [predict.Request([5], [6], image) for image in pictures]
    memory, image_of = predict._image_memory(model, predict._different_images(model, requests, len(requests)))
    prefix = model.student.apply({"params": params}, theirs[1], method="image_prefix")
    expected = decoding.project_memory(model.bart, params["bart"], prefix, np.ones(prefix.shape[:2], bool))
    assert image_of.tolist() == [0, 1, 2, 3]
    jax.tree.map(lambda ours, wanted: np.testing.assert_allclose(ours, wanted, atol=CLOSE), memory, expected)


def test_it_belongs_to_the_identity_of_a_run(models, tmp_path):
    config = tiny_config(models, steps=1, keep_teacher="no")
    shared = sharding.replicated(make_mesh(1))
    state = train(config, tmp_path)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=shared), state.params)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        meta = checkpoints.restore({"params": abstract})[2]
    saved = Preprocessing.from_hf(meta["preprocessing"], IMAGE_SIZE, "meta")
    assert saved == read_clip_config(models / "clip").preprocessing and saved.mean == tuple(LAION["image_mean"])
    assert "preprocessor_config.json" in files_read(models / "clip")
    before = (models / "clip" / "preprocessor_config.json").read_bytes()
    write(models / "clip", LAION | {"image_mean": 0.5})
    longer = tiny_config(models, steps=2, keep_teacher="no")
    for use in (lambda: train(longer, tmp_path), lambda: VLKD.from_run(tmp_path)):
        with pytest.raises(UserError, match=r"preprocessor_config\.json \(clip\) has changed"):
            use()
    (models / "clip" / "preprocessor_config.json").write_bytes(before)
    assert VLKD.from_run(tmp_path).teacher.config.preprocessing == saved


def test_which_file_counts(assets, tmp_path):
    """As in transformers: an image processor inside processor_config.json, then preprocessor_config.json."""
    clip = shutil.copytree(assets / "clip", tmp_path / "clip")
    (clip / "preprocessor_config.json").unlink()
    openai = Preprocessing(IMAGE_SIZE, IMAGE_SIZE)
    assert read_clip_config(clip).preprocessing == openai
    write(clip, LAION)
    write(clip, {"processor_class": "CLIPProcessor"}, "processor_config.json")
    assert read_clip_config(clip).preprocessing.mean == tuple(LAION["image_mean"])
    nested = LAION | {"image_mean": 0.25}
    write(clip, {"processor_class": "CLIPProcessor", "image_processor": nested}, "processor_config.json")
    assert read_clip_config(clip).preprocessing.mean == (0.25, 0.25, 0.25)
    assert {"preprocessor_config.json", "processor_config.json"} <= set(files_read(clip))
    write(clip, {"image_processor": LAION | {"crop_size": 23}}, "processor_config.json")
    with pytest.raises(
        UserError, match=r"processor_config\.json: image_processor\.crop_size is 23; it must be 24 by 24"
    ):
        read_clip_config(clip)


@pytest.mark.parity
def test_what_transformers_saves_with_a_whole_processor(assets, tmp_path):
    from transformers import CLIPProcessor, CLIPTokenizer
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    clip = shutil.copytree(assets / "clip", tmp_path / "clip")
    (clip / "preprocessor_config.json").unlink()
    processor = CLIPImageProcessorPil(**LAION)
    CLIPProcessor(processor, CLIPTokenizer.from_pretrained(str(clip))).save_pretrained(str(clip))
    assert read_clip_config(clip).preprocessing == Preprocessing.from_hf(LAION, IMAGE_SIZE, "file")


@pytest.mark.parity
def test_it_is_saved_with_the_model(models, tmp_path):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    config, params = load_clip(models / "clip")
    save_clip(tmp_path, config, params)
    assert read_clip_config(tmp_path) == config
    saved, original = (CLIPImageProcessorPil.from_pretrained(str(place)) for place in (tmp_path, models / "clip"))
    assert saved.to_dict() == original.to_dict()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], "the file must be a JSON object"),
        ({}, r"crop_size is \{'height': 224, 'width': 224\}; it must be 24 by 24, as config.json's vision_config"),
        ({"crop_size": {"height": 24, "width": 32}}, "crop_size is .*; it must be 24 by 24"),
        ({"crop_size": {"shortest_edge": 24}}, "crop_size is .*; it must be 24 by 24"),
        ({"crop_size": 24.0}, "crop_size is 24.0; it must be a whole number of pixels"),
        ({"size": {"shortest_edge": 24, "longest_edge": 40}}, "size is .*; it must be a whole number of pixels"),
        ({"size": {"longest_edge": 40}}, "size is .*; it must be a whole number of pixels"),
        ({"size": {"height": 24, "width": 0}}, "size is .*; it must be a whole number of pixels"),
        ({"size": True}, "size is True; it must be a whole number"),
        ({"do_center_crop": False}, "do_center_crop is False; it must be true, or do_resize true and size 24 by 24"),
        ({"do_center_crop": False, "do_resize": False}, "do_center_crop is False; it must be true"),
        ({"do_rescale": False}, "do_rescale is False; it must be True .*rescale_factor to 1"),
        ({"rescale_factor": 0}, "rescale_factor is 0; it must be above 0"),
        ({"do_resize": "yes"}, "do_resize is 'yes'; it must be true or false"),
        ({"do_pad": True}, "do_pad is True"),
        ({"resample": 6}, r"resample is 6; it must be one of 0 \(nearest\), .* 3 \(bicubic\)"),
        ({"resample": "bicubic"}, "resample is 'bicubic'"),
        ({"resample": None}, "resample is None"),
        ({"image_mean": [0.5, 0.5]}, r"image_mean is \[0.5, 0.5\]; it must be three numbers"),
        ({"image_mean": [0.5, float("nan"), 0.5]}, "image_mean is .*; it must be three numbers"),
        ({"image_std": [0.5, 0.0, 0.5]}, "image_std is .*; it must be three numbers above 0"),
        (
            {"image_processor_type": "ViTImageProcessor"},
            "image_processor_type is 'ViTImageProcessor'; it must be one of",
        ),
    ],
)
def test_what_cannot_be_done_is_one_line(assets, tmp_path, values, message):
    clip = shutil.copytree(assets / "clip", tmp_path / "clip")
    write(clip, {"size": 24, "crop_size": 24, **values} if values else values)
    with pytest.raises(UserError, match=rf"clip/preprocessor_config\.json: .*{message}") as caught:
        read_clip_config(clip)
    assert "\n" not in str(caught.value)
