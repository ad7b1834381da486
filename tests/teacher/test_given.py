"""The teacher as a file: its logits by row, the rest from a model."""

import numpy as np
import pytest
import torch

from stillroom.data.batching import make_batch
from stillroom.encoder import Needs
from stillroom.teacher.given import GivenTeacher
from stillroom.teacher.live import LiveTeacher
from tiny import make_encoder, make_rows, make_task, make_tokens


def test_logits_are_those_of_the_rows_and_states_those_of_the_model() -> None:
    rows, encoder = make_rows(make_task(), 12), make_encoder()
    batch = make_batch(np.array([7, 2, 11]), rows, make_tokens(rows, encoder))
    logits = np.random.default_rng(0).standard_normal((12, 2)).astype(np.float32)
    found = GivenTeacher(logits)(batch, Needs(logits=True))
    np.testing.assert_array_equal(found.logits.numpy(), logits[[7, 2, 11]])
    assert not found.logits.requires_grad

    live = LiveTeacher(encoder, device=torch.device("cpu"), bf16=False)
    needs = Needs(logits=True, hidden_states=frozenset({1}))
    both = GivenTeacher(logits, live)(batch, needs)
    np.testing.assert_array_equal(both.logits.numpy(), logits[[7, 2, 11]])
    torch.testing.assert_close(both.hidden_states[1], live(batch, needs).hidden_states[1])
    with pytest.raises(ValueError, match="no states"):
        GivenTeacher(logits)(batch, needs)
    assert GivenTeacher(logits)(batch, Needs()).logits.numel() == 0
    assert GivenTeacher(logits, live).served()["given"] == ["logits"]
