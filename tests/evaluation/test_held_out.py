"""What is followed of a student on held-out text."""

from pathlib import Path
from typing import Any

import pytest
import torch

from stillroom.evaluation import held_out
from stillroom.training.distiller import Distiller, Loss
from tiny import make_batch_of, make_job


@pytest.mark.parametrize("method", ["lrc-bert", "tinybert"])
def test_terms_are_where_the_student_is(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before training the terms are still on the CPU, where a GPU's states cannot be multiplied."""
    job = make_job(tmp_path, method=method)
    batch = make_batch_of(job.rows, job.student)
    devices: list[set[str]] = []

    def forward(distiller: Distiller, *given: Any) -> Loss:
        devices.append({part.device.type for part in (*distiller.parameters(), *distiller.buffers())})
        return Loss(torch.tensor(2.0), {})

    monkeypatch.setattr(Distiller, "forward", forward)
    monkeypatch.setattr(held_out, "_matches", lambda *given, **more: {})
    # There is no GPU where the tests run; a device without memory stands in for it.
    found = held_out.follow(
        job.student.to("meta"),
        job.live_teacher or job.teacher,
        job.plan,
        [batch],
        bf16=False,
        masked_lm=False,
    )
    assert devices == [{"meta"}] and found == {"loss": 2.0}
