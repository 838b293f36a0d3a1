"""The network's layers in the forms that run fast, each equal to its textbook form (tests/test_layers.py shows it).

Layout is NHWC, kernels are HWIO. Parameters keep the names and shapes of the linen layers that they stand for.
"""

import dataclasses
import math
from functools import partial
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import DTypeLike

from unet_jax import cpu_convs

# PyTorch's defaults, which the reproduced runs used: both come to U(-1/sqrt(fan_in), 1/sqrt(fan_in)).
kernel_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def bias_init(fan_in: int) -> nn.initializers.Initializer:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)), the distribution of PyTorch's conv biases."""
    bound = fan_in**-0.5
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


def conv(x: Array, kernel: Array, strides: int = 1, padding: int | tuple[int, int] = 0) -> Array:
    """2-D convolution of x [N, H, W, I] with kernel [h, w, I, O], the same zero padding (low, high) on both axes."""
    pad = (padding, padding) if isinstance(padding, int) else padding
    dimensions = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, (strides, strides), (pad, pad), dimension_numbers=dimensions)


def is_concrete(x: Array) -> bool:
    """Whether x has a shape of numbers, which the CPU's forms need: in jax.export it may have symbols."""
    return all(isinstance(side, int) for side in x.shape)


def _rectified(x: Array, relu_first: bool) -> Array:
    return (jnp.maximum(x, 0) if relu_first else x).astype(_statistics_dtype(x))


@flax.struct.dataclass
class Scaled:
    """x * gain + shift of x [N, H, W, C], or of max(x, 0) if `relu_first`, with gain and shift [C]: [N, H, W, C].

    The output of batch norm, to be computed where it is used: on the CPU it is then never written as a whole. Made by
    `scaled` alone: the gradient to x here is the one to the value, summed over all places that use it.
    """

    x: Array
    gain: Array
    shift: Array
    relu_first: bool = flax.struct.field(pytree_node=False, default=False)

    def value(self) -> Array:
        """The array, in x's dtype."""
        return _scale(self.x, self.gain, self.shift, self.relu_first)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _scale(x: Array, gain: Array, shift: Array, relu_first: bool) -> Array:
    return (_rectified(x, relu_first) * gain[None, None, None] + shift[None, None, None]).astype(x.dtype)


def _scale_bwd(relu_first: bool, gain: Array, g: Array) -> tuple[Array, Array, Array]:
    return g, jnp.zeros_like(gain), jnp.zeros_like(gain)


_scale.defvjp(lambda x, gain, shift, relu_first: (_scale(x, gain, shift, relu_first), gain), _scale_bwd)


def scaled(x: Array, gain: Array, shift: Array, relu_first: bool = False) -> Scaled:
    """The `Scaled` of x [N, H, W, C], gain and shift [C]."""
    return Scaled(_used_later(x, gain, shift, relu_first), gain, shift, relu_first)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _used_later(x: Array, gain: Array, shift: Array, relu_first: bool) -> Array:
    return x


def _used_later_bwd(relu_first: bool, residuals: tuple[Array, Array], g: Array) -> tuple[Array, Array, Array]:
    x, gain = residuals
    g = g.astype(gain.dtype)
    dx = g * gain[None, None, None]
    dx = jnp.where(x > 0, dx, 0) if relu_first else dx
    return dx.astype(x.dtype), channel_sum(g * _rectified(x, relu_first)), channel_sum(g)


_used_later.defvjp(lambda x, gain, shift, relu_first: (x, (x, gain)), _used_later_bwd)


def value_of(x: Array | Scaled) -> Array:
    """The array that x stands for."""
    return x.value() if isinstance(x, Scaled) else x


Parts = tuple[Array | Scaled, ...]


@jax.custom_vjp
def same_conv(parts: Parts, kernel: Array, bias: Array) -> Array:
    """3x3 convolution of stride 1 of x [N, H, W, I] with kernel [3, 3, I, O] to [N, H, W, O], plus bias [O].

    x comes in parts that stand side by side in the features, [N, H, W, I1], [N, H, W, I2], ..., and the gradient keeps
    those alone. On the CPU by Winograd, where a picture's tiles fit its cache.
    """
    xs, _ = _opened(parts)
    fits = is_concrete(xs[0]) and cpu_convs.tiles_fit(xs, kernel.shape[-1])
    return lax.platform_dependent(parts, kernel, bias, cpu=_winograd if fits else _same_conv, default=_same_conv)


