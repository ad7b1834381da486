"""A student's start from its teacher: `folding` writes a narrower one, `basis` turns one to its teacher.

Both run the teacher on `text`; `statistics` holds what was seen, `families` the names of a model's parts.
"""

from stillroom.start.basis import align
from stillroom.start.folding import can_fold, fold

__all__ = ["align", "can_fold", "fold"]
