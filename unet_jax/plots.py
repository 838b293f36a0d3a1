"""Arrays and records to matplotlib Figures; the caller saves them."""

import colorsys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # matplotlib takes a second to import: only who draws waits for it
    from matplotlib.figure import Figure

# Distinct for the colour-blind too (Okabe and Ito), the pets' own order first: animal, ground, outline.
COLOURS = ("#e69f00", "#24476b", "#f5f5f0", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442")


def held_out(record: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """("test" or "validation", that part's metrics by name: loss, mean_iou, iou, ...) of a line of metrics.jsonl.

    Without either part the metrics have no loss, mean_iou and iou.
    """
    part = "validation" if "validation_loss" in record else "test"
    prefix = "validation_" if part == "validation" else ""
    metrics = {name.removeprefix(prefix): value for name, value in record.items() if name.startswith(prefix)}
    return part, metrics | ({"loss": record[f"{part}_loss"]} if f"{part}_loss" in record else {})


def palette(classes: int) -> np.ndarray:
    """uint8 [classes, 3]: a colour for each class."""
    named = [tuple(bytes.fromhex(c[1:])) for c in COLOURS[:classes]]
    # Golden-angle hues beyond the named ones: neighbours stay apart however many there are.
    beyond = range(len(named), classes)
    more = [colorsys.hsv_to_rgb((0.55 + 0.618 * i) % 1, 0.75, 0.55 + 0.35 * (i % 2)) for i in beyond]
    return np.array([*named, *[tuple(round(255 * v) for v in rgb) for rgb in more]], np.uint8).reshape(-1, 3)


def colour_labels(labels: np.ndarray, classes: int) -> np.ndarray:
    """uint8 [..., 3] colours of labels [...]; labels that are no class (ignored ones) are black."""
    colours = np.concatenate([palette(classes), np.zeros((1, 3), np.uint8)])
    return colours[np.minimum(labels, classes)]


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", dpi=110)


def metrics_figure(records: Sequence[Mapping[str, Any]], title: str) -> "Figure":
    """Losses, and IoU by class, over the epochs of metrics.jsonl's records: of test, or of the validation part."""
    figure = _figure(10, 4)
    figure.suptitle(title)
    losses, iou = figure.subplots(1, 2)
    epochs = [r["epoch"] for r in records]
    losses.plot(epochs, [r["train_loss"] for r in records], "o-", ms=3, label="train (mean of the epoch)")
    part, last = held_out(records[-1])
    scores = [metrics for _, metrics in map(held_out, records)] if "loss" in last else []
    epochs = epochs[: len(scores)]
    losses.plot(epochs, [s["loss"] for s in scores], "o-", ms=3, label=part)
    losses.set(xlabel="epoch", ylabel="loss", ylim=(0, None))
    iou.plot(epochs, [s["mean_iou"] for s in scores], "k-o", ms=3, lw=2, label="mean")
    for name in scores[-1]["iou"] if scores else ():
        iou.plot(epochs, [s["iou"][name] for s in scores], "o-", ms=2, lw=1, label=name)
    iou.set(xlabel="epoch", ylabel=f"{part} IoU", ylim=(0, 1))
    for axes in (losses, iou):
        axes.legend(frameon=False)
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
    return figure


def results_figure(
    images: np.ndarray,
    labels: np.ndarray,
    predictions: np.ndarray,
    class_names: Sequence[str],
    title: str,
    row_titles: Sequence[str] = (),
) -> "Figure":
    """A row for each of N pictures: image uint8 [N, H, W, 3], true and predicted labels [N, H, W] in colours."""
    from matplotlib.patches import Patch

    count = len(images)
    figure = _figure(6.2, 2.05 * count + 0.9)
    figure.suptitle(title)
    grid = figure.subplots(count, 3, squeeze=False)
    for i, row in enumerate(grid):
        columns = (images[i], *(colour_labels(array[i], len(class_names)) for array in (labels, predictions)))
        for axes, picture in zip(row, columns, strict=True):
            axes.imshow(picture, interpolation="nearest")
            axes.set(xticks=[], yticks=[])
        if row_titles:
            row[0].set_ylabel(row_titles[i], fontsize=8)
    for axes, name in zip(grid[0], ("image", "true mask", "predicted mask"), strict=True):
        axes.set_title(name)
    patches = [
        Patch(facecolor=colour / 255, edgecolor="grey", label=name)
        for colour, name in zip(palette(len(class_names)), class_names, strict=True)
    ]
    figure.legend(handles=patches, loc="outside lower center", ncols=min(len(patches), 6), frameon=False)
    return figure


def comparison_figure(
    runs: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]],
    published: Mapping[str, Mapping[int, float]],
    title: str,
) -> "Figure":
    """A panel for each variant: its runs' losses by epoch over the published test losses {epoch: loss}.

    `runs` has the records of each run by variant and label; a variant's only run needs no label.
    """
    columns = min(len(runs), 4)
    rows = -(-len(runs) // columns)
    figure = _figure(3.4 * columns, 3.6 * rows)
    figure.suptitle(title)
    for place, (name, curves) in enumerate(runs.items(), 1):
        axes: Any = figure.add_subplot(rows, columns, place)
        points = published.get(name, {})
        axes.plot(list(points), list(points.values()), "kx", ms=5, label="test, published")
        for i, (label, records) in enumerate(curves.items()):
            of = f", {label}" if len(curves) > 1 else ""
            part, _ = held_out(records[-1])
            epochs = [r["epoch"] for r in records]
            losses, others = [r["train_loss"] for r in records], [r[f"{part}_loss"] for r in records]
            axes.plot(epochs, losses, "--", color=f"C{i}", lw=1, label=f"train{of}")
            axes.plot(epochs, others, "o-", color=f"C{i}", ms=3, label=f"{part}{of}")
        axes.set(title=name, xlabel="epoch", ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(frameon=False, fontsize=8 if len(curves) == 1 else 5)
    return figure


def ratio_figure(cells: Sequence[Mapping[str, Any]], title: str) -> "Figure":
    """A bar for each cell of the benchmark: our time over PyTorch's, with the range over the turns."""
    figure = _figure(7, 1.2 + 0.28 * len(cells))
    axes = figure.subplots()
    labels = [f"{c['variant']} {c['work']} {c['batch']} x {c['size']}" for c in cells]
    ratios = np.array([c["ratio"] for c in cells])
    spread = np.abs(np.array([c["ratio_range"] for c in cells]).T - ratios)
    axes.barh(labels, ratios, xerr=spread, color=COLOURS[0], ecolor=COLOURS[1])
    axes.axvline(1, color=COLOURS[1], lw=1)
    axes.invert_yaxis()
    axes.set(title=title, xlabel="time of a step, ours / PyTorch's best (below 1: ours is faster)", xlim=(0, None))
    return figure
