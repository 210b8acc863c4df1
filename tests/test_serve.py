"""`vlkd serve`: the JSON says what the class says, every bad request is one line, and limits hold."""

import contextlib
import http.client
import io
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import uvicorn
from PIL import Image
from tiny import ROOT, environment, tiny_config, write_pictures

from vlkd_jax.train import train
from vlkd_jax.vlkd import VLKD
from vlkd_jax.web.server import Limits, bound, create_app

QUESTION = "is there a square?"


@pytest.fixture(scope="module")
def place(assets, tmp_path_factory):
    """A folder with run/ and a picture."""
    place = tmp_path_factory.mktemp("serve")
    train(tiny_config(assets, steps=2, optim__lr=1e-2), place / "run")
    write_pictures(place, 1)
    return place


@pytest.fixture(scope="module")
def model(place):
    return VLKD.from_run(place / "run")


@contextlib.contextmanager
def serving(model, **limits):
    """The port of a server in a thread of this process."""
    listener = bound("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(create_app(model, Limits(**limits)), log_level="critical"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(20)


@pytest.fixture(scope="module")
def port(model):
    with serving(model, per_minute=10_000, picture_bytes=200_000) as port:
        yield port


def request(port, method, path, body=b"", host=None, **headers):
    """(status, headers, body)."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    connection.request(method, path, body, ({"Host": host} if host else {}) | headers)
    answer = connection.getresponse()
    return answer.status, dict(answer.getheaders()), answer.read()


def post(port, path, image=None, **fields):
    """(status, value) of a form."""
    edge, parts = "x1y2z3", []
    for name, value in fields.items():
        parts.append(f'--{edge}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode())
    if image is not None:
        head = f'--{edge}\r\nContent-Disposition: form-data; name="image"; filename="é.png"\r\n\r\n'
        parts.append(head.encode() + image + b"\r\n")
    body = b"".join(parts) + f"--{edge}--\r\n".encode()
    status, _, told = request(port, "POST", path, body, **{"Content-Type": f"multipart/form-data; boundary={edge}"})
    return status, json.loads(told)


@pytest.fixture
def picture(place):
    return (place / "0.png").read_bytes()


def test_it_says_what_the_class_says(port, model, place, picture):
    path = place / "0.png"
    status, told = post(port, "/api/caption", picture, returns=2)
    expected = model.caption(path, method="beam", beams=3, returns=2, scores=True)
    assert status == 200 and [text["text"] for text in told["captions"]] == [text for text, _ in expected]
    status, told = post(port, "/api/ask", picture, question=QUESTION)
    expected = model.answer(path, QUESTION, method="beam", beams=3, returns=3, scores=True)
    assert status == 200 and [text["text"] for text in told["answers"]] == [text for text, _ in expected]
    np.testing.assert_allclose([text["score"] for text in told["answers"]], [score for _, score in expected], atol=1e-4)
    looked = model.attention(path, QUESTION, expected[0].text)
    assert told["attention"]["tokens"] == looked.tokens
    np.testing.assert_allclose(told["attention"]["patches"], looked.patches, atol=1e-5)
    assert told["attention"]["seen"].startswith("data:image/png;base64,")
    about = request(port, "GET", "/api/model")[2].decode()
    assert json.loads(about)["model"]["step"] == 2 and str(place) not in about


def saved(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


BAD = {
    "nothing": (b"", 400, "send a JPEG"),
    "a page": (b"<html>no picture</html>" * 10, 400, "does not decode"),
    "an SVG": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', 400, "does not decode"),
    "half a JPEG": (saved(Image.new("RGB", (300, 300), (9, 99, 9)), "JPEG")[:700], 400, ""),
    "a bomb": (saved(Image.new("1", (20_000, 20_000)), "PNG"), 400, "too"),
    "a large file": (b"\x89PNG" + bytes(300_000), 413, "a picture has 200,000 bytes at most"),
    "noise": (np.random.default_rng(0).bytes(5000), 400, "does not decode"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_pictures_are_one_line(port, name):
    data, expected, told = BAD[name]
    status, value = post(port, "/api/caption", data)
    assert (status, list(value)) == (expected, ["error"])
    assert told in value["error"] and "\n" not in value["error"] and "Traceback" not in value["error"]
    assert "0x" not in value["error"]


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({}, "question: Field required"),
        ({"question": ""}, "question"),
        ({"question": "x" * 301}, "question: String should have at most 300 characters"),
        ({"question": QUESTION, "returns": 9}, "returns: Input should be less than or equal to 5"),
        ({"question": QUESTION, "returns": "many"}, "returns"),
    ],
)
def test_bad_fields_are_one_line(port, picture, fields, told):
    status, value = post(port, "/api/ask", picture, **fields)
    assert status == 422 and value["error"].startswith(told)
    assert post(port, "/api/ask", **{"question": QUESTION})[0] == 422


def test_a_question_that_does_not_fit_is_one_line(port, picture):
    status, value = post(port, "/api/ask", picture, question="é" * 290)
    assert status == 400 and "tokens, there is room for" in value["error"]


def test_the_page_needs_nothing_from_elsewhere(port):
    status, headers, page = request(port, "GET", "/")
    assert status == 200 and not re.search(rb"(https?:)?//\w", page)
    assert "default-src 'none'" in headers["content-security-policy"]
    for path in ("/docs", "/redoc", "/page.html", "/../../etc/passwd"):
        assert request(port, "GET", path)[0] == 404
    assert request(port, "GET", "/", host="elsewhere.example")[0] == 400  # another page's name for this address
    schema = json.loads(request(port, "GET", "/openapi.json")[2])
    assert {"Captions", "Answers", "Attention", "Fault"} <= set(schema["components"]["schemas"])
    assert "413" in schema["paths"]["/api/ask"]["post"]["responses"]


def test_twenty_clients_at_once(port, picture):
    with ThreadPoolExecutor(20) as pool:
        told = list(pool.map(lambda _: post(port, "/api/ask", picture, question=QUESTION), range(20)))
    assert all(status == 200 for status, _ in told) and len({json.dumps(value) for _, value in told}) == 1


def test_limits_on_rate_and_on_waiting(model, picture):
    with serving(model, per_minute=3) as port:
        told = [post(port, "/api/caption", picture) for _ in range(5)]
        assert [status for status, _ in told] == [200] * 3 + [429] * 2
        assert told[-1][1]["error"] == "more than 3 requests a minute; wait a little"
    with serving(model, waiting=2, per_minute=1000) as port, ThreadPoolExecutor(20) as pool:
        told = Counter(status for status, _ in pool.map(lambda _: post(port, "/api/caption", picture), range(20)))
        assert set(told) <= {200, 503} and told[200] >= 2
        assert post(port, "/api/caption", picture)[0] == 200  # and goes on


def test_the_command(place):
    """It tells its address, answers, and ends with SIGTERM's code; a port that is taken is one line."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        argv = [sys.executable, "-m", "vlkd_jax.web.server", f"--model={place / 'run'}"]
        port = taken.getsockname()[1]
        done = subprocess.run([*argv, f"--port={port}"], capture_output=True, text=True, env=environment(), cwd=ROOT)
        assert done.returncode == 2 and "name another, such as --port=" in done.stderr and done.stderr.count("\n") == 1
    process = subprocess.Popen(
        [*argv, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(), cwd=ROOT
    )
    try:
        lines = iter(process.stdout.readline, "")
        address = next(found[0] for line in lines if (found := re.search(r"http://\S+/", line)))
        port, deadline = urllib.parse.urlparse(address).port, time.monotonic() + 60
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                assert request(port, "GET", "/")[0] == 200
                break
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 143
    finally:
        process.kill()
        process.communicate()
