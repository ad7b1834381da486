"""The server: the model's own answers, to whom they belong, and a clear refusal of all else."""

import asyncio
import contextlib
import functools
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from exports import Exported
from serving import SECONDS, post, request, serving
from stillroom import encoder
from stillroom.data.trained import was_trained_on
from stillroom.deploy import serve
from stillroom.deploy.batcher import Batcher, QueueFull
from stillroom.deploy.predictor import Predictor
from stillroom.deploy.serve import Limits, bind, is_loopback
from stillroom.errors import WrongInput
from stillroom.evaluation.predict import predict_rows
from tiny import make_encoder, make_rows, make_task


@pytest.fixture(scope="module")
def predictor(exported: Exported) -> Predictor:
    return Predictor.load(exported.folder, "onnx", threads=1)


@pytest.fixture(scope="module")
def port(predictor: Predictor) -> Iterator[int]:
    limits = {"max_texts": 8, "max_text_chars": 200_000, "max_body_bytes": 300_000}
    with serving(predictor, **limits) as found:
        yield found


def test_answers_are_those_of_torch(exported: Exported, port: int) -> None:
    rows = make_rows(make_task(), 8, seed=3)
    model = encoder.load(str(exported.model))
    logits = predict_rows(model, rows, max_length=66, bf16=False, console=Console(quiet=True))
    expected = torch.softmax(torch.as_tensor(logits, dtype=torch.float64), 1).numpy()
    status, found = post(port, {"texts": rows.texts[0]})
    assert status == 200
    for answer, row in zip(found["answers"], expected, strict=True):
        assert list(answer["probabilities"]) == ["negative", "positive"]
        assert np.allclose(list(answer["probabilities"].values()), row, atol=1e-4)
        assert answer["predicted"] == ["negative", "positive"][row.argmax()]
        assert not answer["cut"]


PAIR = ("a good film", "bad bad plot")


def run_of(folder: Path, *text: str) -> Predictor:
    """Return the model of a run that was trained on these columns; a model alone without any."""
    make_encoder(task=make_task(pair=len(text) == 2)).save(folder / "student")
    if text:
        dataset = {"name": "d.csv", "text": list(text)}
        (folder / "recipe.yaml").write_text(json.dumps({"dataset": dataset}))
    return Predictor.load(folder / "student", threads=1)


@pytest.mark.parametrize("text", [("premise", "hypothesis"), ()], ids=["pairs", "unknown"])
def test_pairs_are_read_as_pairs(tmp_path: Path, text: tuple[str, ...]) -> None:
    predictor = run_of(tmp_path, *text)
    (row,) = predictor.logits([PAIR]).astype(float)
    with serving(predictor) as port:
        status, found = post(port, {"pairs": [PAIR]})
    assert status == 200
    expected = np.exp(row) / np.exp(row).sum()
    assert np.allclose(list(found["answers"][0]["probabilities"].values()), expected, atol=1e-4)


@pytest.mark.parametrize("columns", [("review",), ("premise", "hypothesis")], ids=["one", "two"])
def test_one_text_is_not_read_by_a_model_of_two_or_the_other_way_round(
    tmp_path: Path, columns: tuple[str, ...]
) -> None:
    """It would answer from an input of another kind, and say nothing."""
    asked = {"texts": ["a good film"], "pairs": [PAIR]}
    right, wrong = ("texts", "pairs") if len(columns) == 1 else ("pairs", "texts")
    with serving(run_of(tmp_path, *columns)) as port:
        assert post(port, {right: asked[right]})[0] == 200
        for body in ({wrong: asked[wrong]}, {wrong: []}):
            status, found = post(port, body)
            assert status == 422
            assert was_trained_on(columns) in found["error"]
            assert f'Expected {{"{right}"' in found["error"] and f'"{wrong}"' not in found["error"]
        # What a body of another kind is told, and the page shows, is what this model reads.
        error = post(port, b"{}")[1]["error"].partition("Expected ")[2]
        assert f'"{right}"' in error and f'"{wrong}"' not in error
        assert json.loads(request(port, "GET", "/health")[1])["text"] == list(columns)
        schema = json.loads(request(port, "GET", "/openapi.json")[1])
        body = schema["paths"]["/predict"]["post"]["requestBody"]["content"]["application/json"]
        (example,) = body["examples"].values()
        assert post(port, example["value"])[0] == 200


