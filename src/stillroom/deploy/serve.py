"""A model as an HTTP server: JSON in and out, concurrent requests computed together.

Needs the extra `serve`.
"""

import asyncio
import ipaddress
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, MutableMapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StrictStr, model_validator
from rich.console import Console

from stillroom.data.trained import was_trained_on
from stillroom.deploy.answers import Answer, answer
from stillroom.deploy.batcher import Batcher, QueueFull, Stopped
from stillroom.deploy.predictor import Predictor
from stillroom.errors import StillroomError, WrongInput

try:
    import uvicorn
    from fastapi import Body, FastAPI, HTTPException, Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse, Response
    from fastapi_offline import FastAPIOffline
    from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
    from prometheus_client.exposition import CONTENT_TYPE_LATEST
    from starlette.exceptions import HTTPException as StarletteHTTPException
    from uvicorn.protocols.http.auto import AutoHTTPProtocol
except ImportError as error:
    raise WrongInput(
        f"Serving needs the package {error.name}, which is not installed. Install Stillroom with the "
        "extra serve (in a clone of it: pip install -e '.[serve]')."
    ) from None

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Text = str | tuple[str, str]

_HEAD_SECONDS = _BODY_SECONDS = 30
"""How long a connection may take for its request line and headers, and then for its body."""
_GRACE_SECONDS = 10
"""How long requests that are being answered may still take once the server is to stop."""


@dataclass(frozen=True)
class Limits:
    """How much one request, and all that wait together, may ask."""

    max_batch: int = 32
    """Texts that are computed at once."""
    max_wait_ms: float = 2.0
    """How long a text waits for others to share its batch."""
    max_queue: int = 1024
    """Texts that may wait; beyond them the answer is 503."""
    max_texts: int = 256
    """Texts, or pairs, in one request."""
    max_text_chars: int = 100_000
    """Characters in one text."""
    max_body_bytes: int = 4_000_000
    """Bytes in one body, counted before it is parsed."""

    def __post_init__(self) -> None:
        for name in ("max_batch", "max_queue", "max_texts", "max_text_chars", "max_body_bytes"):
            if getattr(self, name) < 1:
                raise WrongInput(f"{name} has to be at least 1, found {getattr(self, name)}.")
        if not 0 <= self.max_wait_ms <= 10_000:
            raise WrongInput(f"max_wait_ms has to be from 0 to 10,000, found {self.max_wait_ms}.")
        if self.max_texts > self.max_queue:
            raise WrongInput(
                f"A request of max_texts ({self.max_texts}) would never fit a queue of {self.max_queue}. "
                "Raise max_queue."
            )


class Question(BaseModel):
    """What POST /predict takes: either texts or pairs."""

    model_config = ConfigDict(extra="forbid")

    texts: list[StrictStr] | None = None
    """Texts, for a model that reads one at a time."""
    pairs: list[tuple[StrictStr, StrictStr]] | None = None
    """Pairs of texts, for a model that reads two."""

    @model_validator(mode="after")
    def _one_of_both(self) -> "Question":
        if (self.texts is None) == (self.pairs is None):
            raise ValueError('expected either "texts" or "pairs"')
        return self


class Said(BaseModel):
    """What the model says of one text or pair."""

    predicted: str | list[str] | float = Field(description="A label, all labels that hold, or a score.")
    probabilities: dict[str, float] = Field(description="By label; empty for a score.")
    cut: bool = Field(description="Whether the end of the text was not read, because it is too long.")


class Answers(BaseModel):
    """What POST /predict returns: one answer for each text, in their order."""

    answers: list[Said]


class Health(BaseModel):
    """What GET /health returns while the server works."""

    status: str = "ok"
    model: str
    form: str
    kind: str | None
    labels: list[str]
    text: list[str] | None = Field(
        description="The one or two text columns that it was trained on; null where that is not known."
    )
    max_length: int = Field(description="Tokens to which texts are cut.")


class Problem(BaseModel):
    """What every error returns."""

    error: str


