"""Load a server on this machine: throughput, latency, lost and swapped answers, malformed bodies.

    python benchmarks/load.py MODEL [--clients 64] [--seconds 20] [--malformed 10000]

Starts `stillroom serve MODEL` on a free port and stops it. Each client keeps one connection and asks for
texts of its own, whose answers are known from the same model asked alone. A text's logits move a little
with its batch in dynamic int8, hence --tolerance (log odds, or score). The clients share the machine with
the server.
"""

import argparse
import http.client
import json
import random
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from toys import machine

from stillroom.deploy.answers import answer
from stillroom.deploy.predictor import Predictor

TIMEOUT = 60
HEADERS = {"Content-Type": "application/json"}
WORDS = (
    "a the film plot was is not never good great bad poor dull music actor scene very quite and but".split()
)


@dataclass
class Counts:
    """What one client saw."""

    ms: list[float] = field(default_factory=list)
    busy: int = 0
    lost: int = 0
    swapped: int = 0


def make_texts(count: int) -> list[str]:
    chance = random.Random(0)
    found: dict[str, None] = {}
    while len(found) < count:
        found[" ".join(chance.choices(WORDS, k=chance.randint(3, 40)))] = None
    return list(found)


def evidence(predicted: Any, probabilities: dict[str, float]) -> np.ndarray:
    """Return what tells answers apart: log odds of each label, or the score."""
    if not probabilities:
        return np.array([predicted])
    values = np.clip(np.array(list(probabilities.values())), 1e-12, 1 - 1e-12)
    return np.asarray(np.log(values / (1 - values)))


def client(port: int, texts: list[str], known: list[np.ndarray], end: float, tolerance: float) -> Counts:
    counts = Counts()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT)
    turn = 0
    while time.monotonic() < end:
        own = turn % len(texts)
        turn += 1
        started = time.perf_counter()
        try:
            connection.request("POST", "/predict", json.dumps({"texts": [texts[own]]}), HEADERS)
            response = connection.getresponse()
            body = json.loads(response.read())
        except (OSError, http.client.HTTPException, ValueError):
            counts.lost += 1
            connection.close()
            continue
        if response.status == 503:
            counts.busy += 1
            time.sleep(float(response.headers["Retry-After"]))
            continue
        counts.ms.append((time.perf_counter() - started) * 1000)
        if response.status != 200 or len(body["answers"]) != 1:
            counts.lost += 1
            continue
        (said,) = body["answers"]
        moved = np.abs(evidence(said["predicted"], said["probabilities"]) - known[own]).max()
        counts.swapped += bool(moved > tolerance)
    connection.close()
    return counts


def malformed(port: int, count: int) -> dict[str, int]:
    """Return how often each status answered bodies that were damaged at random."""
    chance = random.Random(0)
    good = b'{"texts": ["a good film", "a bad plot"], "pairs": null}'
    statuses: dict[str, int] = {}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT)
    for _ in range(count):
        body = bytearray(good)
        for _ in range(chance.randint(1, 8)):
            body[chance.randrange(len(body))] = chance.randrange(256)
        del body[chance.randint(1, 2 * len(body)) :]
        connection.request("POST", "/predict", bytes(body), HEADERS)
        response = connection.getresponse()
        response.read()
        statuses[str(response.status)] = statuses.get(str(response.status), 0) + 1
    connection.close()
    return dict(sorted(statuses.items()))


def measure(port: int, given: argparse.Namespace) -> dict[str, Any]:
    texts = make_texts(4 * given.clients)
    predictor = Predictor.load(given.model, given.form, threads=1)
    known = [evidence(said.predicted, said.probabilities) for t in texts for said in answer(predictor, [t])]
    del predictor
    end = time.monotonic() + given.seconds
    with ThreadPoolExecutor(given.clients) as pool:
        jobs = [
            pool.submit(
                client, port, texts[i :: given.clients], known[i :: given.clients], end, given.tolerance
            )
            for i in range(given.clients)
        ]
        found = [job.result(given.seconds + 2 * TIMEOUT) for job in jobs]
    ms = np.array([value for counts in found for value in counts.ms])
    result: dict[str, Any] = {
        "machine": machine(),
        "clients": given.clients,
        "requests": len(ms),
        "requests_per_second": len(ms) / given.seconds,
        "p50_ms": float(np.percentile(ms, 50)),
        "p95_ms": float(np.percentile(ms, 95)),
        "p99_ms": float(np.percentile(ms, 99)),
        "busy": sum(counts.busy for counts in found),
        "lost": sum(counts.lost for counts in found),
        "swapped": sum(counts.swapped for counts in found),
        "distinct_answers": len({tuple(np.round(value, 3)) for value in known}),
        "malformed": malformed(port, given.malformed),
    }
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT)
    connection.request("GET", "/health")
    result["up_afterwards"] = connection.getresponse().status == 200
    connection.close()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--form")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--malformed", type=int, default=10_000)
    parser.add_argument("--tolerance", type=float, default=1e-3)
    given = parser.parse_args()
    command = [sys.executable, "-m", "stillroom.cli", "serve", given.model, "--port", "0"]
    command += ["--form", given.form] if given.form else []
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        # However this ends, the server does.
        limit = threading.Timer(given.seconds + 600, server.kill)
        limit.start()
        try:
            assert server.stderr is not None
            line = server.stderr.readline()
            address = re.search(r":(\d+) ", line)
            if address is None:
                sys.exit(line + server.stderr.read())
            print(json.dumps(measure(int(address[1]), given), indent=2))
        finally:
            limit.cancel()
            server.send_signal(signal.SIGINT)
            try:
                server.wait(30)
            except subprocess.TimeoutExpired:
                server.kill()


if __name__ == "__main__":
    main()
