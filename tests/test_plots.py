"""The figures, from arrays and records made up here."""

import io

import matplotlib.colors
import numpy as np
import pytest
from PIL import Image

from unet_jax.plots import COLOURS, colour_labels, comparison_figure, metrics_figure, palette, results_figure

NAMES = ("pet", "background", "border")
RNG = np.random.default_rng(0)


def records(epochs: int) -> list[dict]:
    return [
        {
            "epoch": i,
            "train_loss": 1 / i,
            "test_loss": 1.5 / i,
            "mean_iou": 0.1 * i,
            "iou": {"pet": 0.2 * i, "background": 0.1 * i, "border": None if i == 1 else 0.01},
        }
        for i in range(1, epochs + 1)
    ]


def png_size(figure) -> tuple[int, int]:
    """Draws it (nothing may warn on the way); the picture's width and height."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=50)
    return Image.open(file).size


def lines(axes) -> dict[str, tuple[list, list]]:
    return {line.get_label(): tuple(list(map(float, v)) for v in line.get_data(orig=False)) for line in axes.lines}


def test_palette_begins_with_the_named_colours_and_stays_distinct():
    colours = palette(40).astype(int)
    assert colours.shape == (40, 3)
    assert ["#" + bytes(c).hex() for c in palette(len(COLOURS))] == list(COLOURS)
    np.testing.assert_array_equal(palette(3), colours[:3])
    distance = np.abs(colours[:, None] - colours[None]).max(-1) + 255 * np.eye(40, dtype=int)
    assert distance.min() >= 20
    assert distance[np.arange(39), np.arange(1, 40)].min() >= 48  # neighbours are well apart
    assert np.abs(colours).max(-1).min() >= 48  # none is near the black of ignored pixels
    assert palette(1).shape == (1, 3)


@pytest.mark.parametrize("classes", [3, 12])
def test_colour_labels(classes):
    labels = np.array([[0, classes - 1], [255, classes]], np.uint8)
    colours = colour_labels(labels, classes)
    assert (colours.shape, colours.dtype) == ((2, 2, 3), np.uint8)
    expected = [[palette(classes)[0], palette(classes)[-1]], [[0, 0, 0], [0, 0, 0]]]
    np.testing.assert_array_equal(colours, expected)


def test_metrics_figure():
    figure = metrics_figure(records(3), "a run")
    assert figure.get_suptitle() == "a run"
    losses, iou = figure.axes
    assert (losses.get_ylabel(), iou.get_ylabel(), iou.get_ylim()) == ("loss", "test IoU", (0, 1))
    drawn = lines(losses)
    assert drawn["test"] == ([1, 2, 3], [1.5, 0.75, 0.5])
    assert drawn["train (mean of the epoch)"] == ([1, 2, 3], pytest.approx([1, 1 / 2, 1 / 3]))
    drawn = lines(iou)
    assert list(drawn) == ["mean", *NAMES]
    assert drawn["pet"] == ([1, 2, 3], pytest.approx([0.2, 0.4, 0.6]))
    assert drawn["border"][1] == pytest.approx([np.nan, 0.01, 0.01], nan_ok=True)  # None: a gap
    assert [text.get_text() for text in iou.get_legend().get_texts()] == ["mean", *NAMES]
    assert png_size(figure) == (500, 200)


def test_results_figure():
    images = RNG.integers(0, 256, (2, 8, 12, 3)).astype(np.uint8)
    labels, predictions = RNG.integers(0, 3, (2, 2, 8, 12)).astype(np.uint8)
    labels[0, 0, 0] = 255
    figure = results_figure(images, labels, predictions, NAMES, "some pictures", ("first", "second"))
    assert len(figure.axes) == 6
    assert [axes.get_title() for axes in figure.axes] == ["image", "true mask", "predicted mask", "", "", ""]
    assert [axes.get_ylabel() for axes in figure.axes] == ["first", "", "", "second", "", ""]
    for i in range(2):
        expected = images[i], colour_labels(labels[i], 3), colour_labels(predictions[i], 3)
        for axes, picture in zip(figure.axes[3 * i : 3 * i + 3], expected, strict=True):
            np.testing.assert_array_equal(axes.images[0].get_array(), picture)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == list(NAMES)
    assert [matplotlib.colors.to_hex(patch.get_facecolor()) for patch in legend.get_patches()] == list(COLOURS[:3])
    width, height = png_size(figure)
    assert (width, height) == (310, 250)


def test_results_figure_of_one_picture_and_no_row_titles():
    one = np.zeros((1, 4, 4), np.uint8)
    figure = results_figure(np.zeros((1, 4, 4, 3), np.uint8), one, one, NAMES, "one")
    assert [axes.get_ylabel() for axes in figure.axes] == ["", "", ""]


def test_comparison_figure():
    published = {"mp_tr_ce": {1: 1.3338, 2: 0.828, 25: 0.5283}}
    runs = {"mp_tr_ce": {"a": records(2)}, "my_run": {"a": records(3), "b": records(1)}}
    figure = comparison_figure(runs, published, "ours and theirs")
    assert figure.get_suptitle() == "ours and theirs"
    assert [axes.get_title() for axes in figure.axes] == ["mp_tr_ce", "my_run"]
    first, second = map(lines, figure.axes)
    assert first["test, published"] == ([1, 2, 25], [1.3338, 0.828, 0.5283])
    assert first["test"] == ([1, 2], [1.5, 0.75])
    assert second["test, published"] == ([], [])
    assert second["train, a"][0] == [1, 2, 3]
    assert second["test, b"] == ([1], [1.5])
    assert png_size(figure) == (340, 180)
