"""The processes of a run, one or many: how a process joins, keeps quiet, notices that it must stop, and leaves."""

import contextlib
import functools
import logging
import os
import signal
import sys
import time
import traceback
import zlib
from collections.abc import Callable, Iterator

import absl.logging
import jax
import numpy as np
from jax.experimental import multihost_utils

from unet_jax import signals
from unet_jax.errors import InputError

SIGTERM_STATUS = 128 + signal.SIGTERM


@functools.cache
def quiet() -> None:
    """Silences orbax in this process: its messages on each step, and on writes that were abandoned."""
    absl.logging.set_verbosity(absl.logging.FATAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)

    def report(unraisable: "sys.UnraisableHookArgs", before: Callable[..., object] = sys.unraisablehook) -> None:
        # Writes that were abandoned end when orbax has gone.
        if str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    sys.unraisablehook = report


def join(coordinator: str | None, processes: int | None, process_id: int | None) -> None:
    """Joins this process to the others of a run, before anything else asks JAX for devices.

    `coordinator` is HOST:PORT of process 0. What is None is taken from Slurm, Open MPI or Kubernetes.

    Raises:
      InputError: something is neither given nor found.
    """
    try:
        jax.distributed.initialize(coordinator, processes, process_id)
    except (ValueError, RuntimeError) as error:
        flags = "--coordinator HOST:PORT, --processes N and --process-id I"
        raise InputError(f"--distributed: {str(error).splitlines()[0]} Give {flags}.") from None


def check_agreement(what: object) -> None:
    """Raises InputError in all processes, unless `what` has the same repr in all of them."""
    mine = np.array(zlib.crc32(repr(what).encode()), np.uint32)
    if (multihost_utils.process_allgather(mine) != mine).any():
        raise InputError("the processes differ in their flags or in the pictures they find: give all of them the same")


@contextlib.contextmanager
def noticing_signals() -> Iterator[list[int]]:
    """`signals.noticing`, for one process. With many, nothing is noticed: JAX has a handler, Ctrl-C ends at once."""
    if jax.process_count() > 1:
        yield []
        return
    with signals.noticing() as noticed:
        yield noticed


@contextlib.contextmanager
def leaving_at_once() -> Iterator[None]:
    """After an error, ends one of many processes at once. JAX itself would wait minutes for the others to end.

    They may be waiting for this one. Once it is gone they fail: at once, or when its heartbeat has been missed (100 s).
    """
    try:
        yield
    except BaseException as error:
        status = error.code if isinstance(error, SystemExit) else 1
        if status == SIGTERM_STATUS:  # all leave together
            raise
        if not isinstance(error, SystemExit):
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        if jax.process_index() == 0:  # the others need its service: those that fail too should end first
            time.sleep(2)
        os._exit(status if isinstance(status, int) else 1)
