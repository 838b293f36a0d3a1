"""Trains a variant of the U-Net and writes its run folder: `python experiments/run.py --variant mp_tr_dice`."""

import argparse
import dataclasses
import math
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import tyro

from unet_jax.config import (
    PUBLISHED,
    DatasetName,
    RunConfig,
    check_classes_of_data,
    check_config,
    default_config,
    differences,
    to_dict,
)
from unet_jax.errors import InputError, exit_on_input_error

INTERRUPTED = "interrupted; the same command goes on from the last checkpoint"

# JAX and what builds on it are imported where work begins, so that --help and a mistyped flag answer at once.
if TYPE_CHECKING:
    from unet_jax.checkpoint import Restored
    from unet_jax.data.batches import Loader
    from unet_jax.data.cache import Split
    from unet_jax.device import Placement
    from unet_jax.train import Steps, TrainState


@dataclasses.dataclass(frozen=True)
class Options:
    """Where and how a run is made: no part of what it is."""

    config: RunConfig
    workdir: str | None = None
    """The run's folder. Default: runs/<variant> (with `all`: a folder for each variant inside)."""
    overwrite: bool = False
    """Start anew in a folder that holds another run, whose files are removed."""
    download: bool = False
    """Download and prepare the dataset in --data-dir if it is not there."""
    cache_dir: str | None = None
    """Folder of the decoded pictures. Default: ~/.cache/unet_jax."""
    compilation_cache: bool = True
    """Keep compiled programs in ~/.cache/unet_jax/xla, so that a later start compiles nothing."""
    deterministic: bool = False
    """Have a GPU add in a fixed order: repeated and resumed runs are bit-equal, steps take longer."""
    distributed: bool = False
    """Be one of many processes that make the run together; Slurm, Open MPI and Kubernetes tell all the rest."""
    coordinator: str | None = None
    """HOST:PORT of process 0, the same for all, where nothing tells it; the port is a free one of your choice."""
    processes: int | None = None
    """How many processes there are, where nothing tells it."""
    process_id: int | None = None
    """Which of them this is, from 0, where nothing tells it."""


