"""The memory of this machine, and the C library's settings of it."""

import ctypes
import functools
import os
import sys

MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # of glibc's malloc.h


@functools.cache
def disable_malloc_trim() -> None:
    """Keep large freed blocks in this process, where the C library is glibc.

    By default they return to the kernel, which clears new pages for the same tensors in every iteration: 10 to 18% of
    an iteration's time on convnet64. The process then keeps the largest amount it ever held.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        # an older glibc takes at most 32 MB
        if libc.mallopt(MMAP_THRESHOLD, 1 << 30) or libc.mallopt(MMAP_THRESHOLD, 1 << 25):
            libc.mallopt(TRIM_THRESHOLD, (1 << 31) - 1)


def total_memory() -> int:
    """Bytes of main memory; 2^63 where the system does not say."""
    names = getattr(os, "sysconf_names", {})
    if "SC_PHYS_PAGES" not in names:
        return 1 << 63
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out: torch raises a RuntimeError like any other for it."""
    words = ("allocate memory", "out of memory", "Storage size calculation overflowed", "alloc_cpu")
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)
