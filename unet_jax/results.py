"""What a run leaves behind at its end: figures, scores by picture, and a summary."""

import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from unet_jax import plots, runs
from unet_jax.config import RunConfig, sides
from unet_jax.data.batches import Parts
from unet_jax.metrics import held_out, scores_csv, shown
from unet_jax.train import Steps, TrainState, evaluate


def write_results(
    config: RunConfig,
    folder: Path,
    steps: Steps,
    state: TrainState,
    records: list[dict[str, Any]],
    parts: Parts,
) -> None:
    """The figures, the summary and the last line; with a validation part, of the best epoch, which now meets test."""
    names, data, test = config.data.class_names, config.data, parts.test
    drawn = test or parts.validation or parts.train
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
    height, width = sides(data.image_size)
    title = f"{config.variant} on {data.dataset} ({height}x{width}, {len(records)} epochs)"
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
    part, of_part = held_out(scores)
    said = (
        f"{part} loss {of_part['loss']:.4f}, mean IoU {shown(of_part['mean_iou'])}" if "loss" in of_part else "no test"
    )
    print(f"{config.variant} on {data.dataset}: {said} after {scores['epoch']} epochs; figures in {folder}")
