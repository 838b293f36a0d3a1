"""One run from its config to its figures: its folder, its epochs, and a checkpoint after each epoch."""

import dataclasses
import math
import signal
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import jax

from unet_jax import checkpoint, device, environment, processes, runs, splits, trackers, typed
from unet_jax.checkpoint import Restored
from unet_jax.checks import check_config, check_patience
from unet_jax.config import RunConfig, to_dict
from unet_jax.data import batches
from unet_jax.data.batches import Loader, Parts
from unet_jax.data.cache import Split
from unet_jax.data.datasets import fill_in, load_splits, resolve
from unet_jax.data.tiles import unit
from unet_jax.device import Placement
from unet_jax.errors import InputError, names_for_flags
from unet_jax.folders import default_cache_dir
from unet_jax.loop import NonFiniteLossError, StepResult, fit
from unet_jax.metrics import best_epoch
from unet_jax.progress import Clock, Display
from unet_jax.results import draw_results, write_results
from unet_jax.start import resume, settle_precision, start_from, tell_overlap, what_is_done
from unet_jax.trackers import Tracker
from unet_jax.train import Steps, TrainState, make_steps


@names_for_flags()
def run(
    config: RunConfig,
    workdir: str | Path,
    *,
    overwrite: bool = False,
    download: bool = False,
    cache_dir: str | Path | None = None,
    compilation_cache: bool = True,
    deterministic: bool = False,
    log: Tracker | Literal["tensorboard"] | None = None,
) -> Path:
    """Makes the run of a config, or the rest of it, in a folder. Returns the folder, for `unet_jax.load`.

    An unfinished run of the same config in the folder continues from its newest checkpoint; a finished one is left
    alone. The keywords are options of the command `train`, and the output is the same. As with the command, the process
    keeps freed memory for the next step (so that JAX no longer dispatches asynchronously on the CPU) and compiled
    programs for the next start (`device.set_up`). SIGTERM ends it, by SystemExit, once the step under way is saved.

    Args:
      config: all settings of the run, for example `config.default_config("mp_tr_dice", "synthetic")`, changed by
        `dataclasses.replace`. The dataset "auto" and a folder's class names are resolved here.
      workdir: the run's folder.
      overwrite: starts anew in a folder that holds another run, whose files are removed.
      download: downloads and prepares the dataset in config.data.data_dir if it is not there.
      cache_dir: folder of the decoded pictures, by default ~/.cache/unet_jax.
      compilation_cache: keeps compiled programs in ~/.cache/unet_jax/xla.
      deterministic: has a GPU add in a fixed order.
      log: is called with each epoch's record (a dictionary, the line of metrics.jsonl) once results.png is drawn, for
        example `wandb.log`; "tensorboard" is `trackers.tensorboard(workdir)`. An epoch that is repeated after a kill is
        logged again.

    Raises:
      InputError: the config, the pictures, the folder or `log` cannot be used, or the loss became infinite or NaN.
    """
    folder, config = Path(workdir), typed.build(RunConfig, dataclasses.asdict(config))  # as config.json is read
    tracker = trackers.chosen(log, folder)
    dataset, notice = resolve(config.data.dataset, config.data.data_dir, download)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, dataset=dataset))
    check_config(config)
    config = fill_in(config)
    check_config(config)  # again, with the classes of a folder
    if notice:
        print(notice, file=sys.stderr)
    device.set_up(default_cache_dir() / "xla" if compilation_cache else None)
    print(device.describe())
    train_run(
        config,
        folder,
        device.placement(),
        overwrite=overwrite,
        cache_dir=cache_dir,
        deterministic=deterministic,
        log=tracker,
    )
    return folder


def train_run(
    config: RunConfig,
    folder: Path,
    placement: Placement,
    *,
    overwrite: bool = False,
    cache_dir: str | Path | None = None,
    deterministic: bool = False,
    log: Tracker | None = None,
) -> None:
    """Does the work of `run` on these devices, for a complete config with a resolved dataset."""
    check_patience(config)
    config = settle_precision(config, folder, placement, overwrite)
    if done := what_is_done(folder, config, overwrite):
        print(done)
        return
    loaded = load_splits(config, cache_dir)
    scale = config.data.scale or loaded["train"].scale
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, scale=scale))
    names = [split.names for split in loaded.values()]
    shared = dataclasses.replace(config, data=dataclasses.replace(config.data, data_dir=None))
    processes.check_agreement((shared, overwrite, deterministic, bool(log), folder.name, names))
    parts = divide(config, loaded, placement)
    names_of_parts = {name: part.names if part else [] for name, part in parts._asdict().items()}
    initial = None
    if overwrite or not checkpoint.exists(folder / "checkpoints"):
        initial = start_from(config, placement)  # before the lock, so that a refusal leaves no folder
        tell_overlap(config, names_of_parts)
    with runs.lock(folder):
        if done := what_is_done(folder, config, overwrite):  # by another process in the meantime
            print(done)
            return
        if overwrite:
            runs.clear(folder)
        goes_on = checkpoint.exists(folder / "checkpoints")
        splits.write(folder, names_of_parts, goes_on)
        start = resume(folder, config, placement) if goes_on or not initial else initial
        steps_per_epoch = len(parts.train)
        if start.progress.steps(steps_per_epoch) != int(start.state.step):
            raise InputError(f"{folder} was trained on other pictures: choose another --workdir, or --overwrite")
        runs.write_json(folder / "config.json", to_dict(config))
        sums = {name: split.checksums for name, split in loaded.items()}
        environment.write(folder, config, len(start.progress.records) if goes_on else None, sums)
        per_epoch = f"{steps_per_epoch} step{'s' * (steps_per_epoch > 1)} an epoch"
        print(f"{config.variant} on {config.data.dataset}: {per_epoch}, files in {folder}")
        steps = make_steps(config, placement, steps_per_epoch, deterministic)
        state, records = train_epochs(config, folder, steps, parts, start, log)
        write_results(config, folder, steps, state, records, parts)


