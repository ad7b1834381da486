"""Which student layer learnt from which teacher layer: the flows that a training logged, averaged.

One batch's flow is a vertex of its problem, so that most of it is zero and neighbouring steps differ; the
mean over the steps says what a layer learnt from on the whole.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stillroom import durable
from stillroom.errors import WrongInput
from stillroom.report import pictures
from stillroom.report.pictures import Picture
from stillroom.report.sources import lines_of
from stillroom.training.log import LOG


@dataclass(frozen=True)
class MeanFlow:
    """The flow of one transport problem, over the logged steps of one or several trainings."""

    flow: np.ndarray
    """`(L, M)`, student layers in rows: the mean. It sums to 1."""
    steps: int
    """How many logged steps it is the mean of."""
    first: float
    """The value of the problem, EMD, at the first of them."""
    last: float


def of_log(log: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, MeanFlow]]:
    """Return the mean flows that a log records, by term and problem."""
    kept: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    for line in log:
        for term, problems in line.get("record", {}).items():
            for problem, record in problems.items():
                if isinstance(record, Mapping) and record.get("flow"):
                    name = problem.replace("_", " ")
                    kept.setdefault(term, {}).setdefault(name, []).append(record)
    return {
        term: {
            problem: MeanFlow(
                np.mean([record["flow"] for record in records], axis=0),
                len(records),
                records[0]["emd"],
                records[-1]["emd"],
            )
            for problem, records in problems.items()
        }
        for term, problems in kept.items()
    }


def over_runs(each: Sequence[Mapping[str, Mapping[str, MeanFlow]]]) -> dict[str, dict[str, MeanFlow]]:
    """Return the mean of `of_log` over trainings of the same layers, each counting the same.

    Raises:
        WrongInput: If their terms, problems or numbers of layers differ.
    """
    if len({_sizes(found) for found in each}) > 1:
        raise WrongInput(
            "Expected runs with the same layers and problems, found those of "
            f"{', '.join(sorted({_sizes(found) for found in each}))}. Draw them one by one."
        )
    return {
        term: {
            problem: MeanFlow(
                np.mean([found[term][problem].flow for found in each], axis=0),
                sum(found[term][problem].steps for found in each),
                float(np.mean([found[term][problem].first for found in each])),
                float(np.mean([found[term][problem].last for found in each])),
            )
            for problem in problems
        }
        for term, problems in (each[0].items() if each else ())
    }


def _sizes(found: Mapping[str, Mapping[str, MeanFlow]]) -> str:
    return " and ".join(
        f"{problem} {' x '.join(map(str, mean.flow.shape))}"
        for problems in found.values()
        for problem, mean in problems.items()
    )


def picture(found: Mapping[str, MeanFlow], caption: str, *, title: str | None = None) -> Picture:
    """Return all problems of a term side by side, in per cent of what flows."""
    return pictures.heat({problem: mean.flow for problem, mean in found.items()}, caption, title=title)


def write(runs: Sequence[Path], output: Path, *, title: str | None = None) -> Path:
    """Write the layer flow of one or several trainings as an SVG file, and return where it is.

    Args:
        runs: Folders of runs of a method that transports layers, such as `bert-emd`: of `stillroom
            distill`, or `runs/STUDENT/METHOD/SEED` of a comparison. The flows of several are averaged, each
            run counting the same.
        output: The file.
        title: Stands over the picture.

    Raises:
        WrongInput: If there is no run, one recorded no flow, or their numbers of layers differ.
        RunFailed: If the disk is full.

    Example:
        >>> write([Path("runs/mrpc")], Path("flow-mrpc.svg"), title="MRPC")  # doctest: +SKIP
    """
    each = [of_log(lines_of(run / LOG)) for run in runs]
    for run, found in zip(runs, each, strict=True):
        if not found:
            raise WrongInput(
                f"Expected a run of a method that records the flow between layers, such as bert-emd, found "
                f"no flow in {run / LOG}."
            )
    if not each:
        raise WrongInput("Expected at least one run to draw the layer flow of, found none.")
    terms = over_runs(each)
    several = len(terms) > 1
    problems = {
        f"{term}: {problem}" if several else problem: mean
        for term, found in terms.items()
        for problem, mean in found.items()
    }
    caption = "Layer flow" + (f", {title}" if title else "")
    durable.write_text(output, pictures.alone(picture(problems, caption, title=title)))
    return output
