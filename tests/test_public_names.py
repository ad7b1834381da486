"""The public names: exact, importable, and cheap until they are used."""

import subprocess
import sys

import stillroom


def test_public_names_are_these() -> None:
    assert stillroom.__all__ == [
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


def test_every_public_name_is_there() -> None:
    for name in stillroom.__all__:
        value = getattr(stillroom, name)
        assert name == "__version__" or value.__name__ == name
        assert name in dir(stillroom)


def test_other_names_are_not() -> None:
    assert not hasattr(stillroom, "distil")


def test_the_package_and_its_recipes_do_not_import_torch() -> None:
    code = "import sys, stillroom; stillroom.Recipe; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
