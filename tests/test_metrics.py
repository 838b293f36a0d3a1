"""Confusion matrices and scores, by hand and against the losses."""

import json

import jax
import numpy as np
import pytest

from unet_jax.config import IGNORE_LABEL
from unet_jax.losses import cross_entropy, log_dice
from unet_jax.metrics import PictureSums, best_epoch, class_scores, mean_iou, picture_sums, scores, scores_csv

NAMES = ("pet", "background", "border")
RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(6, 4, 5, 3)).astype(np.float32) * 2
LABELS = RNG.integers(0, 3, (6, 4, 5)).astype(np.uint8)
LABELS[RNG.random(LABELS.shape) < 0.2] = IGNORE_LABEL
WEIGHTS = np.array([1, 1, 1, 1, 1, 0], np.float32)
sums_of = jax.jit(picture_sums)


def of_confusion(confusion) -> PictureSums:
    """Sums whose likelihoods are those of certainty."""
    confusion = np.asarray(confusion)[None]
    return PictureSums(confusion, np.zeros(1), confusion.sum((1, 2)).astype(float))


def test_confusion_by_hand():
    predicted = np.array([[[0, 1, 1], [2, 2, 0]]])
    labels = np.array([[[0, 1, 0], [1, IGNORE_LABEL, 2]]], np.uint8)
    sums = sums_of(np.eye(3, dtype=np.float32)[predicted], labels, np.ones(1, np.float32))
    np.testing.assert_array_equal(sums.confusion, [[[1, 1, 0], [0, 1, 1], [1, 0, 0]]])  # rows: truth
    assert sums.confusion.dtype == np.int32
    right, wrong = np.e / (np.e + 2), 1 / (np.e + 2)
    np.testing.assert_allclose(sums.likelihood, [2 * right + 3 * wrong], rtol=1e-6)
    np.testing.assert_allclose(sums.log_likelihood, [2 * np.log(right) + 3 * np.log(wrong)], rtol=1e-6)


def test_confusion_counts_each_picture_and_nothing_ignored_or_padded():
    sums = sums_of(LOGITS, LABELS, WEIGHTS)
    expected = np.zeros((6, 3, 3), int)
    for n, i, j in np.argwhere(LABELS != IGNORE_LABEL):
        if WEIGHTS[n]:
            expected[n, LABELS[n, i, j], LOGITS[n, i, j].argmax()] += 1
    np.testing.assert_array_equal(sums.confusion, expected)
    assert expected[5].sum() == 0
    assert (sums.log_likelihood[5], sums.likelihood[5]) == (0, 0)
    assert np.all(np.asarray(sums.log_likelihood)[:5] < 0)


def test_scores_by_hand():
    #                     predicted:  pet ground border
    result = scores(of_confusion([[6, 1, 1], [2, 7, 0], [0, 1, 2]]), NAMES)
    assert result["iou"] == pytest.approx({"pet": 6 / 10, "background": 7 / 11, "border": 2 / 4})
    assert result["dice"] == pytest.approx({"pet": 12 / 16, "background": 14 / 18, "border": 4 / 6})
    assert result["mean_iou"] == pytest.approx((6 / 10 + 7 / 11 + 2 / 4) / 3)
    assert result["pixel_accuracy"] == pytest.approx(15 / 20)
    # Pet or border, against background: 6+1+0+2 agree; 2 more are predicted, 1+1 more are true.
    assert result["binary_iou"] == pytest.approx(9 / 13)
    assert (result["test_cross_entropy"], result["test_log_dice"]) == pytest.approx((0, 0), abs=1e-6)
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_a_class_that_occurs_nowhere_has_none_and_is_left_out():
    result = scores(of_confusion([[3, 1, 0], [1, 5, 0], [0, 0, 0]]), NAMES)
    assert (result["iou"]["border"], result["dice"]["border"]) == (None, None)
    assert result["mean_iou"] == pytest.approx((3 / 5 + 5 / 7) / 2)
    # One that is only ever predicted counts, as 0.
    result = scores(of_confusion([[3, 0, 1], [1, 5, 0], [0, 0, 0]]), NAMES)
    assert (result["iou"]["border"], result["dice"]["border"]) == (0, 0)
    assert result["mean_iou"] == pytest.approx((3 / 5 + 5 / 6) / 3)
    json.dumps(result, allow_nan=False)


