"""Arrays and records to matplotlib Figures; the caller saves them."""

import functools
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from unet_jax.metrics import held_out

if TYPE_CHECKING:  # matplotlib takes a second to import: only drawing waits for it
    from matplotlib.figure import Figure

# Distinct for the colour-blind too (Okabe and Ito), the pets' own order first: animal, ground, outline.
COLOURS = ("#e69f00", "#24476b", "#f5f5f0", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442")


def palette(classes: int, colours: Sequence[str] = ()) -> np.ndarray:
    """uint8 [classes, 3]: a colour for each class, those given (#rrggbb) or else our own."""
    named = [tuple(bytes.fromhex(colour[1:])) for colour in (colours or COLOURS)[:classes]]
    return np.array(_distinct(tuple(named), classes), np.uint8).reshape(-1, 3)


@functools.cache
def _distinct(colours: tuple[tuple[int, ...], ...], count: int) -> tuple[tuple[int, ...], ...]:
    # Each further colour is the one on a grid that is farthest from all earlier ones and from black (ignored pixels).
    grid = np.stack(np.meshgrid(*[np.linspace(0, 255, 9).round()] * 3), -1).reshape(-1, 3)
    grid = grid[grid.max(1) >= 96]  # darker ones all look alike
    places, found = _oklab(grid), list(colours)
    before = _oklab(np.array([(0, 0, 0), *found], float))
    nearest = np.linalg.norm(places[:, None] - before, axis=-1).min(1)
    while len(found) < count:
        i = int(nearest.argmax())
        found.append(tuple(map(int, grid[i])))
        nearest = np.minimum(nearest, np.linalg.norm(places - places[i], axis=-1))
    return tuple(found)


def _oklab(rgb: np.ndarray) -> np.ndarray:
    """sRGB [..., 3] from 0 to 255 in Oklab, where distances match what the eye sees (Ottosson 2020)."""
    x = rgb / 255
    linear = np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)
    lms = linear @ np.array([[0.4122, 0.2119, 0.0883], [0.5363, 0.6807, 0.2817], [0.0514, 0.1074, 0.6300]])
    return np.cbrt(lms) @ np.array([[0.2105, 1.9780, 0.0259], [0.7936, -2.4286, 0.7828], [-0.0041, 0.4506, -0.8087]])


def colour_labels(labels: np.ndarray, classes: int, colours: Sequence[str] = ()) -> np.ndarray:
    """uint8 [..., 3] colours of labels [...]; ignored ones are black, or grey where a class is black."""
    table = palette(classes, colours)
    ignored = np.full((1, 3), 128 if (table.max(1) < 32).any() else 0, np.uint8)
    return np.concatenate([table, ignored])[np.minimum(labels, classes)]


def overlay(
    image: np.ndarray, labels: np.ndarray, class_names: Sequence[str], colours: Sequence[str] = ()
) -> np.ndarray:
    """The picture uint8 [H, W, 3] tinted in the classes' colours (not the background), with lines between classes."""
    tints = Image.fromarray(colour_labels(labels, len(class_names), colours))
    tinted = np.array(Image.blend(Image.fromarray(image), tints, 0.45))
    ground = [i for i, name in enumerate(class_names) if name.lower() == "background"]
    clear = np.isin(labels, ground)
    tinted[clear] = image[clear]
    width = max(1, round(max(labels.shape) / 400))
    edges = np.zeros(labels.shape, bool)
    edges[width:] |= labels[width:] != labels[:-width]
    edges[:, width:] |= labels[:, width:] != labels[:, :-width]
    tinted[edges] = 255
    return tinted


