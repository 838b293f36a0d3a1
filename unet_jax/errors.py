"""An error that the user can fix is an InputError: one line that says what is wrong and what to do."""

import contextlib
import errno
import logging
import os
import re
import sys
from collections.abc import Iterator

from unet_jax.signals import ending_at_once

# What a disk may refuse.
STORAGE = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "free some room or choose another folder"),
    **dict.fromkeys((errno.EACCES, errno.EROFS), "allow it or choose another folder"),
}
SIGPIPE_STATUS = 128 + 13


class InputError(ValueError):
    """Bad input. Its message is one line for the user: what is wrong, and what to do about it."""


@contextlib.contextmanager
def names_for_flags() -> Iterator[None]:
    """Rewrites an InputError for callers from Python: it says batch_size where the command says --batch-size."""
    try:
        yield
    except InputError as error:
        text = re.sub(r"(?<!\S)--([a-z]+(?:-[a-z]+)*)", lambda flag: flag[1].replace("-", "_"), str(error))
        raise InputError(text) from None


@contextlib.contextmanager
def quiet(library: str) -> Iterator[None]:
    """Silences the warnings that this library logs."""
    logger = logging.getLogger(library)
    before = logger.level
    logger.setLevel(max(before, logging.ERROR))
    try:
        yield
    finally:
        logger.setLevel(before)


@contextlib.contextmanager
def exit_on_input_error(interrupted: str = "interrupted") -> Iterator[None]:
    """Turns an InputError (or a full disk) into one line on stderr and exit status 2, for a command.

    `interrupted` is what Ctrl-C prints (signals.ending_at_once). If nobody reads the output any more, as in
    `unet-jax train | head -1`, the process ends with SIGPIPE's status.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # file names may have bytes that are no characters
            stream.reconfigure(errors="backslashreplace")
    try:
        with ending_at_once(interrupted):
            try:
                yield
            finally:
                sys.stdout.flush()
    except InputError as error:
        message = str(error)
    except BrokenPipeError:
        for stream in (sys.stdout, sys.stderr):  # which are flushed once more at the end
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        sys.exit(SIGPIPE_STATUS)
    except OSError as error:
        if error.errno not in (*STORAGE, errno.EEXIST, errno.ENOTDIR, errno.ENAMETOOLONG):
            raise
        advice = STORAGE.get(error.errno, "choose another name")
        message = f"{error.strerror}: {error.filename or 'writing a file'}; {advice}"
    except (AssertionError, RuntimeError):
        if not (message := _unusable_platform()):
            raise
    else:
        return
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def _unusable_platform() -> str:
    """The message if JAX_PLATFORMS asks for a device that JAX does not have, else ""."""
    platforms = os.environ.get("JAX_PLATFORMS")
    if not platforms or "jax" not in sys.modules:
        return ""
    try:
        sys.modules["jax"].devices()
    except (AssertionError, RuntimeError):
        return f"JAX has no device for JAX_PLATFORMS={platforms}: unset it, or install jax for that device"
    return ""