def parse(argv: Sequence[str]) -> list[Options]:
    """The options of each run asked for: the flags given, over the defaults of its variant and dataset."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--variant", default="mp_tr_dice")
    first.add_argument("--dataset", choices=get_args(DatasetName), default="auto")
    first.add_argument("--data-dir", "--data_dir")
    first.add_argument("--batch-size", "--batch_size")
    first.add_argument("--download", action="store_true")
    chosen, _ = first.parse_known_args(argv)
    names = list(PUBLISHED) if chosen.variant == "all" else [chosen.variant]
    dataset, notice = chosen.dataset, None
    for name in names:
        default_config(name, dataset)
    if not {"-h", "--help"} & set(argv):
        from unet_jax.data.datasets import resolve

        dataset, notice = resolve(dataset, chosen.data_dir, chosen.download)
    runs = []
    for name in names:
        options = tyro.cli(
            Options,
            args=argv,
            default=Options(default_config(name, dataset)),
            description=__doc__,
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
        )
        data = dataclasses.replace(options.config.data, dataset=dataset)
        config = dataclasses.replace(options.config, variant=name, data=data)
        check_config(config)
        if not options.distributed and (options.coordinator or options.processes or options.process_id):
            raise InputError("--coordinator, --processes and --process-id go with --distributed")
        from unet_jax.data.datasets import choose_batch_size, complete

        config = complete(config)
        config = config if chosen.batch_size else choose_batch_size(config)
        check_config(config)  # again, with the classes of a folder
        folder = Path(options.workdir or ("runs" if chosen.variant == "all" else f"runs/{name}"))
        folder = folder / name if chosen.variant == "all" else folder
        if notice and not options.workdir:
            folder = folder.with_name(f"{folder.name}-synthetic")
        runs.append(dataclasses.replace(options, config=config, workdir=str(folder)))
    if notice:
        print(f"\n{'!' * 100}\n{notice}\n{'!' * 100}\n", file=sys.stderr)
    return runs


def train_run(options: Options, placement: "Placement") -> None:
    """Makes one run, or what is left of it: from the checks before the first file to the figures after the last."""
    from unet_jax import checkpoint, processes, runs
    from unet_jax.data.batches import Loader, validation_rows
    from unet_jax.train import make_steps

    config, folder = options.config, Path(options.workdir or ".")
    if done := _epochs_done(folder, config, options.overwrite):
        print(f"{folder} has its {done} epochs already: give more --epochs, or --overwrite to start anew")
        return
    splits = load_splits(config, options.cache_dir)
    scale = config.data.scale or splits["train"].scale
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, scale=scale))
    batch_size = config.train.batch_size
    names = [split.names for split in splits.values()]
    shared = dataclasses.replace(config, data=dataclasses.replace(config.data, data_dir=None))
    processes.check_agreement((shared, options.overwrite, options.deterministic, folder.name, names))
    training, validation = validation_rows(
        splits["train"].names, config.data.validation_fraction, config.train.seed, splits["train"].validation
    )
    placement.check_batch(batch_size, len(training), len(validation))
    train = Loader(splits["train"], batch_size, placement, training)
    test = Loader(splits["test"], batch_size, placement) if "test" in splits else None
    held_out = Loader(splits["train"], batch_size, placement, validation) if len(validation) else test
    goes_on = not options.overwrite and checkpoint.exists(folder / "checkpoints")
    initial = None if goes_on else start_from(config, placement)  # what it refuses leaves no folder behind
    with runs.lock(folder):
        if options.overwrite:
            runs.clear(folder)
        split = {"train": train, "validation": held_out if len(validation) else None, "test": test}
        runs.write_split(folder, {name: loader.names if loader else [] for name, loader in split.items()}, goes_on)
        start = initial or resume(folder, config, placement)
        if start.progress.steps(len(train)) != int(start.state.step):
            raise InputError(f"{folder} was trained on other pictures: choose another --workdir, or --overwrite")
        runs.write_json(folder / "config.json", to_dict(config))
        runs.write_json(folder / "environment.json", runs.environment() | runs.way_to_data(folder, config))
        print(f"{config.variant} on {config.data.dataset}: {len(train)} steps an epoch, files in {folder}")
        steps = make_steps(config, placement, len(train), options.deterministic)
        state, records = train_epochs(config, folder, steps, train, held_out, start)
        finish(config, folder, steps, state, records, test, test or held_out or train)


def _epochs_done(folder: Path, config: RunConfig, overwrite: bool) -> int:
    """The epochs of a run that has no more to do, else 0; after refusing a folder that holds something else."""
    from unet_jax import runs

    if overwrite or not folder.exists():
        return 0
    if not (folder / "config.json").exists():
        if any(p.name != ".lock" for p in folder.iterdir()):
            raise InputError(f"{folder} holds other files than a run's: choose another --workdir")
        return 0
    if different := differences(runs.read_config(folder), config):
        raise InputError(
            f"{folder} holds a run with another config ({'; '.join(different)}):"
            " choose another --workdir, or --overwrite to start anew"
        )
    done = runs.epochs_finished(folder)
    return done if done >= config.train.epochs else 0


def load_splits(config: RunConfig, cache_dir: str | None) -> "dict[str, Split]":
    """The splits that have pictures as cached arrays, after the checks that need their sizes alone."""
    from unet_jax.data.cache import load_split
    from unet_jax.data.datasets import sources, training_pictures
    from unet_jax.folders import default_cache_dir

    data = config.data
    counts = {"train": data.train_examples, "test": data.test_examples}
    found = sources(data, config.train.seed)
    check_classes_of_data(data.class_names, found["train"].class_names, data.dataset)
    available = training_pictures(data, found["train"].size)
    if config.train.batch_size > available:
        raise InputError(f"--batch-size {config.train.batch_size} is larger than the {available} training pictures")
    cache = Path(cache_dir) if cache_dir else default_cache_dir()
    if not found["test"].size:
        print("there are no pictures to test on: all are trained on, but for what is kept for validation")
    return {
        name: load_split(source, data.image_size, counts[name], cache) for name, source in found.items() if source.size
    }


def start_from(config: RunConfig, placement: "Placement") -> "Restored":
    """A fresh state at step 0, with the parameters and statistics of --init-from if given."""
    import jax

    from unet_jax import runs, train
    from unet_jax.checkpoint import Progress, Restored

    state = runs.fresh_state(config, placement)
    if config.train.init_from:
        other = Path(config.train.init_from)
        theirs, restored = runs.load(other, placement)
        state = state._replace(**taken_over(config, theirs, state.params, train.variables(restored.state)))
    return Restored(jax.device_put(state, placement.replicated), Progress([], []), [])


def taken_over(config: RunConfig, theirs: RunConfig, fresh: Any, variables: dict[str, Any]) -> dict[str, Any]:
    """The variables of the run of --init-from; where its classes are others, with the last layer of `fresh`.

    Raises:
      InputError: the networks differ in more than that.
    """
    other = config.train.init_from
    no_matter: dict[str, Any] = {"dropout_rate": 0.0, "precision": "auto", "remat": False}
    ours, others = (dataclasses.asdict(dataclasses.replace(c.model, **no_matter)) for c in (config, theirs))
    if different := [f"{name} {others[name]} instead of {ours[name]}" for name in ours if ours[name] != others[name]]:
        raise InputError(f"--init-from {other} is a run of another network: {', '.join(different)}")
    if config.data.class_names == theirs.data.class_names:
        return variables
    print(f"the last layer starts anew: {other} has other classes ({', '.join(theirs.data.class_names)})")
    return {**variables, "params": {**variables["params"], "logits": fresh["logits"]}}


def resume(folder: Path, config: RunConfig, placement: "Placement") -> "Restored":
    """The newest sound checkpoint of an unfinished run, its metrics.jsonl brought in line."""
    from unet_jax import runs

    restored = runs.restored(config, folder / "checkpoints", placement)
    for line in restored.skipped:
        print(line, file=sys.stderr)
    runs.write_records(folder, restored.progress.records)
    print(f"going on from step {int(restored.state.step)}, {len(restored.progress.records)} epochs are done")
    return restored


def train_epochs(
    config: RunConfig, folder: Path, steps: "Steps", train: "Loader", held_out: "Loader | None", start: "Restored"
) -> "tuple[TrainState, list[dict[str, Any]]]":
    """Trains to the last epoch, by `save_epochs`, and tells what can go wrong on the way as InputErrors."""
    import jax

    from unet_jax.train import NonFiniteLossError

    records = list(start.progress.records)
    try:
        state, stopped = save_epochs(config, folder, steps, train, held_out, start, records)
    except NonFiniteLossError as error:
        last = f"epoch {len(records)} is the last good checkpoint" if records else "there is no checkpoint before it"
        raise InputError(f"{error}; {last}, in {folder}: try a smaller --learning-rate") from None
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise train.placement.out_of_memory(train.batch_size) from None
    if stopped:
        name = "Ctrl-C" if stopped == signal.SIGINT else "SIGTERM"
        print(f"stopped by {name}: step {int(state.step)} is saved, the same command goes on from there")
        sys.exit(128 + stopped)
    return state, records


def save_epochs(
    config: RunConfig,
    folder: Path,
    steps: "Steps",
    train: "Loader",
    held_out: "Loader | None",
    start: "Restored",
    records: list[dict[str, Any]],
) -> "tuple[TrainState, int]":
    """Trains; each epoch ends with its line, its record (in `records` and metrics.jsonl), and a checkpoint.

    The best epoch by the validation part's mean IoU, if there is such a part, has a second one in the folder `best`.
    After SIGTERM or Ctrl-C it saves at the next step (past an epoch's last, when that is evaluated), and returns which
    of the two it was, else 0.
    """
    from unet_jax import checkpoint, processes, runs
    from unet_jax.train import StepResult, fit

    state, stop = start.state, 0
    display = Display(Clock(config.train.epochs, len(train), len(held_out or ()), int(state.step)), len(train))
    has_best = config.data.validation_fraction > 0
    with (
        checkpoint.manager(folder / "checkpoints", int(state.step)) as checkpoints,
        checkpoint.manager(folder / "best", int(state.step)) if has_best else nullcontext() as best,
        processes.noticing_signals() as noticed,
    ):
        for result in fit(config, steps, state, train, held_out, start.progress.losses):
            state = result.state
            if isinstance(result, StepResult):
                display.step(result.epoch, result.step_of_epoch, result.losses)
                step = (result.epoch - 1) * len(train) + result.step_of_epoch
                # orbax has JAX's processes agree on a step; of a process alone it knows nothing.
                stop = stop or sum(noticed[:1]) or signal.SIGTERM * checkpoints.reached_preemption(step)
                if stop and result.step_of_epoch < len(train) and math.isfinite(loss := float(result.loss)):
                    display.close()
                    checkpoint.save(checkpoints, state, checkpoint.Progress(records, [*result.losses, loss]))
                    break
                continue
            display.epoch(result.record)
            records.append(result.record)
            runs.write_records(folder, records)
            # The best first: a kill between the two has the epoch done again, not its being the best forgotten.
            ious = [r["validation_mean_iou"] or 0 for r in records] if best else []
            if best and ious[-1] == max(ious):
                checkpoint.save(best, state, checkpoint.Progress(records, []))
            checkpoint.save(checkpoints, state, checkpoint.Progress(records, []))
            if stop:
                break
    return state, stop


class Display:
    """A progress bar for each epoch in the published log's form, and the line after it."""

    def __init__(self, clock: "Clock", steps: int) -> None:
        """Takes the steps of an epoch."""
        self.clock, self.steps = clock, steps
        self.bar: Any = None

    def step(self, epoch: int, step: int, losses: Sequence[float]) -> None:
        import jax
        from tqdm import tqdm

        if self.bar is None:
            file = sys.stdout if jax.process_index() else None  # which is nowhere
            self.bar = tqdm(total=self.steps, initial=step - 1, unit="step", desc=f"epoch {epoch}", file=file)
        self.bar.set_postfix_str(f"loss {losses[-1]:.4f}" if losses else "", refresh=False)
        self.bar.update()
        if line := self.clock.tick():
            self.bar.write(line)

    def epoch(self, record: dict[str, Any]) -> None:
        from unet_jax.metrics import shown
        from unet_jax.plots import held_out

        part, scores = held_out(record)
        name = {"test": "Test set", "validation": "Validation part"}[part]
        self.bar.set_postfix_str(f"loss {record['last_batch_loss']:.4f}")
        self.close()
        if "loss" not in scores:
            return
        print(
            f"{name}: average loss {scores['loss']:.4f},"
            f" mean IoU {shown(scores['mean_iou'])}, pixel accuracy {shown(scores['pixel_accuracy'])}"
        )

    def close(self) -> None:
        self.bar.close()
        self.bar = None


class Clock:
    """Says once, early, how long the run will take: from the time of a few steps past the compilation."""

    FIRST, LAST = 2, 6  # the steps timed, counted in this process

    def __init__(self, epochs: int, train_steps: int, test_steps: int, done: int) -> None:
        """Takes the steps of an epoch and of an evaluation, and how many training steps are behind already."""
        # An evaluation is a forward pass, a third of a step's work.
        self.ahead = epochs * (train_steps + test_steps / 3) * max(0.0, 1 - done / (epochs * train_steps))
        self.ticks, self.start = 0, 0.0

    def tick(self) -> str | None:
        """Counts a step; the line, when it is known."""
        self.ticks += 1
        if self.ticks == self.FIRST:
            self.start = time.perf_counter()
        if self.ticks != self.LAST:
            return None
        minutes = (time.perf_counter() - self.start) / (self.LAST - self.FIRST) * self.ahead / 60
        line = f"this will take about {minutes:.0f} minutes on this device" if minutes > 1 else None
        if minutes > 30:
            line = f"{line}; shorter: --image-size 64, fewer --train-examples and --epochs, or a GPU"
        return line


def finish(
    config: RunConfig,
    folder: Path,
    steps: "Steps",
    state: "TrainState",
    records: list[dict[str, Any]],
    test: "Loader | None",
    drawn: "Loader",
) -> None:
    """The figures, the summary and the last line; with a validation part, of the best epoch, which now meets test."""
    import jax
    import numpy as np

    from unet_jax import plots, runs
    from unet_jax.metrics import scores_csv, shown
    from unet_jax.train import evaluate

    names, data = config.data.class_names, config.data
    scores = records[-1]
    if data.validation_fraction:
        _, best = runs.load(folder, drawn.placement, config)
        for line in best.skipped:
            print(line, file=sys.stderr)
        state, scores = best.state, best.progress.records[-1]
    if test:
        of_test, sums = evaluate(steps.evaluate, state, test, names)
        runs.write_text(folder / "scores.csv", scores_csv(test.names, np.asarray(sums.confusion), names))
        scores = {"epoch": scores["epoch"], **of_test} if data.validation_fraction else scores
    title = f"{config.variant} on {data.dataset} ({data.image_size}x{data.image_size}, {len(records)} epochs)"
    rows = drawn.rows[plots.spread(len(drawn.rows), 10)]
    images, labels = np.asarray(drawn.split.images[rows]), np.asarray(drawn.split.labels[rows])
    predictions = np.asarray(steps.predict(state, images))
    if jax.process_index() > 0:
        return
    plots.metrics_figure(records, title, data.class_colours).savefig(folder / "metrics.png")
    figure = plots.results_figure(images, labels, predictions, names, title, colours=data.class_colours)
    figure.savefig(folder / "results.png")
    summary = {
        "variant": config.variant,
        "dataset": data.dataset,
        "epochs": len(records),
        "parameters": sum(x.size for x in jax.tree.leaves(state.params)),
        "seconds": sum(r["seconds"] + r["evaluation_seconds"] for r in records),
        "final": records[-1],
    }
    if test and data.validation_fraction:
        summary["test"] = scores
    runs.write_json(folder / "summary.json", summary)
    part, of_part = plots.held_out(scores)
    said = (
        f"{part} loss {of_part['loss']:.4f}, mean IoU {shown(of_part['mean_iou'])}" if "loss" in of_part else "no test"
    )
    print(f"{config.variant} on {data.dataset}: {said} after {scores['epoch']} epochs; figures in {folder}")


def main() -> None:
    runs_asked_for = parse(sys.argv[1:])
    from unet_jax import device, processes
    from unet_jax.folders import default_cache_dir

    first = runs_asked_for[0]
    device.set_up(default_cache_dir() / "xla" if first.compilation_cache else None)
    if first.distributed:
        processes.join(first.coordinator, first.processes, first.process_id)
        with processes.leaving_at_once(), exit_on_input_error(INTERRUPTED):
            train_runs(runs_asked_for)
    else:
        train_runs(runs_asked_for)


def train_runs(runs_asked_for: list[Options]) -> None:
    """Makes the runs one after the other, and compares them. Of many processes, the first alone prints."""
    import jax

    from unet_jax import device

    if jax.process_index() > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    print(device.describe())
    for options in runs_asked_for:
        train_run(options, device.placement())
    if len(runs_asked_for) > 1 and jax.process_index() == 0:
        from report import write_comparison

        try:
            write_comparison([Path(options.workdir or ".") for options in runs_asked_for])
        except InputError as error:  # such as runs that have no test
            print(f"no comparison: {error}")


if __name__ == "__main__":
    with exit_on_input_error(INTERRUPTED):
        main()
