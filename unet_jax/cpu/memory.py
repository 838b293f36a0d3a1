"""What a process keeps of its memory."""

import ctypes
import functools
import sys
from typing import Any

import jax

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


@functools.cache
def keep_freed_memory() -> None:
    """Lets a process keep the memory of a step on the CPU for the next one, if its C library is glibc.

    A step's temporaries are one block. By default glibc takes the block from the system and gives it back after each
    step, and the system zeroes its pages each time: a quarter of the time of a step of 8 x 128x128. Only the main
    thread's heap can keep such a block, so steps run in that thread. Dispatch is then synchronous, which costs nothing
    where a step uses all cores. The memory that compiling took, up to 2 GB, is given back before the step runs.
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
