"""A mixture is its parts: spelt out as another method it is that method, to the bit."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from stillroom.encoder import Needs
from stillroom.errors import WrongInput
from stillroom.methods import METHODS, build
from stillroom.methods.base import Context, Plan
from stillroom.recipe import MethodSettings
from stillroom.training.augmentation import Augmenter
from stillroom.training.distiller import Distiller
from stillroom.training.loop import train
from tiny import make_batch_of, make_job

QUIET = Console(quiet=True)
CONTEXT = Context("classification", 2, 2_000, 2, 16, 4, 24, labels=np.arange(2_000) % 2)
GENERATOR = {"generator": "tiny", "n_generator": 1, "n_student": 1, "generator_learning_rate": 1e-3}


def mixture(*stages: dict[str, Any], **options: Any) -> Plan:
    return build(MethodSettings(name="mixture", stages=list(stages), **options), CONTEXT)


def trained(folder: Path, method: str, options: dict[str, Any]) -> list[torch.Tensor]:
    """Return the student's weights after a tiny run."""
    torch.manual_seed(0)
    job = make_job(folder, method=method, options=options)
    train(job, QUIET)
    return list(job.student.model.state_dict().values())


SPELT = {
    "kd": (
        {"temperature": 3.0, "soft_weight": 0.25},
        {"stages": [{"terms": {"soft": 0.25, "hard": 0.75}}]},
    ),
    "lrc-bert": (
        {"perturbation": "second", "switch": 0.5},
        {
            "stages": [
                {"terms": {"cos_nce": 1.0}},
                {"start": 0.5, "terms": {"cos_nce": 1.0, "soft": 1.0, "hard": 3.0}, "perturb": True},
            ],
            "input": "lrc-bert",
        },
    ),
    "mate-kd": (
        GENERATOR,
        {
            "stages": [{"terms": {"hard": 1 / 3, "soft": 1 / 3}, "augmented": {"soft": 1 / 3}}],
            "input": "mate-kd",
        },
    ),
    "cilda": (
        GENERATOR,
        {
            "stages": [{"terms": {"hard": 1 / 3, "soft": 1 / 3}, "augmented": {"soft": 1 / 3}}],
            "input": "cilda",
        },
    ),
}
"""By method: its options, and how a mixture says the same."""


@pytest.mark.parametrize("method", SPELT)
def test_spelt_out_as_another_method_it_is_that_method(method: str, tmp_path: Path) -> None:
    options, spelt = SPELT[method]
    stages = [
        {
            key: {f"{method}:{name}": weight for name, weight in value.items()}
            if isinstance(value, dict)
            else value
            for key, value in stage.items()
        }
        for stage in spelt["stages"]  # type: ignore[attr-defined]
    ]
    given = {**spelt, "stages": stages, "options": {method: options}}
    want, found = trained(tmp_path / "a", method, options), trained(tmp_path / "b", "mixture", given)
    assert all(torch.equal(a, b) for a, b in zip(want, found, strict=True))
    other = trained(tmp_path / "c", "mixture", {"stages": [{"terms": {"kd:soft": 1.0}}]})
    assert not all(torch.equal(a, b) for a, b in zip(want, other, strict=True))


def test_terms_of_several_methods_stand_in_one_stage() -> None:
    plan = mixture(
        {"terms": {"lrc-bert:cos_nce": 1.0, "tinybert:hidden_states": 0.5}},
        {"start": 0.5, "terms": {"kd:soft": 2.0}},
        options={"lrc-bert": {"vector": "cls", "layer_map": [1, 4]}},
    )
    first, second = plan.stages
    assert (first.weights, second.weights, second.start) == (
        {"lrc-bert:cos_nce": 1.0, "tinybert:hidden_states": 0.5},
        {"kd:soft": 2.0},
        0.5,
    )
    pooled = frozenset({("cls", 1), ("cls", 4)})
    needs = plan.teacher_needs(first)
    assert needs.pooled_states == pooled and needs.hidden_states == {0, 2, 4} and not needs.logits
    assert plan.teacher_needs(second) == Needs(logits=True)
    assert set(plan.terms) == {*first.weights, *second.weights}


def test_what_a_generator_raises_comes_along() -> None:
    stage = {"terms": {"kd:hard": 1.0}, "augmented": {"kd:soft": 1.0}}
    plan = mixture(stage, options={"cilda": {**GENERATOR, "a1": 0.2, "a2": 0.7}}, input="cilda")
    assert plan.augmentation is not None
    assert plan.augmentation.weights == {"cilda:soft": 0.2, "cilda:contrast": 0.7}
    assert set(plan.terms) == {"kd:hard", "kd:soft", "cilda:soft", "cilda:contrast"}


KEEPERS = {
    "codir:contrast": {"codir": {"bank_negatives": 3, "dimension": 8}},
    "lrc-bert:cos_nce": {"lrc-bert": {"vector": "cls", "negatives": "bank", "bank_negatives": 3}},
    "rail-kd:layers": {"rail-kd": {"redraw": 1, "projection_size": 8}},
}
"""Terms that keep something of each row, or count rows, with few negatives."""

