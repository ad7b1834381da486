"""A teacher that was fine-tuned by the command line itself."""

import json

import pytest
from typer.testing import CliRunner
from workspace import FAST, Workspace, write_data

from stillroom.cli import app
from tiny import save_encoder


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    root = tmp_path_factory.mktemp("cli")
    data = write_data(root / "data")
    encoder = save_encoder(root / "encoder", layers=4, width=24)
    teacher = root / "teacher"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STILLROOM_CACHE", str(root / "cache"))
        command = ["finetune", "--model", str(encoder), "--dataset", str(data), "-o", str(teacher), *FAST]
        rates = ("--set", "training.learning_rate=0.005", "--set", "training.epochs=6")
        result = CliRunner().invoke(app, [*command, *rates, "--json"])
    assert result.exit_code == 0, result.stderr
    return Workspace(data, encoder, teacher, json.loads(result.stdout))
