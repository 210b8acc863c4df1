"""Times what one waits for before anything happens: `python -m benchmarks.startup`.

    python -m benchmarks.startup [--rounds=5] [--output=FILE]

Each run is a process of its own: `import vlkd_jax`, `vlkd --help`, the first caption of one picture by the command with
programs compiled before, and the same picture, student and decoding by Hugging Face's classes in PyTorch.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import timing

PEER = """
import sys
import torch
from PIL import Image
from vlkd_jax.hf.modeling_vlkd import VLKDForConditionalGeneration, VLKDProcessor
model = VLKDForConditionalGeneration.from_pretrained(sys.argv[1]).eval()
processor = VLKDProcessor.from_pretrained(sys.argv[1])
inputs = processor(images=[Image.open(sys.argv[2])])
with torch.inference_mode():
    print(processor.decode_answers(model.generate(**inputs, max_new_tokens=20))[0])
"""
MAKE = """
import sys
from PIL import Image
from vlkd_jax import VLKD
from vlkd_jax.shapes import world
VLKD.from_pretrained().save_pretrained(sys.argv[1])
Image.fromarray(world.render(world.make_scene(1, "test", 0))).save(sys.argv[2])
"""


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        student, picture = f"{folder}/student", f"{folder}/picture.png"
        settings = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
        settings |= {"XDG_CACHE_HOME": f"{folder}/cache", "JAX_PLATFORMS": "cpu"}

        def run(*arguments: str) -> str:
            command = [sys.executable, *arguments]
            return subprocess.run(command, env=settings, check=True, capture_output=True, text=True).stdout

        run("-c", MAKE, student, picture)
        caption = ("-m", "vlkd_jax", "caption", picture, f"--model={student}")
        peer = ("-c", PEER, student, picture)
        said = run(*caption).strip().partition(": ")[2], run(*peer).strip()
        if said[0] != said[1]:
            raise SystemExit(f"the two sides say different things: {said}")
        runs = {
            "python": lambda: run("-c", ""),
            "import vlkd_jax": lambda: run("-c", "import vlkd_jax"),
            "vlkd --help": lambda: run("-m", "vlkd_jax", "--help"),
            "first caption": lambda: run(*caption),
            "first caption, Hugging Face": lambda: run(*peer),
        }
        seconds = timing.alternate(runs, options.rounds)
    result = timing.circumstances(options) | {
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "times_faster": timing.ratio(seconds, "first caption, Hugging Face", "first caption"),
    }
    timing.tell(result, options.output, rounds=seconds)


if __name__ == "__main__":
    main()
