"""Freed memory stays with the process.

glibc hands every block above some 100 kB back to the system and gets it anew, zeroed: 2 to 6 % of a training step on a
CPU, a tenth of a small network's forward pass.
"""

import contextlib
import ctypes
import functools


@functools.cache
def keep_freed() -> None:
    """For the rest of the process; with another C library nothing happens."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, the most that every version takes
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
