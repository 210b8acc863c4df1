"""What a type checker tells users of `VLKD`: an option that there is not, a wrong argument, what comes back."""

import os
import re
import subprocess
import sys

from tiny import ROOT

USE = """
from vlkd_jax import VLKD

m = VLKD.from_pretrained()
reveal_type(m.answer("a.jpg", ["what?"], method="beam", scores=True))
reveal_type(m.embed_texts("a"))
reveal_type(m.attention("a.jpg", "what?", "a cat").tokens)
m.caption("a.jpg", bems=3)
m.generate_text("a", max_new_tokens="3")
m.answer("a.jpg", 5)
m.rank("a.jpg", "a", questions=2.0)
m.captions("a.jpg")
"""


def test_mistakes_are_found_before_a_program_runs(tmp_path):
    (tmp_path / "use.py").write_text(USE)
    command = [sys.executable, "-m", "mypy", "--follow-imports=silent", "--ignore-missing-imports", "use.py"]
    settings = os.environ | {"MYPYPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=settings)
    lines = dict(re.findall(r"^use\.py:(\d+): (?:error|note): (.*)$", done.stdout, re.MULTILINE)[::-1])
    assert "list[tuple[str, float" in lines["5"] and "str |" in lines["5"] and "Any" not in lines["5"]
    assert "numpy.ndarray" in lines["6"] and lines["7"] == 'Revealed type is "list[str]"'
    assert "did you mean" in lines["8"] and '"str"; expected "int"' in lines["9"]
    assert 'incompatible type "int"' in lines["10"] and 'incompatible type "float"' in lines["11"]
    assert '"VLKD" has no attribute "captions"' in lines["12"], done.stdout