MASSES: dict[str, dict[str, Any]] = {"bert-emd:layers": {}, "angular-emd:layers": {}}
"""Terms that keep the masses of their last training pass: of a perturbed step the one that counts."""


@pytest.mark.parametrize(
    ("name", "extra", "source"),
    [(name, {"augmented": True}, "mate-kd") for name in KEEPERS | MASSES]
    + [(name, {"perturb": True}, "lrc-bert") for name in KEEPERS],
)
def test_rows_that_come_again_changed_are_kept_once_as_they_are(
    name: str, extra: dict[str, Any], source: str, tmp_path: Path
) -> None:
    def after_a_step(**more: Any) -> dict[str, Any]:
        """Return what the term holds after one pass over all rows."""
        torch.manual_seed(0)
        stage = {"terms": {name: 1.0, "kd:hard": 1.0}, **more.pop("extra", {})}
        options = {**(KEEPERS | MASSES)[name], **more.pop("options", {})}
        job = make_job(tmp_path, method="mixture", options={"stages": [stage], "options": options, **more})
        distiller, batch = (
            Distiller(job.student, job.plan, bf16=False),
            make_batch_of(job.rows, job.student),
        )
        stage_made, augmented = job.plan.stages[0], None
        if job.generator is not None:
            writer = Augmenter(job.plan, job.generator, job.live_teacher, distiller, seed=0, bf16=False)
            augmented = writer.augment(batch, writer.draw(batch, 0), stage_made)
            assert augmented is not None
            assert not torch.equal(augmented.batch.student.input_ids, batch.student.input_ids)
        assert job.teacher is not None
        torch.manual_seed(1)
        teacher = job.teacher(batch, job.plan.teacher_needs(stage_made))
        distiller(batch, teacher, stage_made, augmented)
        distiller.after_step(stage_made)
        return job.plan.terms[name].state_dict()

    changed = {"augmented": {name: 1.0}} if "augmented" in extra else extra
    given = {"mate-kd": GENERATOR} if source == "mate-kd" else {}
    want, found = after_a_step(), after_a_step(extra=changed, options=given, input=source)
    assert want.keys() == found.keys()
    assert all(torch.equal(value, found[key]) for key, value in want.items())


SOFT = {"terms": {"kd:soft": 1.0}}


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({}, "Missing key method.stages"),
        ({"stages": []}, r"starts that rise from 0, found \[\]"),
        ({"stages": [{**SOFT, "start": 0.5}]}, r"rise from 0, found \[0.5\]"),
        ({"stages": [SOFT, SOFT]}, r"rise from 0, found \[0.0, 0.0\]"),
        ({"stages": [{"terms": {}}]}, "method.stages.0.terms"),
        ({"stages": [{"terms": {"kd:soft": 0}}]}, "method.stages.0.terms.kd:soft.*greater than 0"),
        ({"stages": [{"term": {"kd:soft": 1}}]}, "method.stages.0.term. Did you mean terms"),
        (
            {"stages": [{"terms": {"kd.soft": 1}}]},
            "METHOD:TERM, such as kd:soft, found the method 'kd.soft'",
        ),
        ({"stages": [{"terms": {"mixture:soft": 1}}]}, "found the method 'mixture'"),
        ({"stages": [{"terms": {"kd:sofd": 1}}]}, "unknown term kd:sofd. Did you mean kd:soft"),
        ({"stages": [{"terms": {"pkd:first_tokens": 1}}]}, "head would never be trained"),
        ({"stages": [SOFT], "options": {"pkd": {}}}, "no stage has a term of pkd"),
        (
            {"stages": [SOFT], "options": {"kd": {"temprature": 1}}},
            "method.options.kd.temprature.*temperature",
        ),
        ({"stages": [{**SOFT, "perturb": True}]}, "set method.input to the method"),
        ({"stages": [{**SOFT, "perturb": True}], "input": "kd"}, "kd has no perturbation"),
        ({"stages": [{**SOFT, "augmented": {"kd:soft": 1}}], "input": "lrc-bert"}, "augments no rows"),
        ({"stages": [SOFT], "input": "lrc-bert"}, "no stage perturbs or augments"),
        ({"stages": [SOFT], "input": "lcr-bert"}, "method.input: unknown method .*Did you mean lrc-bert"),
        ({"stages": [{"terms": {":soft": 1}}]}, "METHOD:TERM, such as kd:soft, found the method ''"),
        ({"stages": [{"terms": {"cilda:soft": 1}}]}, "method.options.cilda: cilda needs a masked"),
    ],
)
def test_what_does_not_fit_is_refused(given: dict[str, Any], match: str) -> None:
    with pytest.raises(WrongInput, match=match):
        build(MethodSettings(name="mixture", **given), CONTEXT)


def test_the_card_lists_every_term() -> None:
    card = (Path(__file__).parents[2] / "docs/methods/mixture.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"`([\w-]+:\w+)`", card.split("## Options")[0])) - {"METHOD:TERM"}
    there = set()
    for name in METHODS.keys() - {"mixture"}:
        generator = {"generator": "g"} if "generator" in METHODS[name].settings.model_fields else {}
        plan = build(MethodSettings(name=name, **generator), CONTEXT)
        there |= {f"{name}:{term}" for term in plan.terms}
    assert listed - {"minilm:soft"} == there
