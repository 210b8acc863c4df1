"""Pixels against Hugging Face's PIL processor, every kind of picture a folder may hold, and every kind of damage."""

import io
import json
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from vlkd_jax.data import images
from vlkd_jax.data.images import check_header, open_image, resize_and_crop
from vlkd_jax.errors import UserError
from vlkd_jax.models.clip import normalize_pixels
from vlkd_jax.models.preprocessing import RESAMPLES, Preprocessing

SIZES = [
    (224, 224),
    (640, 480),
    (333, 500),
    (97, 131),
    (500, 225),
    (224, 900),
    (31, 30),
    (1, 1),
    (225, 224),
    (1023, 77),
]


def smooth(rng, width, height, channels=3):
    """A picture with structure at every scale: noise that was enlarged."""
    small = rng.integers(0, 256, (7, 9, channels), np.uint8)
    large = np.asarray(Image.fromarray(small[..., :3]).resize((width, height), Image.Resampling.BICUBIC))
    return np.clip(large + rng.integers(-20, 21, large.shape), 0, 255).astype(np.uint8)


def to_bytes(image, kind, **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def pixels(source, preprocessing):
    return np.asarray(normalize_pixels(resize_and_crop(open_image(source), preprocessing), preprocessing))


HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
SETTINGS = {
    "openai": (224, {}),
    "laion": (224, HALF),
    "one number for all channels": (224, {"image_mean": 0.25, "image_std": 0.4}),
    "small": (72, {"size": {"shortest_edge": 72}, "crop_size": {"height": 72, "width": 72}}),
    "as old files write it": (96, {"size": 96, "crop_size": 96, "do_convert_rgb": None, "do_pad": None}),
    "larger than the crop": (96, {"size": {"shortest_edge": 131}, "crop_size": 96}),
    "smaller than the crop": (97, {"size": {"shortest_edge": 60}, "crop_size": 97}),
    "squashed": (72, HALF | {"size": {"height": 72, "width": 72}, "do_center_crop": False}),
    "squashed, an int": (72, {"size": 72, "default_to_square": True, "do_center_crop": False}),
    "squashed and cropped": (50, {"size": [80, 61], "crop_size": [50, 50]}),
    "only cropped": (81, {"do_resize": False, "crop_size": 81}),
    "not normalised": (72, {"size": 72, "crop_size": 72, "do_normalize": False, "rescale_factor": 1 / 127.5}),
    "to minus one": (72, {"size": 72, "crop_size": 72, "rescale_factor": 1 / 127.5, "image_mean": 1, "image_std": 1}),
    **{name: (72, {"size": 72, "crop_size": 72, "resample": k} | HALF) for k, name in enumerate(RESAMPLES)},
}
"""(image size of the model, what preprocessor_config.json says) by what is special about it."""


@pytest.mark.parity
@pytest.mark.parametrize("setting", SETTINGS)
def test_pixels_are_those_of_hugging_face(rng, setting):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    size, values = SETTINGS[setting]
    ours = Preprocessing.from_hf(values, size, "file")
    again = ours.to_hf()
    assert Preprocessing.from_hf(json.loads(json.dumps(again)), size, "file") == ours
    processors = [CLIPImageProcessorPil(**written) for written in (values, again)]
    for shape in [*SIZES, *rng.integers(20, 400, (6, 2)).tolist()]:
        for kind in ("PNG", "JPEG"):
            data = to_bytes(Image.fromarray(smooth(rng, *shape)), kind)
            read = pixels(data, ours)
            assert read.shape == (size, size, 3) and read.dtype == np.float32
            for processor in processors:
                theirs = processor(Image.open(io.BytesIO(data)), return_tensors="np")["pixel_values"][0]
                assert np.abs(read - theirs.transpose(1, 2, 0)).max() < 1e-6


@pytest.mark.parametrize("values", [{}, HALF])
def test_normalise_is_right_for_every_value(values):
    preprocessing = Preprocessing.from_hf(values, 224, "file")
    picture = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, 2)
    expected = (picture / 255 - np.float64(preprocessing.mean)) / np.float64(preprocessing.std)
    np.testing.assert_allclose(normalize_pixels(picture, preprocessing), expected, atol=1e-6)
    assert normalize_pixels(picture, preprocessing).dtype == np.float32


