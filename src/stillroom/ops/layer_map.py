"""Which teacher layer each student layer learns from."""

from typing import Literal

from stillroom.errors import WrongInput

LayerMap = Literal["uniform"] | tuple[int, ...]
"""`uniform`, or the teacher layer (from 1) of each student layer."""


def resolve_layer_map(layer_map: LayerMap, student_depth: int, teacher_depth: int) -> tuple[int, ...]:
    """Return the teacher layer, from 1, of each student layer.

    Uniform is ``m(i) = i * teacher_depth / student_depth``, rounded up where that is no whole number.

    Args:
        layer_map: `uniform`, or the map itself.
        student_depth: Blocks of the student.
        teacher_depth: Blocks of the teacher.

    Returns:
        One number for each student layer.

    Raises:
        WrongInput: If uniform is asked of a student deeper than its teacher, or a given map has the
            wrong number of layers or a layer that the teacher lacks.

    Example:
        >>> resolve_layer_map("uniform", 4, 12)
        (3, 6, 9, 12)
        >>> resolve_layer_map("uniform", 4, 6)
        (2, 3, 5, 6)
    """
    if layer_map == "uniform":
        if student_depth > teacher_depth:
            raise WrongInput(
                f"A uniform layer map has no teacher layer for each of {student_depth} student layers, "
                f"the teacher has {teacher_depth}. Use a student of at most {teacher_depth} layers, or "
                "give method.layer_map as a list of teacher layers."
            )
        return tuple(-(-i * teacher_depth // student_depth) for i in range(1, student_depth + 1))
    if len(layer_map) != student_depth or not all(1 <= j <= teacher_depth for j in layer_map):
        raise WrongInput(
            f"method.layer_map should hold {student_depth} teacher layers from 1 to {teacher_depth}, "
            f"one for each student layer, found {list(layer_map)}."
        )
    return layer_map
