"""From a picture to CLIP's pixels: what preprocessor_config.json says of it."""

from __future__ import annotations

import dataclasses
from typing import Any

from vlkd_jax.models.fields import Fields

# What transformers' CLIPImageProcessor assumes for an absent key (the same in versions 4 and 5).
PREPROCESSING_DEFAULTS = {
    "image_processor_type": "CLIPImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"shortest_edge": 224},
    "default_to_square": False,
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "do_pad": False,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": (0.48145466, 0.4578275, 0.40821073),
    "image_std": (0.26862954, 0.26130258, 0.27577711),
}
PROCESSORS = ("CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPImageProcessorPil", "CLIPFeatureExtractor")
RESAMPLES = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")
"""Pillow's filters, at the places of their numbers."""


def _resize_before_crop(fields: Fields, image_size: int) -> int | tuple[int, int] | None:
    """`Preprocessing.resize`, where a crop of `image_size` follows or changes nothing."""
    resize = None
    if fields.boolean("do_resize"):
        resize = fields.edges("size", one_is_square=fields.boolean("default_to_square"))
    wanted = f"{image_size} by {image_size}, as config.json's vision_config.image_size says"
    if not fields.boolean("do_center_crop"):
        if resize != (image_size, image_size):
            fields.fail("do_center_crop", f"true, or do_resize true and size {wanted}")
    elif fields.edges("crop_size", one_is_square=True) != (image_size, image_size):
        fields.fail("crop_size", wanted)
    return resize


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """How a picture becomes the pixels that a CLIP was trained on: resized, cropped, scaled, normalised.

    Attributes:
      size: pixels a side of the crop from the middle, which is what the image tower reads; a picture that is smaller
        has black borders.
      resize: what it is resized to before: the length of its short side, or (height, width); None: left as it is.
      resample: number of the filter, an index of `RESAMPLES`.
      rescale, mean, std: a pixel value v of 0 to 255 becomes (v * rescale - mean) / std, by channel.
    """

    size: int
    resize: int | tuple[int, int] | None
    resample: int = PREPROCESSING_DEFAULTS["resample"]
    rescale: float = PREPROCESSING_DEFAULTS["rescale_factor"]
    mean: tuple[float, float, float] = PREPROCESSING_DEFAULTS["image_mean"]
    std: tuple[float, float, float] = PREPROCESSING_DEFAULTS["image_std"]

    @classmethod
    def from_hf(cls, values: Any, image_size: int, source: str, prefix: str = "") -> Preprocessing:
        """Read preprocessor_config.json of a `CLIPImageProcessor`; absent keys take Hugging Face's defaults.

        Args:
          image_size: what the image tower reads, pixels a side.
          source, prefix: the file and the object in it, for errors.

        Raises:
          UserError: naming `source` and the field of what is not done here, or does not give `image_size` pixels.
        """
        fields = Fields(values, PREPROCESSING_DEFAULTS, source, prefix)
        switches = (name for name, default in PREPROCESSING_DEFAULTS.items() if isinstance(default, bool))
        fields.values |= {name: False for name in switches if fields.values[name] is None}  # as transformers takes null
        fields.one_of("image_processor_type", PROCESSORS)
        fields.exactly("do_pad", False, "pictures are cropped to one size")
        fields.exactly("do_rescale", True, "set rescale_factor to 1 for pixels of 0 to 255")
        fields.boolean("do_convert_rgb")  # pictures are RGB before they come here, whatever it says
        if fields.integer("resample", 0) >= len(RESAMPLES):
            fields.fail("resample", "one of " + ", ".join(f"{k} ({name})" for k, name in enumerate(RESAMPLES)))
        if fields.number("rescale_factor") == 0:
            fields.fail("rescale_factor", "above 0")
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        if fields.boolean("do_normalize"):
            mean, std = fields.three_numbers("image_mean"), fields.three_numbers("image_std")
        if min(std) <= 0:
            fields.fail("image_std", "three numbers above 0")
        resize = _resize_before_crop(fields, image_size)
        return cls(image_size, resize, fields.integer("resample", 0), fields.number("rescale_factor"), mean, std)

    def to_hf(self) -> dict:
        """A complete preprocessor_config.json for `CLIPImageProcessor`."""
        size = {"shortest_edge": self.resize}
        if isinstance(self.resize, tuple):
            size = dict(zip(("height", "width"), self.resize, strict=True))
        return {
            "image_processor_type": "CLIPImageProcessor",
            "do_convert_rgb": True,
            "do_resize": self.resize is not None,
            **({} if self.resize is None else {"size": size}),
            "resample": self.resample,
            "do_center_crop": True,
            "crop_size": {"height": self.size, "width": self.size},
            "do_rescale": True,
            "rescale_factor": self.rescale,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }
