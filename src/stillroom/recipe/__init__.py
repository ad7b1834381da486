"""What a run is: typed settings, read from YAML and from `a.b=c`, refused where misspelt.

`syntax` reads and writes them, `problems` says what is wrong, `settings` has the sections, `recipes`,
`comparison` and `sweep` what is run.
"""

from stillroom.recipe.comparison import Comparison, OutOfDomainSettings
from stillroom.recipe.problems import nearest, validate
from stillroom.recipe.recipes import FinetuneRecipe, PretrainRecipe, Recipe
from stillroom.recipe.settings import (
    DatasetSettings,
    MethodSettings,
    Precision,
    Settings,
    TeacherSettings,
    TextSettings,
    TrainingSettings,
)
from stillroom.recipe.sweep import Range, Sweep, read_tries
from stillroom.recipe.syntax import read_yaml, set_value, setting

__all__ = [
    "Comparison",
    "DatasetSettings",
    "FinetuneRecipe",
    "MethodSettings",
    "OutOfDomainSettings",
    "Precision",
    "PretrainRecipe",
    "Range",
    "Recipe",
    "Settings",
    "Sweep",
    "TeacherSettings",
    "TextSettings",
    "TrainingSettings",
    "nearest",
    "read_tries",
    "read_yaml",
    "set_value",
    "setting",
    "validate",
]
