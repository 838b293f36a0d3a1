"""Losses of logits [B, H, W, C] against integer labels [B, H, W]: pure, in float32 or wider, weighted.

`weights` [B] says how much each example counts (0: padding). Pixels labelled IGNORE_LABEL never count. Any other label
that is not a class (below 0, or C and above) makes every loss NaN: it is never rewarded, and training stops. Arrays of
other shapes raise an AssertionError, since they would broadcast.
"""

from collections.abc import Callable, Sequence
from functools import partial

import chex
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from unet_jax.checks import loss_terms
from unet_jax.config import IGNORE_LABEL
from unet_jax.errors import names_for_flags
from unet_jax.layers import wide_dtype

Loss = Callable[[Array, ArrayLike, ArrayLike | None], Array]


def pixel_weights(logits: Array, labels: ArrayLike, weights: ArrayLike | None = None) -> Array:
    """[B, H, W] float32: the example's weight where a label is a class, 0 where it is ignored, else NaN.

    All are 0 in an example of weight 0. Only the shape of the logits [B, H, W, C] matters.

    Raises:
      AssertionError: the shapes do not belong together, or the labels are no integers.
    """
    labels = jnp.asarray(labels)
    chex.assert_type(labels, int)
    chex.assert_rank([logits, labels], [4, 3])
    chex.assert_equal_shape_prefix([logits, labels], 3)
    wide = labels.astype(jnp.int32)  # in narrower types 255 or the number of classes may be another number
    counts = jnp.where((wide >= 0) & (wide < logits.shape[-1]), 1, jnp.nan).astype(jnp.float32)
    counts = jnp.where(wide == IGNORE_LABEL, 0, counts)
    if weights is None:
        return counts
    weights = jnp.asarray(weights, jnp.float32)
    chex.assert_rank(weights, 1)
    chex.assert_equal_shape_prefix([logits, weights], 1)
    weights = weights[:, None, None]
    return jnp.where(weights == 0, 0, counts * weights)


def log_likelihood(logits: Array, labels: ArrayLike) -> Array:
    """[B, H, W]: the log softmax of the true class at each pixel (of class 0 where the label is ignored).

    0 where a label is no class: `pixel_weights` has NaN there.
    """
    labels = jnp.asarray(labels).astype(jnp.int32)
    classes = jnp.where(labels == IGNORE_LABEL, 0, labels)
    one_hot = jax.nn.one_hot(classes, logits.shape[-1], dtype=bool)
    # A masked sum rather than a gather: the gradient of a gather is a scatter, which is slow on every device.
    return jnp.where(one_hot, jax.nn.log_softmax(_wide(logits)), 0).sum(-1)


def _wide(logits: Array) -> Array:
    return logits.astype(wide_dtype(logits))


def _mean(values: Array, weights: Array) -> Array:
    # Not weights.sum() + epsilon: a batch in which nothing counts is to give 0, any other the exact mean.
    return (values * weights).sum() / jnp.maximum(weights.sum(), jnp.finfo(weights.dtype).tiny)


def cross_entropy(
    logits: Array, labels: ArrayLike, weights: ArrayLike | None = None, class_weights: Sequence[float] = ()
) -> Array:
    """Mean over pixels of -log softmax(logits)[label], a scalar. Uniform logits give log C.

    class_weights [C]: the mean is weighted, sum(w[label] * -log softmax[label]) / sum(w[label]) over the batch's
    pixels, as in torch.nn.CrossEntropyLoss(weight=w).
    """
    counts = pixel_weights(logits, labels, weights)
    if len(class_weights):
        chex.assert_shape(logits, (..., len(class_weights)))
        # Ignored labels are clipped to a class, but their count is 0.
        counts = counts * jnp.take(jnp.asarray(class_weights, counts.dtype), jnp.asarray(labels), mode="clip")
    return _mean(-log_likelihood(logits, labels), counts)


def log_dice(logits: Array, labels: ArrayLike, weights: ArrayLike | None = None) -> Array:
    """The published Dice loss, a scalar: -log(2I / (I + N + 1e-6)).

    I is the softmax of the true class summed over all pixels of the batch, N the number of pixels. Only the mean
    probability of the true class matters. Uniform logits of three classes give log 2, perfect ones 0.
    """
    counts = pixel_weights(logits, labels, weights)
    intersection = (jnp.exp(log_likelihood(logits, labels)) * counts).sum()
    total = counts.sum()
    # A batch in which nothing counts gives 0, not infinity.
    ratio = 2 * intersection / (intersection + total + 1e-6)
    return -jnp.log(jnp.where(total == 0, 1, ratio))


def soft_dice(logits: Array, labels: ArrayLike, weights: ArrayLike | None = None) -> Array:
    """One minus the soft Dice coefficient of each class over the batch, averaged over the classes that occur in it.

    2 sum(p y) / (sum(p) + sum(y)) with p the softmax, y the one-hot truth (Milletari, Navab, Ahmadi 2016,
    arXiv:1606.04797, without the squares). A scalar; classes absent from the truth of the batch are left out.
    """
    counts = pixel_weights(logits, labels, weights)[..., None]
    truth = jax.nn.one_hot(labels, logits.shape[-1], dtype=counts.dtype) * counts
    probabilities = jax.nn.softmax(_wide(logits))
    axes = (0, 1, 2)
    overlap, present = (probabilities * truth).sum(axes), truth.sum(axes)
    dice = 2 * overlap / jnp.maximum((probabilities * counts).sum(axes) + present, 1e-6)
    return _mean(1 - dice, (present > 0).astype(counts.dtype))


LOSSES: dict[str, Loss] = {"cross_entropy": cross_entropy, "log_dice": log_dice, "soft_dice": soft_dice}


@names_for_flags()
def make_loss(text: str, class_weights: Sequence[float] = ()) -> Loss:
    """The loss that a text such as "cross_entropy+0.5*soft_dice" names (checks.loss_terms), as one function.

    class_weights [C] are those of cross_entropy; the other terms have none.

    Raises:
      InputError: the text names no loss.
    """
    terms = loss_terms(text)
    losses: dict[str, Loss] = {**LOSSES, "cross_entropy": partial(cross_entropy, class_weights=class_weights)}

    def loss(logits: Array, labels: ArrayLike, weights: ArrayLike | None = None) -> Array:
        return jnp.stack([weight * losses[name](logits, labels, weights) for weight, name in terms]).sum()

    return loss
