"""How settings are written: YAML, `a.b=c`, and `NAME:OPTION=VALUE`."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import yaml

from stillroom import durable
from stillroom.errors import WrongInput


class _Yaml(yaml.SafeLoader):
    """YAML as version 1.2 reads it: `off` is a word, 1e-4 is a number, and a date is text.

    A number that others read otherwise is text, too, and refused where a number is expected: 010 (8 or
    10), 0x10, 1_000, and 12:30 (750). A key that stands twice is an error.
    """

    yaml_implicit_resolvers = {
        first: [
            (tag, pattern)
            for tag, pattern in resolvers
            if not tag.endswith((":bool", ":int", ":float", ":timestamp"))
        ]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Return the mapping that follows; PyYAML would take the last of equal keys, and say nothing."""
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        # Before keys that a `<<` brings in join them: those may be set anew.
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            line, name = key.start_mark.line + 1, (key.tag, key.value)
            if name in lines:
                raise yaml.YAMLError(
                    f"the key {key.value!r} stands in line {lines[name]} and again in line {line}. Remove "
                    "one of them."
                )
            lines[name] = line
        return node


_Yaml.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
# Before the numbers with a point: the first that fits is taken.
_Yaml.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"[-+]?(0|[1-9][0-9]*)$"), list("-+0123456789")
)
_Yaml.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"([-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)


def read_value(text: str) -> Any:
    """Return what a text means as YAML, or raise `yaml.YAMLError`."""
    return yaml.load(text, Loader=_Yaml)


def read_yaml(path: Path) -> dict[str, Any]:
    """Return a YAML file's mapping, or raise `WrongInput` naming the file and line."""
    try:
        values = read_value(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise WrongInput(f"Expected a recipe file, found nothing at {path}.") from None
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise WrongInput(f"{path} cannot be read as YAML: {error}") from None
    if not isinstance(values, dict):
        raise WrongInput(f"{path} should hold `key: value` lines, found {type(values).__name__}.")
    return values


def write_yaml(path: Path, values: dict[str, Any]) -> None:
    """Write a mapping as YAML, its keys in their order."""
    durable.write_text(path, yaml.safe_dump(values, sort_keys=False))


def set_value(values: dict[str, Any], override: str) -> None:
    """Apply one `a.b=c` to nested `values` in place."""
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise WrongInput(f"Expected `--set key=value`, such as training.epochs=3, found {override!r}.")
    *sections, name = key.strip().split(".")
    for section in sections:
        inner = values.setdefault(section, {})
        if isinstance(inner, str):
            inner = values[section] = {"name": inner}
        if not isinstance(inner, dict):
            raise WrongInput(f"--set {override}: {section} is a single value, it has no {name}.")
        values = inner
    try:
        values[name] = read_value(text)
    except yaml.YAMLError as error:
        raise WrongInput(f"--set {override}: the value is not YAML: {error}") from None


def read_method(text: str) -> dict[str, Any]:
    """Return the section `method` that `NAME` or `NAME:OPTION=VALUE:OPTION=VALUE` stands for.

    Example:
        >>> read_method("lrc-bert:perturbation=off:alpha=0.5")
        {'name': 'lrc-bert', 'perturbation': 'off', 'alpha': 0.5}
    """
    name, *options = re.split(r":(?=\w+=)", text)
    values: dict[str, Any] = {"name": name}
    for option in options:
        set_value(values, option)
    return values


def setting(key: str, value: Any) -> str:
    """Return the option that sets a key, as it is typed in a shell.

    Example:
        >>> print(setting("dataset.labels", ["1", "it's"]))
        --set 'dataset.labels=["1","it'"'"'s"]'
    """
    if not isinstance(value, str):
        value = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return f"--set {shlex.quote(f'{key}={value}')}"
