"""What a run leaves behind at its end: figures, scores by picture, and a summary."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from unet_jax import plots, runs
from unet_jax.config import RunConfig, sides
from unet_jax.data.batches import Loader, Parts
from unet_jax.loop import evaluate, out_of_patience
from unet_jax.metrics import held_out, scores_csv, shown
from unet_jax.progress import epochs_text
from unet_jax.train import Steps, TrainState


def write_results(
    config: RunConfig,
    folder: Path,
    steps: Steps,
    state: TrainState,
    records: list[dict[str, Any]],
    parts: Parts,
) -> None:
    """Makes figures, scores, summary and last line. With a validation part, the best epoch is drawn and tested."""
    names, data, test = config.data.class_names, config.data, parts.test
    drawn = test or parts.validation or parts.train
    scores = records[-1]
    if data.validation_fraction:
        _, best = runs.load(folder, drawn.placement, config)
        state, scores = best.state, best.progress.records[-1]
    if test:
        of_test, sums = evaluate(steps.evaluate, state, test, names)
        runs.write_text(folder / "scores.csv", scores_csv(test.names, np.asarray(sums.confusion), names))
        scores = {"epoch": scores["epoch"], **of_test} if data.validation_fraction else scores
    draw_results(config, folder, steps, state, drawn, len(records))
    if jax.process_index() > 0:
        return
    title = _title(config, len(records))
    plots.metrics_figure(records, title, data.class_colours).savefig(folder / "metrics.png")
    stopped_early = out_of_patience(records, config.train.patience)
    summary = {
        "variant": config.variant,
        "dataset": data.dataset,
        "epochs": len(records),
        "stopped_early": stopped_early,
        "parameters": sum(x.size for x in jax.tree.leaves(state.params)),
        "seconds": sum(r["seconds"] + r["evaluation_seconds"] for r in records),
        "final": records[-1],
    }
    if test and data.validation_fraction:
        summary["test"] = scores
    runs.write_json(folder / "summary.json", summary)
    if stopped_early:
        print(f"stopped early: in {config.train.patience} epochs the validation part's mean IoU has not risen")
    part, of_part = held_out(scores)
    said = (
        f"{part} loss {of_part['loss']:.4f}, mean IoU {shown(of_part['mean_iou'])}" if "loss" in of_part else "no test"
    )
    print(f"{config.variant} on {data.dataset}: {said} after {epochs_text(scores['epoch'])}; figures in {folder}")


def draw_results(config: RunConfig, folder: Path, steps: Steps, state: TrainState, drawn: Loader, epochs: int) -> None:
    """Draws results.png: up to ten pictures of a part, with the predictions of a state after so many epochs."""
    data = config.data
    rows = drawn.rows[plots.spread(len(drawn.rows), 10)]
    images, labels = np.asarray(drawn.split.images[rows]), np.asarray(drawn.split.labels[rows])
    predictions = np.asarray(steps.predict(state, images))
    if jax.process_index() > 0:
        return
    figure = plots.results_figure(
        images, labels, predictions, data.class_names, _title(config, epochs), colours=data.class_colours
    )
    figure.savefig(folder / "results.png")


def _title(config: RunConfig, epochs: int) -> str:
    height, width = sides(config.data.image_size)
    return f"{config.variant} on {config.data.dataset} ({height}x{width}, {epochs_text(epochs)})"
