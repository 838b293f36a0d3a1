"""Checkpoints of a run: the train state, and its progress in JSON. Only this module reads and writes with orbax."""

import functools
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding

from unet_jax.errors import STORAGE, InputError, quiet
from unet_jax.train import TrainState

DISK = [os.strerror(number) for number in STORAGE]


class Progress(NamedTuple):
    """What metrics.jsonl held when the checkpoint was made, and the losses of the steps since (in mid-epoch)."""

    records: list[dict[str, Any]]
    losses: list[float]

    def steps(self, steps_per_epoch: int) -> int:
        """The number of steps taken so far."""
        return len(self.records) * steps_per_epoch + len(self.losses)


class MidEpochError(Exception):
    """Averaged weights have no batch statistics of their own before the epoch ends."""


class Restored(NamedTuple):
    """A checkpoint that was read, and a line for each newer one that could not be read."""

    state: TrainState
    progress: Progress
    skipped: list[str]


@contextmanager
def manager(folder: Path, step: int) -> Iterator[ocp.CheckpointManager]:
    """The checkpoints of a run that goes on from `step`; later ones (damaged, or to be made again) are removed.

    The last two are kept, in case the newest is damaged. Where a device has memory of its own, writes happen in the
    background, and closing waits for them. All processes of a run save together in one folder, each its own part.

    Raises:
      InputError: a write in the background failed, since the disk is full or not writable.
    """
    options = ocp.CheckpointManagerOptions(
        max_to_keep=2,
        cleanup_tmp_directories=True,
        # On the CPU a donated state's memory would be overwritten while it is being saved.
        enable_async_checkpointing=jax.default_backend() != "cpu",
    )
    checkpoints = ocp.CheckpointManager(folder.absolute(), options=options)
    try:
        for later in [s for s in checkpoints.all_steps() if s > step]:
            checkpoints.delete(later)
        yield checkpoints
    finally:
        with _disk_errors(checkpoints):
            checkpoints.close()


@contextmanager
def _disk_errors(checkpoints: ocp.CheckpointManager) -> Iterator[None]:
    """Turns an error of the disk into an InputError. It is known by its text: orbax raises it as one of many types."""
    try:
        yield
    except Exception as error:
        if reason := next((reason for reason in DISK if reason in str(error)), None):
            message = f"a checkpoint in {checkpoints.directory} cannot be written ({reason}), earlier ones are whole"
            raise InputError(f"{message}: free some room, and the same command goes on") from None
        raise


def save(checkpoints: ocp.CheckpointManager, state: TrainState, progress: Progress) -> None:
    """Saves under the state's step.

    Raises:
      InputError: the disk is full or not writable. Earlier checkpoints are left as they are.
    """
    # A copy, since the next epoch adds to the records while they are being written.
    notes = {"records": [*progress.records], "losses": progress.losses, "checksum": _checksum(state)}
    items = ocp.args.Composite(state=ocp.args.StandardSave(_fields(state)), progress=ocp.args.JsonSave(notes))
    with _disk_errors(checkpoints):
        checkpoints.save(int(state.step), args=items)


def exists(folder: Path) -> bool:
    """Whether the folder has a complete checkpoint, sound or not (one that is being written has no number as yet)."""
    return folder.is_dir() and any(entry.name.isdecimal() for entry in folder.iterdir())


def restore(folder: Path, abstract: TrainState, sharding: NamedSharding, whole_epochs: bool = False) -> Restored:
    """The newest readable checkpoint in `folder`, with the shapes and dtypes of `abstract`, placed by `sharding`.

    Only those at the end of an epoch count if `whole_epochs`.

    Raises:
      InputError: the folder has no checkpoint, or none that can be read and fits the config.
    """
    if not exists(folder):
        raise InputError(
            f"no complete checkpoint in {folder}: the run was stopped before its first epoch ended, or they are gone"
        )
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), _fields(abstract))
    items = ocp.args.Composite(state=ocp.args.StandardRestore(target), progress=ocp.args.JsonRestore())
    skipped: list[str] = []
    within = False
    with _reader(folder) as checkpoints:
        for step in sorted(checkpoints.all_steps(), reverse=True):
            try:
                restored = checkpoints.restore(step, args=items)
                state = TrainState(**restored["state"])
                if jax.tree.map(_kind, state) != jax.tree.map(_kind, abstract):
                    raise ValueError("its arrays are not those of the config")
                if restored["progress"].pop("checksum", None) not in (None, _checksum(state)):
                    raise ValueError("its values have changed since it was written")
                progress = Progress(**restored["progress"])
                if whole_epochs and progress.losses:
                    raise MidEpochError("in the middle of an epoch, averaged weights have no batch statistics")
                return Restored(state, progress, skipped)
            except Exception as error:  # a damaged file fails in as many ways as there are layers below
                within |= isinstance(error, MidEpochError)
                reason = str(error).strip().split("\n")[0][:150]
                skipped.append(f"checkpoint {step} in {folder} cannot be used ({reason})")
    advice = "train on to the end of the epoch" if within else "it is damaged, or was made with another config"
    raise InputError(f"{'; '.join(skipped)}: {advice}")


@contextmanager
def _reader(folder: Path) -> Iterator[ocp.CheckpointManager]:
    """The checkpoints of a folder, read-only, without orbax's warnings that they cannot be written."""
    with quiet("absl"):
        options = ocp.CheckpointManagerOptions(read_only=True)
        with ocp.CheckpointManager(folder.absolute(), options=options) as checkpoints:
            yield checkpoints


def _fields(state: TrainState) -> dict[str, Any]:
    # Fields that a run does not use are left out, so that its files are the same as before those fields existed.
    return {name: value for name, value in state._asdict().items() if value is not None}


def _checksum(state: TrainState) -> int:
    # Orbax does not notice when a bit of an array flips on the disk.
    return functools.reduce(lambda value, x: zlib.crc32(np.asarray(x).tobytes(), value), jax.tree.leaves(state), 0)


def _kind(array: Any) -> tuple[Any, Any]:
    return array.shape, array.dtype