def test_the_page_shows_both_where_nothing_says_what_the_model_reads(tmp_path: Path) -> None:
    with serving(run_of(tmp_path)) as port:
        schema = json.loads(request(port, "GET", "/openapi.json")[1])
        body = schema["paths"]["/predict"]["post"]["requestBody"]["content"]["application/json"]
        assert list(body["examples"]) == ["texts", "pairs"]
        for example in body["examples"].values():
            assert post(port, example["value"])[0] == 200
        assert json.loads(request(port, "GET", "/health")[1])["text"] is None


def test_64_clients_get_their_own_answers(tmp_path: Path) -> None:
    """Texts whose answers differ: one that is lost or swapped is seen."""
    model = make_encoder(seed=3)
    with torch.no_grad():
        for weight in model.model.parameters():
            if weight.ndim == 2:
                weight.mul_(20)
    model.save(tmp_path / "model")
    predictor = Predictor.load(tmp_path / "model", threads=1)
    with serving(predictor) as port:
        ask_from_64_clients(predictor, port)


def ask_from_64_clients(predictor: Predictor, port: int) -> None:
    texts = list(dict.fromkeys(make_rows(make_task(), 260, seed=9).texts[0]))[:192]
    logits = predictor.logits(texts).astype(float)
    odds = dict(zip(texts, logits[:, 1] - logits[:, 0], strict=True))
    assert len({round(value, 3) for value in odds.values()}) > 100
    start = threading.Barrier(64)

    def client(number: int) -> int:
        start.wait(SECONDS)
        right = 0
        for i in range(3):
            own = [texts[(3 * number + i + j) % len(texts)] for j in range(1 + (number + i) % 3)]
            status, found = post(port, {"texts": own})
            assert status == 200 and len(found["answers"]) == len(own)
            for text, answer in zip(own, found["answers"], strict=True):
                found_odds = np.diff(np.log(list(answer["probabilities"].values())))[0]
                assert abs(found_odds - odds[text]) < 1e-4
                right += 1
        return right

    with ThreadPoolExecutor(64) as clients:
        assert sum(clients.map(client, range(64), timeout=60)) >= 64 * 3
    metrics = request(port, "GET", "/metrics")[1].decode()
    count = float(re.search(r"stillroom_batch_texts_count (\S+)", metrics)[1])  # type: ignore[index]
    total = float(re.search(r"stillroom_batch_texts_sum (\S+)", metrics)[1])  # type: ignore[index]
    # Requests did share batches.
    assert total / count > 2
    assert "stillroom_waiting_texts 0.0" in metrics


WRONG = (
    (b"", 422),
    (b"{", 400),
    (b"[]", 422),
    (b"null", 422),
    (b'"texts"', 422),
    (b"{}", 422),
    (b'{"texts": null}', 422),
    (b'{"texts": "a film"}', 422),
    (b'{"texts": [1]}', 422),
    (b'{"texts": [null]}', 422),
    (b'{"texts": [["a"]]}', 422),
    (b'{"texts": {"a": "b"}}', 422),
    (b'{"texts": ["a"], "pairs": [["a", "b"]]}', 422),
    (b'{"pairs": [["a"]]}', 422),
    (b'{"pairs": [["a", "b", "c"]]}', 422),
    (b'{"pairs": ["ab"]}', 422),
    (b'{"text": ["a"]}', 422),
    (b'{"texts": ["a"], "more": 1}', 422),
    (b'{"\\ud800": 1}', 422),
    (b'{"texts": ["\\ud800"]}', 422),
    (b'{"texts": ["\xff"]}', 400),
    (b"\xff\xfe{\x00}\x00", 422),
    (b"[" * 100_000, 400),
    (b'{"texts": ' + b"[" * 50_000 + b"]" * 50_000 + b"}", 400),
    (json.dumps({"texts": ["a"] * 9}).encode(), 413),
    (json.dumps({"texts": ["a" * 200_001]}).encode(), 413),
    (b'{"texts": ["' + b"a" * 300_000 + b'"]}', 413),
)


@pytest.mark.parametrize(("body", "expected"), WRONG, ids=range(len(WRONG)))
def test_wrong_bodies_are_refused_with_a_reason(port: int, body: bytes, expected: int) -> None:
    status, found = post(port, body)
    assert status == expected, found
    assert list(found) == ["error"] and found["error"]


def test_hundreds_of_malformed_bodies_and_the_server_is_still_up(port: int) -> None:
    chance = random.Random(0)
    good = bytearray(b'{"texts": ["a good film", "a bad plot"]}')
    for _ in range(300):
        body = bytearray(good)
        for _ in range(chance.randint(1, 6)):
            body[chance.randrange(len(body))] = chance.randrange(256)
        if chance.random() < 0.3:
            del body[chance.randrange(len(body)) :]
        status, found = post(port, bytes(body))
        assert status in (200, 400, 422), (status, body)
        assert ("answers" if status == 200 else "error") in found
    assert post(port, bytes(good))[0] == 200


