"""The standard caption tools, where they are: the package pycocoevalcap and the Java programs in it, run as they are.

`caption_metrics` has the same figures, but for METEOR, without Java, through functions of the same names. SPICE runs
where the path of its own jars is given.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from vlkd_jax.errors import UserError

PACKAGE = "pycocoevalcap"
_LINE_ENDS = re.compile(r"\r\n|[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]")
"""What Java or Python take for the end of a line: one inside a caption would move all that follow by a picture."""


@functools.cache
def why_absent() -> str:
    """Why the standard tools cannot be used here; "": they can."""
    if shutil.which("java") is None:
        return "no java on the PATH"
    if importlib.util.find_spec(PACKAGE) is None:
        return f"{PACKAGE} is not installed"
    try:
        subprocess.run(["java", "-version"], check=True, capture_output=True, timeout=60)
        with tempfile.NamedTemporaryFile(dir=_tokenizer_directory()):  # where the package writes
            pass
    except (OSError, subprocess.SubprocessError) as error:
        return f"java or {PACKAGE} cannot be used ({error})"
    return ""


def _tokenizer_directory() -> Path:
    return Path(importlib.util.find_spec(f"{PACKAGE}.tokenizer.ptbtokenizer").origin).parent


def name() -> str:
    """What a result says that it was scored by."""
    return f"{PACKAGE} {version(PACKAGE)}, its Java tokenizer and METEOR"


def tokenize_all(captions: Sequence[str]) -> list[list[str]]:
    """Tokens of each caption, by the Java tokenizer. Raises RuntimeError when it gives another number of lines."""
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    lines = {k: [{"caption": _LINE_ENDS.sub(" ", caption)}] for k, caption in enumerate(captions)}
    # the package pairs lines with captions from the front and drops what is over: a last line of ours tells
    lines["last"] = [{"caption": "last line"}]
    tokens = PTBTokenizer().tokenize(lines)
    if len(tokens) != len(lines) or tokens.pop("last") != ["last line"]:
        raise RuntimeError(f"{PACKAGE}: {len(lines)} captions went in, and other lines came out")
    return [text.split(" ") if text else [] for (text,) in tokens.values()]


def scores(candidates: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> dict[str, Any]:
    """As `caption_metrics.scores`, and `METEOR` of the whole."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge

    said = {k: [" ".join(tokens)] for k, tokens in enumerate(candidates)}
    given = {k: [" ".join(tokens) for tokens in some] for k, some in enumerate(references)}
    return {
        "Bleu": Bleu(4).compute_score(given, said, verbose=0)[0],
        "METEOR": Meteor().compute_score(given, said)[0],
        "ROUGE_L": np.asarray(Rouge().compute_score(given, said)[1]),
        "CIDEr": np.asarray(Cider().compute_score(given, said)[1]),
    }


def spice(captions: Sequence[str], references: Sequence[Sequence[str]], jars: Path) -> np.ndarray:
    """SPICE F of each caption by the program in the directory `jars`: spice-1.0.jar, with its libraries in lib/.

    Source: Anderson et al. 2016. The program needs Java 8.

    Raises:
      UserError: it is not there, or it fails.
    """
    jar = jars / "spice-1.0.jar"
    if not jar.is_file():
        raise UserError(f"{jar}: not there; --spice_jars names the directory of SPICE's own download")
    entries = [
        {"image_id": k, "test": _LINE_ENDS.sub(" ", caption), "refs": [_LINE_ENDS.sub(" ", text) for text in some]}
        for k, (caption, some) in enumerate(zip(captions, references, strict=True))
    ]
    with tempfile.TemporaryDirectory() as directory:
        asked, answered = Path(directory) / "in.json", Path(directory) / "out.json"
        asked.write_text(json.dumps(entries))
        command = ["java", "-Xmx8G", "-jar", jar.name, str(asked), "-out", str(answered), "-silent"]
        try:
            subprocess.run(command, cwd=jars, check=True, capture_output=True, text=True)
            values = {entry["image_id"]: entry["scores"]["All"]["f"] for entry in json.loads(answered.read_text())}
        except (OSError, subprocess.CalledProcessError, ValueError, KeyError, TypeError) as error:
            told = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
            raise UserError(
                f"{jar}: failed ({told[-1] if told else error}); it needs Java 8 and lib/ beside it"
            ) from error
    return np.array([values[k] for k in range(len(entries))])
