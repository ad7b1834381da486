"""The exceptions a caller of Stillroom can meet.

```
StillroomError
├── WrongInput      the recipe, data, model or folder is not what was expected   (exit code 2)
└── RunFailed       a sound run could not go on: a loss that is not finite, a full disk   (exit code 1)
```

Every message says what was expected, what was found, and what to do.
"""


class StillroomError(Exception):
    """Base of all errors that Stillroom raises on purpose."""

    exit_code = 1
    shared = False
    """Whether every process that trains together raises it, so that one may tell it for all."""


class WrongInput(StillroomError):
    """The caller's input is wrong; nothing was changed and the message says what to correct."""

    exit_code = 2


class RunFailed(StillroomError):
    """A run could not go on; its last good checkpoint is kept and the message names it."""
