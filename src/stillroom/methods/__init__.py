"""Every method by name. A new method is one file and one line here."""

from typing import Any

from stillroom.errors import WrongInput
from stillroom.methods import (
    angular_emd,
    bert_emd,
    cilda,
    codir,
    distilbert,
    kd,
    lrc_bert,
    mate_kd,
    minilm,
    minilmv2,
    mixture,
    none,
    pkd,
    rail_kd,
    tinybert,
)
from stillroom.methods.base import Context, Method, Plan
from stillroom.recipe import MethodSettings, Recipe, Settings, TrainingSettings, nearest, validate

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        none.METHOD,
        kd.METHOD,
        lrc_bert.METHOD,
        codir.METHOD,
        bert_emd.METHOD,
        angular_emd.METHOD,
        cilda.METHOD,
        mate_kd.METHOD,
        pkd.METHOD,
        distilbert.METHOD,
        rail_kd.METHOD,
        tinybert.METHOD,
        minilm.METHOD,
        minilmv2.METHOD,
    )
}
METHODS[mixture.NAME] = mixture.of(dict(METHODS))


def find(name: str) -> Method:
    """Return a method by name, or raise `WrongInput` that names the nearest.

    Example:
        >>> find("pkd").paper
        'Sun et al. 2019, arXiv 1908.09355'
    """
    if name not in METHODS:
        raise WrongInput(f"Unknown method {name!r}.{nearest(name, list(METHODS))}")
    return METHODS[name]


def settings_of(given: MethodSettings) -> Settings:
    """Return the method's own settings, checked, or raise `WrongInput` with the wrong key.

    Example:
        >>> settings_of(MethodSettings(name="kd", temperature=4))
        KDSettings(temperature=4.0, soft_weight=0.5)
    """
    return validate(find(given.name).settings, given.options, section="method")


def build(given: MethodSettings, context: Context) -> Plan:
    """Return the plan of the named method in this context.

    Projections and banks start from torch's random state.

    Raises:
        WrongInput: If the method or an option is unknown, or they do not fit the context.

    Example:
        >>> context = Context("classification", 2, 100, 2, 16, 4, 24)
        >>> plan = build(MethodSettings(name="lrc-bert", switch=0.5), context)
        >>> [(stage.start, dict(stage.weights)) for stage in plan.stages]
        [(0.0, {'cos_nce': 1.0}), (0.5, {'cos_nce': 1.0, 'soft': 1.0, 'hard': 3.0})]
    """
    return find(given.name).build(settings_of(given), context)


def pretrainer(name: str) -> Method:
    """Return a method that has task-agnostic distillation, or raise `WrongInput` naming those."""
    if find(name).pretrain is None:
        able = [method.name for method in METHODS.values() if method.pretrain is not None]
        raise WrongInput(f"{name} has no task-agnostic distillation. There are: {', '.join(able)}.")
    return find(name)


def build_pretraining(given: MethodSettings, context: Context) -> Plan:
    """Return the plan of the named method on text without labels."""
    make = pretrainer(given.name).pretrain
    assert make is not None
    return make(settings_of(given), context)


def spelt_out(given: MethodSettings) -> MethodSettings:
    """Return the method with all of its options, or raise `WrongInput` with the wrong key."""
    # As JSON, so that the recipe is equal to itself when it is read again: lists are no tuples.
    return MethodSettings(name=given.name, **settings_of(given).model_dump(mode="json"))


def training_defaults(name: str, given: TrainingSettings) -> dict[str, Any]:
    """Return the method's own values of what `given` leaves open.

    Example:
        >>> training_defaults("angular-emd", TrainingSettings(epochs=2))
        {'batch_size': 16}
    """
    return {k: value for k, value in find(name).training.items() if k not in given.model_fields_set}


def resolve(recipe: Recipe) -> Recipe:
    """Return the recipe with the method's options and training defaults spelt out."""
    method = spelt_out(recipe.method)
    training = recipe.training.model_copy(update=training_defaults(method.name, recipe.training))
    return recipe.model_copy(update={"method": method, "training": training})
