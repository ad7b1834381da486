"""What the tests of exports share."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

QUIET = Console(quiet=True)


@dataclass(frozen=True)
class Exported:
    """Folders of the source, its data and the export, and the manifest."""

    model: Path
    data: Path
    folder: Path
    manifest: dict[str, Any]
