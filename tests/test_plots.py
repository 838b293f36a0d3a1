"""The figures, from arrays and records made up here."""

import io

import matplotlib.colors
import numpy as np
import pytest
from PIL import Image

from unet_jax.plots import (
    COLOURS,
    _oklab,
    colour_labels,
    comparison_figure,
    metrics_figure,
    overlay,
    palette,
    results_figure,
    spread,
)

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
    # As the eye sees it: with hues by the golden angle two of the first ten were .03 apart.
    places = _oklab(np.array([(0, 0, 0), *palette(24)], float))
    between = np.linalg.norm(places[:, None] - places, axis=-1) + 9 * np.eye(25)
    assert between.min() > 0.12
    assert len(set(map(tuple, palette(255)))) == 255


def test_the_datas_own_colours_are_used():
    own = ("#010203", "#ff0000")
    np.testing.assert_array_equal(palette(2, own), [[1, 2, 3], [255, 0, 0]])
    np.testing.assert_array_equal(colour_labels(np.array([1, 255]), 2, own), [[255, 0, 0], [128, 128, 128]])


def test_many_runs_have_a_legend_below_their_curves_and_colours_of_their_own():
    runs = {variant: {f"runs/{i}": records(2) for i in range(20)} for variant in ("mp_tr_ce", "mp_tr_dice")}
    figure = comparison_figure(runs, {}, "many")
    figure.savefig(io.BytesIO())
    for axes in figure.axes:
        box = axes.get_legend().get_window_extent()
        assert not overlaps(box, axes.get_window_extent())
        assert box.y0 >= -5  # its empty border
        assert len({line.get_color() for line in axes.lines}) == 20


def test_ignored_pixels_differ_from_a_black_class_and_are_in_the_legend():
    labels = np.array([[[0, 1], [255, 0]]], np.uint8)
    coloured = colour_labels(labels, 2, ("#000000", "#ff0000"))
    np.testing.assert_array_equal(coloured[0], [[[0, 0, 0], [255, 0, 0]], [[128, 128, 128], [0, 0, 0]]])
    for truth, shown in ((labels, ["x", "y", "ignored"]), (labels % 2, ["x", "y"])):
        figure = results_figure(np.zeros((1, 2, 2, 3), np.uint8), truth, labels % 2, ("x", "y"), "t")
        assert [text.get_text() for text in figure.legends[0].get_texts()] == shown


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
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["mean", *NAMES]
    # One colour a class everywhere.
    assert [matplotlib.colors.to_hex(line.get_color()) for line in iou.lines[1:]] == list(COLOURS[:3])
    own = metrics_figure(records(3), "a run", ("#000001", "#000002", "#000003"))
    assert matplotlib.colors.to_hex(own.axes[1].lines[2].get_color()) == "#000002"
    width, height = png_size(figure)
    assert 500 < width < 600
    assert height == 200


def overlaps(box, other) -> bool:
    return bool(box.x0 < other.x1 and other.x0 < box.x1 and box.y0 < other.y1 and other.y0 < box.y1)


@pytest.mark.parametrize("count", [3, 11, 60])
def test_legends_are_whole_and_cover_nothing(count):
    names = [f"a class of number {i}" for i in range(count)]
    lines_of = [{**r, "iou": dict.fromkeys(names, 0.5)} for r in records(2)]
    one = np.zeros((1, 4, 4), np.uint8)
    figures = (metrics_figure(lines_of, "x"), results_figure(np.zeros((1, 4, 4, 3), np.uint8), one, one, names, "x"))
    for figure in figures:
        png_size(figure)
        (legend,) = figure.legends
        box, page = legend.get_window_extent(), figure.bbox
        assert box.x0 >= page.x0 - 1
        assert box.x1 <= page.x1 + 1
        assert box.y0 >= page.y0 - 1
        assert box.y1 <= page.y1 + 1
        assert not any(overlaps(box, axes.get_window_extent()) for axes in figure.axes)
        assert len(legend.get_texts()) >= count
        assert min(axes.get_window_extent().width for axes in figure.axes) > 100