def spread(count: int, most: int) -> np.ndarray:
    """At most that many of `count` places, evenly from the first to the last: neighbours are often alike."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int))


def _plain(text: str) -> str:
    """A text made safe for matplotlib: dollars start no mathematics, and bytes that are not UTF-8 are replaced."""
    return text.encode(errors="replace").decode().replace("$", r"\$")


def _name(text: str) -> str:
    """A class name that fits a legend. matplotlib leaves out names that begin with an underscore."""
    short = text if len(text) <= 40 else f"{text[:39]}…"
    return _plain(f"\u200b{short}" if short.startswith("_") else short)


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    warnings.filterwarnings("ignore", "Glyph .* missing from")  # boxes show it, and each text would say so anew
    return Figure(figsize=(width, height), layout="constrained", dpi=110)


def metrics_figure(records: Sequence[Mapping[str, Any]], title: str, colours: Sequence[str] = ()) -> "Figure":
    """Losses, and IoU by class, over the epochs of metrics.jsonl's records: of test, or of the validation part."""
    from matplotlib.patheffects import withStroke

    figure = _figure(10, 4)
    figure.suptitle(_plain(title))
    losses, iou = figure.subplots(1, 2)
    epochs = [r["epoch"] for r in records]
    losses.plot(epochs, [r["train_loss"] for r in records], "o-", ms=3, label="train (mean of the epoch)")
    part, last = held_out(records[-1])
    scores = [metrics for _, metrics in map(held_out, records)] if "loss" in last else []
    epochs = epochs[: len(scores)]
    losses.plot(epochs, [s["loss"] for s in scores], "o-", ms=3, label=part)
    losses.set(xlabel="epoch", ylabel="loss", ylim=(0, None))
    losses.legend(frameon=False)
    iou.plot(epochs, [s["mean_iou"] for s in scores], "k--o", ms=3, lw=2, label="mean")  # a class may be black
    names = list(scores[-1]["iou"]) if scores else []
    for name, colour in zip(names, palette(len(names), colours) / 255, strict=True):
        values = [s["iou"][name] for s in scores]
        (line,) = iou.plot(epochs, values, "o-", ms=3, lw=1.2, color=colour, label=_name(name))
        line.set_path_effects([withStroke(linewidth=2.4, foreground="0.35")])  # light colours show on white, too
    iou.set(xlabel="epoch", ylabel=f"{part} IoU", ylim=(0, 1))
    for axes in (losses, iou):
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
    legend = figure.legend(
        handles=iou.lines, loc="outside right upper", ncols=-(-len(iou.lines) // 16), frameon=False, fontsize=8
    )
    width, height = figure.get_size_inches()
    figure.set_size_inches(width + legend.get_window_extent().width / figure.dpi, height)
    return figure


def results_figure(
    images: np.ndarray,
    labels: np.ndarray,
    predictions: np.ndarray,
    class_names: Sequence[str],
    title: str,
    row_titles: Sequence[str] = (),
    colours: Sequence[str] = (),
) -> "Figure":
    """A row for each of N pictures: image uint8 [N, H, W, 3], true and predicted labels [N, H, W] in colours."""
    from matplotlib.patches import Patch

    count, classes = len(images), len(class_names)
    shape = max(images.shape[1] / images.shape[2], 0.5)  # with less, the row titles would overlap
    figure = _figure(6.2, 2.05 * shape * count + 0.9)
    figure.suptitle(_plain(title))
    grid = figure.subplots(count, 3, squeeze=False)
    for i, row in enumerate(grid):
        columns = (images[i], *(colour_labels(array[i], classes, colours) for array in (labels, predictions)))
        for axes, picture in zip(row, columns, strict=True):
            axes.imshow(picture, interpolation="nearest")
            axes.set(xticks=[], yticks=[])
        if row_titles:
            row[0].set_ylabel(_plain(row_titles[i]), fontsize=8)
    for axes, name in zip(grid[0], ("image", "true mask", "predicted mask"), strict=True):
        axes.set_title(name)
    shown = [*class_names, *["ignored"] * bool((labels >= classes).any())]
    patches = [
        Patch(facecolor=colour / 255, edgecolor="grey", label=_name(name))
        for colour, name in zip(colour_labels(np.arange(len(shown)), classes, colours), shown, strict=True)
    ]
    _legend_below(figure, patches)
    return figure


def _legend_below(figure: "Figure", handles: Sequence[Any]) -> None:
    """A legend in as many columns as there is width for; the figure grows by its further rows."""
    width, height = figure.get_size_inches()
    for columns in range(min(len(handles), 6), 0, -1):
        legend = figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False)
        box = legend.get_window_extent()
        if box.width <= width * figure.dpi:
            break
        if columns > 1:
            legend.remove()
    rows = -(-len(handles) // columns)
    figure.set_size_inches(width, height + box.height / figure.dpi * (1 - 1 / rows))


def _line_colours(count: int) -> list[str]:
    """matplotlib's own, which are ten, or else our distinct ones, far from the white ground too."""
    if count <= 10:
        return [f"C{i}" for i in range(count)]
    return [f"#{bytes(colour).hex()}" for colour in _distinct(((255, 255, 255),), count + 1)[1:]]


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
    most = max(map(len, runs.values()))
    figure = _figure(3.4 * columns, (3.6 + 0.14 * most * (most > 1)) * rows)
    figure.suptitle(title + "; dashed: training loss" * (most > 1))
    for place, (name, curves) in enumerate(runs.items(), 1):
        axes: Any = figure.add_subplot(rows, columns, place)
        points = published.get(name, {})
        if points:
            axes.plot(list(points), list(points.values()), "kx", ms=5, label="test, published")
        alone = len(curves) == 1
        for colour, (label, records) in zip(_line_colours(len(curves)), curves.items(), strict=True):
            part, _ = held_out(records[-1])
            epochs = [r["epoch"] for r in records]
            losses, others = [r["train_loss"] for r in records], [r.get(f"{part}_loss", np.nan) for r in records]
            axes.plot(epochs, losses, "--", color=colour, lw=1, label="train" if alone else "_train")
            axes.plot(epochs, others, "o-", color=colour, ms=3, label=part if alone else _plain(f"{part}, {label}"))
        axes.set(title=_plain(name), xlabel="epoch", ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
        if not alone:
            axes.legend(frameon=False, fontsize=6, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    if all(len(curves) == 1 for curves in runs.values()):  # their lines have the same names: one legend, off the curves
        lines = [line for axes in figure.axes for line in axes.lines]
        _legend_below(figure, list({line.get_label(): line for line in lines}.values()))
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


def quality_figure(curves: Sequence[Any], levels: Sequence[float]) -> "Figure":
    """Mean IoU over minutes of training: curves with label, part, minutes and mean_iou, and a line at each level."""
    figure = _figure(7, 4)
    axes = figure.subplots()
    for level in levels:
        axes.axhline(level, color="0.7", lw=1, ls=":")
    for curve in curves:
        axes.plot(curve.minutes, curve.mean_iou, "o-", ms=3, label=_plain(f"{curve.label} ({curve.part})"))
    axes.set(xlabel="minutes of training", ylabel="mean IoU", xlim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="lower right")
    return figure
