"""One self-contained HTML file: nothing is fetched, no script runs but the page's own."""

import base64
import hashlib
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from stillroom import durable
from stillroom.provenance import STUDENT
from stillroom.report import answers, card, comparison, facts, pictures, pretraining
from stillroom.report.sources import (
    RESULTS,
    Run,
    is_pretraining,
    read_comparison,
    read_pretraining,
    read_run,
)

REPORT = "report.html"


def write(folder: Path, output: Path | None = None) -> Path:
    """Write the page of a comparison, or of a run with its student's model card; return where it is.

    Args:
        folder: A finished run, task-agnostic or on a task, or a comparison.
        output: The file to write; by default `report.html` in the run folder.

    Raises:
        WrongInput: If the folder is no finished run, or a file in it is damaged.
        RunFailed: If the disk is full.
    """
    if (folder / RESULTS).is_file():
        return write_comparison(folder, output)
    if is_pretraining(folder):
        return write_pretraining(folder, output)
    run = read_run(folder)
    path = output or folder / REPORT
    durable.write_text(path, render(run))
    if (folder / STUDENT).is_dir():
        durable.write_text(folder / STUDENT / card.README, card.text_of(run))
    return path


def write_comparison(folder: Path, output: Path | None = None) -> Path:
    """Write a comparison's page and return where it is; by default `report.html` in its folder."""
    compared = read_comparison(folder)
    path = output or folder / REPORT
    text = _page(
        "comparison.html.j2",
        title=f"Stillroom comparison: {folder.resolve().name}",
        folder=folder,
        dataset=compared.found["dataset"],
        headline=comparison.headline(compared.found),
        results=comparison.table(compared.found),
        elsewhere=comparison.out_of_domain(compared.found),
        quality=comparison.picture(compared.found),
        differences=comparison.differences(compared.found),
        curves=comparison.curves(compared),
        flows=comparison.flows(compared),
        commands=comparison.commands(compared),
        settings=compared.settings,
        environment=comparison.environment(compared),
    )
    durable.write_text(path, text)
    return path


def write_pretraining(folder: Path, output: Path | None = None) -> Path:
    """Write the page of a task-agnostic distillation and its student's model card; return where it is."""
    run = read_pretraining(folder)
    path = output or folder / REPORT
    text = _page(
        "pretraining.html.j2",
        title=f"Stillroom pre-training: {folder.resolve().name}",
        run=run,
        headline=pretraining.headline(run),
        caution=pretraining.caution(run),
        held_out=pretraining.held_out(run),
        curves=pretraining.curves(run),
        terms=pretraining.terms(run),
        read=pretraining.text(run),
        models=pretraining.models(run),
        commands=pretraining.commands(run),
        recipe=facts.recipe_text(run.recipe),
        environment=pretraining.environment(run),
    )
    durable.write_text(path, text)
    if (folder / STUDENT).is_dir():
        durable.write_text(folder / STUDENT / card.README, card.text_of_start(run))
    return path


def render(run: Run) -> str:
    """Return the page of a run."""
    kept = run.kept
    tests = facts.tests(run)
    table, picture = facts.costs(run)
    return _page(
        "run.html.j2",
        title=f"Stillroom report: {run.folder.resolve().name}",
        run=run,
        headline=facts.headline(run),
        caution=facts.caution(run, tests),
        costs=table,
        quality=picture,
        tests=facts.tests_table(tests),
        curves=facts.curves(run),
        flows=facts.flows(run),
        agreement=kept and answers.agreement(kept),
        classes=kept and answers.per_class(kept),
        confusions=answers.confusions(kept) if kept else [],
        calibration=kept and answers.calibrations(kept),
        few=pictures.FEW,
        robustness=facts.robustness(run),
        environment=facts.environment(run),
        commands=facts.commands(run),
        recipe=facts.recipe_text(run.recipe),
    )


def _page(template: str, **values: Any) -> str:
    here = files("stillroom.report")
    style = here.joinpath("page.css").read_text(encoding="utf-8")
    script = here.joinpath("page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = Environment(
        loader=PackageLoader("stillroom", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["svg"] = Markup
    # A number stays on the line of its per cent.
    environment.filters["unbroken"] = lambda text: text.replace(" %", "\u00a0%")
    # The only script that a browser runs is the one with this hash.
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
        "base-uri 'none'; form-action 'none'"
    )
    made = environment.get_template(template)
    return made.render(policy=policy, style=Markup(style), script=Markup(script), **values)
