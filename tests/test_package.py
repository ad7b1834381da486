"""The package that is installed: all that it needs and nothing else, and no word of a clone's documents."""

import ast
import zipfile
from pathlib import Path

import pytest
from hatchling.build import build_wheel

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "stillroom"


def test_the_wheel_holds_the_package_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line of .gitignore, such as runs/, keeps a folder of that name out of it, code or not."""
    monkeypatch.chdir(ROOT)
    with zipfile.ZipFile(tmp_path / build_wheel(str(tmp_path))) as wheel:
        names = set(wheel.namelist())
    found = {name for name in names if ".dist-info/" not in name}
    files = (path for path in SOURCE.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    assert found == {path.relative_to(SOURCE.parent).as_posix() for path in files}
    kinds = {Path(name).name.partition(".")[2] for name in found}
    assert kinds == {"py", "typed", "html.j2", "css", "js"}, "say here that files of a new kind are wanted"
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def spoken(source: str) -> list[str]:
    """Return the strings of a file that are no docstring, nor a string that explains a name."""
    tree = ast.parse(source)
    silent = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    return [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in silent
    ]


def test_no_message_names_a_document_of_a_clone() -> None:
    assert spoken('"""docs/a.md"""\nx = 1\n"""docs/b.md"""\nraise E(f"{x} (docs/c.md)")') == [
        " (docs/c.md)"
    ]
    found = {
        (path.name, text)
        for path in SOURCE.rglob("*.py")
        for text in spoken(path.read_text(encoding="utf-8"))
        if any(part in text for part in ("docs/", "recipes/", "benchmarks/", "tests/"))
    }
    assert found == set()
