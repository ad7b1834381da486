"""Stillroom: distil a fine-tuned encoder into a small, fast one, and prove what was kept."""

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stillroom.deploy.export import export
    from stillroom.deploy.latency import bench
    from stillroom.errors import RunFailed, StillroomError, WrongInput
    from stillroom.evaluation.compare import evaluate
    from stillroom.recipe import Comparison, DatasetSettings, FinetuneRecipe, PretrainRecipe, Recipe, Sweep
    from stillroom.run.compare import compare
    from stillroom.run.distill import distill
    from stillroom.run.finetune import finetune
    from stillroom.run.pretrain import pretrain
    from stillroom.run.sweep import sweep

    __version__: str

# Read by torch's CPU allocator at its first use: huge pages for large tensors. The gradient of a
# word-embedding table is asked for anew in every step, and costs a page fault per 4 KiB without.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
# Read by oneDNN at its first product: how many products it keeps compiled. Each length of a batch takes
# about 19, and its own number of 1,024 is less than what rows of up to 128 tokens need: then
# each step would compile its products anew.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "2048")

__all__ = [
    "Comparison",
    "DatasetSettings",
    "FinetuneRecipe",
    "PretrainRecipe",
    "Recipe",
    "RunFailed",
    "StillroomError",
    "Sweep",
    "WrongInput",
    "__version__",
    "bench",
    "compare",
    "distill",
    "evaluate",
    "export",
    "finetune",
    "pretrain",
    "sweep",
]

_HOMES = {
    "Comparison": "stillroom.recipe",
    "DatasetSettings": "stillroom.recipe",
    "FinetuneRecipe": "stillroom.recipe",
    "PretrainRecipe": "stillroom.recipe",
    "Recipe": "stillroom.recipe",
    "RunFailed": "stillroom.errors",
    "StillroomError": "stillroom.errors",
    "Sweep": "stillroom.recipe",
    "WrongInput": "stillroom.errors",
    "bench": "stillroom.deploy.latency",
    "compare": "stillroom.run.compare",
    "distill": "stillroom.run.distill",
    "evaluate": "stillroom.evaluation.compare",
    "export": "stillroom.deploy.export",
    "finetune": "stillroom.run.finetune",
    "sweep": "stillroom.run.sweep",
    "pretrain": "stillroom.run.pretrain",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: torch takes seconds, `--help` should not."""
    if name == "__version__":
        from importlib.metadata import version

        return version("stillroom")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
