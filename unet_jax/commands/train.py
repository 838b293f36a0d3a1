"""Trains a variant of the U-Net and writes its run folder: `unet-jax train --variant mp_tr_dice`."""

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import tyro

from unet_jax.checks import check_config
from unet_jax.config import PUBLISHED, DatasetName, RunConfig, default_config
from unet_jax.errors import InputError, exit_on_input_error

INTERRUPTED = "interrupted; the same command goes on from the last checkpoint"

# JAX and what builds on it are imported where work begins, so that --help and a mistyped flag answer at once.
if TYPE_CHECKING:
    from unet_jax.device import Placement


@dataclasses.dataclass(frozen=True)
class Options:
    """Where and how a run is made. This is not part of its config."""

    config: RunConfig
    workdir: str | None = None
    """The run's folder. Default: runs/VARIANT (with `all`: a folder for each variant inside)."""
    overwrite: bool = False
    """Remove the files of another run in the folder, and start anew."""
    download: bool = False
    """With --data-dir: download the dataset into it if it is not there. Without, the pets are downloaded anyway."""
    cache_dir: str | None = None
    """Folder of the decoded pictures. Default: ~/.cache/unet_jax."""
    no_compilation_cache: bool = False
    """Do not keep compiled programs. Else they are in ~/.cache/unet_jax/xla, so that a later start compiles nothing."""
    deterministic: bool = False
    """Make a GPU add in a fixed order: repeated and resumed runs are bit-equal, but steps take longer."""
    log: Literal["tensorboard"] | None = None
    """Write losses, scores and results.png after each epoch for TensorBoard, in the run's folder tensorboard."""
    distributed: bool = False
    """Be one of many processes that make the run together. Slurm, Open MPI and Kubernetes set all the rest."""
    coordinator: str | None = None
    """HOST:PORT of process 0, the same for all processes, if nothing sets it. Choose any free port."""
    processes: int | None = None
    """The number of processes, if nothing sets it."""
    process_id: int | None = None
    """The number of this process, from 0, if nothing sets it."""


def parse(argv: Sequence[str], prog: str | None = None) -> list[Options]:
    """The options of each run: the given flags over the defaults of its variant and dataset."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--variant", default="mp_tr_dice")
    first.add_argument("--dataset", choices=get_args(DatasetName), default="auto")
    first.add_argument("--data-dir", "--data_dir")
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
            prog=prog,
            default=Options(default_config(name, dataset)),
            description=__doc__,
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
        )
        data = dataclasses.replace(options.config.data, dataset=dataset)
        config = dataclasses.replace(options.config, variant=name, data=data)
        check_config(config)
        if not options.distributed and (options.coordinator or options.processes or options.process_id):
            raise InputError("--coordinator, --processes and --process-id go with --distributed")
        from unet_jax.data.datasets import fill_in

        config = fill_in(config)
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
    """Makes one run, or the rest of it (`unet_jax.experiment`)."""
    from unet_jax import experiment, trackers

    folder = Path(options.workdir or ".")
    experiment.train_run(
        options.config,
        folder,
        placement,
        overwrite=options.overwrite,
        cache_dir=options.cache_dir,
        deterministic=options.deterministic,
        log=trackers.chosen(options.log, folder),
    )


def main(runs_asked_for: list[Options]) -> None:
    """Sets up this process, which may be one of many, and makes the runs."""
    from unet_jax import device, processes
    from unet_jax.folders import default_cache_dir

    first = runs_asked_for[0]
    device.set_up(None if first.no_compilation_cache else default_cache_dir() / "xla")
    if first.distributed:
        processes.join(first.coordinator, first.processes, first.process_id)
        with processes.leaving_at_once(), exit_on_input_error(INTERRUPTED):
            train_runs(runs_asked_for)
    else:
        train_runs(runs_asked_for)


def train_runs(runs_asked_for: list[Options]) -> None:
    """Makes the runs one after the other, and compares them. With many processes, only the first prints."""
    import jax

    from unet_jax import device

    if jax.process_index() > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    print(device.describe())
    for options in runs_asked_for:
        train_run(options, device.placement())
    if len(runs_asked_for) > 1 and jax.process_index() == 0:
        from unet_jax.commands.report import read_run, write_comparison

        try:
            folders = [Path(options.workdir or ".") for options in runs_asked_for]
            write_comparison({folder: read_run(folder) for folder in folders})
        except InputError as error:  # such as runs that have no test
            print(f"no comparison: {error}")


def command(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Runs the command with these arguments, by default the arguments of the process."""
    with exit_on_input_error(INTERRUPTED):
        main(parse(sys.argv[1:] if argv is None else argv, prog))
