"""Help: quick, complete, and with examples that run."""

import shlex
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

import stillroom
from stillroom.cli import app

COMMANDS = (
    "finetune",
    "distill",
    "compare",
    "sweep",
    "evaluate",
    "export",
    "bench",
    "predict",
    "serve",
    "pretrain",
    "generator",
    "augment",
    "report",
    "methods",
    "datasets",
    "cache",
)
WIDE = {"COLUMNS": "250", "TERMINAL_WIDTH": "250"}


def _help(*command: str) -> str:
    result = CliRunner().invoke(app, [*command, "--help"], env=WIDE)
    assert result.exit_code == 0
    return result.stdout


def _examples(text: str) -> list[str]:
    _, found, end = text.partition("Examples:")
    assert found, text
    lines = [line.strip() for line in end.splitlines() if line.strip()]
    # The examples are the end: nothing else follows them.
    assert lines and all(line.startswith("$ stillroom ") for line in lines), lines
    return [line.removeprefix("$ stillroom ") for line in lines]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_ends_with_examples_of_the_command(command: str) -> None:
    examples = _examples(_help(command))
    assert all(shlex.split(example)[0] == command for example in examples)


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS)])
def test_examples_parse(command: tuple[str, ...]) -> None:
    """Every option of every example exists, takes what it is given, and none that is needed lacks."""
    group = typer.main.get_command(app)
    for example in _examples(_help(*command)):
        name, *arguments = shlex.split(example)
        group.commands[name].make_context(name, arguments)


def test_every_command_is_listed() -> None:
    text = _help()
    assert all(f"{command} " in text for command in COMMANDS)
    assert tuple(typer.main.get_command(app).commands) == COMMANDS


def test_every_option_has_a_help_text() -> None:
    for name, command in typer.main.get_command(app).commands.items():
        for parameter in command.params:
            assert getattr(parameter, "help", None), f"{name} {parameter.name}"


def test_help_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from stillroom.cli import app\n"
        "assert CliRunner().invoke(app, ['distill', '--help']).exit_code == 0\n"
        "print(sorted({'torch', 'transformers', 'datasets', 'scipy', 'numpy'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_version() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.stdout) == (0, f"stillroom {stillroom.__version__}\n")


def test_module_and_entry_point_are_the_same() -> None:
    command = [sys.executable, "-m", "stillroom.cli", "--version"]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert found.stdout == f"stillroom {stillroom.__version__}\n"
