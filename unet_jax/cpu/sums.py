"""Sums over pictures and pixels."""

import math

import jax.numpy as jnp
from jax import Array

from unet_jax.layers import wide_dtype


def channel_sum(x: Array) -> Array:
    """Sum of x [..., C] over all axes but the last: [C]."""
    # XLA's CPU backend sums long axes by windows of 32, unfused and unvectorized: up to 15x slower than a sum over a
    # short axis, which it fuses with what makes x and vectorizes over the channels. So: sums of up to 8 rows (of 32 is
    # up to 3x slower), then their sum as a matrix product (as a second sum XLA merges it with the first: slow again).
    rows, channels = x.size // x.shape[-1], x.shape[-1]
    group = math.gcd(rows, 8)
    partial_sums = x.astype(wide_dtype(x)).reshape(rows // group, group, channels).sum(1)
    return jnp.dot(jnp.ones(rows // group, partial_sums.dtype), partial_sums, precision="highest").astype(x.dtype)
