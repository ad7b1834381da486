"""Processes that do runs: what they make of Ctrl-C."""

import signal
import subprocess
import sys

from stillroom.run.handout import _deaf

_SAYS = [sys.executable, "-c", "import signal; print(signal.getsignal(signal.SIGINT) == signal.SIG_IGN)"]


def test_a_process_that_still_loads_is_deaf_to_the_keyboard() -> None:
    """Else it would write the traceback of an import, behind what this one says."""
    before = signal.getsignal(signal.SIGINT)
    with _deaf():
        within = subprocess.run(_SAYS, capture_output=True, text=True, check=True).stdout
    assert within == "True\n" and signal.getsignal(signal.SIGINT) == before
    assert subprocess.run(_SAYS, capture_output=True, text=True, check=True).stdout == "False\n"