def divide(config: RunConfig, loaded: Mapping[str, Split], placement: Placement) -> Parts:
    """The pictures in batches, part by part; raises InputError for batches that the devices do not divide."""
    batch_size, split = config.train.batch_size, loaded["train"]
    training, validation = batches.divide(split, config.data.validation_fraction, config.train.seed)
    if empty := len(split.names) - len(training) - len(validation):
        print(f"not trained on: {empty} {unit(config.data)} in which no pixel counts")
    placement.check_batch(batch_size, len(training), len(validation))
    return Parts(
        Loader(split, batch_size, placement, training),
        Loader(split, batch_size, placement, validation) if len(validation) else None,
        Loader(loaded["test"], batch_size, placement) if "test" in loaded else None,
    )


def train_epochs(
    config: RunConfig, folder: Path, steps: Steps, parts: Parts, start: Restored, log: Tracker | None
) -> tuple[TrainState, list[dict[str, Any]]]:
    """Trains to the end with `save_epochs`. A loss that is not finite and a lack of memory become InputErrors."""
    records = list(start.progress.records)
    try:
        state, stopped = save_epochs(config, folder, steps, parts, start, records, log)
    except NonFiniteLossError as error:
        last = f"epoch {len(records)} is the last good checkpoint" if records else "there is no checkpoint before it"
        raise InputError(f"{error}; {last}, in {folder}: try a smaller --learning-rate") from None
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise parts.train.placement.out_of_memory(parts.train.batch_size) from None
    if stopped:
        name = "Ctrl-C" if stopped == signal.SIGINT else "SIGTERM"
        print(f"stopped by {name}: step {int(state.step)} is saved, the same command goes on from there")
        sys.exit(128 + stopped)
    return state, records


def save_epochs(
    config: RunConfig,
    folder: Path,
    steps: Steps,
    parts: Parts,
    start: Restored,
    records: list[dict[str, Any]],
    log: Tracker | None,
) -> tuple[TrainState, int]:
    """Trains. Each epoch ends with a printed line, a record (in `records` and metrics.jsonl), and a checkpoint.

    With a validation part, the epoch with the best mean IoU on it has a second checkpoint, in the folder `best`. After
    SIGTERM or Ctrl-C, training stops at the next step and saves; after the last step of an epoch it evaluates first.
    Returns the state, and the number of the signal or 0.
    """
    train, held_out = parts.train, parts.held_out
    state, stop = start.state, 0
    display = Display(Clock(config.train.epochs, len(train), len(held_out or ()), int(state.step)), len(train))
    has_best = config.data.validation_fraction > 0
    with (
        checkpoint.manager(folder / "checkpoints", int(state.step)) as checkpoints,
        checkpoint.manager(folder / "best", int(state.step)) if has_best else nullcontext() as best,
        processes.noticing_signals() as noticed,
    ):
        for result in fit(config, steps, state, train, held_out, start.progress.losses, start.progress.records):
            state = result.state
            if isinstance(result, StepResult):
                display.step(result.epoch, result.step_of_epoch, result.losses)
                step = (result.epoch - 1) * len(train) + result.step_of_epoch
                # orbax makes many processes agree on a step; in a single process it notices nothing.
                stop = stop or sum(noticed[:1]) or signal.SIGTERM * checkpoints.reached_preemption(step)
                if stop and result.step_of_epoch < len(train) and math.isfinite(loss := float(result.loss)):
                    display.close()
                    checkpoint.save(checkpoints, state, checkpoint.Progress(records, [*result.losses, loss]))
                    break
                continue
            display.epoch(result.record)
            records.append(result.record)
            runs.write_records(folder, records)
            if log:
                draw_results(config, folder, steps, state, held_out or train, len(records))
                if jax.process_index() == 0:
                    log(result.record)
            # `best` comes first: after a kill between the two, the epoch is done again, and the best one is not lost.
            if best and best_epoch(records) == len(records) - 1:
                checkpoint.save(best, state, checkpoint.Progress(records, []))
            checkpoint.save(checkpoints, state, checkpoint.Progress(records, []))
            if stop:
                break
    return state, stop
