"""`stillroom methods`: what there is to distil with, and its options."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

import stillroom
from stillroom.cli import frame

EXAMPLES = frame.examples("stillroom methods", "stillroom methods lrc-bert", "stillroom methods kd --json")


def methods(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="Show one method with its options.")
    ] = None,
    as_json: frame.AsJson = False,
) -> None:
    """List the methods, or show one with its paper and options."""

    def work(console: Console) -> dict[str, Any]:
        from stillroom.methods import METHODS, find

        if name is None:
            return {"methods": [_summary(method) for method in METHODS.values()]}
        return _summary(find(name)) | _details(find(name))

    found = frame.execute(work, as_json=as_json)
    if as_json:
        return
    if name is None:
        table = frame.table(dict.fromkeys(("name", "paper", "summary", "status"), "left"))
        for method in found["methods"]:
            table.add_row(*(method[key] for key in ("name", "paper", "summary", "status")))
        frame.show(table, "Options of one: stillroom methods NAME")
        return
    table = frame.table(dict.fromkeys(("option", "values", "default", "meaning"), "left"))
    for key, option in found["options"].items():
        table.add_row(f"method.{key}", option["values"], json.dumps(option["default"]), option["meaning"])
    frame.show(
        f"{found['title']}: {found['summary']}",
        f"Paper: {found['paper'] or '-'}",
        f"Status: {found['status']}",
        *([f"Card: {found['card']}"] if found["card"] else []),
        *([table] if found["options"] else ["It has no options."]),
        *(f"Default: training.{key}={value}" for key, value in found["training"].items()),
    )


def _summary(method: Any) -> dict[str, Any]:
    return {key: getattr(method, key) for key in ("name", "title", "paper", "summary", "status")}


def _details(method: Any) -> dict[str, Any]:
    schema = method.settings.model_json_schema()["properties"] if method.settings.model_fields else {}
    options = {
        key: {
            "values": _values(field),
            "default": field.get("default"),
            "meaning": " ".join(field.get("description", "").split()),
        }
        for key, field in schema.items()
    }
    # Of a clone; an installed package brings no documents.
    card = Path(stillroom.__file__).parents[2] / "docs" / "methods" / f"{method.name}.md"
    return {
        "card": str(card) if card.exists() else None,
        "options": options,
        "training": dict(method.training),
    }


_LIMITS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}


def _values(field: dict[str, Any]) -> str:
    """Return the values that a field of a JSON schema takes, in words."""
    if "anyOf" in field:
        return " | ".join(_values(option) for option in field["anyOf"])
    if "enum" in field:
        return " | ".join(map(str, field["enum"]))
    if "const" in field:
        return str(field["const"])
    if "$ref" in field or "additionalProperties" in field:
        # Sections of their own, which the card describes.
        return "mapping"
    if field["type"] == "array":
        return f"list of {_values(field['items'])}"
    limits = ", ".join(f"{sign} {field[key]:g}" for key, sign in _LIMITS.items() if key in field)
    name = {"boolean": "true | false", "null": "none"}.get(field["type"], field["type"])
    return f"{name} {limits}".strip()
