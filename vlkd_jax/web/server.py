"""A page about a student, and the same as JSON: `vlkd serve --model=DIR`.

FastAPI with one plain HTML file: the schema of the JSON comes from the types, nothing is loaded from the network, and
what a request may cost is said here. Gradio would bring fonts from elsewhere and a server of its own making.
"""

import collections
import contextlib
import dataclasses
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from importlib.resources import files
from types import SimpleNamespace
from typing import Annotated, Any

import numpy as np
import uvicorn
from fastapi import Depends, FastAPI, File, Form, Request, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from PIL import Image
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

from vlkd_jax import entry
from vlkd_jax.commands import COMMANDS
from vlkd_jax.console import say
from vlkd_jax.data.images import open_image
from vlkd_jax.errors import RecordError, UserError
from vlkd_jax.evals.markup import picture_uri
from vlkd_jax.vlkd import BUILTIN_STUDENT, VLKD

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "img-src data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
FORM_BYTES = 10_000
"""Of a request beside its picture."""
MOST_RETURNS = 5
CLIENTS = 10_000
"""Whose rates are kept at most."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """What requests may cost.

    Attributes:
      picture_bytes: of a picture's file; its pixels are limited as everywhere (`data.images`).
      question: characters.
      per_minute: requests of one address.
      waiting: requests that wait for the model; one is answered at a time.
    """

    picture_bytes: int = 10 * 2**20
    question: int = 300
    per_minute: int = 60
    waiting: int = 32


class Text(BaseModel):
    """A text and its log-likelihood, the sum over its tokens and the end."""

    text: str
    score: float


class Attention(BaseModel):
    """Of each token of the first answer: which patches of the picture it was read from, rows from the top.

    `whole` is what was read of the token for the whole picture; the rest of 1 was read of the question. `seen` is the
    part of the picture that the model sees, as a data URI.
    """

    tokens: list[str]
    patches: list[list[list[float]]]
    whole: list[float]
    seen: str


class Captions(BaseModel):
    """Captions of a picture, the best first."""

    captions: list[Text]


class Answers(BaseModel):
    """Answers to a question about a picture, the best first; no attention where the model reads it as one token."""

    answers: list[Text]
    attention: Attention | None


class Fault(BaseModel):
    """What is wrong with a request, in one line."""

    error: str


class Gate:
    """Who may ask now: one at a time, so many waiting, so many a minute of one address."""

    def __init__(self, limits: Limits):
        self._limits, self._lock, self._model = limits, threading.Lock(), threading.Lock()
        self._waiting = 0
        self._asked: collections.OrderedDict[str, collections.deque[float]] = collections.OrderedDict()

    def check_rate(self, client: str) -> None:
        """Raises HTTPException 429 for an address that has asked too often."""
        now = time.monotonic()
        with self._lock:
            times = self._asked.setdefault(client, collections.deque())
            self._asked.move_to_end(client)
            while len(self._asked) > CLIENTS:
                self._asked.popitem(last=False)
            while times and now - times[0] > 60:
                times.popleft()
            if len(times) >= self._limits.per_minute:
                raise HTTPException(429, f"more than {self._limits.per_minute} requests a minute; wait a little")
            times.append(now)

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Waits for the model. Raises HTTPException 503 where too many wait already."""
        with self._lock:
            if self._waiting >= self._limits.waiting:
                raise HTTPException(503, f"{self._waiting} requests are waiting already; try again in a little while")
            self._waiting += 1
        try:
            with self._model:
                yield
        finally:
            with self._lock:
                self._waiting -= 1


class BodyLimit:
    """An ASGI layer that reads no more of a request than is allowed, whatever its headers say."""

    def __init__(self, app: Any, most: int):
        self.app, self.most = app, most

    async def __call__(self, scope: dict, receive: Callable[[], Awaitable[dict]], send: Callable) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        read = 0

        async def limited() -> dict:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self.most:
                raise HTTPException(413, f"a picture has {self.most - FORM_BYTES:,} bytes at most; send a smaller one")
            return message

        await self.app(scope, limited, send)


