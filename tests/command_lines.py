"""Runs command lines of `vlkd_jax.train`, each in a process of its own, but importing the program only once.

python tests/command_lines.py < cases.json > results.json; a case is {"argv": [...], "full_disk_after": step or null}.
Before a fork only modules are imported, no device is touched, so that each child starts as a fresh program would.
"""

import json
import os
import sys
import tempfile

from vlkd_jax import checkpoint, entry, train
from vlkd_jax.commands import COMMANDS


def fill_disk_after(step: int) -> None:
    """From the checkpoint after `step` on, the file system has no byte left."""
    free = checkpoint._free_bytes

    def none_left(directory) -> int:
        return 0 if any(int(path.name[5:13]) >= step for path in directory.glob("step_????????")) else free(directory)

    checkpoint._free_bytes = none_left


def child(case: dict, out: int, err: int) -> None:
    """Becomes the program, with these file descriptors as its output."""
    os.dup2(out, 1)
    os.dup2(err, 2)
    if case.get("full_disk_after") is not None:
        fill_disk_after(case["full_disk_after"])
    sys.argv = ["vlkd_jax.train", *case["argv"]]
    try:
        entry.run(train.main, COMMANDS["train"])
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    else:
        code = 0
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run(case: dict) -> dict:
    """{"code", "out", "err"} of one command line."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        pid = os.fork()
        if not pid:
            child(case, out.fileno(), err.fileno())
        _, status = os.waitpid(pid, 0)
        texts = {}
        for name, file in (("out", out), ("err", err)):
            file.seek(0)
            texts[name] = file.read().decode()
        return {"code": os.waitstatus_to_exitcode(status), **texts}


if __name__ == "__main__":
    print(json.dumps([run(case) for case in json.load(sys.stdin)]))
