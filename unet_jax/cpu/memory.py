"""What a process keeps of its memory."""

import ctypes
import functools
import sys
from typing import Any

import jax

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


@functools.cache
def keep_freed_memory() -> None:
    """Lets a process keep the memory of a step on the CPU for the next one, where its C library is glibc.

    A step's temporaries are one block. As it is, glibc takes each such block from the system and gives it back after
    the step, and the system zeroes the pages of the next: a quarter of the time of a step of 8 x 128x128. Only the main
    thread's heap can keep such blocks, so steps run there: dispatch is no longer asynchronous, which gained nothing
    where a step takes all cores. What compiling a step took, up to 2 GB, goes back before the step runs.
    """
    if sys.platform != "linux" or not hasattr(libc := ctypes.CDLL(None), "mallopt"):
        return
    libc.mallopt(M_TRIM_THRESHOLD, -1)  # never
    libc.mallopt(M_MMAP_MAX, 0)
    jax.config.update("jax_cpu_enable_async_dispatch", False)

    def give_back(event: str, duration_secs: float, **_: Any) -> None:
        if event.endswith("/backend_compile_duration") and duration_secs > 1:
            libc.malloc_trim(0)

    jax.monitoring.register_event_duration_secs_listener(give_back)
