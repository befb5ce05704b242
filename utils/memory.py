"""The C library's memory settings."""

import ctypes
import functools
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
