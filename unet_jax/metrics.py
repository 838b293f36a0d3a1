"""Segmentation metrics: sums made on the device picture by picture, scores made from them on the host."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from unet_jax.losses import log_likelihood, pixel_weights


class PictureSums(NamedTuple):
    """What the scores are made of, for each of N pictures; padding pictures have zeros."""

    confusion: Array | np.ndarray  # [N, C, C] int32: pixels of true class (row) predicted as class (column)
    log_likelihood: Array | np.ndarray  # [N] float32: the true class's log probability, summed over pixels that count
    likelihood: Array | np.ndarray  # [N] float32: likewise its probability


def picture_sums(logits: Array, labels: ArrayLike, weights: ArrayLike) -> PictureSums:
    """The sums of logits [N, H, W, C] against labels [N, H, W], over the pixels that count. Weights [N] are 0 or 1.

    A label that is neither a class nor ignored makes its picture's likelihoods NaN, and is in no confusion matrix.
    """
    classes = logits.shape[-1]
    counts = pixel_weights(logits, labels, weights)
    truth = jax.nn.one_hot(labels, classes, dtype=jnp.float32) * (counts > 0)[..., None].astype(jnp.float32)
    predicted = jax.nn.one_hot(logits.argmax(-1), classes, dtype=jnp.float32)
    # Zeros and ones, summed in float32 over one picture: exact up to 2^24 pixels.
    confusion = jnp.einsum("nhwt,nhwp->ntp", truth, predicted, preferred_element_type=jnp.float32)
    log_p = log_likelihood(logits, labels)
    return PictureSums(confusion.astype(jnp.int32), (log_p * counts).sum((1, 2)), (jnp.exp(log_p) * counts).sum((1, 2)))


def class_scores(confusion: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """IoU and Dice [..., C] of confusion matrices [..., C, C]; NaN for a class neither true nor predicted anywhere."""
    overlap = np.diagonal(confusion, axis1=-2, axis2=-1).astype(float)
    total = confusion.sum(-1) + confusion.sum(-2)
    with np.errstate(invalid="ignore"):
        return overlap / (total - overlap), 2 * overlap / total


def mean_iou(confusion: np.ndarray) -> np.ndarray:
    """Mean IoU [...] of confusion matrices [..., C, C], over the classes that are true or predicted somewhere.

    NaN where none is, as in a picture without a pixel that counts.
    """
    iou, _ = class_scores(confusion)
    occurs = ~np.isnan(iou)
    with np.errstate(invalid="ignore"):
        return np.where(occurs, iou, 0).sum(-1) / occurs.sum(-1)


def scores(sums: PictureSums, class_names: Sequence[str]) -> dict[str, Any]:
    """The metrics of a split, in JSON's types, from its pictures' sums (all pixels of all pictures counted alike).

    IoU and Dice come from the confusion matrix of the whole split, not averaged over pictures. test_log_dice takes the
    split as one batch. The others are `confusion_scores`. Every metric is None if no pixel counts.
    """
    confusion = np.asarray(sums.confusion, np.int64).sum(0)
    pixels = int(confusion.sum()) or math.nan  # NaN if no pixel counts: every score below is then None
    likelihood = float(np.asarray(sums.likelihood, float).sum()) / pixels
    # losses.log_dice with I = likelihood * pixels, N = pixels. JSON has no infinity, hence None if I is 0.
    return {
        "test_cross_entropy": _or_none(-float(np.asarray(sums.log_likelihood, float).sum()) / pixels),
        "test_log_dice": _or_none(-np.log(2 * likelihood / (likelihood + 1 + 1e-6 / pixels))) if likelihood else None,
        **confusion_scores(confusion, class_names),
    }


def confusion_scores(confusion: np.ndarray, class_names: Sequence[str]) -> dict[str, Any]:
    """The metrics that a split's confusion matrix [C, C] decides, in JSON's types.

    A class that occurs neither in the truth nor in the predictions has None and is left out of mean_iou. If a class is
    called background, binary_iou is the IoU of all others taken as one.
    """
    iou, dice = class_scores(confusion)
    result: dict[str, Any] = {
        "pixel_accuracy": _or_none(np.trace(confusion) / (int(confusion.sum()) or math.nan)),
        "mean_iou": _or_none(mean_iou(confusion)),
        "iou": _by_name(class_names, iou),
        "dice": _by_name(class_names, dice),
    }
    lower = [name.lower() for name in class_names]
    if "background" in lower and len(class_names) > 1:
        ground = lower.index("background")
        is_object = np.arange(len(class_names)) != ground
        overlap = confusion[np.ix_(is_object, is_object)].sum()
        others = int(confusion.sum() - confusion[ground, ground])
        result["binary_iou"] = float(overlap / others) if others else None
    return result


def scores_csv(names: Sequence[str], confusion: np.ndarray, class_names: Sequence[str]) -> str:
    """A table of CSV with a line for each of N pictures, from their confusion matrices [N, C, C].

    Empty cells: a class neither true nor predicted there, or a picture without a pixel that counts.
    """
    file = io.StringIO()
    table = csv.writer(file, lineterminator="\n")
    table.writerow(["picture", "mean_iou", "pixel_accuracy", *(f"iou_{name}" for name in class_names)])
    iou, _ = class_scores(confusion)
    for name, matrix, by_class in zip(names, confusion, iou, strict=True):
        pixels = int(matrix.sum())
        overall = mean_iou(matrix), np.trace(matrix) / (pixels or math.nan)
        table.writerow([name, *("" if np.isnan(v) else f"{v:.6f}" for v in (*overall, *by_class))])
    return file.getvalue()


def _by_name(class_names: Sequence[str], values: np.ndarray) -> dict[str, float | None]:
    return {n: _or_none(v) for n, v in zip(class_names, values, strict=True)}


def _or_none(value: Any) -> float | None:
    return None if np.isnan(value) else float(value)


def shown(value: float | None) -> str:
    """A score to four places, or "-" where there is none."""
    return "-" if value is None else f"{value:.4f}"


def cell(text: object) -> str:
    """A text as a cell of a Markdown table."""
    return " ".join(str(text).split()).replace("|", "\\|")


def best_epoch(records: Sequence[Mapping[str, Any]]) -> int:
    """The index of the record of metrics.jsonl with the highest mean IoU on validation; of equals, the last."""
    return max(range(len(records)), key=lambda i: (records[i]["validation_mean_iou"] or 0, i))


def held_out(record: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """("test" or "validation", that part's metrics by name: loss, mean_iou, iou, ...) of a line of metrics.jsonl.

    Without either part the metrics have no loss, mean_iou and iou.
    """
    part = "validation" if "validation_loss" in record else "test"
    prefix = "validation_" if part == "validation" else ""
    metrics = {name.removeprefix(prefix): value for name, value in record.items() if name.startswith(prefix)}
    return part, metrics | ({"loss": record[f"{part}_loss"]} if f"{part}_loss" in record else {})
