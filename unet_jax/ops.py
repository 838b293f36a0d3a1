"""What the layers, batch norm and the CPU's convolutions share."""

import math

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import DTypeLike


def conv(x: Array, kernel: Array, strides: int = 1, padding: int = 0) -> Array:
    """2-D convolution of x [N, H, W, I] with kernel [h, w, I, O], so many zeros on each side."""
    dimensions = ("NHWC", "HWIO", "NHWC")
    pad = (padding, padding)
    return lax.conv_general_dilated(x, kernel, (strides, strides), (pad, pad), dimension_numbers=dimensions)


def statistics_dtype(x: Array) -> DTypeLike:
    """That of sums over x: float32 or wider."""
    return np.promote_types(x.dtype, np.float32)  # jnp's refuses bfloat16 where promotion is strict


def channel_sum(x: Array) -> Array:
    """Sum of x [..., C] over all axes but the last: [C]."""
    return lax.platform_dependent(x, cpu=_channel_sum_cpu, default=_channel_sum)


def _channel_sum(x: Array) -> Array:
    return x.sum(tuple(range(x.ndim - 1)))


def _channel_sum_cpu(x: Array) -> Array:
    # XLA's CPU backend sums long axes by windows of 32, unfused and unvectorized: up to 15x slower than a sum over a
    # short axis, which it fuses with what makes x and vectorizes over the channels. So: sums of up to 8 rows (of 32 is
    # up to 3x slower), then their sum as a matrix product (as a second sum XLA merges it with the first: slow again).
    rows, channels = x.size // x.shape[-1], x.shape[-1]
    group = math.gcd(rows, 8)
    partial_sums = x.astype(statistics_dtype(x)).reshape(rows // group, group, channels).sum(1)
    return jnp.dot(jnp.ones(rows // group, partial_sums.dtype), partial_sums, precision="highest").astype(x.dtype)
