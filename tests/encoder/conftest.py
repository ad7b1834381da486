"""An encoder of every family."""

import pytest

from stillroom.encoder import Encoder
from tiny import FAMILIES, make_encoder


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Encoder:
    return make_encoder(request.param, layers=3)
