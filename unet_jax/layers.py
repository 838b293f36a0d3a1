"""The network's layers in the forms that run fast, each equal to its textbook form (tests/test_layers.py shows it).

Layout is NHWC, kernels are HWIO. Parameters keep the names and shapes of the linen layers that they stand for.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import DTypeLike

from unet_jax import cpu_convs
from unet_jax.batch_norm import Scaled, value_of
from unet_jax.ops import channel_sum, conv

# PyTorch's defaults, which the reproduced runs used: both come to U(-1/sqrt(fan_in), 1/sqrt(fan_in)).
kernel_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def bias_init(fan_in: int) -> nn.initializers.Initializer:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)), the distribution of PyTorch's conv biases."""
    bound = fan_in**-0.5
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


@jax.custom_vjp
def add_bias(x: Array, bias: Array) -> Array:
    """x [..., C] + bias [C]; the bias' gradient is a `channel_sum`."""
    return x + bias.reshape((1,) * (x.ndim - 1) + bias.shape)


add_bias.defvjp(lambda x, bias: (add_bias(x, bias), None), lambda _, g: (g, channel_sum(g)))


def _double(x: Array, kernel: Array, bias: Array) -> Array:
    # One 2x2 convolution computes the four output phases at once. Padded on one side alone, XLA would have cuDNN take a
    # padded copy of x; with the bias after the phases are interleaved, a bias as large as the output (LOG.md).
    n, h, w, in_features = x.shape
    out_features = kernel.shape[2]
    padded = jnp.pad(kernel, ((0, 1), (0, 1), (0, 0), (0, 0)))
    taps = np.array([[1, 3], [2, 0]])  # [phase, tap]; 3 is of the zeros
    phases = padded[taps][:, :, taps]  # [phase_h, tap_h, phase_w, tap_w, O, I]
    merged = phases.transpose(1, 3, 5, 0, 2, 4).reshape(2, 2, in_features, 4 * out_features)
    y = conv(x, merged, padding=1) + jnp.tile(bias, 4)[None, None, None]
    y = y[:, 1:, 1:].reshape(n, h, w, 2, 2, out_features)
    return y.transpose(0, 1, 3, 2, 4, 5).reshape(n, 2 * h, 2 * w, out_features)


@jax.custom_vjp
def transposed_conv(x: Array, kernel: Array, bias: Array) -> Array:
    """3x3 transposed convolution of stride 2 of x [N, H, W, I], kernel [3, 3, O, I], plus bias [O]: [N, 2H, 2W, O].

    PyTorch's ConvTranspose2d(3, stride=2, padding=1, output_padding=1). Along an axis, output 2i sees w[1] x[i], and
    output 2i+1 sees w[2] x[i] + w[0] x[i+1]. Dilating the input (the textbook form) multiplies mostly zeros. The
    gradients are those of the map that it transposes, the 3x3 convolution of stride 2.
    """
    return _double(x, kernel, bias)


def _transposed_conv_bwd(residuals: tuple[Array, Array], g: Array) -> tuple[Array, Array, Array]:
    x, kernel = residuals
    return conv(g, kernel, strides=2, padding=1), _halving_conv_kernel_grad(g, kernel, x), channel_sum(g)


transposed_conv.defvjp(lambda x, kernel, bias: (_double(x, kernel, bias), (x, kernel)), _transposed_conv_bwd)


@jax.custom_vjp
def halving_conv(x: Array, kernel: Array) -> Array:
    """3x3 convolution of stride 2 of x [N, 2H, 2W, I] with kernel [3, 3, I, O] to [N, H, W, O].

    The automatic gradient to x dilates g, which is slow; here it is `transposed_conv`, its equal.
    """
    return conv(x, kernel, strides=2, padding=1)


def _halving_conv_kernel_grad(x: Array, kernel: Array, g: Array) -> Array:
    return jax.linear_transpose(lambda k: conv(x, k, strides=2, padding=1), kernel)(g)[0]


