"""The folder of a run: its files, who may write them, and how a run is read back."""

import contextlib
import fcntl
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import jax
import numpy as np
from jax.experimental import multihost_utils

from unet_jax import weights
from unet_jax.checkpoint import Progress, Restored, exists, restore
from unet_jax.config import RunConfig, from_dict
from unet_jax.device import Placement
from unet_jax.errors import InputError
from unet_jax.train import TrainState, init_state, make_model, make_optimizer

FILES = (
    *("config.json", "environment.json", "split.json", "metrics.jsonl", "summary.json", "scores.csv"),
    *("metrics.png", "results.png"),
)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write. It replaces `path` once it is whole: a kill or a full disk leaves the old file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a file by `replacing`, in UTF-8 except for names with other bytes. Only the first process does so."""
    if jax.process_index() > 0:
        return
    with replacing(path) as file:
        file.write(text.encode(errors="surrogateescape"))


def write_json(path: Path, value: Any) -> None:
    """`write_text` of indented JSON."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_records(folder: Path, records: list[dict[str, Any]]) -> None:
    """Makes metrics.jsonl hold these records, a line each."""
    write_text(folder / "metrics.jsonl", "".join(json.dumps(record) + "\n" for record in records))


def labels(folders: Sequence[Path]) -> list[str]:
    """A short name for each run: the last two parts of its path, or the whole of each if two would be alike."""
    short = ["/".join(folder.parts[-2:]) for folder in folders]
    return short if len(set(short)) == len(short) else list(map(str, folders))


def read_records(folder: Path) -> list[dict[str, Any]]:
    """The records in metrics.jsonl, one for each epoch."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def data_dir(folder: Path, config: RunConfig) -> str | None:
    """The data_dir of the run in `folder` as seen from here; None where the run had none.

    Raises:
      InputError: there is no such folder.
    """
    name = config.data.data_dir
    if not name:
        return None
    if not os.path.isabs(name):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # an older run: its name is kept as it is
            name = os.path.relpath(folder.resolve() / json.loads((folder / "environment.json").read_text())["data_dir"])
    if not os.path.isdir(name):
        raise InputError(f"{folder} was trained on the pictures in {name}, which is no folder here: give a --data-dir")
    return name


def read_config(folder: Path) -> RunConfig:
    """The config of the run in `folder`.

    Raises:
      InputError: there is no run, or its config cannot be read.
    """
    try:
        return from_dict(json.loads((folder / "config.json").read_text()))
    except FileNotFoundError:
        raise InputError(f"{folder} is no run folder: it has no config.json") from None
    except InputError as error:
        raise InputError(f"{folder}/config.json: {error}") from None
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise InputError(f"{folder}/config.json cannot be read ({error})") from None


def load(folder: Path, placement: Placement, config: RunConfig | None = None) -> tuple[RunConfig, Restored]:
    """The config of the run in `folder` and its newest sound checkpoint, or its best one where validation chose one.

    With averaged weights, checkpoints within an epoch do not count: their averages have no statistics yet.
    A folder that has only weights gives an inference state (see `train.inference_state`); `pets` is the network that
    comes with the package (see `weights.find`).

    Raises:
      InputError: there is no run, or no checkpoint that can be read.
    """
    folder = weights.find(folder)
    config = config or read_config(folder)
    if (folder / weights.FILE).exists() and not exists(folder / "checkpoints"):
        state = jax.device_put(weights.read(folder, abstract_state(config, placement)), placement.replicated)
        return config, Restored(state, Progress([], []), [])
    checkpoints = folder / ("best" if exists(folder / "best") else "checkpoints")
    return config, restored(config, checkpoints, placement, whole_epochs=config.train.ema > 0)


def restored(config: RunConfig, checkpoints: Path, placement: Placement, whole_epochs: bool = False) -> Restored:
    """The newest sound checkpoint in the folder `checkpoints` of a run of this config; InputError if there is none.

    Prints a line for each that is skipped: damaged, or not at the end of an epoch if `whole_epochs`.
    """
    found = restore(checkpoints, abstract_state(config, placement), placement.replicated, whole_epochs)
    for line in found.skipped:
        print(line, file=sys.stderr)
    return found


def fresh_state(config: RunConfig, placement: Placement) -> TrainState:
    """The train state at step 0, of initial weights."""
    model, train = make_model(config.model, len(config.data.class_names), placement), config.train
    optimizer = make_optimizer(train, steps_per_epoch=1)  # its state is the same for any
    return init_state(model, optimizer, train.seed, ema=train.ema)


def abstract_state(config: RunConfig, placement: Placement) -> TrainState:
    """The shapes and dtypes of `fresh_state`, without its arrays."""
    return jax.eval_shape(partial(fresh_state, config, placement))


def finished_records(folder: Path) -> list[dict[str, Any]]:
    """The records of the run in `folder` up to where its summary was written; none if it has no summary."""
    try:
        epochs = int(json.loads((folder / "summary.json").read_text())["epochs"])
        return read_records(folder)[:epochs]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def clear(folder: Path) -> None:
    """Removes a run's own files from its folder, and nothing else. Of many processes, the first; the others wait."""
    if jax.process_index() == 0:
        (folder / "config.json").unlink(missing_ok=True)  # first: without it what is left is no run
        evaluations = [file.parent for file in folder.glob("evaluation-*/evaluation.json")]  # of what is removed here
        for path in (*(folder / name for name in ("checkpoints", "best", "tensorboard")), *evaluations):
            shutil.rmtree(path, ignore_errors=True)
        for name in FILES:
            (folder / name).unlink(missing_ok=True)
    multihost_utils.sync_global_devices("run folder cleared")


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Makes the folder and keeps it for this run alone. Of many processes, the first does so for all.

    Raises:
      InputError: another process trains there, or it cannot be written (in all processes).
    """
    with contextlib.ExitStack() as files:
        refusal = ""
        if jax.process_index() == 0:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                fcntl.flock(files.enter_context((folder / ".lock").open("w")), fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                refusal = f"another process trains in {folder}: wait for it, or choose another folder"
            except OSError as error:
                refusal = f"{folder} cannot be written ({error.strerror}): choose another folder"
        if multihost_utils.broadcast_one_to_all(np.array(bool(refusal))):
            raise InputError(refusal or f"the first process cannot have {folder}")
        yield
