"""The losses: closed forms, the published formula, and what must not count."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from unet_jax.checks import LOSS_NAMES, loss_terms
from unet_jax.config import IGNORE_LABEL
from unet_jax.errors import InputError
from unet_jax.losses import LOSSES, make_loss

SHAPE = (4, 3, 5)
RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(*SHAPE, 3)).astype(np.float32) * 2
LABELS = RNG.integers(0, 3, SHAPE).astype(np.uint8)
ONES = np.ones(4, np.float32)
NAMES = sorted(LOSSES)


@functools.cache
def value_and_gradient(name):
    return jax.jit(jax.value_and_grad(LOSSES[name]))


def value(name, logits=LOGITS, labels=LABELS, weights=ONES) -> float:
    result, _ = value_and_gradient(name)(logits, labels, weights)
    assert result.shape == ()
    assert result.dtype == jnp.float32
    return float(result)


def softmax(logits: np.ndarray) -> np.ndarray:
    e = np.exp(logits.astype(float) - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def true_class(logits, labels, counts):
    """The true class's probability at each pixel that counts."""
    p = np.take_along_axis(softmax(logits), np.where(counts, labels, 0)[..., None].astype(int), -1)[..., 0]
    return p[counts]


def by_numpy(name, logits, labels, counts=None) -> float:
    counts = np.ones(labels.shape, bool) if counts is None else counts
    p = true_class(logits, labels, counts)
    if name == "cross_entropy":
        return -np.log(p).mean()
    if name == "log_dice":
        return -np.log(2 * p.sum() / (p.sum() + p.size + 1e-6))
    dice = []
    for k in range(logits.shape[-1]):
        y, q = (labels == k)[counts], softmax(logits)[..., k][counts]
        if y.any():
            dice.append(2 * q[y].sum() / (q.sum() + y.sum()))
    return 1 - np.mean(dice)


@pytest.mark.parametrize("name", NAMES)
def test_formula(name):
    assert value(name) == pytest.approx(by_numpy(name, LOGITS, LABELS), abs=1e-6)
    assert value(name, weights=None) == pytest.approx(value(name), abs=1e-6)


