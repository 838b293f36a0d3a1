"""The network's layers in plain JAX: NHWC pictures, HWIO kernels, float32 parameters of linen's names and shapes."""

import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen import Dropout as Dropout  # layers too
from flax.linen import relu as relu
from jax import Array, lax
from jax.typing import DTypeLike


def pytorch_init(fan_in: int) -> nn.initializers.Initializer:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)), PyTorch's default for the kernels and biases of convolutions."""
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -(fan_in**-0.5), fan_in**-0.5)


def wide_dtype(x: Array) -> DTypeLike:
    """The dtype of sums over x: float32 or wider."""
    return np.promote_types(x.dtype, np.float32)  # jnp's refuses bfloat16 where promotion is strict


def convolution(x: Array, kernel: Array, strides: int = 1) -> Array:
    """x [N, H, W, I] with kernel [k, k, I, O], zeros around: [N, ceil(H/strides), ceil(W/strides), O] if k is odd."""
    padding = [(kernel.shape[0] // 2,) * 2] * 2
    return lax.conv_general_dilated(x, kernel, (strides, strides), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def add_bias(x: Array, bias: Array) -> Array:
    """x [..., C] + bias [C], in x's dtype. The bias' gradient is a sum over all pixels: in float32 or wider."""
    return x + jnp.broadcast_to(bias.astype(wide_dtype(x)), x.shape).astype(x.dtype)


class Conv(nn.Module):
    """Convolution with bias: x [N, H, W, I] to [N, H, W, features]; a stride of 2 halves H and W."""

    features: int
    kernel_size: int = 3
    strides: int = 1
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (self.kernel_size, self.kernel_size, x.shape[-1], self.features)
        init = pytorch_init(fan_in=math.prod(shape[:3]))
        kernel = self.param("kernel", init, shape, jnp.float32)
        bias = self.param("bias", init, (self.features,), jnp.float32)
        return self.convolve(x, kernel, bias)

    def convolve(self, x: Array, kernel: Array, bias: Array) -> Array:
        return add_bias(convolution(x.astype(self.dtype), kernel.astype(self.dtype), self.strides), bias)


class TransposedConv(nn.Module):
    """Transposed 3x3 convolution of stride 2 with bias: x [N, H, W, I] to [N, 2H, 2W, features].

    It is PyTorch's ConvTranspose2d(3, stride=2, padding=1, output_padding=1); the kernel is [3, 3, features, I].
    """

    features: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        init = pytorch_init(fan_in=9 * self.features)  # as PyTorch counts it: over the outputs
        kernel = self.param("kernel", init, (3, 3, self.features, x.shape[-1]), jnp.float32)
        bias = self.param("bias", init, (self.features,), jnp.float32)
        return self.convolve(x, kernel, bias)

    def convolve(self, x: Array, kernel: Array, bias: Array) -> Array:
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        # Along an axis, output 2i sees w[1] x[i], and output 2i+1 sees w[2] x[i] + w[0] x[i+1]. One 2x2 convolution
        # gives a pixel's four outputs at once. The textbook form dilates x, and its kernel gradient is slow everywhere.
        n, h, w, in_features = x.shape
        taps = np.array([[1, 3], [2, 0]])  # [output 2i or 2i+1, x[i] or x[i+1]]: tap; 3 is a tap of zeros
        kernel = jnp.pad(kernel, ((0, 1), (0, 1), (0, 0), (0, 0)))[taps][:, :, taps]
        kernel = kernel.transpose(1, 3, 5, 0, 2, 4).reshape(2, 2, in_features, 4 * self.features)
        y = add_bias(convolution(x, kernel), jnp.tile(bias, 4))
        # The 2x2 convolution pads by 1 on all sides: its first row and column see x[-1], and are left out.
        y = y[:, 1:, 1:].reshape(n, h, w, 2, 2, self.features)
        return y.transpose(0, 1, 3, 2, 4, 5).reshape(n, 2 * h, 2 * w, self.features)


class BatchNorm(nn.Module):
    """Batch norm over N, H, W (Ioffe and Szegedy 2015, arXiv:1502.03167): x [N, H, W, C] to the same shape and dtype.

    Parameters scale, bias [C]. batch_stats: moving averages mean, var [C] (var biased, as in Flax) with momentum 0.9,
    which PyTorch calls 0.1. The variance is that of Flax too, mean(x^2) - mean(x)^2: inexact if the mean is a hundred
    times the standard deviation.
    """

    epsilon: float = 1e-5
    momentum: float = 0.9

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        shape = (x.shape[-1],)
        scale = self.param("scale", nn.initializers.ones, shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, shape, jnp.float32)
        old_mean = self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32)
        old_var = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)
        mean, var = self.statistics(x) if train else (old_mean.value, old_var.value)
        if train and not self.is_initializing():
            old_mean.value += (1 - self.momentum) * (mean - old_mean.value)
            old_var.value += (1 - self.momentum) * (var - old_var.value)
        gain = scale.astype(mean.dtype) * lax.rsqrt(var + self.epsilon)
        return self.affine(x, gain, bias.astype(mean.dtype) - mean * gain)

    def statistics(self, x: Array) -> tuple[Array, Array]:
        x = x.astype(wide_dtype(x))
        mean, mean_square = x.mean((0, 1, 2)), jnp.square(x).mean((0, 1, 2))
        return mean, jnp.maximum(mean_square - jnp.square(mean), 0)

    def affine(self, x: Array, gain: Array, shift: Array) -> Array:
        return (x.astype(wide_dtype(x)) * gain[None, None, None] + shift[None, None, None]).astype(x.dtype)


@jax.custom_jvp
def max_pool(x: Array) -> Array:
    """2x2 max pool of stride 2: x [N, H, W, C] to [N, H//2, W//2, C]; an odd last row or column is dropped.

    At ties the first of the window in row order takes the whole gradient, as in PyTorch (ReLU makes ties common).
    """
    return _windows(x).max((2, 4))


def _windows(x: Array) -> Array:
    n, h, w, c = x.shape
    return x[:, : h // 2 * 2, : w // 2 * 2].reshape(n, h // 2, 2, w // 2, 2, c)


@max_pool.defjvp
def _max_pool_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    # `max` would split the gradient among equals, and XLA's own pooling has a slow gradient. Comparing two values
    # always picks one. Testing x == max could pick none, if the compiler computes x twice with different rounding.
    (x,), (dx,) = primals, tangents
    windows = _windows(x)  # [N, H//2, 2, W//2, 2, C]
    left, rows = windows[..., 0, :] >= windows[..., 1, :], windows.max(4)
    top = rows[:, :, 0] >= rows[:, :, 1]
    taken = jnp.stack([top, ~top], 2)[..., None, :] & jnp.stack([left, ~left], 4)
    return max_pool(x), jnp.where(taken, _windows(dx), 0).sum((2, 4))


def resize_double(x: Array) -> Array:
    """Bilinear resize with aligned corners, which `jax.image.resize` lacks: x [N, H, W, C] to [N, 2H, 2W, C]."""
    return _double_axis(_double_axis(x, 2), 1)


def _double_axis(x: Array, axis: int) -> Array:
    # Output j of 2n lies at j (n-1)/(2n-1): 2i at i - i/(2n-1), and 2i+1 at i + (n-1-i)/(2n-1).
    n = x.shape[axis]
    shape = tuple(n if a == axis else 1 for a in range(x.ndim))
    to_previous = (jnp.arange(n) / (2 * n - 1)).astype(x.dtype).reshape(shape)
    previous = jnp.concatenate([lax.slice_in_dim(x, 0, 1, axis=axis), lax.slice_in_dim(x, 0, n - 1, axis=axis)], axis)
    following = jnp.concatenate([lax.slice_in_dim(x, 1, n, axis=axis), lax.slice_in_dim(x, n - 1, n, axis=axis)], axis)
    even, odd = x + to_previous * (previous - x), x + jnp.flip(to_previous, axis) * (following - x)
    return jnp.stack([even, odd], axis + 1).reshape(*x.shape[:axis], 2 * n, *x.shape[axis + 1 :])


join = partial(jnp.concatenate, axis=-1)  # [N, H, W, C1], [N, H, W, C2], ... to [N, H, W, C1 + C2 + ...]
