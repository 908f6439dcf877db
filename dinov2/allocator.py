"""Memory that a step frees stays with the process for the next one, on a CPU."""

import ctypes
import sys

MMAP_MAX, TRIM_THRESHOLD, TOP_PAD = -4, -1, -2  # of mallopt(3)
SETTINGS = {MMAP_MAX: 0, TRIM_THRESHOLD: -1, TOP_PAD: 2**26}  # bytes by which the heap grows at a time


def keep_freed_memory() -> bool:
    """Have the C library keep what is freed; says whether that could be done.

    By default it asks the kernel for every large tensor anew, and the kernel clears each page at its first
    use: an eighth of the time of a step of ViT-S. Only glibc has these settings.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    done = [mallopt(name, value) == 1 for name, value in SETTINGS.items()]
    return all(done)
