"""What every command shares: its options, where its output goes, and how it ends when it fails.

Standard output holds the result and nothing else, standard error all the rest. Only the standard
library, typer and rich are imported at start-up, so that `--help` comes at once.
"""

import contextlib
import ctypes
import errno
import json
import os
import shlex
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from stillroom.errors import StillroomError, WrongInput

DEBUG = "STILLROOM_DEBUG"
"""Environment variable that shows the traceback of errors; `--debug` sets it."""

_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR)
"""What the system says of a path that cannot be used: no fault of the program."""

_NOISY = r"(transformers|datasets|torch|accelerate|huggingface_hub|sklearn)(\.|$)"

DATA = "Data"
RUN = "Run"

_DATASET: Any = typer.Option(
    "--dataset",
    metavar="D",
    help="glue/<task>, builtin/<name>, or a file or folder of your own.",
    rich_help_panel=DATA,
)
Dataset = Annotated[str, _DATASET]
OptionalDataset = Annotated[str | None, _DATASET]
DataDir = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Folder that holds glue/<task>/<split>.parquet. Default: $STILLROOM_DATA, else the hub.",
        rich_help_panel=DATA,
    ),
]
Augmented = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Rows that `stillroom augment` wrote, to train on as well; the teacher labels them.",
        rich_help_panel=DATA,
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Set any key of the recipe, such as training.epochs=3; may be repeated, the last one counts.",
        rich_help_panel=RUN,
    ),
]
DataOverrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Set how the data is read, such as dataset.max_length=64; may be repeated.",
        rich_help_panel=DATA,
    ),
]
Seed = Annotated[
    int | None,
    typer.Option(metavar="N", help="Short for --set training.seed=N.", rich_help_panel=RUN),
]
AsJson = Annotated[
    bool,
    typer.Option("--json", help='Print the result as one JSON object; an error as {"error": ...}.'),
]


def examples(*commands: str) -> str:
    """Return the end of a help page: one example per line."""
    # Empty lines between: older versions of typer join lines that follow each other.
    return "\n\n".join(["[bold]Examples:[/]", *(f"$ {escape(command)}" for command in commands)])


def overrides(
    given: Sequence[str] | None,
    *,
    data_dir: Path | None = None,
    augmented: Path | None = None,
    seed: int | None = None,
) -> list[str]:
    """Return what `--data-dir`, `--augmented`, `--seed` and `--set` ask for, as `key=value` in order."""
    # JSON is YAML, and quotes what YAML would read as a number or a date.
    paths = {"dataset.data_dir": data_dir, "dataset.augmented": augmented}
    short = [f"{key}={json.dumps(str(path))}" for key, path in paths.items() if path is not None]
    return [*short, *([] if seed is None else [f"training.seed={seed}"]), *(given or ())]


def dataset_settings(
    name: str | None, data_dir: Path | None, given: Sequence[str] | None, *, run: str | Path | None = None
) -> Any:
    """Return the `DatasetSettings` that `--dataset`, `--data-dir` and `--set` name, None without any.

    Without `--dataset` they change those of the `run`, where its folder has a recipe.

    Raises:
        WrongInput: If another key than one of `dataset` is set, or options stand without a data set.
    """
    from stillroom.recipe import DatasetSettings, read_yaml, set_value, validate

    changes = overrides(given, data_dir=data_dir)
    values: dict[str, Any] = {"dataset": {} if name is None else {"name": name}}
    recipe = None if run is None else Path(run) / "recipe.yaml"
    if name is None and changes and recipe is not None and recipe.is_file():
        own = read_yaml(recipe).get("dataset") or {}
        values["dataset"] = {"name": own} if isinstance(own, str) else dict(own)
    for change in changes:
        set_value(values, change)
    own = values.pop("dataset")
    if values:
        raise WrongInput(f"Only keys of dataset can be set here, found {', '.join(values)}.")
    return validate(DatasetSettings, own, section="dataset") if own else None


def numbers(option: str, text: str) -> list[int]:
    """Return the whole numbers that an option lists with commas.

    Raises:
        WrongInput: If that is not what it lists.
    """
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise WrongInput(f"{option} {text}: expected whole numbers with commas, such as 1,2.") from None


def data_options(folder: Path) -> str:
    """Return the options that name the data of a finished run, for the command to try next."""
    from stillroom.recipe import DatasetSettings, read_yaml

    settings = DatasetSettings.model_validate(read_yaml(folder / "recipe.yaml")["dataset"])
    options = ["--dataset", settings.name]
    # What is trained on beside the rows says nothing of how the rows are read.
    left_out = {"name", "augmented", "augmented_labels"}
    for key, value in settings.model_dump(mode="json", exclude=left_out, exclude_defaults=True).items():
        if key == "data_dir":
            options += ["--data-dir", value]
        else:
            options += ["--set", f"dataset.{key}={json.dumps(value)}"]
    return shlex.join(options)


