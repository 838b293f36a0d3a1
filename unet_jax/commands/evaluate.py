"""Evaluates a run's checkpoint on a split of a dataset: `unet-jax evaluate runs/mp_tr_dice`."""

import dataclasses
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
    from unet_jax.commands.picking import Picked
    from unet_jax.config import DataConfig, RunConfig


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
    full_size: bool = False
    """Score the masks that predict writes, at the pictures' own size, instead of the network's at the training size."""
    out: Path | None = None
    """Folder for the results. Default: RUN/evaluation-SPLIT, with -TTA and -full-size where they are used; for other
    pictures than the run's own RUN/evaluation-FOLDER-SPLIT."""


def evaluate_run(options: Options) -> None:
    """Writes evaluation.json, scores.csv, split.json, tables.md and (not at full size) pictures.png; prints tables."""
    from unet_jax import device, runs
    from unet_jax.commands.picking import pick
    from unet_jax.data.tiles import unit
    from unet_jax.folders import default_cache_dir
    from unet_jax.metrics import scores_csv, shown
    from unet_jax.predict import FLIPS
    from unet_jax.train import make_steps

    if options.examples is not None and options.examples < 1:
        raise InputError(f"--examples is {options.examples}: it must be at least 1")
    device.set_up(default_cache_dir() / "xla")
    placement = device.placement()
    config, restored = runs.load(options.run, placement)
    picked, classes = pick(options, config), config.data.class_names
    dataset, name = picked.dataset, picked.name
    steps = make_steps(config, placement, steps_per_epoch=1, views=FLIPS[options.tta])  # it matters only in training
    scores, names, by_picture = score(options, config, picked, steps, restored, placement)
    kinds = (picked.elsewhere, name, options.tta.removeprefix("none"), "full-size" * options.full_size)
    out = options.out or options.run / "-".join(["evaluation", *filter(None, kinds)])
    out.mkdir(parents=True, exist_ok=True)
    epoch = len(restored.progress.records)
    about = {"dataset": dataset, "data_dir": picked.data_dir, "split": name, "pictures": len(names), "epoch": epoch}
    about |= {"tta": options.tta, "full_size": options.full_size}
    confusion = by_picture.sum(0, np.int64)
    runs.write_json(out / "evaluation.json", {**about, **scores, "confusion": confusion.tolist()})
    runs.write_json(out / "split.json", {name: names})
    runs.write_text(out / "scores.csv", scores_csv(names, by_picture, classes))
    text = tables(scores, confusion, classes)
    runs.write_text(out / "tables.md", text)
    if picked.split:
        draw_extremes(steps, restored.state, picked.split, by_picture, config.data, out, options.run.resolve().name)
    step = int(restored.state.step)
    trained = f"epoch {epoch}" if epoch else f"step {step}" if step else "imported weights"
    scored = "pictures" if options.full_size else unit(config.data)
    how = f", --tta {options.tta}" * (options.tta != "none") + ", at full size" * options.full_size
    print(f"{options.run}, {trained}, {len(names)} {name} {scored} of {dataset}{how}\n\n{text}")
    loss = "" if options.full_size else f"loss {scores['test_loss']:.4f}, "
    print(f"{name} {loss}mean IoU {shown(scores['mean_iou'])}{how}; files in {out}")


def score(
    options: Options, config: "RunConfig", picked: "Picked", steps: Any, restored: Any, placement: Any
) -> tuple[dict[str, Any], list[str], np.ndarray]:
    """The scores of all pictures together, and of each picture its name and its confusion matrix ([N, C, C])."""
    from unet_jax.data.batches import Loader
    from unet_jax.full_size import confusions
    from unet_jax.loop import evaluate
    from unet_jax.metrics import confusion_scores
    from unet_jax.predict import predictor

    classes = config.data.class_names
    if not picked.split:
        by_run = predictor(config, restored, placement)
        names, by_picture = confusions(by_run, picked.source, picked.rows, options.examples, options.tta)
        return confusion_scores(by_picture.sum(0), classes), names, by_picture
    loader = Loader(picked.split, config.train.batch_size, placement)
    scores, sums = evaluate(steps.evaluate, restored.state, loader, classes)
    return scores, picked.split.names, np.asarray(sums.confusion)


def tables(scores: dict[str, Any], confusion: np.ndarray, names: tuple[str, ...]) -> str:
    """Markdown: IoU and Dice by class, and the confusion matrix with rows that sum to 100 %."""
    from unet_jax.metrics import cell, shown

    shares = 100 * confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    lines = ["| class | IoU | Dice | pixels |", "|---|---|---|---|"]
    for i, name in enumerate(names):
        cells = [shown(scores[k][name]) for k in ("iou", "dice")]
        lines.append(f"| {cell(name)} | {cells[0]} | {cells[1]} | {confusion[i].sum() / max(confusion.sum(), 1):.1%} |")
    names = tuple(map(cell, names))
    lines += ["", f"| true \\ predicted, % | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for i, name in enumerate(names):
        cells = [f"{share:.1f}" if confusion[i].any() else "-" for share in shares[i]]
        lines.append(f"| {name} | {' | '.join(cells)} |")
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