def test_names_are_shown_as_they_are_whatever_they_have_in_them():
    names = ("$a$b$", "_hidden", "caf\udce9", "x" * 200)
    one = np.zeros((1, 4, 4), np.uint8)
    figure = results_figure(np.zeros((1, 4, 4, 3), np.uint8), one, one, names, "$\\frac$ $", ("$p$\nmean IoU",))
    png_size(figure)
    shown = [text.get_text() for text in figure.legends[0].get_texts()]
    assert shown[:3] == [r"\$a\$b\$", "\u200b_hidden", "caf?"]
    assert len(shown[3]) == 40
    png_size(metrics_figure([{**r, "iou": dict.fromkeys(names, 0.5)} for r in records(2)], "$\\x$"))


def test_names_that_the_font_lacks_give_boxes_and_no_warnings():
    one = np.zeros((1, 4, 4), np.uint8)
    figure = results_figure(np.zeros((1, 4, 4, 3), np.uint8), one, one, ("森林", "b"), "x")
    figure.savefig(io.BytesIO())


def test_the_background_is_clear_in_an_overlay():
    image = np.full((40, 40, 3), 100, np.uint8)
    labels = np.zeros((40, 40), np.uint8)
    labels[10:30, 10:30] = 1
    seen = overlay(image, labels, ("Background", "thing"), ("#000000", "#ff0000"))
    np.testing.assert_array_equal(seen[:9], image[:9])
    np.testing.assert_allclose(seen[20, 20], 0.55 * np.array([100] * 3) + 0.45 * np.array([255, 0, 0]), atol=1)
    np.testing.assert_array_equal(seen[10, 20], [255] * 3)  # the line between them
    assert (overlay(image, labels, ("a", "b"))[:9] != image[:9]).any()  # without a background all are tinted


def test_pictures_shown_are_spread_over_the_split():
    np.testing.assert_array_equal(spread(91, 10), np.arange(0, 91, 10))
    np.testing.assert_array_equal(spread(3, 10), [0, 1, 2])
    np.testing.assert_array_equal(spread(1, 10), [0])


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
    assert [text.get_text() for text in legend.get_texts()] == [*NAMES, "ignored"]
    drawn = [matplotlib.colors.to_hex(patch.get_facecolor()) for patch in legend.get_patches()]
    assert drawn == [*COLOURS[:3], "#000000"]
    width, height = png_size(figure)
    assert (width, height) == (310, 181)  # its rows have the pictures' shape


def test_results_figure_of_one_picture_and_no_row_titles():
    one = np.zeros((1, 4, 4), np.uint8)
    figure = results_figure(np.zeros((1, 4, 4, 3), np.uint8), one, one, NAMES, "one")
    assert [axes.get_ylabel() for axes in figure.axes] == ["", "", ""]


def test_comparison_figure():
    published = {"mp_tr_ce": {1: 1.3338, 2: 0.828, 25: 0.5283}}
    runs = {"mp_tr_ce": {"a": records(2)}, "my_run": {"a": records(3), "b": records(1)}}
    figure = comparison_figure(runs, published, "ours and theirs")
    assert figure.get_suptitle() == "ours and theirs; dashed: training loss"
    assert [axes.get_title() for axes in figure.axes] == ["mp_tr_ce", "my_run"]
    first, second = map(lines, figure.axes)
    assert first["test, published"] == ([1, 2, 25], [1.3338, 0.828, 0.5283])
    assert first["test"] == ([1, 2], [1.5, 0.75])
    assert "test, published" not in second
    assert second["_train"][0] == [1]  # of the last of its runs
    assert second["test, a"][0] == [1, 2, 3]
    assert second["test, b"] == ([1], [1.5])
    assert png_size(figure) == (340, 194)
