"""Which teacher layer each student layer learns from."""

from typing import Literal

from stillroom.errors import WrongInput

LayerMap = Literal["uniform"] | tuple[int, ...]
"""`uniform`, or the teacher layer (from 1) of each student layer."""


def resolve_layer_map(layer_map: LayerMap, student_depth: int, teacher_depth: int) -> tuple[int, ...]:
    """Return the teacher layer, from 1, of each student layer.

    Uniform is ``m(i) = i * teacher_depth / student_depth``.

    Raises:
        WrongInput: If uniform does not come out even, or a given map has the wrong number of
            layers or a layer that the teacher lacks.

    Example:
        >>> resolve_layer_map("uniform", 4, 12)
        (3, 6, 9, 12)
    """
    if layer_map == "uniform":
        if teacher_depth % student_depth:
            even = [n for n in range(1, teacher_depth + 1) if teacher_depth % n == 0]
            raise WrongInput(
                f"A uniform layer map from {student_depth} student layers to {teacher_depth} teacher "
                f"layers does not come out even. Use a student of {', '.join(map(str, even))} layers, "
                "or give method.layer_map as a list of teacher layers."
            )
        step = teacher_depth // student_depth
        return tuple(range(step, teacher_depth + 1, step))
    if len(layer_map) != student_depth or not all(1 <= j <= teacher_depth for j in layer_map):
        raise WrongInput(
            f"method.layer_map should hold {student_depth} teacher layers from 1 to {teacher_depth}, "
            f"one for each student layer, found {list(layer_map)}."
        )
    return layer_map
