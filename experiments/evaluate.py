"""Evaluates a run's checkpoint on a split of a dataset: `python experiments/evaluate.py runs/mp_tr_dice`."""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from unet_jax.config import DatasetName
from unet_jax.errors import InputError, exit_on_input_error


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
    split: Literal["test", "train", "validation"] = "test"
    """Which part of the dataset; validation is what the run kept of train."""
    examples: int | None = None
    """The first N pictures. Default: as many as the run took."""
    out: Path | None = None
    """Folder for the results. Default: RUN/evaluation-<split>."""


def evaluate_run(options: Options) -> None:
    """Writes evaluation.json, tables.md and pictures.png, and prints the tables."""
    from unet_jax import device, runs
    from unet_jax.data.batches import Loader, validation_rows
    from unet_jax.data.cache import Split, load_split
    from unet_jax.data.datasets import resolve, sources
    from unet_jax.folders import default_cache_dir
    from unet_jax.train import evaluate, make_steps

    if options.examples is not None and options.examples < 1:
        raise InputError(f"--examples is {options.examples}: it must be at least 1")
    device.set_up(default_cache_dir() / "xla")
    placement = device.placement()
    config, restored = runs.load(options.run, placement)
    for line in restored.skipped:
        print(line, file=sys.stderr)
    batch_size = -(-config.train.batch_size // placement.devices) * placement.devices
    dataset, _ = resolve(options.dataset or config.data.dataset, options.data_dir or config.data.data_dir, False)
    data = dataclasses.replace(config.data, dataset=dataset, data_dir=options.data_dir or config.data.data_dir)
    if options.split == "validation" and not data.validation_fraction:
        raise InputError(f"{options.run} kept no part of train for validation: choose --split test or train")
    own = data.test_examples if options.split == "test" else data.train_examples
    source = sources(data, config.train.seed)["test" if options.split == "test" else "train"]
    if len(source.class_names) != len(data.class_names):
        raise InputError(f"{options.run} knows the classes {data.class_names}, the dataset has {source.class_names}")
    cache = Path(options.cache_dir) if options.cache_dir else default_cache_dir()
    if options.split == "test" or not data.validation_fraction:
        split = load_split(source, data.image_size, options.examples or own, cache)
    else:  # as the run divided all of its pictures
        split = load_split(source, data.image_size, own, cache)
        training, validation = validation_rows(split.names, data.validation_fraction, config.train.seed)
        rows = (training if options.split == "train" else validation)[: options.examples]
        split = Split(split.images[rows], split.labels[rows], [split.names[i] for i in rows])
    steps = make_steps(config, placement, steps_per_epoch=1)  # which do not train
    loader = Loader(split, batch_size, placement)
    scores, sums = evaluate(steps.evaluate, restored.state, loader, data.class_names)
    out = options.out or options.run / f"evaluation-{options.split}"
    out.mkdir(parents=True, exist_ok=True)
    epoch = len(restored.progress.records)
    about = {"dataset": dataset, "split": options.split, "pictures": len(split.names), "epoch": epoch}
    confusion = np.asarray(sums.confusion, np.int64).sum(0)
    runs.write_json(out / "evaluation.json", {**about, **scores, "confusion": confusion.tolist()})
    text = tables(scores, confusion, data.class_names)
    runs.write_text(out / "tables.md", text)
    draw_extremes(steps, restored.state, split, np.asarray(sums.confusion), data.class_names, out, options.run.name)
    trained = f"epoch {epoch}" if int(restored.state.step) else "imported weights"
    print(f"{options.run}, {trained}, {len(split.names)} {options.split} pictures of {dataset}\n\n{text}")
    print(f"test loss {scores['test_loss']:.4f}, mean IoU {scores['mean_iou']:.4f}; files in {out}")


def tables(scores: dict[str, Any], confusion: np.ndarray, names: tuple[str, ...]) -> str:
    """Markdown: IoU and Dice by class, and the confusion matrix with rows that sum to 100 %."""
    shares = 100 * confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    lines = ["| class | IoU | Dice | pixels |", "|---|---|---|---|"]
    for i, name in enumerate(names):
        cells = ["-" if scores[k][name] is None else f"{scores[k][name]:.4f}" for k in ("iou", "dice")]
        lines.append(f"| {name} | {cells[0]} | {cells[1]} | {confusion[i].sum() / max(confusion.sum(), 1):.1%} |")
    lines += ["", f"| true \\ predicted, % | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    lines += [f"| {n} | {' | '.join(f'{v:.1f}' for v in row)} |" for n, row in zip(names, shares, strict=True)]
    return "\n".join(lines) + "\n"


def draw_extremes(
    steps: Any, state: Any, split: Any, confusion: np.ndarray, names: tuple[str, ...], out: Path, title: str
) -> None:
    """The five pictures with the highest mean IoU and the five with the lowest, each with its own."""
    from unet_jax.metrics import mean_iou
    from unet_jax.plots import results_figure

    by_picture = mean_iou(confusion)
    order = np.argsort(-by_picture, kind="stable")
    rows = np.concatenate([order[:5], order[5:][-5:]])
    images, labels = np.asarray(split.images[rows]), np.asarray(split.labels[rows])
    predictions = np.asarray(steps.predict(state, images))
    row_titles = [f"{split.names[i]}\nmean IoU {by_picture[i]:.3f}" for i in rows]
    figure = results_figure(images, labels, predictions, names, f"{title}: best and worst pictures", row_titles)
    figure.savefig(out / "pictures.png")


if __name__ == "__main__":
    with exit_on_input_error():
        evaluate_run(tyro.cli(Options, description=__doc__))