def make_app(predictor: Predictor, name: str, limits: Limits | None = None) -> FastAPI:
    """Return the ASGI application that serves a model.

    Args:
        predictor: The model; it computes in one thread.
        name: What /health calls it.
        limits: What requests may ask.
    """
    limits = limits or Limits()
    registry = CollectorRegistry()
    requests = Counter(
        "stillroom_requests", "Requests to /predict by status.", ["status"], registry=registry
    )
    texts_seen = Counter("stillroom_texts", "Texts and pairs that were answered.", registry=registry)
    seconds = Histogram(
        "stillroom_request_seconds",
        "From the first byte of a request to its answer.",
        registry=registry,
        buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5),
    )
    sizes = Histogram(
        "stillroom_batch_texts",
        "Texts that were computed together.",
        registry=registry,
        buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256),
    )

    def compute(texts: list[Text]) -> list[Answer]:
        sizes.observe(len(texts))
        return answer(predictor, texts, batch_size=limits.max_batch)  # type: ignore[arg-type]

    batcher: Batcher[Text, Answer] = Batcher(
        compute,
        max_batch=limits.max_batch,
        max_wait=limits.max_wait_ms / 1000,
        max_queue=limits.max_queue,
    )
    waiting = Gauge("stillroom_waiting_texts", "Texts that wait or are computed.", registry=registry)
    waiting.set_function(lambda: batcher.waiting)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with batcher:
            yield

    app = FastAPIOffline(
        title="Stillroom",
        description=f"{name} ({predictor.form})",
        redoc_url=None,
        lifespan=lifespan,
        # The page would otherwise ask a server on the internet whether the schema is valid.
        swagger_ui_parameters={"validatorUrl": None},
    )

    errors: dict[int | str, dict[str, Any]] = {
        code: {"model": Problem} for code in (400, 408, 413, 422, 500, 503)
    }
    reads = _keys_of(predictor)
    examples: Any = {key: {"value": {key: _EXAMPLES[key]}} for key in reads}

    @app.post("/predict", responses=errors)
    async def predict(question: Annotated[Question, Body(openapi_examples=examples)]) -> Answers:
        """Return what the model says of each text or pair, in their order."""
        asked = "pairs" if question.texts is None else "texts"
        if predictor.text is not None and asked not in reads:
            raise HTTPException(
                422, f"{was_trained_on(predictor.text)}, and would read {asked}. {_expected(reads)}"
            )
        texts: list[Text] = [*(question.texts or ()), *(question.pairs or ())]
        _require_within(texts, limits)
        try:
            found = await batcher.ask(texts)
        except QueueFull:
            raise HTTPException(
                503,
                f"{batcher.waiting} texts wait already. Ask again in a second.",
                headers={"Retry-After": "1"},
            ) from None
        except StillroomError as error:
            raise HTTPException(500, str(error)) from None
        except Stopped:
            raise HTTPException(503, "The server stops.", headers={"Retry-After": "1"}) from None
        texts_seen.inc(len(texts))
        said = [Said(predicted=a.predicted, probabilities=a.probabilities, cut=a.cut) for a in found]
        return Answers(answers=said)

    @app.get("/health", responses={503: {"model": Problem}})
    async def health() -> Health:
        """Return what is served, or 503."""
        if not batcher.alive:
            raise HTTPException(503, "The thread that computes has ended. Start the server again.")
        return Health(
            model=name,
            form=predictor.form,
            kind=predictor.kind,
            labels=list(predictor.labels),
            text=None if predictor.text is None else list(predictor.text),
            max_length=predictor.max_length,
        )

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Return counters and histograms as Prometheus reads them."""
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    def count(status: int, took: float) -> None:
        requests.labels(str(status)).inc()
        seconds.observe(took)

    _explain_errors(app, _expected(reads))
    app.add_middleware(_Guard, most=limits.max_body_bytes, count=count)
    return app


def _require_within(texts: list[Text], limits: Limits) -> None:
    if len(texts) > limits.max_texts:
        raise HTTPException(413, f"Expected at most {limits.max_texts} texts, found {len(texts)}.")
    for number, given in enumerate(texts):
        for text in (given,) if isinstance(given, str) else given:
            if len(text) > limits.max_text_chars:
                raise HTTPException(
                    413,
                    f"Text {number} (from 0): expected at most {limits.max_text_chars} characters, found "
                    f"{len(text)}.",
                )
            # JSON can spell half a surrogate pair, which no tokenizer can read.
            if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
                raise HTTPException(422, f"Text {number} (from 0) is not valid Unicode.")


def _explain_errors(app: FastAPI, expected: str) -> None:
    """Answer every error with `{"error": ...}`, without what the request held."""

    @app.exception_handler(StarletteHTTPException)
    async def refused(request: Request, error: StarletteHTTPException) -> JSONResponse:
        return JSONResponse({"error": str(error.detail)}, error.status_code, headers=error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:] if isinstance(part, int | str))
        # The place is the sender's own text, and may hold what cannot be written.
        where = where[:80].encode("ascii", "backslashreplace").decode()
        if first["type"] == "json_invalid":
            return JSONResponse({"error": f"The body is no JSON. {expected}"}, 400)
        message = str(first["msg"]).removeprefix("Value error, ")
        return JSONResponse({"error": f"{where or 'body'}: {message}. {expected}"}, 422)

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"error": f"The server failed: {type(error).__name__}."}, 500)


_EXAMPLES: dict[str, Any] = {"texts": ["a good film"], "pairs": [["a good film", "I liked it"]]}
_SHAPES = {"texts": '{"texts": ["...", ...]}', "pairs": '{"pairs": [["...", "..."], ...]}'}


def _keys_of(predictor: Predictor) -> tuple[str, ...]:
    """Return which keys of a question the model reads: both where nothing says what it was trained on."""
    return ("texts", "pairs") if predictor.text is None else (("texts", "pairs")[len(predictor.text) - 1],)


def _expected(keys: tuple[str, ...]) -> str:
    shapes = " or ".join(_SHAPES[key] for key in keys)
    return f"Expected {shapes} with Content-Type: application/json."


class _Guard:
    """Read a body before anything parses it: no more bytes than allowed, and not for ever."""

    def __init__(self, app: Any, most: int, count: Callable[[int, float], object]):
        self._app, self._most, self._count = app, most, count

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start" and scope["path"] == "/predict":
                self._count(message["status"], time.perf_counter() - started)
            await send(message)

        try:
            async with asyncio.timeout(_BODY_SECONDS):
                body = await self._read(scope, receive)
        except TimeoutError:
            await self._refuse(408, f"The body did not come within {_BODY_SECONDS} s.", scope, counted)
            return
        if body is None:
            text = f"Expected at most {self._most} bytes in the body. Send fewer texts at once."
            await self._refuse(413, text, scope, counted)
            return
        messages = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def replay() -> Message:
            return next(messages, None) or await receive()

        await self._app(scope, replay, counted)

    async def _read(self, scope: Message, receive: Receive) -> bytes | None:
        """Return the body, or None if it is too large."""
        stated = dict(scope["headers"]).get(b"content-length", b"0")
        if stated.isdigit() and int(stated[:20]) > self._most:
            return None
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return bytes(body)
            body += message.get("body", b"")
            if len(body) > self._most:
                return None
            if not message.get("more_body", False):
                return bytes(body)

    @staticmethod
    async def _refuse(status: int, text: str, scope: Message, send: Send) -> None:
        # What is left of the body is not read: the connection cannot be used again.
        response = JSONResponse({"error": text}, status, headers={"Connection": "close"})
        await response(scope, _nothing, send)


async def _nothing() -> Message:
    return {"type": "http.disconnect"}


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that holds the address, or raise `WrongInput`. Port 0 finds a free one."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        # With the protocol named, asyncio sends answers at once; without, some wait 40 ms for an ACK.
        made = socket.socket(family, kind, protocol)
    except (OSError, OverflowError, UnicodeError) as error:
        raise WrongInput(
            f"There is no address {host}, port {port}: {error}. Check --host, --port."
        ) from None
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
    except (OSError, OverflowError) as error:
        made.close()
        raise WrongInput(
            f"{host}, port {port} cannot be served on: {error}. Give another --port; 0 finds a free one."
        ) from None
    return made


def is_loopback(host: str) -> bool:
    """Return whether only this machine reaches a host.

    Example:
        >>> is_loopback("127.0.0.1"), is_loopback("localhost"), is_loopback("0.0.0.0")
        (True, True, False)
    """
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class _Impatient(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
    """Closes a connection that does not ask in time; uvicorn itself would keep it for ever."""

    _limit: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, error: Exception | None) -> None:
        self._stop()
        super().connection_lost(error)

    def _watch(self) -> None:
        """Let time run while no request is whole; it does not start anew with each byte."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop()
        elif self._limit is None:
            self._limit = self.loop.call_later(_HEAD_SECONDS, self._close)

    def _stop(self) -> None:
        if self._limit is not None:
            self._limit.cancel()
            self._limit = None

    def _close(self) -> None:
        # A request may have been read and answered since.
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()


