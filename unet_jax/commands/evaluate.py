"""Evaluates a run's checkpoint on a split of a dataset: `unet-jax evaluate runs/mp_tr_dice`."""

import contextlib
import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import tyro

from unet_jax.commands.files import with_tta_named
from unet_jax.config import DatasetName, Tta
from unet_jax.errors import InputError, exit_on_input_error

if TYPE_CHECKING:
    from unet_jax.config import DataConfig, RunConfig
    from unet_jax.data.cache import Split
    from unet_jax.data.source import Source


@dataclasses.dataclass(frozen=True)
class Options:
    """What to evaluate, and on what."""

    run: Annotated[Path, tyro.conf.Positional]
    """The run's folder."""
    dataset: DatasetName | None = None
    """Default: the run's own."""
    data_dir: str | None = None
    """Folder of the prepared dataset. Default: the run's own."""
    cache_dir: str | None = None
    """Folder of the decoded pictures. Default: ~/.cache/unet_jax."""
    split: Literal["test", "train", "validation", "all"] | None = None
    """Which part of the dataset; validation is the part of train that the run kept. Default: test, or validation if
    there is no test; for another folder, all."""
    examples: int | None = None
    """The first N pictures. Default: as many as the run took."""
    tta: Tta = "none"
    """Average the probabilities over a picture and its mirror image (horizontal, which a bare --tta means), or over all
    four flips (all)."""
    out: Path | None = None
    """Folder for the results. Default: RUN/evaluation-SPLIT, or RUN/evaluation-SPLIT-TTA."""


def is_own(options: Options, config: "RunConfig", found: "dict[str, Source]") -> bool:
    """Whether these are the pictures of the run itself. A folder that was moved is recognized by their names."""
    from unet_jax import runs, splits

    if not (options.data_dir or options.dataset):
        return True
    with contextlib.suppress(InputError, OSError):  # the run's own folder may be gone
        if os.path.samefile(options.data_dir or "", runs.data_dir(options.run, config) or ""):
            return True
    names = splits.read(options.run)
    trained = {*names.get("train", []), *names.get("validation", [])}
    return bool(trained) and trained <= {*found["train"].names} and {*names["test"]} <= {*found["test"].names}


def pick(options: Options, config: "RunConfig") -> "tuple[str, str, Split]":
    """The dataset's name, the split's, and its pictures."""
    from unet_jax import runs, splits
    from unet_jax.data.cache import Split, load_split
    from unet_jax.data.datasets import resolve, sources, whole
    from unet_jax.folders import default_cache_dir

    data_dir = options.data_dir or runs.data_dir(options.run, config)
    dataset, _ = resolve(options.dataset or config.data.dataset, data_dir, False)
    if dataset == "synthetic" and options.data_dir:
        raise InputError(f"{options.run} is of synthetic pets: add --dataset folder for the pictures in {data_dir}")
    data = dataclasses.replace(config.data, dataset=dataset, data_dir=data_dir)
    found = sources(data, config.train.seed)
    own = dataset != "folder" or is_own(options, config, found)
    held_out = "test" if found["test"].size or not data.validation_fraction else "validation"
    name = options.split or (held_out if own else "all")
    if name == "validation" and not data.validation_fraction:
        raise InputError(f"{options.run} kept no part of train for validation: choose --split test or train")
    divided = data.validation_fraction > 0 and (own or bool(found["train"].validation))
    if name == "validation" and not divided:
        raise InputError(f"{data_dir} is not divided as the run's pictures were: choose --split train, test or all")
    source = whole(found) if name == "all" else found["test" if name == "test" else "train"]
    if not source.size:
        raise InputError(f"{data_dir} has no pictures in the {name} split: choose another --split, such as all")
    if len(source.class_names) != len(data.class_names):
        raise InputError(f"{options.run} knows the classes {data.class_names}, the dataset has {source.class_names}")
    count = {"test": data.test_examples, "all": None}.get(name, data.train_examples)
    cache = Path(options.cache_dir) if options.cache_dir else default_cache_dir()
    if name in ("test", "all") or not divided:
        split = load_split(source, data.image_size, options.examples or count, cache)
    else:
        split = load_split(source, data.image_size, count, cache)
        split = part_of_train(split, name, config)
        # A run that an older version made has no names.
        if own and split.names != splits.read(options.run).get(name, split.names):
            raise InputError(
                f"{data_dir or dataset} has other {name} pictures than {options.run} had: --split all scores them all"
            )
        first = slice(options.examples)
        split = Split(split.images[first], split.labels[first], split.names[first])
    if name in ("test", "all"):
        if dataset == "folder" and not splits.read(options.run):
            print(f"{options.run} {splits.UNKNOWN}")
        check_unseen(options.run, split, own and name == "test", config.train.seed)
    return dataset, name, split


def part_of_train(train: "Split", name: str, config: "RunConfig") -> "Split":
    """The training or the validation part of train, divided as the run divided its own pictures."""
    from unet_jax.data.batches import validation_rows
    from unet_jax.data.cache import Split

    parts = validation_rows(train.names, config.data.validation_fraction, config.train.seed, train.validation)
    rows = parts[name == "validation"]
    return Split(train.images[rows], train.labels[rows], [train.names[i] for i in rows])


