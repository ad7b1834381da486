"""What the documents say holds: links lead somewhere, keys and options exist, the README's code runs."""

import ast
import importlib
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from click import Context
from pydantic import BaseModel
from transformers import AutoModelForSequenceClassification
from typer.main import get_command
from workspace import write_data

from stillroom.cli import app
from stillroom.data import columns, sources, tables
from stillroom.methods import METHODS
from stillroom.recipe import DatasetSettings, FinetuneRecipe, PretrainRecipe, Recipe
from tiny import save_encoder

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)\)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing


def keys(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, info in model.model_fields.items():
        inner = [one for one in (info.annotation, *get_args(info.annotation)) if isinstance(one, type)]
        section = next((one for one in inner if issubclass(one, BaseModel)), None)
        if section is not None:
            yield from keys(section, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", "required" if info.is_required() else repr(info.default)


def test_recipe_page_lists_every_key_with_its_default() -> None:
    rows = re.findall(r"^\| `([\w.]+)` \| (.+?) \|", (ROOT / "docs/recipe.md").read_text(), re.MULTILINE)
    assert dict(rows) == dict(keys(Recipe))


def test_pretraining_page_lists_what_differs_with_its_default() -> None:
    rows = re.findall(r"^\| `([\w.]+)` \| (.+?) \|", (ROOT / "docs/pretrain.md").read_text(), re.MULTILINE)
    known, task = dict(keys(PretrainRecipe)), dict(keys(Recipe))
    assert dict(rows).items() <= known.items()
    differ = {
        key
        for key, default in known.items()
        if key.startswith(("t", "dropout")) and default != task.get(key)
    }
    assert {key for key in differ if key != "teacher"} <= dict(rows).keys()


def test_pretraining_page_lists_every_method_that_has_it() -> None:
    page = (ROOT / "docs/pretrain.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| \[`([\w-]+)`\]", page, re.MULTILINE)
    assert set(listed) == {method.name for method in METHODS.values() if method.pretrain is not None}


@pytest.mark.parametrize("name", METHODS)
def test_card_names_every_option(name: str) -> None:
    card = (ROOT / f"docs/methods/{name}.md").read_text(encoding="utf-8")
    missing = [option for option in METHODS[name].settings.model_fields if f"`{option}`" not in card]
    assert not missing
    assert METHODS[name].status in card.lower() or METHODS[name].status in card


def test_readme_lists_every_method_with_its_status() -> None:
    for method in METHODS.values():
        row = next(line for line in README.splitlines() if line.startswith(f"| [`{method.name}`]"))
        assert f"docs/methods/{method.name}.md" in row
        assert method.status in row
        assert method.paper in row


@pytest.mark.parametrize("name", METHODS)
def test_readme_says_what_was_measured_of_each_method(name: str) -> None:
    """Seed 0: the mean of the shares kept of each task, and the student's mean by the teacher's."""
    row = next(line for line in README.splitlines() if line.startswith(f"| [`{name}`]"))
    tasks = json.loads((ROOT / "benchmarks/results.json").read_text())["tasks"].values()
    perturbed = name in {"lrc-bert", "angular-emd"}
    cells = []
    for student in ("layers:2,4,6", "4x312 from pca"):
        made = [
            task["students"][student]["methods"].get(f"{name}, tensor norm" if perturbed else name)
            for task in tasks
        ]
        if any(found is None or "0" not in found["seeds"] for found in made):
            cells.append("-")
            continue
        pairs = [
            (found["seeds"]["0"][task["metric"]], task["teacher"]["metrics"][task["metric"]])
            for found, task in zip(made, tasks, strict=True)
        ]
        shares = 100 * sum(mine / its for mine, its in pairs) / len(pairs)
        whole = 100 * sum(mine for mine, _ in pairs) / sum(its for _, its in pairs)
        cells.append(f"{shares:.1f} % ({whole:.1f})")
    assert row.endswith(f"| {' | '.join(cells)} |")


def test_card_says_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    cards = importlib.import_module("cards")
    tasks = json.loads((ROOT / "benchmarks/results.json").read_text())["tasks"]
    for name in METHODS:
        card = (ROOT / f"docs/methods/{name}.md").read_text(encoding="utf-8")
        assert f"\n\n{cards.HEADING}{cards.line(name, tasks)}\n" in card, "run benchmarks/cards.py"


def test_cards_compare_a_method_with_the_control_by_the_same_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    cards = importlib.import_module("cards")

    def scores(*by_seed: float) -> dict[str, Any]:
        return {"seeds": {str(seed): {"mcc": score} for seed, score in enumerate(by_seed)}, "steps": 9}

    three, folded = cards.STUDENTS
    teacher = {"metrics": {"mcc": 0.8}}
    made = {
        three: {"methods": {"none": scores(0.4, 0.6), "kd": scores(0.6, 0.7, 0.1)}},
        folded: {"methods": {"none": scores(0.7, 0.1), "kd": scores(0.72), "pkd": scores()}},
    }
    tasks = {"a": {"metric": "mcc", "teacher": teacher, "students": made}}
    # (0.6 + 0.7) / 2 of 0.8 beside (0.4 + 0.6) / 2, and 0.72 beside 0.7.
    assert (
        "9 steps, as the mean over 1 tasks of GLUE: 81.2 % by three layers (62.5 % without a teacher, "
        "seeds 0, 1); 90.0 % by 4x312 folded from it (87.5 % without a teacher, seed 0)."
    ) in cards.line("kd", tasks)
    assert "62.5 % by three layers (seeds 0, 1); 50.0 % by" in cards.line("none", tasks)
    assert cards.line("pkd", tasks) == cards.line("mixture", tasks)
    assert cards.line("pkd", tasks).startswith("Not measured")


def printed() -> Iterator[str]:
    """Yield a pattern for each text in the source: what is put in at run time may be anything."""
    for path in sorted((ROOT / "src").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        constants = {
            target.id: node.value.value
            for node in tree.body
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
            for target in node.targets
            if isinstance(target, ast.Name) and isinstance(node.value.value, str)
        }
        for node in ast.walk(tree):
            # A sum is a text with a part that depends.
            ends = [node.left, node.right] if isinstance(node, ast.BinOp) else [node]
            parts = [
                part for end in ends for part in (end.values if isinstance(end, ast.JoinedStr) else [end])
            ]
            known, pattern = 0, ""
            for part in parts:
                text = part
                if isinstance(part, ast.FormattedValue) and isinstance(part.value, ast.Name):
                    text = ast.Constant(constants.get(part.value.id))
                if isinstance(text, ast.Constant) and isinstance(text.value, str):
                    known += len(text.value)
                    pattern += re.escape(text.value.lstrip("\n"))
                else:
                    pattern += ".+"
            # A text of hardly anything but gaps would match everything.
            if known >= 20:
                yield pattern


def test_troubleshooting_quotes_messages_of_the_source() -> None:
    """A message that was reworded would no longer be found by who searches for it."""
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    quoted = [text.strip() for text in re.findall(r"```text\n(.*?)```", page, re.DOTALL)]
    assert len(quoted) > 15
    patterns = [re.compile(pattern, re.DOTALL) for pattern in printed()]
    for text in quoted:
        # These are put before every message.
        bare = re.sub(r"^(Error|Warning): ", "", text)
        assert any(pattern.fullmatch(said) for pattern in patterns for said in (text, bare)), text


@pytest.mark.parametrize("page", ["README.md", "docs/choose.md", "docs/compare.md", "docs/deploy.md"])
def test_commands_are_commands(page: str) -> None:
    """A renamed option, or prose beside a command, would leave the newcomer with a line that fails."""
    group = get_command(app)
    lines = map(str.strip, (ROOT / page).read_text(encoding="utf-8").replace("\\\n", " ").splitlines())
    commands = [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("stillroom ")]
    assert commands
    for name, *arguments in commands:
        command = group.commands[name]  # type: ignore[attr-defined]
        command.make_context(name, arguments, parent=Context(group))


DATA = (ROOT / "docs/data.md").read_text(encoding="utf-8")


def test_data_page_lists_formats_columns_and_words_as_the_code_does() -> None:
    def listed(start: str, end: str) -> list[str]:
        return re.findall(r"`([^`]+)`", DATA.split(start, 1)[1].split(end, 1)[0])

    rows = re.findall(r"^\| (`\..+?) \|", DATA, re.MULTILINE)
    assert set(re.findall(r"`(.+?)`", " ".join(rows))) == set(tables._READERS)
    stems = [stem for split in ("train", "validation") for stem in sources._STEMS[split]]
    assert listed("found by its name:", "any\nother") == stems
    pairs = listed("- two texts:", "- else")
    assert list(zip(pairs[::2], pairs[1::2], strict=True)) == list(columns.PAIRS)
    assert listed("- else one text:", "- labels") == list(columns.TEXTS)
    assert listed("- labels:", "Name others") == list(columns.LABELS)
    assert listed("mostly a missing label:", "In lower") == list(columns.MISSING)


def test_data_pages_commands_are_commands_with_valid_settings() -> None:
    group = get_command(app)
    commands = [shlex.split(line)[1:] for line in DATA.splitlines() if line.startswith("stillroom ")]
    assert len(commands) >= 8
    for name, *arguments in commands:
        command = group.commands[name]  # type: ignore[attr-defined]
        given = command.make_context(name, arguments, parent=Context(group)).params
        FinetuneRecipe.load(dataset=given["dataset"], overrides=given["given"] or ())


@pytest.mark.parametrize(
    ("number", "kind", "labels"),
    [
        (0, "classification", ("negative", "positive")),
        (1, "classification", ("negative", "positive")),
        (2, "regression", ()),
        (3, "multi-label", ("music", "plot")),
    ],
)
def test_data_pages_examples_are_what_it_says(
    number: int, kind: str, labels: tuple[str, ...], tmp_path: Path
) -> None:
    ending, text = re.findall(r"```(csv|jsonl)\n(.*?)```", DATA, re.DOTALL)[number]
    path = tmp_path / f"rows.{ending}"
    path.write_text(text)
    task = sources.load(DatasetSettings(name=str(path)), ("all",)).task
    assert (task.kind, task.labels) == (kind, labels)


@pytest.mark.slow
def test_readme_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """The README's example as it stands, with a tiny encoder and toy rows for the real ones."""
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert code is not None
    rows = write_data(tmp_path / "rows")
    model = save_encoder(tmp_path / "encoder", layers=6)
    monkeypatch.chdir(tmp_path)
    text = code[1].replace('"minilm-l6"', repr(str(model))).replace('"builtin/verdicts"', repr(str(rows)))
    assert str(model) in text and str(rows) in text
    # The tiny teacher needs a larger rate to solve its task in three epochs.
    text = text.replace(f"dataset={str(rows)!r})", f"dataset={str(rows)!r}, overrides=RATE)", 1)
    exec(compile(text, "README.md", "exec"), {"RATE": ["training.learning_rate=0.01"]})
    assert "of the teacher is kept" in capsys.readouterr().out
    assert (tmp_path / "runs/student/student/model.safetensors").exists()


@pytest.mark.slow
def test_library_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Every block as it stands, one after the other; what a comment behind `print` says is printed."""
    page = (ROOT / "docs/library.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == page.count("```") / 2 == 4
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "library.md", "exec"), names)
        printed = capsys.readouterr().out.splitlines()
        said = re.findall(r"^print\(.*\)  # (.*)$", block, re.MULTILINE)
        assert said == printed[: len(said)]
    assert printed[-1].endswith("% of the teacher is kept")
    assert all(bool(value.isfinite()) for value in names["loss"].terms.values())
    for folder in ("student", "runs/student/student"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path / folder)


@pytest.mark.parametrize(
    "figures",
    ["results.json", "results_gpu.json", "results_starts.json", "results_mnli.json", "results_long.json"],
)
def test_result_tables_are_the_committed_figures(figures: str) -> None:
    """A table that was typed, or not made again, would show figures that no run gave."""
    script = ROOT / "benchmarks" / "results.py"
    made = subprocess.run(
        [sys.executable, script, "--markdown", script.with_name(figures)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert made.stdout.strip()
    assert made.stdout.strip() in (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