def _opened(parts: Parts) -> tuple[list[Array], cpu_convs.Join]:
    """The parts' arrays, and what makes one array of them, or of a few of their pictures."""

    def join(*xs: Array) -> Array:
        pairs = zip(parts, xs, strict=True)
        return _joined(tuple(dataclasses.replace(p, x=x) if isinstance(p, Scaled) else x for p, x in pairs))

    return [part.x if isinstance(part, Scaled) else part for part in parts], join


def _joined(parts: Parts) -> Array:
    return jnp.concatenate([value_of(part) for part in parts], -1)


def _winograd(parts: Parts, kernel: Array, bias: Array) -> Array:
    return cpu_convs.conv(*_opened(parts), kernel, bias)


def _same_conv(parts: Parts, kernel: Array, bias: Array) -> Array:
    return add_bias(conv(_joined(parts), kernel, padding=1), bias)


def _same_conv_bwd(residuals: tuple[Parts, Array], g: Array) -> tuple[Parts, Array, Array]:
    parts, kernel = residuals
    features = [x.shape[-1] for x in _opened(parts)[0]]

    def direct(parts: Parts, kernel: Array, g: Array) -> tuple[list[Array], Array]:
        x = _joined(parts)
        to_kernel = jax.linear_transpose(lambda kernel: conv(x, kernel, padding=1), kernel)(g)[0]
        # One by one: computed for all at once, each would be copied out of it.
        pairs = zip(_opened(parts)[0], jnp.split(kernel, np.cumsum(features)[:-1], 2), strict=True)
        return [jax.linear_transpose(partial(conv, kernel=own, padding=1), x)(g)[0] for x, own in pairs], to_kernel

    def on_cpu(parts: Parts, kernel: Array, g: Array) -> tuple[list[Array], Array]:
        to_kernel = cpu_convs.kernel_gradient(*_opened(parts), g)
        if cpu_convs.tiles_fit([g], kernel.shape[2]):
            return cpu_convs.input_gradient(features, kernel, g, after=to_kernel), to_kernel
        return direct(parts, kernel, g)[0], to_kernel

    to_values, to_kernel = lax.platform_dependent(parts, kernel, g, cpu=on_cpu, default=direct)
    to_parts = tuple(jax.vjp(value_of, part)[1](to)[0] for part, to in zip(parts, to_values, strict=True))
    return to_parts, to_kernel, channel_sum(g)


