"""A server in a thread of the tests' own process, on a free port of this machine."""

import contextlib
import http.client
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

from stillroom.deploy.predictor import Predictor
from stillroom.deploy.serve import Limits, bind, make_app, make_server

SECONDS = 20
"""No request and no start takes longer, however slow the machine."""


@contextlib.contextmanager
def serving(predictor: Predictor, **limits: Any) -> Iterator[int]:
    """Yield the port of a server, which has ended afterwards."""
    with bind("127.0.0.1", 0) as listening:
        server = make_server(make_app(predictor, "tiny", Limits(**limits)))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        end = time.monotonic() + SECONDS
        while not server.started:
            assert thread.is_alive() and time.monotonic() < end
            time.sleep(0.01)
        try:
            yield listening.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(SECONDS)
        assert not thread.is_alive()


def request(
    port: int, method: str, path: str, body: bytes | None = None, **headers: str
) -> tuple[int, bytes, http.client.HTTPMessage]:
    """Return status, body and headers of one request."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=SECONDS)
    with contextlib.closing(connection):
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        return response.status, response.read(), response.headers


def post(port: int, body: Any) -> tuple[int, Any]:
    """Return status and JSON of a question; `body` is bytes, or becomes JSON."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    status, found, _ = request(port, "POST", "/predict", data, **headers)
    return status, json.loads(found)