def create_app(model: VLKD, limits: Limits = Limits(), hosts: tuple[str, ...] = ("127.0.0.1", "localhost")) -> FastAPI:
    """The application.

    Args:
      hosts: names under which it may be called, which keeps other pages of a browser out; ("*",): any.
    """
    app = FastAPI(title="vlkd_jax", docs_url=None, redoc_url=None)  # their pages would come from elsewhere
    gate, page = Gate(limits), (files("vlkd_jax.web") / "page.html").read_text(encoding="utf-8")
    app.add_middleware(BodyLimit, most=limits.picture_bytes + FORM_BYTES)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))
    _answer_faults(app)
    wrong = {code: {"model": Fault} for code in (400, 413, 422, 429, 503)}

    def within_rate(request: Request) -> None:
        gate.check_rate(request.client.host if request.client else "")

    limited = [Depends(within_rate)]

    @app.middleware("http")
    async def with_headers(request: Request, call_next: Callable) -> Any:
        response = await call_next(request)
        response.headers.update(HEADERS)
        return response

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    def index() -> str:
        return page

    @app.get("/api/model")
    def about() -> dict[str, Any]:
        """Which model answers, not where it lies, and what a request may cost."""
        told = {name: value for name, value in model.identity.items() if name not in ("directory", "clip", "bart")}
        return {"model": told, "limits": dataclasses.asdict(limits)}

    @app.post("/api/caption", responses=wrong, dependencies=limited)
    def caption(
        image: Annotated[UploadFile, File(description="a picture")],
        returns: Annotated[int, Form(ge=1, le=MOST_RETURNS)] = 1,
    ) -> Captions:
        """Captions of a picture, by beam search."""
        picture = opened(image)
        with gate.turn():
            return Captions(captions=best(model.caption, picture, returns=returns))

    @app.post("/api/ask", responses=wrong, dependencies=limited)
    def ask(
        image: Annotated[UploadFile, File(description="a picture")],
        question: Annotated[str, Form(min_length=1, max_length=limits.question)],
        returns: Annotated[int, Form(ge=1, le=MOST_RETURNS)] = 3,
    ) -> Answers:
        """Answers to a question about a picture, by beam search, and where the first one looked."""
        picture = opened(image)
        with gate.turn():
            answers = best(model.answer, picture, question, returns=returns)
            return Answers(answers=answers, attention=attended(model, picture, question, answers[0].text))

    return app


def _answer_faults(app: FastAPI) -> None:
    """Whatever is wrong with a request is told as a `Fault`."""

    @app.exception_handler(HTTPException)
    async def told(request: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse({"error": str(error.detail)}, error.status_code)

    @app.exception_handler(RequestValidationError)
    async def told_fields(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        return JSONResponse({"error": f"{first['loc'][-1]}: {first['msg']}"}, 422)

    @app.exception_handler(UserError)
    async def told_mistake(request: Request, error: UserError) -> JSONResponse:
        return JSONResponse({"error": str(error)}, 400)


def opened(upload: UploadFile) -> Image.Image:
    """The picture of an upload. Raises RecordError for what is none."""
    data = upload.file.read()
    try:
        return open_image(data)
    except RecordError as error:
        raise RecordError(error.reason, f"{error.reason}; send a JPEG, PNG or WebP of ordinary size") from error


def best(say: Callable[..., Any], *inputs: Any, returns: int) -> list[Text]:
    """So many texts by beam search."""
    said = say(*inputs, scores=True, method="beam", beams=max(3, returns), returns=returns)
    return [Text(text=text, score=score) for text, score in (said if returns > 1 else [said])]


def attended(model: VLKD, picture: Image.Image, question: str, answer: str) -> Attention | None:
    """Where an answer looked; None of a model that reads a picture as one token."""
    if model.config.image_tokens == "pooled":
        return None
    told = model.attention(picture, question, answer)
    patches, whole = (np.round(x.astype(float), 5).tolist() for x in (told.patches, told.whole))
    seen = picture_uri(Image.fromarray(told.seen))
    return Attention(tokens=told.tokens, patches=patches, whole=whole, seen=seen)


def bound(host: str, port: int) -> socket.socket:
    """A socket that listens there. Raises UserError where it cannot."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(128)
    except (OSError, OverflowError) as error:
        listener.close()
        raise UserError(
            f"--host={host} --port={port}: {error}; name another, such as --port=0, one that is free"
        ) from error
    return listener


class _Server(uvicorn.Server):
    """A server that leaves signals to `vlkd_jax.runtime`."""

    def capture_signals(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


def main(values: SimpleNamespace) -> None:
    """Entry point."""
    limits = Limits(int(values.megabytes * 2**20), per_minute=values.per_minute)
    listener = bound(values.host, values.port)
    model = VLKD.from_pretrained(values.model)
    say("compiling")
    best(model.caption, Image.new("RGB", (64, 64)), returns=1)
    port = listener.getsockname()[1]
    is_local = values.host in ("127.0.0.1", "localhost", "::1")
    app = create_app(model, limits, ("127.0.0.1", "localhost", "[::1]") if is_local else ("*",))
    address = f"http://{values.host}:{port}/"
    say(f"{values.model or BUILTIN_STUDENT} answers at {address} (schema: {address}openapi.json); Ctrl-C ends it")
    if not is_local:
        say("anybody who reaches this address can use it: there is no login and no encryption")
    # uvloop would take the signals' pipe from vlkd_jax.runtime
    _Server(uvicorn.Config(app, log_level="warning", loop="asyncio")).run(sockets=[listener])


if __name__ == "__main__":
    entry.run(main, COMMANDS["serve"])
