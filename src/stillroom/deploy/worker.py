"""One model in a process of its own, timed on request: `python -m stillroom.deploy.worker`.

Reads one JSON object per line from standard input and answers each with one on standard output:

- `{"load": {"model", "form", "threads", "max_length"}}` -> `{"form", "precision", "max_length", "seconds"}`
- `{"tokens": {"batch", "length"}}` or `{"texts": [batch, ...]}` -> `{"batches": how many}`
- `{"time": {"batch": index, "repeats": n}}` -> `{"seconds": [...]}`, after one run that does not count
- `{"memory": true}` -> `{"peak_bytes"}`

A wrong input is answered with `{"error": text}`. A process of its own gives each model its own number of
threads, and its own peak of memory.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from stillroom.deploy.predictor import Predictor
from stillroom.errors import StillroomError


class _Worker:
    """A loaded model and the batches that it is timed on."""

    def __init__(self) -> None:
        self.predictor: Predictor | None = None
        self.batches: list[dict[str, np.ndarray]] = []

    def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Return the answer to one request."""
        ((name, given),) = request.items()
        if name == "load":
            start = time.perf_counter()
            self.predictor = Predictor.load(given["model"], given["form"], threads=given["threads"])
            seconds = time.perf_counter() - start
            if given["max_length"] is not None:
                self.predictor.cut_to(given["max_length"])
            int8 = "int8" in self.predictor.form
            precision = "int8" if int8 else self.predictor.session.precision
            most = self.predictor.max_length
            return {
                "form": self.predictor.form,
                "precision": precision,
                "max_length": most,
                "seconds": seconds,
            }
        if name == "memory":
            return {"peak_bytes": _peak_bytes()}
        assert self.predictor is not None
        if name == "tokens":
            self.batches = [_random_batch(self.predictor, given["batch"], given["length"])]
            return {"batches": 1}
        if name == "texts":
            rows = [self.predictor.encode([tuple(t) if len(t) > 1 else t[0] for t in b]) for b in given]
            self.batches = [self.predictor.pad(batch) for batch in rows]
            return {"batches": len(self.batches)}
        batch = self.batches[given["batch"] % len(self.batches)]
        # The other models ran meanwhile: the caches are theirs.
        self.predictor.session(batch)
        times = []
        for _ in range(given["repeats"]):
            start = time.perf_counter()
            self.predictor.session(batch)
            times.append(time.perf_counter() - start)
        return {"seconds": times}


def _random_batch(predictor: Predictor, batch: int, length: int) -> dict[str, np.ndarray]:
    """Return `batch` rows of `length` tokens without padding, drawn with a fixed seed."""
    chance = np.random.Generator(np.random.Philox(key=0))
    names = predictor.inputs
    ids = chance.integers(predictor.pad_id + 1, predictor.vocabulary_size, (batch, length))
    made = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    return {name: made[name] for name in names}


def _peak_bytes() -> int:
    """Return the largest resident memory of this process so far."""
    status = Path("/proc/self/status")
    if status.exists():
        # Not getrusage: on Linux its maximum is that of the process which started this one, if larger.
        (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
        return 1024 * int(line.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    """Answer requests until standard input ends."""
    # What libraries print must not come between the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    worker = _Worker()
    for line in sys.stdin:
        try:
            found = worker.answer(json.loads(line))
        except StillroomError as error:
            found = {"error": str(error)}
        print(json.dumps(found), file=answers, flush=True)


if __name__ == "__main__":
    main()
