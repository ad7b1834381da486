"""Plain knowledge distillation on the prediction layer.

Hinton, Vinyals, Dean: "Distilling the Knowledge in a Neural Network", 2015, arXiv 1503.02531.
"""

from typing import Annotated

from pydantic import Field

from stillroom.methods.base import Context, Method, Plan, Stage
from stillroom.methods.prediction import HARD, SOFT, HardLabels, SoftLabels
from stillroom.recipe import Settings


class KDSettings(Settings):
    """Options of `kd`. The paper gives no single value for either."""

    temperature: Annotated[float, Field(gt=0)] = 2.0
    """T of the soft labels; the loss is multiplied by T squared (sec. 2 of the paper)."""
    soft_weight: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Weight of the soft labels; hard labels weigh one minus this."""


def build(settings: KDSettings, context: Context) -> Plan:
    """Return one stage: ``a T^2 KL(teacher || student) + (1 - a) hard``."""
    weights = {"soft": settings.soft_weight}
    if settings.soft_weight < 1:
        weights["hard"] = 1 - settings.soft_weight
    terms = {
        "soft": SoftLabels(context.kind, settings.temperature),
        "hard": HardLabels(context.kind),
    }
    return Plan(terms, (Stage(0.0, weights),))


METHOD = Method(
    name="kd",
    title="Knowledge distillation",
    paper="Hinton et al. 2015, arXiv 1503.02531",
    summary="The teacher's softened labels beside the hard labels.",
    status="as the paper",
    settings=KDSettings,
    build=build,
    terms={"soft": SOFT, "hard": HARD},
)
