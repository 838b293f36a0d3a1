"""The layers of `unet_jax.layers` in forms that run fast on one CPU device; parameters and results are the same.

Gradients are hand-written, for reverse mode. Where the C++ is used, there are only gradients of first order.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from unet_jax import layers
from unet_jax.cpu import bfloat16, convs
from unet_jax.cpu.lazy import Joined, Lazy, Rectified, as_array, rectified, scaled
from unet_jax.cpu.sums import channel_sum

__all__ = ["BatchNorm", "Conv", "Dropout", "TransposedConv", "join", "max_pool", "relu", "resize_double"]


class Conv(layers.Conv):
    """`layers.Conv`, in C++ where `bfloat16.handles`, and for 3x3 kernels where `convs.handles`."""

    def convolve(self, x: Array | Lazy, kernel: Array, bias: Array) -> Array:
        """The convolution itself."""
        x = x if isinstance(x, Lazy) else x.astype(self.dtype)
        if bfloat16.handles(x, self.dtype, self.kernel_size, self.strides):
            return bfloat16.conv(x, kernel, bias, self.strides)
        kernel, bias = kernel.astype(self.dtype), bias.astype(self.dtype)
        if self.kernel_size == 3 and convs.handles(x, kernel, self.strides):
            return (convs.same_conv if self.strides == 1 else convs.halving_conv)(x, kernel, bias)
        return add_bias(layers.convolution(as_array(x).astype(self.dtype), kernel, self.strides), bias)


class TransposedConv(layers.TransposedConv):
    """`layers.TransposedConv`, in C++ where `bfloat16.handles` or `convs.handles`."""

    def convolve(self, x: Array | Lazy, kernel: Array, bias: Array) -> Array:
        """The transposed convolution itself."""
        x = x if isinstance(x, Lazy) else x.astype(self.dtype)
        if bfloat16.handles(x, self.dtype):
            return bfloat16.transposed_conv(x, kernel, bias)
        kernel, bias = kernel.astype(self.dtype), bias.astype(self.dtype)
        if convs.handles(x, kernel):
            return convs.transposed_conv(x, kernel, bias)
        plain = super().convolve

        @jax.custom_vjp
        def convolve(x: Array, kernel: Array, bias: Array) -> Array:
            return plain(x, kernel, bias)

        def gradients(residuals: tuple[Array, Array], g: Array) -> tuple[Array, Array, Array]:
            # Computed with the stride 2 convolution that this is the transpose of. JAX's own gradients, of the plain
            # layer's 2x2 convolution, are slow on a CPU.
            x, kernel = residuals
            to_kernel = jax.linear_transpose(lambda kernel: layers.convolution(g, kernel, 2), kernel)(x)[0]
            return layers.convolution(g, kernel, 2), to_kernel, channel_sum(g)

        convolve.defvjp(lambda x, kernel, bias: (convolve(x, kernel, bias), (x, kernel)), gradients)
        return convolve(as_array(x).astype(self.dtype), kernel, bias)


@jax.custom_vjp
def add_bias(x: Array, bias: Array) -> Array:
    """x [N, H, W, C] + bias [C]; the bias' gradient is a `channel_sum`."""
    return x + bias[None, None, None]


add_bias.defvjp(lambda x, bias: (add_bias(x, bias), None), lambda _, g: (g, channel_sum(g)))


class BatchNorm(layers.BatchNorm):
    """`layers.BatchNorm` that keeps only its input for the gradient. Its output is lazy."""

    def statistics(self, x: Array | Lazy) -> tuple[Array, Array]:
        """Mean and biased variance [C] of x, float32 or wider."""
        return _statistics(*_relu_first(x))

    def affine(self, x: Array | Lazy, gain: Array, shift: Array) -> Any:
        """x * gain + shift, in x's dtype, for gain and shift [C]."""
        array, relu_first = _relu_first(x)
        return scaled(array, gain, shift, relu_first)


def _relu_first(x: Array | Lazy) -> tuple[Array, bool]:
    return (x.x, True) if isinstance(x, Rectified) else (as_array(x), False)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _statistics(x: Array, relu_first: bool) -> tuple[Array, Array]:
    a, count = rectified(x, relu_first), x.size // x.shape[-1]
    mean = channel_sum(a) / count
    return mean, jnp.maximum(channel_sum(jnp.square(a)) / count - jnp.square(mean), 0)


