"""What is wrong with settings, in Stillroom's words: pydantic's problems, and the nearest valid name."""

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from stillroom.errors import WrongInput

_Model = TypeVar("_Model", bound=BaseModel)


def validate(model: type[_Model], values: Mapping[str, Any], section: str = "") -> _Model:
    """Return `model(**values)`, or raise `WrongInput` with one line per wrong key or value."""
    if not isinstance(values, Mapping):
        where = section or "recipe"
        raise WrongInput(f"{where} should hold `key: value` lines, found {values!r:.60}.")
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        raise WrongInput("\n".join(_explain(model, error.errors(), section))) from None


def nearest(name: str, valid: Sequence[str]) -> str:
    """Return ` Did you mean x?` for the valid name nearest to `name`, and the list of all."""
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    hint = f" Did you mean {close[0]}?" if close else ""
    return f"{hint} Valid: {', '.join(valid)}."


_EXPECTED = {
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "dict_type": "`key: value` lines",
    "finite_number": "a finite number",
    "float_parsing": "a number",
    "float_type": "a number",
    "greater_than": "a number greater than {gt:.10g}",
    "greater_than_equal": "a number greater than or equal to {ge:.10g}",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "int_type": "a whole number",
    "less_than": "a number less than {lt:.10g}",
    "less_than_equal": "a number less than or equal to {le:.10g}",
    "list_type": "a list in brackets",
    "literal_error": "{expected}",
    "model_type": "`key: value` lines",
    "path_type": "a path",
    "string_too_short": "text that is not empty",
    "string_type": "text",
    "too_short": "at least {min_length}",
    "tuple_type": "a list in brackets",
}
"""What pydantic's problems mean, by their type."""

# Pydantic's names for the members of a union, which stand among the keys.
_MEMBER = re.compile(r"(literal|tuple|list|function-after)\[.*\]|constrained-(int|float)")


def _explain(model: type[BaseModel], problems: Sequence[Any], section: str) -> list[str]:
    """Return a line for each wrong key or value."""
    # A value that fits no member of a union has a problem with each, and one line.
    told: dict[tuple[str, str], list[str]] = {}
    for problem in problems:
        path = [str(part) for part in problem["loc"] if not _MEMBER.fullmatch(str(part))]
        where = ".".join([section, *path] if section else path)
        found = f", found {problem['input']!r}" if path else ""
        if problem["type"] == "extra_forbidden":
            told[f"Unknown key {where}.{_valid_keys(model, path)}", ""] = []
        elif problem["type"] == "missing":
            told[f"Missing key {where}: set it in the recipe or on the command line.", ""] = []
        elif problem["type"] in _EXPECTED:
            expected = _EXPECTED[problem["type"]].format(**problem.get("ctx", {}))
            told.setdefault((where, found), []).append(expected)
        else:
            message = problem["msg"].removeprefix("Value error, ")
            told[f"{where or 'recipe'}: {message}{found}.", ""] = []
    return [
        f"{head}: expected {' or '.join(one_of)}{found}." if one_of else head
        for (head, found), one_of in told.items()
    ]


def _valid_keys(model: type[BaseModel], path: Sequence[str]) -> str:
    """Return what `nearest` says of the last part of a path; nothing where its section is not known."""
    inner: type[BaseModel] | None = model
    for part in path[:-1]:
        # A name in a mapping, or a place in a list, is no section: its model is already found.
        if inner is not None and part in inner.model_fields:
            inner = _model_in(inner.model_fields[part].annotation)
    return "" if inner is None else nearest(path[-1], list(inner.model_fields))


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """Return the settings that an annotation holds: itself, or inside a union, a list or a mapping."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_model_in, get_args(annotation))), None)