def test_arrays_and_files_go_the_same_way(rng, tmp_path):
    picture = smooth(rng, 90, 60)
    Image.fromarray(picture).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    for source in (tmp_path / "a.png", str(tmp_path / "a.png"), data):
        np.testing.assert_array_equal(np.asarray(open_image(source)), picture)
    as_array, as_file = (resize_and_crop(source, Preprocessing(48, 48)) for source in (picture, open_image(data)))
    np.testing.assert_array_equal(as_array, as_file)
    square = smooth(rng, 48, 48)
    np.testing.assert_array_equal(resize_and_crop(square, Preprocessing(48, 48)), square)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(rng, orientation):
    upright = np.asarray(Image.fromarray(smooth(rng, 40, 24)).convert("RGB"))
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = to_bytes(Image.fromarray(np.ascontiguousarray(stored)), "PNG", exif=exif)
    np.testing.assert_array_equal(np.asarray(open_image(data)), upright)


def test_damaged_exif_is_no_obstacle_or_one_line(rng):
    data = to_bytes(
        Image.fromarray(smooth(rng, 40, 24)), "JPEG", exif=b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\xff\xff" + b"\x01" * 30
    )
    try:
        assert open_image(data).size in ((40, 24), (24, 40))
    except UserError as error:
        assert "does not decode" in str(error)


def test_transparency_lies_on_white(rng):
    picture = smooth(rng, 20, 16)
    alpha = np.full((16, 20, 1), 255, np.uint8)
    alpha[:8] = 0
    whole = np.concatenate([picture, alpha], -1)
    expected = picture.copy()
    expected[:8] = 255
    np.testing.assert_array_equal(np.asarray(open_image(to_bytes(Image.fromarray(whole), "PNG"))), expected)
    grey = Image.fromarray(whole).convert("LA")
    opened = np.asarray(open_image(to_bytes(grey, "PNG")))
    assert (opened[:8] == 255).all() and (opened[8:] == np.asarray(grey)[8:, :, :1]).all()