def test_what_is_not_http_and_other_paths_and_types(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=SECONDS) as raw:
        raw.sendall(b"\x16\x03\x01 this is no HTTP\r\n\r\n")
        assert b"400" in raw.recv(1000)
    for method, path, expected in (("GET", "/predict", 405), ("GET", "/nothing", 404)):
        status, body, _ = request(port, method, path)
        assert status == expected and json.loads(body)["error"]
    # A page in a browser can send text without asking; it is not taken for JSON.
    status, body, _ = request(
        port, "POST", "/predict", b'{"texts": ["a"]}', **{"Content-Type": "text/plain"}
    )
    assert status == 422 and "application/json" in json.loads(body)["error"]


def test_a_body_without_a_stated_length_is_cut_off(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=SECONDS) as raw:
        raw.sendall(
            b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n" + b"%x\r\n" % 300_001 + b"a" * 300_001 + b"\r\n"
        )
        assert b" 413 " in raw.recv(1000)


def test_clients_that_dawdle_are_cut_off_and_hold_nobody_up(
    predictor: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slow bodies get 408, connections that never ask are closed, dripping bytes buys no time."""
    monkeypatch.setattr(serve, "_HEAD_SECONDS", 0.6)
    monkeypatch.setattr(serve, "_BODY_SECONDS", 0.6)
    head = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 99\r\n"
    with serving(predictor, max_wait_ms=0) as port, contextlib.ExitStack() as stack:

        def connect(sent: bytes) -> socket.socket:
            raw = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=SECONDS))
            raw.sendall(sent)
            return raw

        silent, half_head, half_body = connect(b""), connect(head), connect(head + b"\r\n{")
        many = [connect(b"POST /pre") for _ in range(40)]
        dripping = connect(b"P")
        started = time.monotonic()
        for byte in b"OST /predict HTTP":
            # Between the drops others are served.
            assert post(port, {"texts": ["a good film"]})[0] == 200
            with contextlib.suppress(OSError):
                dripping.sendall(bytes([byte]))
            time.sleep(0.06)
        assert half_body.recv(1000).startswith(b"HTTP/1.1 408 ")
        for raw in (silent, half_head, dripping, *many):
            with contextlib.suppress(ConnectionResetError):
                assert raw.recv(1000) == b""
        assert time.monotonic() - started < SECONDS / 2
        # A connection that was answered may ask again, but then dawdle no more than a new one.
        again = connect(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        answered = b""
        while not answered.endswith(b"}"):
            answered += again.recv(1000)
        assert answered.startswith(b"HTTP/1.1 200 ")
        again.sendall(b"GET /hea")
        assert again.recv(1000) == b""


def test_no_texts_are_no_answers_and_long_ones_are_cut(port: int) -> None:
    assert post(port, {"texts": []}) == (200, {"answers": []})
    status, found = post(port, {"texts": ["good " * 20_000, "", "good"]})
    assert status == 200
    assert [answer["cut"] for answer in found["answers"]] == [True, False, False]


def test_health_schema_and_page_need_no_network(port: int) -> None:
    status, body, _ = request(port, "GET", "/health")
    health = json.loads(body)
    assert (status, health["status"], health["form"]) == (200, "ok", "onnx")
    assert health["labels"] == ["negative", "positive"]
    assert "/predict" in json.loads(request(port, "GET", "/openapi.json")[1])["paths"]
    page = request(port, "GET", "/docs")[1].decode()
    assert "http://" not in page and "https://" not in page
    for asset in re.findall(r'(?:src|href)="(/[^"]+)"', page):
        assert request(port, "GET", asset)[0] == 200
    assert '"validatorUrl": null' in page


class Slow(Predictor):
    """Waits in every batch until it may go on."""

    gate: threading.Event

    def encode(self, texts: Any) -> list[Any]:
        assert self.gate.wait(SECONDS)
        return super().encode(texts)


def test_a_full_queue_says_when_to_come_again(exported: Exported) -> None:
    slow = Slow.load(exported.folder, "onnx", threads=1)
    slow.gate = threading.Event()
    with serving(slow, max_queue=4, max_texts=4) as port, ThreadPoolExecutor(4) as clients:
        first = [clients.submit(post, port, {"texts": ["a good film"]}) for _ in range(4)]
        end = time.monotonic() + SECONDS
        while "waiting_texts 4.0" not in request(port, "GET", "/metrics")[1].decode():
            assert time.monotonic() < end
        headers = {"Content-Type": "application/json"}
        status, body, found = request(port, "POST", "/predict", b'{"texts": ["one more"]}', **headers)
        assert (status, found["Retry-After"]) == (503, "1")
        assert json.loads(body)["error"]
        slow.gate.set()
        # What was taken is answered, and then there is room again.
        assert [request.result(SECONDS)[0] for request in first] == [200] * 4
        assert post(port, {"texts": ["one more"]})[0] == 200


# The batcher by itself


def test_a_request_that_fails_takes_no_other_with_it() -> None:
    batches = []

    def double(items: list[int]) -> list[int]:
        batches.append(len(items))
        if 13 in items:
            raise ValueError("13")
        return [2 * item for item in items]

    async def main() -> list[Any]:
        async with Batcher(double, max_batch=8, max_wait=0.2, max_queue=100) as batcher:
            asked = [batcher.ask([1, 2]), batcher.ask([13]), batcher.ask([3]), batcher.ask([])]
            found = await asyncio.gather(*asked, return_exceptions=True)
            assert batcher.waiting == 0
            return found

    found = asyncio.run(main())
    assert found[0] == [2, 4] and found[2] == [6] and found[3] == []
    assert isinstance(found[1], ValueError)
    assert batches == [4, 2, 1, 1]


def test_a_full_batch_does_not_wait_and_none_is_lost() -> None:
    async def main() -> list[Any]:
        async with Batcher(lambda items: items, max_batch=4, max_wait=5, max_queue=99) as batcher:
            started = time.monotonic()
            found = await asyncio.gather(*(batcher.ask([i]) for i in range(40)))
            assert time.monotonic() - started < 4
            with pytest.raises(QueueFull):
                await batcher.ask(range(100))
            return found

    assert asyncio.run(main()) == [[i] for i in range(40)]


def test_a_cancelled_request_leaves_the_queue() -> None:
    async def main() -> None:
        async with Batcher(lambda items: items, max_batch=4, max_wait=0.05, max_queue=9) as batcher:
            task = asyncio.create_task(batcher.ask([1, 2, 3]))
            await asyncio.sleep(0)
            task.cancel()
            assert await batcher.ask([4]) == [4]
            assert batcher.waiting == 0

    asyncio.run(main())


# Addresses, limits and the command


def test_addresses_and_limits_are_checked() -> None:
    with bind("127.0.0.1", 0) as taken:
        # asyncio turns Nagle's algorithm off for these alone.
        assert taken.proto == socket.IPPROTO_TCP
        taken.listen()
        with pytest.raises(WrongInput, match="--port"):
            bind("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(WrongInput, match="--host"):
        bind("no such host", 8000)
    assert is_loopback("::1") and not is_loopback("0.0.0.0") and not is_loopback("example.org")
    for wrong in ({"max_batch": 0}, {"max_wait_ms": float("nan")}, {"max_texts": 9, "max_queue": 8}):
        with pytest.raises(WrongInput):
            Limits(**wrong)


@pytest.mark.parametrize(("stop", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_the_command_serves_answers_what_it_took_and_stops(
    exported: Exported, stop: signal.Signals, code: int
) -> None:
    command = [sys.executable, "-m", "stillroom.cli", "serve", str(exported.folder), "--port", "0"]
    # Whoever asks waits a second for others: in the meantime the server is told to stop.
    command += ["--max-wait-ms", "1000"]
    options: dict[str, Any] = {
        "env": {**os.environ, "PYTHONUNBUFFERED": "1"},
        # A suite that a shell runs in the background would hand down that SIGINT is ignored.
        "preexec_fn": functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    }
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **options) as process:
        try:
            assert process.stderr is not None
            line = process.stderr.readline()
            port = int(re.search(r"http://127\.0\.0\.1:(\d+)", line)[1])  # type: ignore[index]
            with ThreadPoolExecutor(1) as pool:
                asked = pool.submit(post, port, {"texts": ["a good film"]})
                while b"stillroom_waiting_texts 1.0" not in request(port, "GET", "/metrics")[1]:
                    time.sleep(0.01)
                process.send_signal(stop)
                status, found = asked.result(SECONDS)
            assert status == 200 and len(found["answers"]) == 1
            assert process.wait(SECONDS) == code
            assert process.stderr.read().count("The server has stopped.") == 1
        finally:
            process.kill()


def test_without_the_extra_the_command_says_what_to_install(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['uvicorn'] = None\n"
        "from stillroom.cli import app; app(['serve', 'nowhere'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "uvicorn" in done.stderr and "extra serve" in done.stderr
    assert "Traceback" not in done.stderr
