"""Augmentation: picture and mask move alike, no class is invented, chance is in the key alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unet_jax.augment import RANGES, Change, augment, recolour, warp
from unet_jax.config import IGNORE_LABEL
from unet_jax.data import synthetic

PETS = [synthetic.source("train", 4, 32, 0).read(i) for i in range(4)]
IMAGES, LABELS = np.stack([p.image for p in PETS]), np.stack([p.labels for p in PETS])
NOTHING = Change(1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0)
jit_augment = jax.jit(augment, static_argnums=3)


def change(**values) -> Change:
    """The same for each of the four."""
    return Change(*(jnp.full(4, v, jnp.float32) for v in NOTHING._replace(**values)))


def test_nothing_changes_nothing():
    images, labels = warp(IMAGES, LABELS, change())
    np.testing.assert_array_equal(images, IMAGES)
    np.testing.assert_array_equal(labels, LABELS)
    np.testing.assert_array_equal(recolour(images, change()), images)


def test_large_pictures_keep_their_pixels():
    labels = (np.arange(4100 * 4200) % 2).astype(np.uint8).reshape(1, 4100, 4200)  # more than float32 counts
    images = np.zeros((*labels.shape, 1), np.uint8)
    _, moved = jax.jit(warp)(images, labels, Change(*(p[:1] for p in change())))
    np.testing.assert_array_equal(moved, labels)


def test_moves_that_pixels_can_make_exactly():
    flipped = warp(IMAGES, LABELS, change(flip=-1))
    for ours, original in zip(flipped, (IMAGES, LABELS), strict=True):
        np.testing.assert_array_equal(ours, original[:, :, ::-1])
    turned = warp(IMAGES, LABELS, change(angle=np.pi / 2))
    np.testing.assert_allclose(turned[0], np.rot90(IMAGES, 1, (1, 2)), atol=0.01)
    np.testing.assert_array_equal(turned[1], np.rot90(LABELS, 1, (1, 2)))
    # The window is the quarter at the top right: every second output pixel falls on a pixel, of 63 instead of 32.
    quarter, mask = warp(IMAGES[:, :31, :31], LABELS[:, :31, :31], change(log_scale=np.log(0.5), shift_y=-1, shift_x=1))
    np.testing.assert_allclose(quarter[:, ::2, ::2], IMAGES[:, :16, 15:31], atol=0.01)
    np.testing.assert_allclose(quarter[:, 0, 1], (IMAGES[:, 0, 15] / 2 + IMAGES[:, 0, 16] / 2), atol=0.01)
    np.testing.assert_array_equal(mask[:, ::2, ::2], LABELS[:, :16, 15:31])


def test_outside_is_ignored_and_takes_the_edge():
    images, labels = warp(IMAGES, LABELS, change(log_scale=np.log(2), shift_y=1))
    # Twice as much is seen; a shift of 1 puts the picture in the lower or upper half of that, centred across.
    seen = np.asarray(labels) != IGNORE_LABEL
    rows, columns = seen[0].any(1).nonzero()[0], seen[0].any(0).nonzero()[0]
    assert (len(rows), rows[-1], len(columns), columns[0]) == (16, 31, 16, 8)
    assert seen[:, rows[0] :, columns[0] : columns[-1] + 1].all()
    corner = np.asarray(images)[:, 0, 0]
    np.testing.assert_array_equal(corner, IMAGES[:, 0, 0])


@pytest.mark.parametrize("strength", RANGES)
def test_picture_and_mask_move_alike_and_no_class_is_new(strength):
    # The mask written into the picture, and colours left alone: where the warped picture is a flat 0 or 255, its
    # mask says the same; elsewhere it is between two classes.
    labels = (LABELS == 1).astype(np.uint8)
    written = np.repeat(255 * labels[..., None], 3, -1)
    ranges = RANGES[strength]
    keys = jax.random.split(jax.random.key(3), 5)
    drawn = [jax.random.uniform(k, (4,), minval=r[0], maxval=r[1]) for k, r in zip(keys, ranges[:5], strict=True)]
    images, masks = map(np.asarray, warp(written, labels, Change(*drawn, *change()[5:])))
    inside = masks != IGNORE_LABEL
    assert set(np.unique(masks[inside])) == {0, 1}
    assert 0.5 < inside.mean() < 1 or strength == "basic"
    # Bilinear weights: a pixel's own class has at least a quarter of the value, usually the half and more.
    value = images[..., 0] / 255
    assert (np.abs(value - masks)[inside] <= 0.75 + 1e-5).all()
    assert np.abs(value - masks)[inside].mean() < 0.05
    assert (masks != labels).mean() > 0.05  # it did move


def test_colours():
    grey = jnp.full((4, 2, 2, 3), 100.0)
    np.testing.assert_allclose(recolour(grey, change(brightness=1.5)), 150, rtol=1e-5)
    np.testing.assert_allclose(recolour(grey, change(hue=1, saturation=0.3, contrast=0.4)), 100, rtol=1e-5)
    # Red turns to green by a third of the circle; without saturation it is its luma.
    red = jnp.zeros((4, 1, 1, 3)).at[..., 0].set(200.0)
    np.testing.assert_allclose(recolour(red, change(hue=2 * np.pi / 3))[0, 0, 0], [0, 200, 0], atol=1e-3)
    np.testing.assert_allclose(recolour(red, change(saturation=0))[0, 0, 0], 0.299 * 200, rtol=1e-5)
    two = jnp.stack([jnp.full((4, 1, 3), 50.0), jnp.full((4, 1, 3), 150.0)], 1)
    np.testing.assert_allclose(recolour(two, change(contrast=0.5))[0, :, 0, 0], [75, 125], rtol=1e-5)
    np.testing.assert_array_equal(recolour(two, change(brightness=9))[0, 1, 0], 255)


def test_chance_is_in_the_key_alone():
    one, again = (jit_augment(jax.random.key(0), IMAGES, LABELS, "strong") for _ in range(2))
    other = jit_augment(jax.random.key(1), IMAGES, LABELS, "strong")
    for a, b, c in zip(one, again, other, strict=True):
        np.testing.assert_array_equal(a, b)
        assert (np.asarray(a) != np.asarray(c)).mean() > 0.05
    assert one[0].dtype == jnp.float32
    assert one[1].dtype == jnp.uint8
    # Pictures of one batch change in their own ways.
    same = jit_augment(jax.random.key(0), IMAGES[[0, 0, 0, 0]], LABELS[[0, 0, 0, 0]], "strong")[1]
    assert (np.asarray(same[0]) != np.asarray(same[1])).any()
