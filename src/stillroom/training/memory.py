"""Keep freed memory for the next step, where the C library would hand it back in every one."""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Numbers of glibc's malloc.h."""


def keep_freed_memory() -> bool:
    """Tell glibc to serve large tensors from its heap and to keep the heap; return whether it does.

    A step frees and asks for the same tensors of megabytes. By default glibc maps those from the system
    and gives them back, so that each page costs a fault in every step. Afterwards the process holds as
    much as it held at its most. Both thresholds are needed: with the first alone the heap's end is
    trimmed and grown again instead. Nothing is done where there is no glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, 2**30)) and bool(mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
