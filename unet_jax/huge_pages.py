"""Large pages of memory for the CPU's steps. Imports nothing that is slow."""

import os
import sys
from pathlib import Path

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
TUNABLE = "glibc.malloc.hugetlb"


def use_huge_pages() -> None:
    """Starts this program anew with glibc's malloc asking for huge pages, where the system gives them when asked.

    XLA allocates the temporaries of a CPU's step at each call and frees them after it: 0.5 GB for 8 pictures of
    128x128, which the kernel zeroes 4 kB at a time, an eighth of the step. glibc reads the setting as a process starts
    (GNU C library manual, Memory Allocation Tunables), so the process replaces itself; its id, files and standard
    streams stay. Nothing happens a second time, on other systems, or where pages are huge always or never.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    try:
        asked_for = "[madvise]" in SETTING.read_text()
    except OSError:
        return
    if asked_for and TUNABLE not in tunables:
        os.environ["GLIBC_TUNABLES"] = f"{tunables}:{TUNABLE}=1".removeprefix(":")
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
