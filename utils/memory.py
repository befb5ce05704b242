"""Memory an attack frees in one iteration and wants again in the next."""

import ctypes
import functools
import sys

MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # of glibc's malloc.h


@functools.cache
def keep_pages() -> None:
    """From here on large blocks that are freed stay with this process, where the C library is glibc.

    It gives them back otherwise, and the kernel clears new pages for the same tensors in every iteration: 10 to 18% of
    the time of one on convnet64. The process keeps the most it ever held.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        # an older glibc takes no more than 32 MB
        if libc.mallopt(MMAP_THRESHOLD, 1 << 30) or libc.mallopt(MMAP_THRESHOLD, 1 << 25):
            libc.mallopt(TRIM_THRESHOLD, (1 << 31) - 1)