def test_binary_iou_needs_a_background_and_something_else():
    assert "binary_iou" not in scores(of_confusion(np.eye(2, dtype=int)), ("cat", "dog"))
    assert "binary_iou" not in scores(of_confusion([[4]]), ("background",))
    # Wherever it stands in the order, and however many objects there are.
    first = scores(of_confusion([[4, 1, 0], [2, 3, 1], [0, 0, 2]]), ("background", "cat", "dog"))
    assert first["binary_iou"] == pytest.approx(6 / 9)


def test_nothing_that_counts_has_no_scores():
    result = scores(of_confusion(np.zeros((3, 3), int)), NAMES)
    by_class = {*result.pop("iou").values(), *result.pop("dice").values()}
    assert by_class == {*result.values()} == {None}
    json.dumps(result, allow_nan=False)


def test_a_likelihood_of_zero_has_no_log_dice():
    certain = of_confusion([[0, 2, 0], [0, 0, 0], [0, 0, 0]])
    result = scores(certain._replace(likelihood=np.zeros(1)), NAMES)
    assert (result["test_log_dice"], result["mean_iou"]) == (None, 0)


def test_of_equal_epochs_the_last_is_the_best():
    assert best_epoch([{"validation_mean_iou": value} for value in (0.5, 0.7, 0.7, 0.6, None)]) == 2


def test_scores_of_many_matrices_at_once():
    matrices = np.array([[[3, 1], [1, 5]], [[2, 0], [0, 0]], [[0, 0], [0, 0]]])
    iou, dice = class_scores(matrices)
    np.testing.assert_allclose(iou, [[3 / 5, 5 / 7], [1, np.nan], [np.nan, np.nan]])
    np.testing.assert_allclose(dice, [[6 / 8, 10 / 12], [1, np.nan], [np.nan, np.nan]])
    np.testing.assert_allclose(mean_iou(matrices), [(3 / 5 + 5 / 7) / 2, 1, np.nan])


def test_losses_of_the_split_are_those_of_one_whole_batch():
    result = scores(PictureSums(*map(np.asarray, sums_of(LOGITS, LABELS, WEIGHTS))), NAMES)
    for name, loss in (("test_cross_entropy", cross_entropy), ("test_log_dice", log_dice)):
        assert result[name] == pytest.approx(float(jax.jit(loss)(LOGITS, LABELS, WEIGHTS)), rel=1e-5)
        assert result[name] > 0.1


def test_scores_do_not_depend_on_the_batch_size():
    whole = sums_of(LOGITS, LABELS, WEIGHTS)
    parts = [sums_of(LOGITS[i : i + 2], LABELS[i : i + 2], WEIGHTS[i : i + 2]) for i in (0, 2, 4)]
    joined = PictureSums(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
    np.testing.assert_array_equal(joined.confusion, whole.confusion)
    alike, expected = scores(joined, NAMES), scores(whole, NAMES)
    assert {k: v for k, v in alike.items() if not k.startswith("test_")} == {
        k: v for k, v in expected.items() if not k.startswith("test_")
    }
    for name in ("test_cross_entropy", "test_log_dice"):
        assert alike[name] == pytest.approx(expected[name], rel=1e-6)
    # Padding makes no difference either.
    assert scores(PictureSums(*(array[:5] for array in joined)), NAMES) == alike


def test_scores_of_each_picture_as_csv():
    confusion = np.array([[[3, 1, 0], [0, 4, 0], [0, 0, 0]], np.zeros((3, 3), int)])
    lines = scores_csv(["a,b", "void"], confusion, NAMES).splitlines()
    assert lines == [
        "picture,mean_iou,pixel_accuracy,iou_pet,iou_background,iou_border",
        '"a,b",0.775000,0.875000,0.750000,0.800000,',
        "void,,,,,",
    ]


def test_strict_promotion_and_bfloat16_logits():
    with jax.numpy_dtype_promotion("strict"):
        sums = sums_of(LOGITS.astype("bfloat16"), LABELS, WEIGHTS)
    assert [array.dtype for array in sums] == [np.int32, np.float32, np.float32]
    assert np.asarray(sums.confusion).sum() == (LABELS[:5] != IGNORE_LABEL).sum()


def test_a_label_that_is_no_class_is_in_no_confusion_and_spoils_its_picture():
    labels = LABELS.astype(np.int32)
    labels[1, 0, 0] = 3
    sums, clean = sums_of(LOGITS, labels, WEIGHTS), sums_of(LOGITS, LABELS, WEIGHTS)
    assert np.isnan(sums.likelihood[1])
    assert np.isnan(sums.log_likelihood[1])
    np.testing.assert_array_equal(sums.likelihood[2:], clean.likelihood[2:])
    assert np.asarray(sums.confusion)[1].sum() == (labels[1] < 3).sum()
