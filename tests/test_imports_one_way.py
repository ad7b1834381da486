"""Imports go one way along the flow of data: no module imports what stands after it."""

import ast
from pathlib import Path

import pytest

import stillroom

SOURCE = Path(stillroom.__file__).parent

ORDER = (
    "errors durable processes recipe data ops encoder start student teacher generator methods "
    "training evaluation provenance deploy report preflight run cli __main__"
).split()
"""`stillroom/<name>.py` or `stillroom/<name>/`, from the first to the last."""

METHOD_MAY_IMPORT = {"base", "prediction", "augmentation"}
"""The files of `methods` that are no methods, and that every method shares."""

FILES = sorted(path for path in SOURCE.rglob("*.py") if path != SOURCE / "__init__.py")


def stands_in(path: Path) -> str:
    """Return the first name of a file's place in the package."""
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported(source: str) -> set[str]:
    """Return the dotted names below `stillroom` that a file imports, wherever in the file it does."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where a module stands"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.removeprefix("stillroom.") for name in found if name.startswith("stillroom.")}


def position(name: str) -> int:
    """Return where a name stands; a public name stands where its package's `__init__` does."""
    first = name.split(".")[0]
    return ORDER.index(first if first in ORDER else "cli")


def wrong_way(place: str, source: str) -> list[str]:
    """Return the imports of a file at `place` that stand after it."""
    return sorted(name for name in imported(source) if position(name) > position(place))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_no_module_imports_what_stands_after_it(path: Path) -> None:
    assert stands_in(path) in ORDER, "a new module: give it its place in ORDER"
    assert wrong_way(stands_in(path), path.read_text(encoding="utf-8")) == []


METHODS = [p for p in FILES if stands_in(p) == "methods" and p.stem != "__init__"]


@pytest.mark.parametrize("path", METHODS, ids=lambda path: path.stem)
def test_no_method_imports_another(path: Path) -> None:
    found = {name.split(".")[1] for name in imported(path.read_text()) if name.startswith("methods.")}
    assert found <= METHOD_MAY_IMPORT - {path.stem}


def test_only_the_encoder_swaps_the_attention_of_a_model() -> None:
    hooks = "AttentionInterface", "AttentionMaskInterface", "set_attn_implementation"
    files = {path for path in FILES if any(hook in path.read_text(encoding="utf-8") for hook in hooks)}
    assert {stands_in(path) for path in files} == {"encoder"}


def test_the_check_finds_what_it_looks_for() -> None:
    source = "def f():\n    from stillroom.training.loop import train\n    import stillroom.run, os\n"
    assert imported(source) == {"training.loop.train", "run"}
    assert wrong_way("methods", source) == ["run", "training.loop.train"]
    assert wrong_way("training", source) == ["run"]
    assert wrong_way("cli", source) == wrong_way("cli", "from stillroom import distill") == []
    assert wrong_way("run", "from stillroom import distill") == ["distill"]
    assert imported("from stillroom import durable, encoder") == {"durable", "encoder"}
    assert len(FILES) > 20 and len(METHODS) >= 3
