"""Random changes of pictures and their masks: pure functions of a key, for use inside jit.

Parameters are drawn first. Then `warp` (one affine map for picture and mask alike) and `recolour` (one colour matrix;
Haeberli 1993, Matrix operations for image processing) apply them. Both of these are deterministic.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from unet_jax.config import IGNORE_LABEL, Augment


class Change(NamedTuple):
    """The parameters of a change to N pictures: float32 arrays [N]. In RANGES: the lowest and highest value of each."""

    flip: Any  # negative: flipped left to right
    log_scale: Any  # natural logarithm of the visible window's side over the picture's side
    shift_y: Any  # from -1 (the window touches the top or left edge) to 1
    shift_x: Any
    angle: Any  # radians
    brightness: Any  # these three are factors: 1 changes nothing
    contrast: Any
    saturation: Any
    hue: Any  # radians


# Pets stand upright: no vertical flips, and rotation by at most 0.3 (17 degrees).
RANGES: dict[Augment, Change] = {
    "basic": Change(
        flip=(-1, 1), log_scale=(-0.25, 0), shift_y=(-1, 1), shift_x=(-1, 1), angle=(0, 0),
        brightness=(0.85, 1.15), contrast=(0.85, 1.15), saturation=(1, 1), hue=(0, 0),
    ),
    "strong": Change(
        flip=(-1, 1), log_scale=(-0.5, 0.2), shift_y=(-1, 1), shift_x=(-1, 1), angle=(-0.3, 0.3),
        brightness=(0.7, 1.3), contrast=(0.7, 1.3), saturation=(0.5, 1.5), hue=(-0.2, 0.2),
    ),
}  # fmt: skip


def augment(key: Array, images: ArrayLike, labels: ArrayLike, strength: Augment) -> tuple[Array, Array]:
    """uint8 pictures [N, H, W, 3] and labels [N, H, W] changed by RANGES[strength]: float32 (0 to 255) and uint8."""
    count = jnp.shape(images)[0]
    ranges = RANGES[strength]
    keys = jax.random.split(key, len(ranges))
    drawn = (jax.random.uniform(k, (count,), jnp.float32, *r) for k, r in zip(keys, ranges, strict=True))
    change = Change(*drawn)
    images, labels = warp(images, labels, change)
    return recolour(images, change), labels


def warp(images: ArrayLike, labels: ArrayLike, change: Change) -> tuple[Array, Array]:
    """Flips, crops, scales and turns uint8 pictures [N, H, W, C] and labels [N, H, W]: float32 and uint8, same shapes.

    The picture is interpolated bilinearly; the mask takes the nearest pixel, so that no class is invented. Pixels
    from outside the picture get the label IGNORE_LABEL and the colours of the edge.
    """
    n, h, w, channels = jnp.shape(images)
    flip, log_scale, shift_y, shift_x, angle = (p[:, None, None] for p in change[:5])
    y, x = (jnp.arange(size, dtype=jnp.float32) - (size - 1) / 2 for size in (h, w))
    y, x = y[None, :, None], x[None, None, :] * jnp.where(flip < 0, -1, 1)
    scale = jnp.exp(log_scale)
    # Whatever the shift, a window smaller than the picture stays inside it (unless turned), a larger one contains it.
    at_y = scale * (jnp.cos(angle) * y + jnp.sin(angle) * x) + shift_y * (1 - scale) * ((h - 1) / 2)
    at_x = scale * (jnp.cos(angle) * x - jnp.sin(angle) * y) + shift_x * (1 - scale) * ((w - 1) / 2)
    inside = (jnp.abs(at_y) <= h / 2) & (jnp.abs(at_x) <= w / 2)
    at_y, at_x = jnp.clip(at_y + (h - 1) / 2, 0, h - 1), jnp.clip(at_x + (w - 1) / 2, 0, w - 1)
    top, left = jnp.floor(at_y), jnp.floor(at_x)
    down, right = (at_y - top)[..., None], (at_x - left)[..., None]
    # The four neighbours of a position lie side by side, with labels as the last channel: one gather takes them all.
    packed = jnp.concatenate([jnp.asarray(images), jnp.asarray(labels)[..., None]], -1)
    packed = jnp.pad(packed, ((0, 0), (0, 1), (0, 1), (0, 0)), mode="edge")
    corners = [packed[:, :h, :w], packed[:, :h, 1:], packed[:, 1:, :w], packed[:, 1:, 1:]]
    rows = jnp.concatenate(corners, -1).reshape(n, h * w, -1)
    index = (top.astype(jnp.int32) * w + left.astype(jnp.int32)).reshape(n, h * w)  # float32 counts to 2^24 alone
    taken = jax.vmap(lambda row, i: row[i])(rows, index).reshape(n, h, w, 4, channels + 1)
    colours = taken[..., :channels].astype(jnp.float32)
    upper = colours[..., 0, :] * (1 - right) + colours[..., 1, :] * right
    lower = colours[..., 2, :] * (1 - right) + colours[..., 3, :] * right
    nearest = jnp.where(right < 0.5, taken[..., 0::2, channels], taken[..., 1::2, channels])
    nearest = jnp.where(down[..., 0] < 0.5, nearest[..., 0], nearest[..., 1])
    return upper * (1 - down) + lower * down, jnp.where(inside, nearest, jnp.uint8(IGNORE_LABEL))


def recolour(images: Array, change: Change) -> Array:
    """Changes brightness, contrast, saturation and hue of float32 pictures [N, H, W, 3] from 0 to 255.

    Contrast scales around the picture's mean grey, saturation around each pixel's grey (ITU-R BT.601). Hue rotates
    colours around the grey axis.
    """
    brightness, contrast, saturation, hue = (p[:, None, None] for p in change[5:])
    grey = jnp.broadcast_to(jnp.float32([[[0.299, 0.587, 0.114]]]), (1, 3, 3))
    same, mean = jnp.eye(3, dtype=jnp.float32)[None], jnp.full((1, 3, 3), 1 / 3, jnp.float32)
    across = jnp.float32([[[0, -1, 1], [1, 0, -1], [-1, 1, 0]]]) / 3**0.5
    saturate = saturation * same + (1 - saturation) * grey
    turn = jnp.cos(hue) * same + (1 - jnp.cos(hue)) * mean + jnp.sin(hue) * across  # Rodrigues' formula
    product = partial(jnp.einsum, precision="highest")  # not in TF32
    matrix = brightness * contrast * product("nij,njk->nik", saturate, turn)
    level = product("nhwc,c->n", images, grey[0, 0]) / (images.shape[1] * images.shape[2])
    # brightness * (contrast * (x - level) + level): the part that does not depend on the pixel.
    offset = (brightness * (1 - contrast) * level[:, None, None])[..., None]
    return jnp.clip(product("nij,nhwj->nhwi", matrix, images) + offset, 0, 255)