def test_palettes(rng):
    palette = Image.fromarray(smooth(rng, 20, 16)).quantize(16)
    for kind in ("PNG", "GIF", "BMP"):
        opened = open_image(to_bytes(palette, kind))
        assert opened.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(opened), np.asarray(palette.convert("RGB")))
    indices = np.asarray(palette)
    opened = np.asarray(open_image(to_bytes(palette, "PNG", transparency=int(indices[0, 0]))))
    assert (opened[indices == indices[0, 0]] == 255).all()
    frames = [Image.fromarray(smooth(rng, 20, 16)) for _ in range(3)]
    animated = to_bytes(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert np.asarray(open_image(animated)).shape == (16, 20, 3)


@pytest.mark.parametrize("mode", ["1", "L", "CMYK", "YCbCr"])
def test_other_colour_models(rng, mode):
    picture = Image.fromarray(smooth(rng, 40, 30)).convert(mode)
    kind = "PNG" if mode in ("1", "L") else "JPEG"
    data = to_bytes(picture, kind)
    opened = open_image(data)
    assert opened.mode == "RGB" and opened.size == (40, 30)
    np.testing.assert_array_equal(np.asarray(opened), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_keep_their_shades(kind):
    """Pillow's own conversion would clip everything above 255 to white."""
    ramp = np.linspace(0, 65535, 64 * 8).astype(np.uint16).reshape(8, 64)
    opened = np.asarray(open_image(to_bytes(Image.fromarray(ramp), kind)))
    assert opened.shape == (8, 64, 3) and opened.dtype == np.uint8
    assert np.abs(opened[..., 0].astype(float) - ramp / 257.0).max() <= 1


def test_strips_do_not_become_huge(rng):
    """A picture of 1 x 20,000 enlarged to 224 pixels across would take 3 GB."""
    for shape in ((1, 20_000), (20_000, 1), (2, 4001)):
        resized = resize_and_crop(Image.fromarray(smooth(rng, *shape)), Preprocessing(224, 224))
        assert resized.shape == (224, 224, 3)


def chunk(name, body):
    return len(body).to_bytes(4, "big") + name + body + zlib.crc32(name + body).to_bytes(4, "big")


def header(width, height):
    """The beginning of a PNG of width x height grey pixels."""
    size = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size + bytes([8, 0, 0, 0, 0]))


def bomb(side):
    """A small PNG that really decodes to side x side grey pixels."""
    packer = zlib.compressobj(1)
    rows = bytes(side + 1) * 100
    body = b"".join(packer.compress(rows) for _ in range(side // 100)) + packer.flush()
    return header(side, side) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


CHILD = """
import resource, sys
from vlkd_jax.data.images import open_image
from vlkd_jax.errors import UserError
from vlkd_jax.models.clip import normalize_pixels
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    open_image(sys.argv[1])
except UserError as error:
    print(error)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("side", [8100, 9900, 13_300])
def test_bombs_are_refused_from_the_header(tmp_path, side):
    """Above our limit, above Pillow's warning and near its error; none is decoded (65 MB and more)."""
    path = tmp_path / "bomb.png"
    path.write_bytes(bomb(side))
    done = subprocess.run([sys.executable, "-c", CHILD, path], capture_output=True, text=True, check=True)
    message, grown = done.stdout.splitlines()
    assert str(path) in message and f"{side}x{side} pixels" in message and "smaller" in message
    assert int(grown) < 30_000  # KiB
    assert done.stderr == ""


@pytest.mark.parametrize("size", [(9000, 9000), (20_000, 20_000), (2**31 - 1, 2**31 - 1)])
def test_the_header_alone_is_enough_to_refuse(size):
    with pytest.raises(UserError, match="pixels"):
        check_header(header(*size) + chunk(b"IDAT", b"")[:8])


def refused(source, name):
    with pytest.raises(UserError) as caught:
        open_image(source)
    message = str(caught.value)
    assert name in message and "\n" not in message
    assert message.endswith(("drop its line", "make the picture smaller"))
    return message


def damaged_files(rng):
    picture = Image.fromarray(smooth(rng, 120, 90))
    jpeg, png = to_bytes(picture, "JPEG"), to_bytes(picture, "PNG")
    webp, gif, tiff = (to_bytes(picture, kind) for kind in ("WEBP", "GIF", "TIFF"))
    return {
        "truncated.jpg": jpeg[: len(jpeg) // 2],
        "truncated.png": png[: len(png) // 2],
        "truncated.webp": webp[: len(webp) // 2],
        "truncated.gif": gif[: len(gif) // 3],
        "truncated.tif": tiff[: len(tiff) // 2],
        "page.jpg": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
        "empty.jpg": b"",
        "one_byte.png": b"\x89",
        "drawing.svg": b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>",
        "text.png": b"not a picture",
    }


def test_damage_is_named(rng, tmp_path):
    for name, data in damaged_files(rng).items():
        (tmp_path / name).write_bytes(data)
        refused(tmp_path / name, str(tmp_path / name))
    assert "not found" in refused(tmp_path / "absent.jpg", "absent.jpg")
    refused(tmp_path, str(tmp_path))


def test_random_damage_never_escapes_as_another_error(rng):
    """Flipped and cut bytes either still decode or give the one error."""
    picture = Image.fromarray(smooth(rng, 40, 30))
    for kind in ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"):
        whole = to_bytes(picture, kind)
        for _ in range(60):
            data = bytearray(whole[: rng.integers(1, len(whole))] if rng.random() < 0.3 else whole)
            for position in rng.integers(len(data), size=rng.integers(1, 9)):
                data[position] = rng.integers(256)
            try:
                assert open_image(bytes(data)).mode == "RGB"
            except UserError as error:
                assert "decode" in str(error) or "pixels" in str(error)


@pytest.mark.parametrize("size", [(400, 300), (30, 200), (1, 500), (64, 64)])
def test_random_parts_of_a_picture(size):
    """Within the picture, as large and of such a shape as is asked for, a function of the random numbers alone."""
    rng, areas = np.random.default_rng(0), []
    width, height = size
    for _ in range(300):
        left, top, w, h = images._random_box(width, height, rng, 0.3)
        assert 0 <= left <= left + w <= width and 0 <= top <= top + h <= height and w > 0 and h > 0
        areas.append(w * h / (width * height))
        if size == (400, 300):
            assert 0.74 < w / h < 1.35 and 0.29 < areas[-1] <= 1
    if size == (400, 300):
        assert 0.5 < np.mean(areas) < 0.75
    picture = np.random.default_rng(1).integers(0, 255, (height, width, 3), dtype=np.uint8)
    crops = [
        images.random_resized_crop(picture, Preprocessing(16, 16), np.random.default_rng(k), 0.3) for k in (5, 5, 6)
    ]
    assert crops[0].shape == (16, 16, 3) and np.array_equal(crops[0], crops[1])
    if width / height > 0.5:  # in a strip no part of such a shape is large enough: always the middle
        assert not np.array_equal(crops[0], crops[2])


def test_a_whole_part_is_the_resized_picture(monkeypatch):
    """A part that is all of a square picture: what training without random parts makes of it."""
    picture = np.random.default_rng(1).integers(0, 255, (48, 48, 3), dtype=np.uint8)
    monkeypatch.setattr(images, "_random_box", lambda width, height, rng, smallest: (0, 0, width, height))
    whole = images.random_resized_crop(picture, Preprocessing(16, 16), np.random.default_rng(0), 0.9)
    assert np.array_equal(whole, resize_and_crop(picture, Preprocessing(16, 16)))