def _halving_conv_bwd(residuals: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, kernel = residuals
    no_bias = jnp.zeros(kernel.shape[2], g.dtype)
    return _double(g, kernel, no_bias), _halving_conv_kernel_grad(x, kernel, g)


halving_conv.defvjp(lambda x, kernel: (halving_conv(x, kernel), (x, kernel)), _halving_conv_bwd)


class Conv(nn.Module):
    """Convolution with bias and PyTorch's initial weights; padding keeps the size (3x3 at stride 2 halves it).

    Of x [N, H, W, I], or of several that stand side by side in the features.
    """

    features: int
    kernel_size: int = 3
    strides: int = 1
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, *parts: Array | Scaled) -> Array:
        k, in_features = self.kernel_size, sum(x.shape[-1] for x in parts)
        kernel = self.param("kernel", kernel_init, (k, k, in_features, self.features)).astype(self.dtype)
        bias = self.param("bias", bias_init(k * k * in_features), (self.features,)).astype(self.dtype)
        halves = (k, self.strides) == (3, 2) and parts[0].shape[1] % 2 == 0 and parts[0].shape[2] % 2 == 0
        if (k, self.strides) == (3, 1) and cpu_convs.suit(parts, kernel):
            return cpu_convs.same_conv(parts, kernel, bias)
        if halves and len(parts) == 1 and cpu_convs.suit(parts, kernel):
            return cpu_convs.halving_conv(*parts, kernel, bias)
        x = jnp.concatenate([value_of(part) for part in parts], -1).astype(self.dtype)
        return add_bias(halving_conv(x, kernel) if halves else conv(x, kernel, self.strides, k // 2), bias)


class TransposedConv(nn.Module):
    """`transposed_conv` with bias; the kernel has linen's ConvTranspose(transpose_kernel=True) shape [3, 3, O, I]."""

    features: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array | Scaled) -> Array:
        # PyTorch counts the fan-in of a transposed conv over its output features.
        init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", in_axis=2, out_axis=3)
        kernel = self.param("kernel", init, (3, 3, self.features, x.shape[-1])).astype(self.dtype)
        bias = self.param("bias", bias_init(9 * self.features), (self.features,)).astype(self.dtype)
        if cpu_convs.suit([x], kernel):
            return cpu_convs.transposed_conv(x, kernel, bias)
        return transposed_conv(value_of(x).astype(self.dtype), kernel, bias)


@jax.custom_vjp
def max_pool(x: Array) -> Array:
    """2x2 max pool of stride 2: x [N, H, W, C] to [N, H//2, W//2, C]; an odd last row or column is dropped.

    At ties the first of the window in row order takes the whole gradient, as in PyTorch and `lax.reduce_window`
    (ties are common here: ReLU makes whole windows equal).
    """
    return _windows(x).max(axis=(2, 4))


def _windows(x: Array) -> Array:
    n, h, w, c = x.shape
    return x[:, : h // 2 * 2, : w // 2 * 2].reshape(n, h // 2, 2, w // 2, 2, c)


def _max_pool_fwd(x: Array) -> tuple[Array, tuple[Array, Array]]:
    y = max_pool(x)
    return y, (x, y)


def _max_pool_bwd(residuals: tuple[Array, Array], g: Array) -> tuple[Array]:
    x, y = residuals
    n, h, w, c = x.shape
    windows = _windows(x)
    taken = jnp.zeros(y.shape, bool)
    grads = []
    for i, j in np.ndindex(2, 2):
        is_max = (windows[:, :, i, :, j] == y) & ~taken
        taken |= is_max
        grads.append(jnp.where(is_max, g, 0))
    stacked = jnp.stack([jnp.stack(grads[:2], axis=3), jnp.stack(grads[2:], axis=3)], axis=2)
    dx = stacked.reshape(n, h // 2 * 2, w // 2 * 2, c)
    return (jnp.pad(dx, ((0, 0), (0, h % 2), (0, w % 2), (0, 0))),)


max_pool.defvjp(_max_pool_fwd, _max_pool_bwd)


def _blend_weights(x: Array, axis: int) -> tuple[Array, ...]:
    # Aligned corners put output j of 2n at j (n-1)/(2n-1): 2i at i - i/(2n-1), 2i+1 at i + (n-1-i)/(2n-1).
    n = x.shape[axis]
    points: Any = np.arange(n) if isinstance(n, int) else jnp.arange(n)  # jax.export has symbolic sizes
    to_previous = points / (2 * n - 1)
    shape = [n if a == axis else 1 for a in range(x.ndim)]
    return tuple(jnp.asarray(weights, x.dtype).reshape(shape) for weights in (to_previous, to_previous[::-1]))


def _shift(x: Array, axis: int, step: int) -> Array:
    """x[i + step] at i along the axis for step +-1, zeros beyond the end."""
    n = x.shape[axis]
    inner = lax.slice_in_dim(x, max(step, 0), n + min(step, 0), axis=axis)
    return jnp.pad(inner, [(max(-step, 0), max(step, 0)) if a == axis else (0, 0) for a in range(x.ndim)])


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def double_axis(x: Array, axis: int) -> Array:
    """Linear interpolation that doubles the points along an axis, first and last kept (aligned corners).

    Output 2i lies between x[i-1] and x[i], output 2i+1 between x[i] and x[i+1]: a few passes over x, where a matrix
    product multiplies mostly zeros. The automatic gradient would pad each slice; the hand-written one shifts too.
    """
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


double_axis.defvjp(lambda x, axis: (double_axis(x, axis), None), _double_axis_bwd)


def resize_double(x: Array) -> Array:
    """Bilinear resize with aligned corners: x [N, H, W, C] to [N, 2H, 2W, C]; a single pixel is repeated.

    `jax.image.resize` does not align corners.
    """
    return double_axis(double_axis(x, 2), 1)