same_conv.defvjp(lambda parts, kernel, bias: (same_conv(parts, kernel, bias), (parts, kernel)), _same_conv_bwd)


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
    partial_sums = x.astype(_statistics_dtype(x)).reshape(rows // group, group, channels).sum(1)
    return jnp.dot(jnp.ones(rows // group, partial_sums.dtype), partial_sums, precision="highest").astype(x.dtype)


@jax.custom_vjp
def add_bias(x: Array, bias: Array) -> Array:
    """x [..., C] + bias [C]; the bias' gradient is a `channel_sum`."""
    return x + bias.reshape((1,) * (x.ndim - 1) + bias.shape)


add_bias.defvjp(lambda x, bias: (add_bias(x, bias), None), lambda _, g: (g, channel_sum(g)))


@jax.custom_vjp
def transposed_conv(x: Array, kernel: Array) -> Array:
    """3x3 transposed convolution of stride 2 that doubles x [N, H, W, I] with kernel [3, 3, O, I] to [N, 2H, 2W, O].

    PyTorch's ConvTranspose2d(3, stride=2, padding=1, output_padding=1) without its bias. Along an axis, output 2i sees
    w[1] x[i], and output 2i+1 sees w[2] x[i] + w[0] x[i+1]. Dilating the input (the textbook form) multiplies mostly
    zeros. The gradients are those of the map that it transposes, the 3x3 convolution of stride 2.
    """
    cpu = cpu_convs.transposed_conv if is_concrete(x) else _transposed_conv
    return lax.platform_dependent(x, kernel, cpu=cpu, default=_transposed_conv)


def _transposed_conv(x: Array, kernel: Array) -> Array:
    # One 2x2 convolution computes the four output phases at once.
    n, h, w, in_features = x.shape
    out_features = kernel.shape[2]
    padded = jnp.pad(kernel, ((0, 1), (0, 1), (0, 0), (0, 0)))
    taps = np.array([[1, 3], [2, 0]])  # [phase, tap]; 3 is of the zeros
    phases = padded[taps][:, :, taps]  # [phase_h, tap_h, phase_w, tap_w, O, I]
    merged = phases.transpose(1, 3, 5, 0, 2, 4).reshape(2, 2, in_features, 4 * out_features)
    y = conv(x, merged, padding=(0, 1)).reshape(n, h, w, 2, 2, out_features)
    return y.transpose(0, 1, 3, 2, 4, 5).reshape(n, 2 * h, 2 * w, out_features)


def _transposed_conv_bwd(residuals: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, kernel = residuals
    return conv(g, kernel, strides=2, padding=1), _halving_conv_kernel_grad(g, kernel, x)


transposed_conv.defvjp(lambda x, kernel: (transposed_conv(x, kernel), (x, kernel)), _transposed_conv_bwd)


@jax.custom_vjp
def halving_conv(x: Array, kernel: Array) -> Array:
    """3x3 convolution of stride 2 of x [N, 2H, 2W, I] with kernel [3, 3, I, O] to [N, H, W, O].

    The automatic gradient to x dilates g, which is slow; here it is `transposed_conv`, its equal.
    """
    return conv(x, kernel, strides=2, padding=1)


def _halving_conv_kernel_grad(x: Array, kernel: Array, g: Array) -> Array:
    def direct(x: Array, g: Array) -> Array:
        return jax.linear_transpose(lambda k: conv(x, k, strides=2, padding=1), kernel)(g)[0]

    return lax.platform_dependent(x, g, cpu=cpu_convs.halving_kernel_gradient, default=direct)


def _halving_conv_bwd(residuals: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, kernel = residuals
    return transposed_conv(g, kernel), _halving_conv_kernel_grad(x, kernel, g)


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
        k, in_features = self.kernel_size, sum(x.shape[-1] for x in _opened(parts)[0])
        kernel = self.param("kernel", kernel_init, (k, k, in_features, self.features)).astype(self.dtype)
        bias = self.param("bias", bias_init(k * k * in_features), (self.features,)).astype(self.dtype)
        wide = kernel.dtype != jnp.bfloat16  # Winograd's sums would be rounded to 8 bits
        if wide and (k, self.strides) == (3, 1) and min(in_features, self.features) >= cpu_convs.WINOGRAD_FEATURES:
            return same_conv(jax.tree.map(lambda x: x.astype(self.dtype), parts), kernel, bias)
        x = _joined(parts).astype(self.dtype)
        if (k, self.strides) == (3, 2) and x.shape[1] % 2 == 0 and x.shape[2] % 2 == 0:
            y = halving_conv(x, kernel)
        else:
            y = conv(x, kernel, self.strides, k // 2)
        return add_bias(y, bias)


class TransposedConv(nn.Module):
    """`transposed_conv` with bias; the kernel has linen's ConvTranspose(transpose_kernel=True) shape [3, 3, O, I]."""

    features: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array | Scaled) -> Array:
        x = value_of(x)
        # PyTorch counts the fan-in of a transposed conv over its output features.
        init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", in_axis=2, out_axis=3)
        kernel = self.param("kernel", init, (3, 3, self.features, x.shape[-1]))
        bias = self.param("bias", bias_init(9 * self.features), (self.features,))
        return add_bias(transposed_conv(x.astype(self.dtype), kernel.astype(self.dtype)), bias.astype(self.dtype))


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


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def double_axis(x: Array, axis: int) -> Array:
    """Linear interpolation that doubles the points along an axis, first and last kept (aligned corners).

    Output 2i lies between x[i-1] and x[i], output 2i+1 between x[i] and x[i+1]: a few passes over x, where a matrix
    product multiplies mostly zeros. The automatic gradient would pad each slice; the hand-written one shifts too.
    """
    previous, following = _blend_weights(x, axis)
    even = (1 - previous) * x + previous * cpu_convs.shift(x, axis, -1)
    odd = (1 - following) * x + following * cpu_convs.shift(x, axis, 1)
    shape = (*x.shape[:axis], 2 * x.shape[axis], *x.shape[axis + 1 :])
    return jnp.stack([even, odd], axis + 1).reshape(shape)


def _double_axis_bwd(axis: int, _: None, g: Array) -> tuple[Array]:
    pairs = g.reshape(*g.shape[:axis], g.shape[axis] // 2, 2, *g.shape[axis + 1 :])
    even, odd = (lax.index_in_dim(pairs, i, axis + 1, keepdims=False) for i in (0, 1))
    previous, following = _blend_weights(even, axis)
    own = (1 - previous) * even + (1 - following) * odd
    return (own + cpu_convs.shift(previous * even, axis, 1) + cpu_convs.shift(following * odd, axis, -1),)


double_axis.defvjp(lambda x, axis: (double_axis(x, axis), None), _double_axis_bwd)


def resize_double(x: Array) -> Array:
    """Bilinear resize with aligned corners: x [N, H, W, C] to [N, 2H, 2W, C]; a single pixel is repeated.

    `jax.image.resize` does not align corners.
    """
    return double_axis(double_axis(x, 2), 1)


def _statistics_dtype(x: Array) -> DTypeLike:
    return np.promote_types(x.dtype, np.float32)  # jnp's refuses bfloat16 where promotion is strict


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def statistics(x: Array, relu_first: bool) -> tuple[Array, Array]:
    """Mean and (biased) variance [C], float32 or wider, of x [N, H, W, C], or of max(x, 0) if `relu_first`.

    With the gradient of `scaled` this makes batch norm's (Ioffe and Szegedy 2015, arXiv:1502.03167, section 3), which
    keeps x alone between the passes.
    """
    a, count = _rectified(x, relu_first), x.size // x.shape[-1]
    mean = channel_sum(a) / count
    return mean, jnp.maximum(channel_sum(jnp.square(a)) / count - jnp.square(mean), 0)


def _statistics_fwd(x: Array, relu_first: bool) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    mean, var = statistics(x, relu_first)
    return (mean, var), (x, mean)


def _statistics_bwd(relu_first: bool, residuals: tuple[Array, Array], grads: tuple[Array, Array]) -> tuple[Array]:
    x, mean = residuals
    to_mean, to_var = (g / (x.size // x.shape[-1]) for g in grads)
    centred = _rectified(x, relu_first) - mean[None, None, None]
    dx = to_mean[None, None, None] + 2 * centred * to_var[None, None, None]
    return ((jnp.where(x > 0, dx, 0) if relu_first else dx).astype(x.dtype),)


statistics.defvjp(_statistics_fwd, _statistics_bwd)


class BatchNorm(nn.Module):
    """Batch norm over N, H, W with parameters scale, bias and running batch_stats mean, var [C], all float32.

    With `relu_first`, of max(x, 0): one function, so that the gradient need not keep the ReLU's output beside its
    input. Running statistics move by 0.1 a step (PyTorch's momentum 0.1; var is the biased one, as in Flax).
    """

    relu_first: bool = False
    epsilon: float = 1e-5
    momentum: float = 0.9

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Scaled:
        shape = (x.shape[-1],)
        scale = self.param("scale", nn.initializers.ones, shape)
        bias = self.param("bias", nn.initializers.zeros, shape)
        running = [
            self.variable("batch_stats", "mean", jnp.zeros, shape),
            self.variable("batch_stats", "var", jnp.ones, shape),
        ]
        mean, var = statistics(x, self.relu_first) if train else (r.value for r in running)
        if train and not self.is_initializing():
            for old, new in zip(running, (mean, var), strict=True):
                old.value = self.momentum * old.value + (1 - self.momentum) * new
        gain = scale.astype(mean.dtype) * lax.rsqrt(var + self.epsilon)
        return scaled(x, gain, bias.astype(mean.dtype) - mean * gain, self.relu_first)
