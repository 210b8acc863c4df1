"""Turns pickled PyTorch weights into safetensors, once: `python -m vlkd_jax.hf.convert DIR [--output=DIR2]`.

PyTorch's weights-only reader builds tensors and plain containers and runs nothing else that a pickle asks for.
"""

from __future__ import annotations

import shutil
import zipfile
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from vlkd_jax import entry
from vlkd_jax.commands import COMMANDS
from vlkd_jax.console import say
from vlkd_jax.errors import UserError, few
from vlkd_jax.hf.files import CONFIG, GENERATION, PREPROCESSOR, PROCESSOR, TOKENIZER_FILES, WEIGHTS, pickled_files
from vlkd_jax.hf.save import replace
from vlkd_jax.workdir import output_directory

CARRIED = (CONFIG, GENERATION, PREPROCESSOR, PROCESSOR, *TOKENIZER_FILES, "README.md")
"""What goes to another --output beside the weights."""


def convert(source: Path, output: Path) -> Path:
    """Writes `output/model.safetensors` from the pickled weights of `source`; the file's path.

    Raises:
      UserError: there are none, one is no file of tensors alone, or weights lie in `output` already.
    """
    files = pickled_files(source)
    if not files:
        raise UserError(f"{source}: no pickled weights (*.bin, *.pt, *.pth); there is nothing to convert")
    target = output / WEIGHTS
    if target.exists():
        raise UserError(f"{target}: is there already; name another --output, so that nothing is lost")
    tensors: dict[str, Any] = {}
    for path in files:
        of_file = _tensors(path)
        if twice := tensors.keys() & of_file.keys():
            raise UserError(f"{path}: another file has {few(sorted(twice))} too; keep the files of one checkpoint")
        tensors |= of_file
    output_directory(output, "--output")
    from safetensors.torch import save_file

    whole = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
    replace(target, lambda aside: save_file(whole, aside, metadata={"format": "pt"}))
    for name in CARRIED if output.resolve() != source.resolve() else ():
        if (source / name).is_file():
            shutil.copyfile(source / name, output / name)
    return target


def _tensors(path: Path) -> dict[str, Any]:
    """The tensors of one file by name; what a trainer wraps in "state_dict" too."""
    import torch

    refused = f"{path}: not a file of tensors alone"
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # torch's reader raises nearly anything for damaged data
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{refused}, and nothing else in it is run ({reason}); get the weights as safetensors"
        ) from error
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not content:
        raise UserError(f"{refused}: it holds a {type(content).__name__}; get the weights as safetensors")
    others = [str(name) for name, value in content.items() if not isinstance(value, torch.Tensor)]
    if others:
        raise UserError(f"{refused}: it also holds {few(others)}; save its state_dict() by itself")
    return content


def main(values: SimpleNamespace) -> None:
    """Entry point."""
    source = Path(values.source)
    if not source.is_dir():
        raise UserError(f"{source}: not a directory; give one in Hugging Face format")
    if find_spec("torch") is None:
        raise UserError("vlkd convert needs torch, which is not installed: pip install torch")
    target = convert(source, Path(values.output or source))
    say(f"wrote {target}")


if __name__ == "__main__":
    entry.run(main, COMMANDS["convert"])
