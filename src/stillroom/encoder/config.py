"""A model's configuration: the task that it states, and the width of its blocks."""

from typing import Any

from stillroom.data.tasks import Kind, Task

PROBLEM_TYPES: dict[Kind, str] = {
    "classification": "single_label_classification",
    "regression": "regression",
    "multi-label": "multi_label_classification",
}
"""What a configuration calls each kind of labels."""


def describe_task(config: Any, task: Task) -> None:
    """Write the task's label names, width and kind into a configuration.

    Example:
        >>> from stillroom.data.tasks import GLUE
        >>> from transformers import BertConfig
        >>> config = BertConfig()
        >>> describe_task(config, GLUE["glue/stsb"])
        >>> config.num_labels, config.id2label, config.problem_type
        (1, {0: 'score'}, 'regression')
    """
    names = task.labels or ("score",)
    config.id2label = dict(enumerate(names))
    config.label2id = {label: i for i, label in enumerate(names)}
    config.problem_type = PROBLEM_TYPES[task.kind]


def kind_of(config: Any) -> Kind | None:
    """Return the kind of labels that a configuration states, or None where it states none of these.

    Example:
        >>> from transformers import BertConfig
        >>> kind_of(BertConfig(problem_type="multi_label_classification")), kind_of(BertConfig())
        ('multi-label', None)
    """
    return next((kind for kind, name in PROBLEM_TYPES.items() if name == config.problem_type), None)


def ffn_width(config: Any) -> int:
    """Return the number of FFN units of a block."""
    return int(config.hidden_dim if hasattr(config, "hidden_dim") else config.intermediate_size)


def set_ffn_width(config: Any, width: int) -> None:
    """Set the number of FFN units of a block."""
    setattr(config, "hidden_dim" if hasattr(config, "hidden_dim") else "intermediate_size", width)
