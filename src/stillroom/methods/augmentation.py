"""What `mate-kd` and `cilda` share: the generator's options, and the divergence on the outputs.

Rashid et al.: "MATE-KD: Masked Adversarial TExt, a Companion to Knowledge Distillation", 2021, arXiv
2105.05912, as its official code computes it.
"""

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from stillroom.data.batching import Batch
from stillroom.data.tasks import Kind
from stillroom.encoder import Needs, Outputs
from stillroom.errors import WrongInput
from stillroom.methods.base import Augmentation, Term
from stillroom.ops.prediction import output_divergence
from stillroom.recipe import Settings


class AugmentationSettings(Settings):
    """Options of every method with a generator."""

    generator: str | None = None
    """Masked language model with the teacher's vocabulary: a folder or hub id. Must be given."""
    mask_probability: Annotated[float, Field(gt=0, lt=1)] = 0.3
    """p, with which each word is masked."""
    masks: Literal["fresh", "fixed"] = "fresh"
    """Whether a row's masked words are drawn anew in each step, or once for all of them."""
    n_generator: Annotated[int, Field(ge=1)] = 10
    """Generator steps at the start of each cycle; the student rests meanwhile."""
    n_student: Annotated[int, Field(ge=1)] = 100
    """Student steps at the end of each cycle; the generator rests meanwhile."""
    generator_learning_rate: Annotated[float, Field(gt=0)] = 5e-7
    """Peak learning rate of the generator; it rises and falls as the student's does."""
    adv_div: Literal["kl", "ce"] = "kl"
    """Divergence of student and teacher: KL, or the cross-entropy that MATE-KD's code computes."""
    student_mode: Literal["eval", "train"] = "eval"
    """Student in generator steps: without dropout, or with it, the generator then always as well."""


class Divergence(Term):
    """The divergence of the student's outputs from the teacher's: `ops.prediction.output_divergence`."""

    student_needs = Needs(logits=True)
    teacher_needs = Needs(logits=True)

    def __init__(self, kind: Kind, form: Literal["kl", "ce"]):
        super().__init__()
        self.kind = kind
        self.form = form

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """Return the divergence; in a generator step the teacher's logits carry a gradient too."""
        return output_divergence(student.logits, teacher.logits, form=self.form, kind=self.kind)


def augmentation(
    settings: AugmentationSettings,
    method: str,
    weights: Mapping[str, float],
    projections: Literal["frozen", "adv", "min"] = "frozen",
) -> Augmentation:
    """Return the augmentation that the options describe.

    Args:
        settings: The method's options.
        method: Its name, for the message.
        weights: Which terms the generator raises.
        projections: What happens to their parameters meanwhile.

    Raises:
        WrongInput: If no generator is given.
    """
    if settings.generator is None:
        raise WrongInput(
            f"{method} needs a masked language model with the teacher's vocabulary, which rewrites words "
            "of the training rows: set method.generator to a folder or a hub id. Where there is none, "
            "make one: stillroom generator --model minilm-l6 --dataset D -o DIR"
        )
    return Augmentation(
        generator=settings.generator,
        weights=weights,
        mask_probability=settings.mask_probability,
        masks=settings.masks,
        generator_steps=settings.n_generator,
        student_steps=settings.n_student,
        learning_rate=settings.generator_learning_rate,
        student_mode=settings.student_mode,
        projections=projections,
    )