def make_server(app: FastAPI) -> uvicorn.Server:
    """Return the server of an application: `serve(sockets=[bind(host, port)])` runs it."""
    return uvicorn.Server(
        uvicorn.Config(
            app,
            http=_Impatient,
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=_GRACE_SECONDS,
        )
    )


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM end the server as asked for, and not the process as killed.

    uvicorn raises the signal again when all is answered. Elsewhere than in the main thread there are no
    handlers to set.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def serve(
    model: str,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    form: str | None = None,
    threads: int | None = None,
    limits: Limits | None = None,
    console: Console | None = None,
) -> None:
    """Serve a model until Ctrl-C or SIGTERM; requests that are being answered are answered first.

    Args:
        model: As `Predictor.load` takes it.
        host: Where to listen. Any other than this machine's own is warned of: there is no password.
        port: 0 finds a free one.
        form: One of the export's. Default: the fastest.
        threads: How many the model computes with.
        limits: What requests may ask.
        console: For what is said.

    Raises:
        WrongInput: If the model, the address or a limit is wrong.
    """
    console = console or Console(stderr=True)
    with bind(host, port) as listening:
        predictor = Predictor.load(model, form, threads=threads)
        # Who reads the address below can connect from now on, and waits for the server to come up.
        listening.listen()
        shown = f"[{host}]" if ":" in host else host
        url = f"http://{shown}:{listening.getsockname()[1]}"
        if not is_loopback(host):
            console.print(
                f"Warning: {host} can be reached from other machines, and there is neither password nor "
                "encryption. Put a proxy that has both in front.",
                style="yellow",
                markup=False,
            )
        console.print(
            f"Serving {model} ({predictor.form}) on {url} - /predict, /docs, /health, /metrics. "
            "Ctrl-C stops.",
            markup=False,
            highlight=False,
        )
        with _ended_by_sigterm():
            make_server(make_app(predictor, model, limits)).run(sockets=[listening])
        console.print("The server has stopped.")
