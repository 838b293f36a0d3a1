"""What a run starts from: initial weights, another run's weights, or its own newest checkpoint, unless it is done."""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from unet_jax import checkpoint, device, runs, splits, train, weights
from unet_jax.checkpoint import Progress, Restored
from unet_jax.config import RunConfig, differences
from unet_jax.data.classes import some
from unet_jax.device import Placement
from unet_jax.errors import InputError
from unet_jax.loop import out_of_patience
from unet_jax.progress import epochs_text


def what_is_done(folder: Path, config: RunConfig, overwrite: bool) -> str:
    """A line on what a finished run has done, or "" if there is more to do. Refuses a folder of something else."""
    if overwrite and config.train.init_from and Path(config.train.init_from).resolve() == folder.resolve():
        raise InputError(f"--init-from {folder} is the run itself, which would be lost: choose another --workdir")
    if overwrite or not folder.exists():
        return ""
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder: choose another --workdir")
    if not (folder / "config.json").exists():
        if any(p.name not in (".lock", "split.json") for p in folder.iterdir()):  # those come before config.json
            raise InputError(f"{folder} holds other files than a run's: choose another --workdir")
        return ""
    if different := differences(runs.read_config(folder), config):
        raise InputError(
            f"{folder} holds a run with another config ({'; '.join(different)}):"
            " choose another --workdir, or --overwrite to start anew"
        )
    records, patience = runs.finished_records(folder), config.train.patience
    done = epochs_text(len(records))
    if out_of_patience(records, patience):
        return f"{folder} stopped after {done} by --patience {patience}: give more of it, or --overwrite to start anew"
    if len(records) >= config.train.epochs:
        return f"{folder} has its {done} already: give more --epochs, or --overwrite to start anew"
    # One epoch may have been recorded before its checkpoint was there.
    metrics = folder / "metrics.jsonl"
    recorded = len(metrics.read_text().splitlines()) if metrics.exists() else 0
    if recorded > 1 and not checkpoint.exists(folder / "checkpoints"):
        raise InputError(
            f"{folder} has {epochs_text(recorded)} but no checkpoint: put its checkpoints/ back, or --overwrite"
        )
    return ""


def settle_precision(config: RunConfig, folder: Path, placement: Placement, overwrite: bool) -> RunConfig:
    """The config with the precision "auto" replaced by that of the run to continue in the folder, else by the fastest.

    config.json gets the result, so that a run that continues on another machine does not silently change it.
    """
    fastest, precision = device.fastest_precision(placement), config.model.precision
    if precision == "auto":
        goes_on = not overwrite and (folder / "config.json").exists()
        precision = runs.read_config(folder).model.precision if goes_on else fastest
    if precision == "bfloat16" and fastest == "float32":
        print(
            "bfloat16 is slower than float32 here: it needs a GPU, or one CPU with AMX or AVX512-BF16", file=sys.stderr
        )
    return dataclasses.replace(config, model=dataclasses.replace(config.model, precision=precision))


def start_from(config: RunConfig, placement: Placement) -> Restored:
    """A fresh state at step 0, with the parameters and statistics of --init-from if given."""
    state = runs.fresh_state(config, placement)
    if config.train.init_from:
        theirs, restored = runs.load(Path(config.train.init_from), placement)
        state = state._replace(**taken_over(config, theirs, state.params, train.variables(restored.state)))
    return Restored(jax.device_put(state, placement.replicated), Progress([], []), [])


def tell_overlap(config: RunConfig, names: Mapping[str, Sequence[str]]) -> None:
    """Prints a line if the run of --init-from knows test or validation pictures already. `names` are those by part.

    Raises:
      InputError: the split.json of that run cannot be read.
    """
    run = config.train.init_from
    if not run:
        return
    seen = splits.seen(Path(run), config.train.seed)
    told = []
    for part, known in (("test", seen.either), ("validation", seen.train)):
        if both := splits.among(names[part], known):
            told.append(f"{len(both)} of {len(names[part])} {part} pictures ({some(both)})")
    if told:
        print(
            f"init_from: {' and '.join(told)} have names that {run} was trained on: if they are the same pictures,"
            " their scores will be too good (the same seed and fractions keep the split)"
        )
    folder = weights.find(run)
    kinds = {config.data.dataset, runs.read_config(folder).data.dataset}
    if kinds == {"folder"} and not splits.read(folder):  # an export; the splits of other datasets are known
        print(f"init_from: {run} {splits.UNKNOWN}")


def taken_over(config: RunConfig, theirs: RunConfig, fresh: Any, variables: dict[str, Any]) -> dict[str, Any]:
    """The variables of the run of --init-from, with the last layer of `fresh` if that run has other classes.

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


def resume(folder: Path, config: RunConfig, placement: Placement) -> Restored:
    """Reads the newest sound checkpoint of an unfinished run, and makes metrics.jsonl match it."""
    restored = runs.restored(config, folder / "checkpoints", placement)
    runs.write_records(folder, restored.progress.records)
    print(f"going on from step {int(restored.state.step)}, after {epochs_text(len(restored.progress.records))}")
    return restored
