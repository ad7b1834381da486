"""MATE-KD: a generator rewrites masked words so that student and teacher differ; the student learns both.

Rashid, Lioutas, Rezagholizadeh: "MATE-KD: Masked Adversarial TExt, a Companion to Knowledge
Distillation", ACL 2021, arXiv 2105.05912. Equations and defaults as in its official code
(huawei-noah/Efficient-NLP).
"""

from stillroom.methods.augmentation import AugmentationSettings, Divergence, augmentation
from stillroom.methods.base import Context, Method, Plan, Stage
from stillroom.methods.prediction import HARD, HardLabels


class MateKDSettings(AugmentationSettings):
    """Options of `mate-kd`. `adv_div: ce` with `student_mode: train` is what the official code does."""


def build(settings: MateKDSettings, context: Context) -> Plan:
    """Return one stage: ``1/3 hard(X) + 1/3 D(X) + 1/3 D(X')``; the generator raises ``D(X')``.

    Raises:
        WrongInput: If no generator is given.
    """
    terms = {"hard": HardLabels(context.kind), "soft": Divergence(context.kind, settings.adv_div)}
    stage = Stage(0.0, {"hard": 1 / 3, "soft": 1 / 3}, augmented={"soft": 1 / 3})
    return Plan(terms, (stage,), augmentation=augmentation(settings, "mate-kd", {"soft": 1.0}))


METHOD = Method(
    name="mate-kd",
    title="MATE-KD",
    paper="Rashid et al. 2021, arXiv 2105.05912",
    summary="A generator rewrites masked words adversarially; the student learns on both texts.",
    status="as the official code, its cross-entropy replaced by KL",
    settings=MateKDSettings,
    build=build,
    terms={"soft": "brings the student’s answers to the teacher’s", "hard": HARD},
    training={"epochs": 30, "learning_rate": 2e-5, "weight_decay": 0.0, "max_grad_norm": 5.0},
)
