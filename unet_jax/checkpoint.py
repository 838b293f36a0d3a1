"""Checkpoints of a run: the train state, and beside it in JSON how far it had come. The only place that knows orbax."""

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
        """How many steps that makes."""
        return len(self.records) * steps_per_epoch + len(self.losses)


class Restored(NamedTuple):
    """A checkpoint read back, and a line for each newer one that could not be."""

    state: TrainState
    progress: Progress
    skipped: list[str]


@contextmanager
def manager(folder: Path, step: int) -> Iterator[ocp.CheckpointManager]:
    """The checkpoints of a run that goes on from `step`; later ones (damaged, or to be made again) are removed.

    The last two are kept, so that a damaged newest has an elder. Writes happen behind the training where a device has
    memory of its own. Closing waits for them. All processes of a run save together, each its part, in one folder.

    Raises:
      InputError: a write behind the training found the disk full, or not to be written.
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
    """Tells what the disk refuses as an InputError; it comes through orbax in as many types as there are layers."""
    try:
        yield
    except Exception as error:
        if reason := next((reason for reason in DISK if reason in str(error)), None):
            message = f"a checkpoint in {checkpoints.directory} cannot be written ({reason}), those before it are whole"
            raise InputError(f"{message}: free some room, and the same command goes on") from None
        raise


def save(checkpoints: ocp.CheckpointManager, state: TrainState, progress: Progress) -> None:
    """Saves under the state's step.

    Raises:
      InputError: the disk is full, or not to be written. The checkpoints before are left as they are.
    """
    # A copy of the records, to which the next epoch adds while they are being written.
    notes = {"records": [*progress.records], "losses": progress.losses, "checksum": _checksum(state)}
    items = ocp.args.Composite(state=ocp.args.StandardSave(_fields(state)), progress=ocp.args.JsonSave(notes))
    with _disk_errors(checkpoints):
        checkpoints.save(int(state.step), args=items)


def exists(folder: Path) -> bool:
    """Whether the folder has a complete checkpoint, sound or not (one that is being written has no number as yet)."""
    return folder.is_dir() and any(entry.name.isdecimal() for entry in folder.iterdir())


def restore(folder: Path, abstract: TrainState, sharding: NamedSharding) -> Restored:
    """The newest checkpoint in `folder` that can be read, as the shapes and dtypes of `abstract`, on `sharding`.

    Raises:
      InputError: the folder has no checkpoint, or none that can be read or fits the config.
    """
    if not exists(folder):
        raise InputError(f"no complete checkpoint in {folder}: the run was stopped before its first epoch ended")
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), _fields(abstract))
    items = ocp.args.Composite(state=ocp.args.StandardRestore(target), progress=ocp.args.JsonRestore())
    skipped: list[str] = []
    with _reader(folder) as checkpoints:
        for step in sorted(checkpoints.all_steps(), reverse=True):
            try:
                restored = checkpoints.restore(step, args=items)
                state = TrainState(**restored["state"])
                if jax.tree.map(_kind, state) != jax.tree.map(_kind, abstract):
                    raise ValueError("its arrays are not those of the config")
                if restored["progress"].pop("checksum", None) not in (None, _checksum(state)):
                    raise ValueError("its values have changed since it was written")
                return Restored(state, Progress(**restored["progress"]), skipped)
            except Exception as error:  # a damaged file fails in as many ways as there are layers below
                reason = str(error).strip().split("\n")[0][:150]
                skipped.append(f"checkpoint {step} in {folder} cannot be used ({reason})")
    raise InputError(f"{skipped[0]}: it is damaged, or was made with another config")


@contextmanager
def _reader(folder: Path) -> Iterator[ocp.CheckpointManager]:
    """The checkpoints of a folder, to be read alone; orbax's warnings that they are not to be written are left out."""
    with quiet("absl"):
        options = ocp.CheckpointManagerOptions(read_only=True)
        with ocp.CheckpointManager(folder.absolute(), options=options) as checkpoints:
            yield checkpoints


def _fields(state: TrainState) -> dict[str, Any]:
    # Without those that a run does not use, so that files stay as they were before there were such.
    return {name: value for name, value in state._asdict().items() if value is not None}


def _checksum(state: TrainState) -> int:
    # Of arrays, orbax does not notice a bit that has flipped on the disk.
    return functools.reduce(lambda value, x: zlib.crc32(np.asarray(x).tobytes(), value), jax.tree.leaves(state), 0)


def _kind(array: Any) -> tuple[Any, Any]:
    return array.shape, array.dtype
