"""Every method by name. A new method is one file and one line here."""

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
from stillroom.recipe import MethodSettings, Recipe, Settings, nearest, validate

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
    """Return a method by name, or raise `WrongInput` that names the nearest."""
    if name not in METHODS:
        raise WrongInput(f"Unknown method {name!r}.{nearest(name, list(METHODS))}")
    return METHODS[name]


def settings_of(given: MethodSettings) -> Settings:
    """Return the method's own settings, checked, or raise `WrongInput` with the wrong key."""
    return validate(find(given.name).settings, given.options, section="method")


def build(given: MethodSettings, context: Context) -> Plan:
    """Return the plan of the named method in this context."""
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


def resolve(recipe: Recipe) -> Recipe:
    """Return the recipe with the method's options and training defaults spelt out."""
    settings = settings_of(recipe.method)
    # As JSON, so that the recipe is equal to itself when it is read again: lists are no tuples.
    method = MethodSettings(name=recipe.method.name, **settings.model_dump(mode="json"))
    defaults = find(recipe.method.name).training
    unset = {key: value for key, value in defaults.items() if key not in recipe.training.model_fields_set}
    training = recipe.training.model_copy(update=unset)
    return recipe.model_copy(update={"method": method, "training": training})