def test_uniform_logits():
    uniform = np.full_like(LOGITS, 0.7)
    assert value("cross_entropy", uniform) == pytest.approx(np.log(3), abs=1e-6)
    assert value("log_dice", uniform) == pytest.approx(np.log(2), abs=1e-6)
    # Each class a third of the pixels, each with probability a third: 2 (n/3/3) / (n/3 + n/3).
    balanced = np.resize(np.arange(3, dtype=np.uint8), SHAPE)
    assert value("soft_dice", uniform, balanced) == pytest.approx(2 / 3, abs=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_perfect_logits_give_zero(name):
    perfect = 100 * np.eye(3, dtype=np.float32)[LABELS]
    assert value(name, perfect) == pytest.approx(0, abs=1e-6)
    # Wrong ones: an e^-100 of truth.
    if name != "log_dice":
        assert value(name, -perfect) > 0.9


def test_hand_worked():
    # Two pixels, probabilities of class 0 and 1: (.8, .2) and (.4, .6); truth: 0, then 1.
    logits, labels = np.log(np.array([[[[0.8, 0.2], [0.4, 0.6]]]], np.float32)), np.array([[[0, 1]]], np.uint8)
    one = ONES[:1]
    assert value("cross_entropy", logits, labels, one) == pytest.approx(-(np.log(0.8) + np.log(0.6)) / 2)
    assert value("log_dice", logits, labels, one) == pytest.approx(-np.log(2.8 / 3.4), abs=1e-6)
    dice = (2 * 0.8 / (1.2 + 1), 2 * 0.6 / (0.8 + 1))
    assert value("soft_dice", logits, labels, one) == pytest.approx(1 - sum(dice) / 2)


def test_log_dice_depends_on_the_mean_probability_of_the_truth_alone():
    # Probabilities of the truth .9 and .1, in either order, or .5 twice.
    logits = np.log(np.array([[0.9, 0.1], [0.1, 0.9], [0.5, 0.5]], np.float32))
    losses = [
        value("log_dice", logits[list(rows)].reshape(1, 1, 2, 2), np.zeros((1, 1, 2), np.uint8), ONES[:1])
        for rows in [(0, 1), (1, 0), (2, 2)]
    ]
    np.testing.assert_allclose(losses, -np.log(2 / 3), rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_weight_0_leaves_an_example_out_exactly(name):
    weights = np.array([1, 0, 1, 0], np.float32)
    loss, gradient = value_and_gradient(name)(LOGITS, LABELS, weights)
    assert float(loss) == pytest.approx(by_numpy(name, LOGITS[::2], LABELS[::2]), abs=1e-6)
    np.testing.assert_array_equal(gradient[1::2], 0)
    assert np.all(np.abs(np.asarray(gradient)[::2]).max(-1) > 0)
    # Whatever the padding holds.
    logits, labels = LOGITS.copy(), LABELS.copy()
    logits[1::2], labels[1::2] = 30 * logits[1::2], (labels[1::2] + 1) % 3
    other, other_gradient = value_and_gradient(name)(logits, labels, weights)
    assert float(other) == float(loss)
    np.testing.assert_array_equal(other_gradient, gradient)


@pytest.mark.parametrize("name", NAMES)
def test_ignored_pixels_count_in_nothing(name):
    ignored = np.random.default_rng(1).random(SHAPE) < 0.4
    labels = np.where(ignored, IGNORE_LABEL, LABELS).astype(np.uint8)
    loss, gradient = value_and_gradient(name)(LOGITS, labels, ONES)
    assert float(loss) == pytest.approx(by_numpy(name, LOGITS, LABELS, ~ignored), abs=1e-6)
    gradient = np.asarray(gradient)
    np.testing.assert_array_equal(gradient[ignored], 0)
    assert np.all(np.abs(gradient[~ignored]).max(-1) > 0)
    logits = np.where(ignored[..., None], -17 * LOGITS, LOGITS)
    other, other_gradient = value_and_gradient(name)(logits, labels, ONES)
    assert float(other) == float(loss)
    np.testing.assert_array_equal(other_gradient, gradient)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("what", ["ignored", "padding"])
def test_a_batch_in_which_nothing_counts_gives_zero(name, what):
    labels = np.full_like(LABELS, IGNORE_LABEL) if what == "ignored" else LABELS
    loss, gradient = value_and_gradient(name)(LOGITS, labels, ONES if what == "ignored" else 0 * ONES)
    assert float(loss) == 0
    np.testing.assert_array_equal(gradient, 0)


def test_soft_dice_leaves_absent_classes_out():
    labels = np.where(LABELS == 2, 1, LABELS).astype(np.uint8)
    assert value("soft_dice", LOGITS, labels) == pytest.approx(by_numpy("soft_dice", LOGITS, labels), abs=1e-6)
    # A class of padding alone is absent too.
    labels[0], labels[1:] = 2, np.minimum(labels[1:], 1)
    weights = np.array([0, 1, 1, 1], np.float32)
    expected = by_numpy("soft_dice", LOGITS[1:], labels[1:])
    assert value("soft_dice", LOGITS, labels, weights) == pytest.approx(expected, abs=1e-6)
    perfect = 100 * np.eye(3, dtype=np.float32)[labels]
    assert value("soft_dice", perfect, labels, weights) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_logits_are_computed_in_float32(name):
    logits = LOGITS.astype(jnp.bfloat16)
    with jax.numpy_dtype_promotion("strict"):
        loss, gradient = value_and_gradient(name)(logits, LABELS, ONES)
    assert (loss.dtype, gradient.dtype) == (jnp.float32, jnp.bfloat16)
    assert float(loss) == pytest.approx(by_numpy(name, logits.astype(np.float32), LABELS), abs=1e-6)


def test_every_loss_has_a_name_that_a_config_can_give():
    assert tuple(LOSSES) == LOSS_NAMES


def test_sums_of_losses():
    loss = make_loss("cross_entropy + 0.5*soft_dice+1e-1*log_dice")
    expected = value("cross_entropy") + 0.5 * value("soft_dice") + 0.1 * value("log_dice")
    with jax.numpy_dtype_promotion("strict"):
        total = jax.jit(loss)(LOGITS, LABELS, ONES)
    assert float(total) == pytest.approx(expected, abs=1e-6)
    # In the gradient too.
    parts = [value_and_gradient(name)(LOGITS, LABELS, ONES)[1] for name in ("cross_entropy", "soft_dice", "log_dice")]
    gradient = jax.jit(jax.grad(loss))(LOGITS, LABELS, ONES)
    np.testing.assert_allclose(gradient, parts[0] + 0.5 * parts[1] + 0.1 * parts[2], atol=1e-6)
    assert float(make_loss("log_dice")(LOGITS, LABELS, ONES)) == pytest.approx(value("log_dice"))


def test_loss_terms():
    assert loss_terms("log_dice") == ((1.0, "log_dice"),)
    assert loss_terms("2 * cross_entropy + .25*soft_dice") == ((2.0, "cross_entropy"), (0.25, "soft_dice"))


@pytest.mark.parametrize(
    ("text", "term"),
    [
        ("dice", "dice"),
        ("", ""),
        ("cross_entropy+", ""),
        ("cross_entropy-soft_dice", "cross_entropy-soft_dice"),
        ("cross_entropy+0*soft_dice", "0*soft_dice"),
        ("-1*soft_dice", "-1*soft_dice"),
        ("1..5*log_dice", "1..5*log_dice"),
        ("nan*log_dice", "nan*log_dice"),
        ("1e999*log_dice", "1e999*log_dice"),
        ("log_dice*2", "log_dice*2"),
        ("Cross_Entropy", "Cross_Entropy"),
    ],
)
def test_a_text_that_names_no_loss_is_refused_in_one_line(text, term):
    for parse, name in ((loss_terms, "--loss"), (make_loss, "loss")):  # of a flag, and of a Python function
        with pytest.raises(InputError) as error:
            parse(text)
        assert str(error.value).startswith(f"{name} has ")
        assert f"the term {term!r}: write cross_entropy, log_dice, soft_dice" in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("label", [3, 254, -1, 1000])
@pytest.mark.parametrize("name", NAMES)
def test_a_label_that_is_no_class_makes_the_loss_nan(name, label):
    labels = LABELS.astype(np.int32)
    labels[1, 0, 0] = label
    assert np.isnan(value(name, labels=labels))
    # In padding no label matters.
    weights = np.array([1, 0, 1, 1], np.float32)
    loss, gradient = value_and_gradient(name)(LOGITS, labels, weights)
    assert float(loss) == value(name, weights=weights)
    assert np.isfinite(gradient).all()
    with_weights = make_loss("cross_entropy", (1.0, 2.0, 3.0))
    assert np.isnan(with_weights(LOGITS, labels, ONES))
    assert np.isfinite(with_weights(LOGITS, labels, weights))


@pytest.mark.parametrize("name", NAMES)
def test_minus_one_in_int8_is_no_ignored_label(name):
    # 255 as int8 is -1: compared in that type, they would be the same.
    assert np.isnan(make_loss(name)(LOGITS, np.full(LABELS.shape, -1, np.int8), ONES))


def test_unsigned_labels_and_more_classes_than_they_can_count():
    logits = np.zeros((1, 1, 2, 300), np.float32)
    assert value("cross_entropy", logits, np.array([[[0, 254]]], np.uint8), ONES[:1]) == pytest.approx(np.log(300))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("labels", "weights"),
    [
        (LABELS[0], ONES),
        (LABELS[:1], ONES),
        (LABELS[..., None], ONES),
        (LABELS[:, :1], ONES),
        (LABELS, ONES[:1]),
        (LABELS, ONES[:, None]),
        (LABELS, np.float32(1)),
    ],
)
def test_shapes_that_would_broadcast_are_refused(name, labels, weights):
    for loss in (LOSSES[name], jax.jit(LOSSES[name])):
        with pytest.raises(AssertionError, match=r"shape|rank"):
            loss(LOGITS, labels, weights)


@pytest.mark.parametrize("name", NAMES)
def test_a_weight_of_2_is_the_example_twice(name):
    twice = value(
        name, np.concatenate([LOGITS, LOGITS[:1]]), np.concatenate([LABELS, LABELS[:1]]), np.ones(5, np.float32)
    )
    assert value(name, weights=np.float32([2, 1, 1, 1])) == pytest.approx(twice, rel=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_labels_that_are_no_integers_are_refused(name):
    with pytest.raises(AssertionError, match="type"):
        LOSSES[name](LOGITS, LABELS + 0.5, ONES)


def test_each_class_has_its_weight():
    weights = np.float32([1, 2, 4])
    likelihood = np.log(true_class(LOGITS, LABELS, np.ones(SHAPE, bool)))
    own = weights[LABELS.ravel()]
    assert LOSSES["cross_entropy"](LOGITS, LABELS, class_weights=weights) == pytest.approx(
        -(own * likelihood).sum() / own.sum(), rel=1e-5
    )
    with pytest.raises(AssertionError, match="shape"):
        make_loss("cross_entropy", (1.0, 2.0))(LOGITS, LABELS, ONES)


@pytest.mark.parametrize("name", NAMES)
def test_the_shapes_may_be_symbols(name):
    b, h, w = export.symbolic_shape("b, h, w")
    shapes = (jax.ShapeDtypeStruct((b, h, w, 3), np.float32), jax.ShapeDtypeStruct((b, h, w), np.uint8))
    shapes += (jax.ShapeDtypeStruct((b,), np.float32),)
    exported = export.export(jax.jit(LOSSES[name]))(*shapes)
    np.testing.assert_allclose(exported.call(LOGITS, LABELS, ONES), value(name), rtol=1e-6)
