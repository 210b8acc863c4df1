"""Times the input pipeline against the bare work and a torch DataLoader: `python -m benchmarks.pipeline`.

    python -m benchmarks.pipeline [--images=DIR] [--count=2048] [--threads=1] [--workers=0] [--rounds=5] [--output=FILE]

What is read: the JPEGs of a folder, or pictures made here (640 x 480), each with a caption of twelve words, as `vlkd
prepare` keeps them. Ours: decoded, resized and cropped to 224, both tokenisations, infilling, batches of 64. The limit:
Pillow's decoding and resizing of the same bytes in a loop, and nothing else. The peer: a DataLoader whose dataset does
ours with Pillow, Hugging Face's tokenizers and torch's collation. The rivals take turns.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import io
import itertools
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image

from benchmarks import timing
from vlkd_jax.config import model_directory
from vlkd_jax.data.inputs import Columns
from vlkd_jax.data.pipeline import Encoder, batches
from vlkd_jax.data.prepare import Options, prepare
from vlkd_jax.data.records import RecordPairs
from vlkd_jax.data.text import BartText, ClipText, infill
from vlkd_jax.models.preprocessing import Preprocessing

BATCH, LENGTH, SEED = 64, 64, 0
WANTED = 1_200
"""Images a second of one large GPU at its target."""
WORDS = ("a", "the", "red", "small", "dog", "two", "people", "street", "on", "under", "with", "near", "large", "house")
SIZE = Preprocessing(224, 224)


def write_pictures(directory: Path, count: int) -> None:
    """Pictures as compressible as photos: smooth noise with a little grain."""
    rng = np.random.default_rng(SEED)
    for k in range(count):
        smooth = Image.fromarray(rng.integers(0, 255, (24, 32, 3), dtype=np.uint8)).resize(
            (640, 480), Image.Resampling.BICUBIC
        )
        grain = np.asarray(smooth, np.int16) + rng.integers(-6, 7, (480, 640, 3))
        Image.fromarray(grain.clip(0, 255).astype(np.uint8)).save(directory / f"{k:06d}.jpg", quality=90)


def prepared(images: Path | None, count: int, root: Path) -> RecordPairs:
    """Record files of the pictures."""
    if images is None:
        images = root / "images"
        images.mkdir()
        write_pictures(images, count)
    names = sorted(path.name for path in images.iterdir() if path.suffix.lower() in (".jpg", ".jpeg"))
    names = list(itertools.islice(itertools.cycle(names), count))
    rng = np.random.default_rng(SEED)
    lines = [json.dumps({"image": name, "caption": " ".join(rng.choice(WORDS, 12))}) for name in names]
    (root / "pairs.jsonl").write_text("\n".join(lines))
    prepare(root / "pairs.jsonl", root / "data", Columns(images=str(images)), Options(), workers=os.cpu_count() or 1)
    return RecordPairs(root / "data", "train")


class Peer(torch.utils.data.Dataset):
    """What a PyTorch user writes for the same rows."""

    def __init__(self, pairs: RecordPairs, clip: Path, bart: Path):
        self.pairs = pairs
        self.clip = transformers.CLIPTokenizer.from_pretrained(clip)
        self.bart = transformers.BartTokenizer.from_pretrained(bart)
        self.rng = np.random.default_rng(SEED)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self.pairs[index]
        options = {"padding": "max_length", "truncation": True, "return_tensors": "np"}
        clip = self.clip(record.text, max_length=77, **options)
        bart = self.bart(record.text, max_length=LENGTH, **options)
        ids = self.bart(record.text, add_special_tokens=False)["input_ids"]
        masked = infill(ids, self.rng, self.bart.mask_token_id, 0.3, 3.0, 0.15)[: LENGTH - 2]
        source = np.full(LENGTH, self.bart.pad_token_id)
        source[: len(masked) + 2] = [self.bart.bos_token_id, *masked, self.bart.eos_token_id]
        row = {"pixels": np.array(squared(Image.open(io.BytesIO(record.image)))), "source": source}
        return row | {"clip": clip["input_ids"][0], "text": bart["input_ids"][0], "mask": bart["attention_mask"][0]}


def squared(image: Image.Image) -> Image.Image:
    """Pillow's own calls for CLIP's pixels: shorter side to 224, the middle."""
    image = image.convert("RGB")
    scale = 224 / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - 224) // 2, (image.height - 224) // 2
    return image.crop((left, top, left + 224, top + 224))


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, help="a folder of JPEGs; default: pictures made here")
    parser.add_argument("--clip", default="builtin:shapes/clip", help="directory of CLIP's tokenizer")
    parser.add_argument("--bart", default="builtin:shapes/bart", help="directory of BART's tokenizer")
    parser.add_argument("--count", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--workers", type=int, default=0, help="processes, on both sides")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    options = parser.parse_args()
    clip, bart = (model_directory(name) for name in (options.clip, options.bart))
    with tempfile.TemporaryDirectory() as folder:
        pairs = prepared(options.images, options.count, Path(folder))
        data = [pairs[k].image for k in range(len(pairs))]
        encode = Encoder(ClipText(clip), 77, BartText(bart), LENGTH, LENGTH, preprocessing=SIZE, truncate=True)
        steps = len(pairs) // BATCH
        settings = {"batch_size": BATCH, "seed": SEED, "threads": options.threads, "workers": options.workers}

        def ours(steps: int) -> None:
            """A stream of its own each time: one that goes on would read ahead while the rivals are timed."""
            for _ in itertools.islice(batches(pairs, encode, **settings), steps):
                pass

        start = time.perf_counter()
        ours(1)
        first = time.perf_counter() - start
        loader = torch.utils.data.DataLoader(
            Peer(pairs, clip, bart),
            BATCH,
            shuffle=True,
            num_workers=options.workers,
            drop_last=True,
            persistent_workers=options.workers > 0,
        )

        def limit() -> None:
            for image in data[: steps * BATCH]:
                np.asarray(squared(Image.open(io.BytesIO(image))))

        seconds = timing.alternate(
            {
                "ours": lambda: ours(steps),
                "limit": limit,
                "peer": lambda: [None for _ in loader],
            },
            options.rounds,
        )
    rate = {name: steps * BATCH / statistics.median(values) for name, values in seconds.items()}
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("grain", "pillow", "torch", "transformers")},
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()},
        "images_per_second": rate,
        "of_the_limit": timing.ratio(seconds, "limit", "ours"),
        "over_the_peer": timing.ratio(seconds, "peer", "ours"),
        "first_batch_seconds": first,
        "kilobytes_a_picture": sum(map(len, data)) / len(data) / 1000,
        "cores_for_1200_images_per_second": WANTED / rate["ours"] * (options.workers or options.threads),
    }
    print(json.dumps(result, indent=1))
    if options.output:
        options.output.write_text(json.dumps(result | {"seconds": seconds}, indent=1) + "\n")


if __name__ == "__main__":
    main()