def check_unseen(run: Path, split: "Split", own: bool, seed: int) -> None:
    """Prints how many pictures have names that the run was trained on; InputError if they are its own test split.

    What the runs were trained on that it started from (--init-from) counts too, but is never refused.
    """
    from unet_jax import splits
    from unet_jax.data.classes import some

    def text(seen: list[str], by: str) -> str:
        return f"{len(seen)} of these {len(split.names)} pictures have names that {by} was trained on ({some(seen)})"

    names = splits.read(run)
    itself = {*names.get("train", []), *names.get("validation", [])}
    trained = frozenset().union(*splits.seen(run, seed))
    if own and (seen := [n for n in split.names if n in itself]):
        raise InputError(
            f"{text(seen, str(run))}: the folder's lists or pictures have changed since; --split all scores them anyway"
        )
    if seen := [n for n in split.names if n in trained]:
        print(text(seen, f"{run}" if {*seen} <= itself else f"{run}, or a run that it started from,"))


def evaluate_run(options: Options) -> None:
    """Writes evaluation.json, scores.csv, split.json, tables.md and pictures.png, and prints the tables."""
    from unet_jax import device, runs
    from unet_jax.data.batches import Loader
    from unet_jax.folders import default_cache_dir
    from unet_jax.loop import evaluate
    from unet_jax.metrics import scores_csv, shown
    from unet_jax.predict import FLIPS
    from unet_jax.train import make_steps

    if options.examples is not None and options.examples < 1:
        raise InputError(f"--examples is {options.examples}: it must be at least 1")
    device.set_up(default_cache_dir() / "xla")
    placement = device.placement()
    config, restored = runs.load(options.run, placement)
    dataset, name, split = pick(options, config)
    classes = config.data.class_names
    steps = make_steps(config, placement, steps_per_epoch=1, views=FLIPS[options.tta])  # it matters only in training
    loader = Loader(split, config.train.batch_size, placement)
    scores, sums = evaluate(steps.evaluate, restored.state, loader, classes)
    kind = name if options.tta == "none" else f"{name}-{options.tta}"
    out = options.out or options.run / f"evaluation-{kind}"
    out.mkdir(parents=True, exist_ok=True)
    epoch = len(restored.progress.records)
    about = {"dataset": dataset, "split": name, "pictures": len(split.names), "epoch": epoch, "tta": options.tta}
    by_picture = np.asarray(sums.confusion)
    confusion = by_picture.sum(0, np.int64)
    runs.write_json(out / "evaluation.json", {**about, **scores, "confusion": confusion.tolist()})
    runs.write_json(out / "split.json", {name: split.names})
    runs.write_text(out / "scores.csv", scores_csv(split.names, by_picture, classes))
    text = tables(scores, confusion, classes)
    runs.write_text(out / "tables.md", text)
    draw_extremes(steps, restored.state, split, by_picture, config.data, out, options.run.name)
    step = int(restored.state.step)
    trained = f"epoch {epoch}" if epoch else f"step {step}" if step else "imported weights"
    averaged = "" if options.tta == "none" else f", --tta {options.tta}"
    print(f"{options.run}, {trained}, {len(split.names)} {name} pictures of {dataset}{averaged}\n\n{text}")
    print(f"{name} loss {scores['test_loss']:.4f}, mean IoU {shown(scores['mean_iou'])}{averaged}; files in {out}")


def tables(scores: dict[str, Any], confusion: np.ndarray, names: tuple[str, ...]) -> str:
    """Markdown: IoU and Dice by class, and the confusion matrix with rows that sum to 100 %."""
    from unet_jax.metrics import shown

    shares = 100 * confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    lines = ["| class | IoU | Dice | pixels |", "|---|---|---|---|"]
    for i, name in enumerate(names):
        cells = [shown(scores[k][name]) for k in ("iou", "dice")]
        lines.append(f"| {name} | {cells[0]} | {cells[1]} | {confusion[i].sum() / max(confusion.sum(), 1):.1%} |")
    lines += ["", f"| true \\ predicted, % | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    lines += [f"| {n} | {' | '.join(f'{v:.1f}' for v in row)} |" for n, row in zip(names, shares, strict=True)]
    return "\n".join(lines) + "\n"


def draw_extremes(
    steps: Any, state: Any, split: Any, confusion: np.ndarray, data: "DataConfig", out: Path, title: str
) -> None:
    """Draws the five pictures with the highest mean IoU and the five with the lowest, each with its score.

    Pictures in which no pixel counts are left out.
    """
    from unet_jax.metrics import mean_iou
    from unet_jax.plots import results_figure

    by_picture = mean_iou(confusion)
    order = np.argsort(-by_picture, kind="stable")[: np.count_nonzero(~np.isnan(by_picture))]
    rows = np.concatenate([order[:5], order[5:][-5:]])
    if not len(rows):
        return
    images, labels = np.asarray(split.images[rows]), np.asarray(split.labels[rows])
    predictions = np.asarray(steps.predict(state, images))
    row_titles = [f"{split.names[i]}\nmean IoU {by_picture[i]:.3f}" for i in rows]
    title = f"{title}: best and worst pictures"
    figure = results_figure(images, labels, predictions, data.class_names, title, row_titles, data.class_colours)
    figure.savefig(out / "pictures.png")


def command(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Runs the command with these arguments, by default the arguments of the process."""
    with exit_on_input_error():
        args = with_tta_named(sys.argv[1:] if argv is None else argv)
        evaluate_run(tyro.cli(Options, args=args, prog=prog, description=__doc__))