def _statistics_fwd(x: Array, relu_first: bool) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    mean, var = _statistics(x, relu_first)
    return (mean, var), (x, mean)


def _statistics_bwd(relu_first: bool, residuals: tuple[Array, Array], grads: tuple[Array, Array]) -> tuple[Array]:
    x, mean = residuals
    to_mean, to_var = (g / (x.size // x.shape[-1]) for g in grads)
    centred = rectified(x, relu_first) - mean[None, None, None]
    dx = to_mean[None, None, None] + 2 * centred * to_var[None, None, None]
    return ((jnp.where(x > 0, dx, 0) if relu_first else dx).astype(x.dtype),)


_statistics.defvjp(_statistics_fwd, _statistics_bwd)


class Dropout(nn.Dropout):
    """linen's Dropout, which takes lazy arrays too."""

    @nn.compact
    def __call__(self, x: Any) -> Any:  # type: ignore[override]
        return super().__call__(as_array(x)) if self.rate and not self.deterministic else x


def relu(x: Array | Lazy) -> Array | Lazy:
    """max(x, 0), computed where it is used, or at once if x itself is lazy."""
    return nn.relu(x.value()) if isinstance(x, Lazy) else Rectified(x)


def join(parts: list[Any]) -> Joined:
    """Concatenates [N, H, W, C1], [N, H, W, C2], ... along the channels where they are used."""
    if len({part.shape[:3] for part in parts}) > 1:
        raise TypeError(f"cannot concatenate pictures of shapes {[part.shape for part in parts]}")
    return Joined(tuple(parts))


def max_pool(x: Array | Lazy) -> Array:
    """`layers.max_pool`, which takes lazy arrays too."""
    return _in_wide_dtype(layers.max_pool, as_array(x))


def _in_wide_dtype(f: Callable[[Array], Array], x: Array) -> Array:
    """f(x), computed in float32 if x is bfloat16, in which XLA takes up to ten times as long."""
    return f(x.astype(layers.wide_dtype(x))).astype(x.dtype)


def resize_double(x: Array | Lazy) -> Array:
    """`layers.resize_double`, whose gradient shifts and adds instead of padding slices."""
    return _in_wide_dtype(lambda x: _double_axis(_double_axis(x, 2), 1), as_array(x))


def _blend_weights(x: Array, axis: int) -> tuple[Array, Array]:
    # Aligned corners put output j of 2n at j (n-1)/(2n-1): 2i at i - i/(2n-1), 2i+1 at i + (n-1-i)/(2n-1).
    n = x.shape[axis]
    to_previous = np.arange(n) / (2 * n - 1)
    shape = [n if a == axis else 1 for a in range(x.ndim)]
    previous, following = (jnp.asarray(weights, x.dtype) for weights in (to_previous, to_previous[::-1]))
    return previous.reshape(shape), following.reshape(shape)


def _shift(x: Array, axis: int, step: int) -> Array:
    """x[i + step] at i along the axis for step +-1, zeros beyond the end."""
    n = x.shape[axis]
    inner = lax.slice_in_dim(x, max(step, 0), n + min(step, 0), axis=axis)
    return jnp.pad(inner, [(max(-step, 0), max(step, 0)) if a == axis else (0, 0) for a in range(x.ndim)])


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _double_axis(x: Array, axis: int) -> Array:
    # Output 2i lies between x[i-1] and x[i], output 2i+1 between x[i] and x[i+1]. The automatic gradient would pad each
    # slice; the hand-written one shifts too.
    previous, following = _blend_weights(x, axis)
    even = (1 - previous) * x + previous * _shift(x, axis, -1)
    odd = (1 - following) * x + following * _shift(x, axis, 1)
    shape = (*x.shape[:axis], 2 * x.shape[axis], *x.shape[axis + 1 :])
    return jnp.stack([even, odd], axis + 1).reshape(shape)


def _double_axis_bwd(axis: int, _: None, g: Array) -> tuple[Array]:
    pairs = g.reshape(*g.shape[:axis], g.shape[axis] // 2, 2, *g.shape[axis + 1 :])
    even, odd = (lax.index_in_dim(pairs, i, axis + 1, keepdims=False) for i in (0, 1))
    previous, following = _blend_weights(even, axis)
    own = (1 - previous) * even + (1 - following) * odd
    return (own + _shift(previous * even, axis, 1) + _shift(following * odd, axis, -1),)


_double_axis.defvjp(lambda x, axis: (_double_axis(x, axis), None), _double_axis_bwd)
