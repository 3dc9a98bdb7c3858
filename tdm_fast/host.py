"""The process's memory on the host: keep it, measure it."""

from __future__ import annotations

import ctypes
import platform
import re
import resource
from pathlib import Path

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def keep_memory() -> None:
    """Ask glibc to keep freed blocks for reuse instead of returning them to the system.

    A training step on a CPU frees and takes hundreds of MB; every return costs page faults at the next step, which on
    virtual machines can outweigh the arithmetic. Does nothing where the C library is not glibc.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        limit = 2**30
        libc.mallopt(_M_MMAP_THRESHOLD, limit)
        libc.mallopt(_M_TRIM_THRESHOLD, limit)


def peak_memory() -> int:
    """Bytes: the most that this process ever had resident.

    Linux says so itself; its `getrusage` also counts the process that this one was started by.
    """
    status = Path("/proc/self/status")
    if status.exists() and (found := re.search(r"VmHWM:\s*(\d+) kB", status.read_text())):
        return int(found[1]) * 1024
    scale = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
