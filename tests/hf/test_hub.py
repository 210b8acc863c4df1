"""Models by their hub id: against a hub on this machine that answers as the real one does."""

import hashlib
import json
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from tiny import ROOT, arguments, environment

from vlkd_jax.errors import UserError
from vlkd_jax.hf import hub

COMMIT = hashlib.sha1(b"the newest").hexdigest()


@pytest.fixture
def server(assets, tmp_path):
    """Its address; it has me/clip and me/bart with one file beside the weights that must not be asked for."""
    asked = []

    def files_of(model):
        return [*sorted(file.name for file in (assets / model).iterdir()), "pytorch_model.bin", "modeling_evil.py"]

    class Hub(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments):
            pass

        def reply(self, code, body=b"", **headers):
            self.send_response(code)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_GET(self):
            path = self.path.partition("?")[0]
            asked.append(path)
            if match := re.fullmatch(r"/api/models/me/(clip|bart)(?:/revision/([^/]+))?", path):
                if match[2] not in (None, "main", COMMIT):
                    return self.reply(404, X_Error_Code="RevisionNotFound")
                info = {
                    "id": f"me/{match[1]}",
                    "sha": COMMIT,
                    "siblings": [{"rfilename": f} for f in files_of(match[1])],
                }
                return self.reply(200, json.dumps(info).encode(), Content_Type="application/json")
            if match := re.fullmatch(rf"/api/models/me/(clip|bart)/tree/{COMMIT}", path):
                tree = [{"type": "file", "path": f, "size": 1, "oid": COMMIT} for f in files_of(match[1])]
                return self.reply(200, json.dumps(tree).encode(), Content_Type="application/json")
            if match := re.fullmatch(rf"/me/(clip|bart)/resolve/{COMMIT}/([\w.-]+)", path):
                body = (assets / match[1] / match[2]).read_bytes()
                etag = f'"{hashlib.sha1(body).hexdigest()}"'
                return self.reply(200, body, ETag=etag, X_Repo_Commit=COMMIT)
            return self.reply(404, X_Error_Code="RepoNotFound")

        do_HEAD = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked = asked
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def run(arguments, home, endpoint=""):
    """A Python process with a hub's cache of its own; without an endpoint it is told that there is no network."""
    environ = environment() | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "0" if endpoint else "1"}
    environ |= {"HF_ENDPOINT": endpoint} if endpoint else {}
    environ |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_ETAG_TIMEOUT": "2"}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environ, cwd=ROOT)


def errors(names, home, endpoint=""):
    """What `pinned` says of each name."""
    program = (
        "import sys\nfrom vlkd_jax.errors import UserError\nfrom vlkd_jax.hf.hub import pinned\n"
        "for name in sys.argv[1:]:\n    try:\n        print(pinned(name))\n    except UserError as e:\n        print(e)"
    )
    result = run(["-c", program, *names], home, endpoint)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def test_a_run_from_the_hub(server, assets, tmp_path):
    """Trained by id; the commit stands in its record; without a network it goes on from the cache."""
    endpoint = f"http://127.0.0.1:{server.server_port}"
    changes = {"clip": "hf:me/clip", "bart": "hf:me/bart@main", "steps": 1, "save_every": 1}
    argv = arguments(assets, tmp_path / "run", **changes)
    result = run(["-m", "vlkd_jax.train", *argv], tmp_path / "home", endpoint)
    assert result.returncode == 0, result.stderr
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["clip"] == f"hf:me/clip@{COMMIT}" and config["bart"] == f"hf:me/bart@{COMMIT}"
    inputs = json.loads((tmp_path / "run" / "inputs.json").read_text())
    weights = (assets / "bart" / "model.safetensors").read_bytes()
    assert inputs["bart"]["model.safetensors"] == hashlib.sha256(weights).hexdigest()
    assert not [path for path in server.asked if path.endswith((".bin", ".py"))]
    argv = arguments(assets, tmp_path / "run", **(changes | {"steps": 2}))
    result = run(["-m", "vlkd_jax.train", *argv], tmp_path / "home")
    assert result.returncode == 0, result.stderr


def test_mistakes_are_one_line_each(server, tmp_path):
    messages = {
        "hf:me/nothing": "no such model on the hub, or it asks for a login (hf auth login)",
        "hf:me/clip@old": "me/clip has no revision old; leave @old out for the newest",
        "hf:me": "not the name of a model on the hub; write hf:OWNER/NAME or hf:OWNER/NAME@REVISION",
    }
    told = errors(messages, tmp_path / "home", f"http://127.0.0.1:{server.server_port}")
    assert told == [f"{name}: {message}" for name, message in messages.items()]


@pytest.mark.parametrize("offline", ["a switch", "no answer"])
def test_offline_is_one_line(tmp_path, offline):
    endpoint = "" if offline == "a switch" else "http://127.0.0.1:9"  # the discard port: nobody listens
    (told,) = errors(["hf:me/clip"], tmp_path / "home", endpoint)
    assert told.startswith("hf:me/clip: not in the hub's local cache, and the hub gives no answer")
    assert "hf download me/clip --local-dir DIR" in told


@pytest.mark.parametrize("name", ["hf:", "hf:a/b/c", "hf:a/b@", "hf:a b/c", "hf:a/b@x/y"])
def test_names(name):
    with pytest.raises(UserError, match="not the name of a model on the hub"):
        hub.pinned(name)


def test_only_what_is_read_is_fetched():
    assert not [pattern for pattern in hub.PATTERNS if pattern.endswith((".py", ".bin", ".pt", "*"))]
