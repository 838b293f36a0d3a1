"""Ctrl-C (SIGINT) and SIGTERM: in the loop of steps they set a flag, elsewhere they end the process at once.

No KeyboardInterrupt is raised. Where JAX's C++ calls Python, as in its garbage collector callback, it would be lost or
end in a crash. Instead a thread waits for the signals, which also works while compiled code runs.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

_noticed: list[int] | None = None  # the signals noticed by the loop of steps that runs now


@contextlib.contextmanager
def ending_at_once(line: str) -> Iterator[None]:
    """Makes Ctrl-C print the line and end the process with status 130, unless `noticing` is active.

    In a thread other than the main one, or where Ctrl-C is ignored (as in a shell's background), nothing changes.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        yield
        return
    read, write = os.pipe()
    os.set_blocking(write, False)
    before = signal.signal(signal.SIGINT, lambda *_: None)
    before_fd = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    threading.Thread(target=_wait, args=(read, line), daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before_fd)
        signal.signal(signal.SIGINT, before)
        os.close(write)  # which ends the thread


def _wait(read: int, line: str) -> None:
    while number := os.read(read, 1):
        if number[0] != signal.SIGINT:
            continue
        if _noticed is None or signal.SIGINT in _noticed:
            os.write(2, f"\n{line}\n".encode())
            os._exit(128 + signal.SIGINT)
        _noticed.append(signal.SIGINT)
        os.write(2, b"\nstopping after this step; Ctrl-C again ends at once\n")
    os.close(read)


@contextlib.contextmanager
def noticing() -> Iterator[list[int]]:
    """A list of the signals noticed, which do not end the process: SIGTERM, and in `ending_at_once` the first Ctrl-C.

    In a thread other than the main one nothing is noticed: Python allows handlers in the main thread only.
    """
    global _noticed
    noticed: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield noticed
        return
    before = signal.signal(signal.SIGTERM, lambda number, _: noticed.append(number))
    _noticed = noticed
    try:
        yield noticed
    finally:
        _noticed = None
        signal.signal(signal.SIGTERM, before)
