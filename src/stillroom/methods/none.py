"""No teacher: the student learns from hard labels alone. The control of every comparison."""

from stillroom.methods.base import Context, Method, Plan, Stage
from stillroom.methods.prediction import HARD, HardLabels
from stillroom.recipe import Settings


class NoneSettings(Settings):
    """Nothing to set."""


def build(settings: NoneSettings, context: Context) -> Plan:
    """Return one stage of hard labels."""
    return Plan({"hard": HardLabels(context.kind)}, (Stage(0.0, {"hard": 1.0}),))


METHOD = Method(
    name="none",
    title="No teacher",
    paper="",
    summary="Hard labels alone: the control that shows what distillation adds.",
    status="control",
    settings=NoneSettings,
    build=build,
    terms={"hard": HARD},
)