def execute(
    work: Callable[[Console], dict[str, Any]],
    *,
    as_json: bool,
    stopped: Callable[[], str] = lambda: "Stopped.",
    together: bool = False,
) -> dict[str, Any]:
    """Return what `work` returns, printed as JSON if asked for, or end the process with its error.

    Exit codes: 0 done, 1 failed, 2 wrong input, 130 stopped from the keyboard. Of processes that were
    launched together the first one talks; another ends here, and tells of errors that it alone has.

    Args:
        work: Gets a console for progress and warnings; imports what it needs.
        as_json: Whether the result, or the error, goes to standard output as one JSON object.
        stopped: What to say after Ctrl-C.
        together: Whether processes that were launched together can do it.
    """
    console = Console(stderr=True)
    # In a file or a pipe no line needs to be broken.
    console.soft_wrap = not console.is_terminal
    debug = os.environ.get(DEBUG, "") not in ("", "0")
    try:
        with _quiet(debug), _stdout_to_stderr():
            if not together and os.environ.get("WORLD_SIZE", "1") != "1":
                from stillroom.preflight import require_one_process

                require_one_process()
            result = work(console)
        text = json.dumps(result, indent=2, allow_nan=False)
    except StillroomError as error:
        if error.shared and not _talks():
            # The launcher ends all when one has ended: the first one is to tell why before.
            time.sleep(2)
            raise typer.Exit(error.exit_code) from None
        _fail(console, str(error), error.exit_code, as_json=as_json, debug=debug)
    except KeyboardInterrupt:
        _fail(console, stopped(), 130, as_json=as_json, debug=debug)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _REFUSED and error.filename is not None:
            place = f"{error.filename} cannot be used: {error.strerror}. Check the path and who may use it."
            _fail(console, place, 2, as_json=as_json, debug=debug)
        reason = f"{type(error).__name__}: {error}"
        hint = "" if debug else f"\nThis was not expected. Set {DEBUG}=1 to see where it came from."
        _fail(console, reason + hint, 1, as_json=as_json, debug=debug)
    if not _talks():
        raise typer.Exit(0)
    if as_json:
        typer.echo(text)
    return result


@contextlib.contextmanager
def standard_streams() -> Iterator[None]:
    """Open the standard streams that are closed, and end in one line where the result cannot be written."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            # It gets the lowest number that is free, which is the closed one's.
            opened = os.open(os.devnull, os.O_RDWR)
            setattr(sys, name, os.fdopen(opened, "w" if number else "r"))
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except OSError as error:
        if os.environ.get(DEBUG, "") not in ("", "0"):
            traceback.print_exc()
        # What is still in the buffer goes nowhere, without a second error at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        with contextlib.suppress(OSError):
            print(f"Error: Standard output cannot be written ({error.strerror or error}).", file=sys.stderr)
        sys.exit(1)


def _talks() -> bool:
    """Return whether this is the first of the processes that were launched together, or alone."""
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0"


def show(*parts: Table | str) -> None:
    """Print a result for people on standard output."""
    console = Console()
    if not console.is_terminal:
        # In a file or a pipe no table needs to be squeezed.
        console = Console(width=200)
    for part in parts:
        # A command or a path that is to be copied must stay in one piece.
        console.print(part, markup=False, highlight=False, soft_wrap=isinstance(part, str))


def table(columns: Mapping[str, str], title: str | None = None) -> Table:
    """Return an empty table: column names with `left` or `right`."""
    made = Table(title=title, title_justify="left", title_style="bold")
    for name, justify in columns.items():
        made.add_column(Text(name), justify="right" if justify == "right" else "left")
    return made


def cost_cells(model: Mapping[str, Any]) -> list[str]:
    """Return parameters in millions, megabytes and milliseconds, for `COST_COLUMNS`."""
    return [
        f"{model['parameters'] / 1e6:.1f}",
        f"{model['bytes'] / 1e6:.1f}",
        f"{model['ms_per_example']:.2f}",
    ]


COST_COLUMNS = {"M parameters": "right", "MB": "right", "ms/example": "right"}


def _fail(console: Console, message: str, code: int, *, as_json: bool, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    text = Text.assemble(("Error: " if code != 130 else "", "bold red"), message)
    console.print(text)
    if as_json:
        typer.echo(json.dumps({"error": message}))
    raise typer.Exit(code) from None


@contextlib.contextmanager
def _quiet(debug: bool) -> Iterator[None]:
    """Silence what third parties say about themselves. What the user has set stays as it is."""
    # Set before their import, which reads them. Tokenizers warn of forks that do no harm.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if debug:
        yield
        return
    for name in ("TRANSFORMERS_VERBOSITY", "DATASETS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=_NOISY)
        yield


@contextlib.contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Send to standard error what is printed meanwhile, by C libraries and child processes too."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        # C's own buffer would otherwise be written at exit, behind the result.
        ctypes.CDLL(None).fflush(None)
        os.dup2(kept, 1)
        os.close(kept)
