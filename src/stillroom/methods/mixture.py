"""Mixture: terms of any methods, put into stages by the recipe.

Of no paper: each term is its method's, with its equation and source.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any

from pydantic import Field

from stillroom.errors import WrongInput
from stillroom.methods.base import Context, Method, Plan, Stage, Term
from stillroom.recipe import Settings, nearest, validate

NAME = "mixture"

Weights = dict[str, Annotated[float, Field(gt=0)]]
"""Weight of each term; a term is named `METHOD:TERM`, as `lrc-bert:cos_nce`."""


class MixtureStage(Settings):
    """A stretch of training."""

    start: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the steps from which on it holds."""
    terms: Annotated[Weights, Field(min_length=1)]
    """The terms that are computed, each with its weight."""
    perturb: bool = False
    """Whether embeddings are perturbed, by the method that `input` names."""
    augmented: Weights = {}
    """Terms that are computed on augmented rows, by the generator of the method that `input` names."""


class MixtureSettings(Settings):
    """Options of `mixture`."""

    stages: tuple[MixtureStage, ...]
    """What is trained on when: each a `start` (the first is 0) and `terms`, as `{kd:soft: 1}`."""
    options: dict[str, dict[str, Any]] = {}
    """Options of the methods that terms are taken from, by method."""
    input: str | None = None
    """Method whose perturbation (`lrc-bert`) or generator (`cilda`) changes the rows; none by default."""


def build(settings: MixtureSettings, context: Context, methods: Mapping[str, Method]) -> Plan:
    """Return the stages as they are given, on terms of the other methods.

    Args:
        settings: The mixture's.
        context: What it is built for; so are the methods that terms are taken from, whole.
        methods: All others, by name.

    Raises:
        WrongInput: If a stage names no method or term that there is, a method's options are wrong, the
            stages do not rise from 0, or no stage would train the classification head.
    """
    starts = [stage.start for stage in settings.stages]
    if not starts or starts[0] != 0 or starts != sorted(set(starts)):
        raise WrongInput(f"method.stages: expected stages with starts that rise from 0, found {starts}.")
    named = [name for stage in settings.stages for name in (*stage.terms, *stage.augmented)]
    parts = {name: name.partition(":")[::2] for name in named}
    if settings.input is not None and settings.input not in methods:
        raise WrongInput(
            f"method.input: unknown method {settings.input!r}.{nearest(settings.input, list(methods))}"
        )
    used = dict.fromkeys(method for method, _ in parts.values())
    if settings.input is not None:
        used[settings.input] = None
    plans = {name: _plan(name, settings.options.get(name, {}), context, methods) for name in used}
    idle = settings.options.keys() - plans.keys()
    if idle:
        raise WrongInput(f"method.options: no stage has a term of {', '.join(sorted(idle))}.")
    terms = {name: _term(plans[method], method, term) for name, (method, term) in parts.items()}
    if not any(terms[name].student_needs.logits for stage in settings.stages for name in stage.terms):
        raise WrongInput(
            "The classification head would never be trained: put a term that reads the logits, such as "
            "kd:soft or kd:hard, into a stage."
        )
    stages = tuple(Stage(s.start, s.terms, s.perturb, s.augmented) for s in settings.stages)
    if settings.input is None:
        if any(stage.perturb or stage.augmented for stage in stages):
            raise WrongInput(
                "method.stages: to perturb or augment rows, set method.input to the method that does it."
            )
        return Plan(terms, stages)
    if not any(stage.perturb or stage.augmented for stage in stages):
        raise WrongInput(
            f"method.input: {settings.input} is named, and no stage perturbs or augments rows."
        )
    source = plans[settings.input]
    if source.perturbation is None and any(stage.perturb for stage in stages):
        raise WrongInput(f"method.input: {settings.input} has no perturbation. lrc-bert has.")
    if source.augmentation is None and any(stage.augmented for stage in stages):
        raise WrongInput(f"method.input: {settings.input} augments no rows. mate-kd and cilda do.")
    rule = source.augmentation
    if rule is not None:
        raised = {f"{settings.input}:{name}": weight for name, weight in rule.weights.items()}
        terms |= {f"{settings.input}:{name}": source.terms[name] for name in rule.weights}
        rule = replace(rule, weights=raised)
    return Plan(terms, stages, source.perturbation, rule)


def _plan(name: str, options: Mapping[str, Any], context: Context, methods: Mapping[str, Method]) -> Plan:
    """Return the plan of a method that terms are taken from."""
    if name not in methods:
        raise WrongInput(
            f"method: expected terms as METHOD:TERM, such as kd:soft, found the method {name!r}."
            f"{nearest(name, list(methods))}"
        )
    section = f"method.options.{name}"
    made = validate(methods[name].settings, options, section=section)
    try:
        return methods[name].build(made, context)
    except WrongInput as error:
        raise WrongInput(f"{section}: {error}") from error


def _term(plan: Plan, method: str, term: str) -> Term:
    if term not in plan.terms:
        names = [f"{method}:{name}" for name in plan.terms]
        raise WrongInput(
            f"method.stages: unknown term {method}:{term}.{nearest(f'{method}:{term}', names)}"
        )
    return plan.terms[term]


def of(methods: Mapping[str, Method]) -> Method:
    """Return the method that mixes terms of `methods`."""
    return Method(
        name=NAME,
        title="Mixture",
        paper="",
        summary="Any terms of the others in any stages, as the recipe puts them.",
        status="terms as in their methods",
        settings=MixtureSettings,
        build=lambda settings, context: build(settings, context, methods),
        terms={
            f"{method.name}:{term}": what
            for method in methods.values()
            for term, what in method.terms.items()
        },
    )
