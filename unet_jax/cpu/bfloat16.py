"""Convolutions on a CPU and their gradients in bfloat16, in C++ for processors with such products (bfloat16.cc).

Like those of `convs`, they read lazy arrays directly. Kernels, biases and their gradients are float32: the C++ rounds
kernels to bfloat16 when it packs them. Products are summed in float32. Without matrix units (AMX), the convolutions of
`convs` do what they do faster: they read and write bfloat16, and compute in float32, with kernels that are not rounded.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from unet_jax.cpu.convs import (
    NONE,
    Part,
    call_library,
    has_known_sizes,
    has_whole_vectors,
    opened,
    parts_of,
    same_conv,
    tile_side,
    to_part,
)
from unet_jax.cpu.lazy import Joined, Lazy
from unet_jax.cpu.library import has_bfloat16, has_matrix_units
from unet_jax.cpu.sums import channel_sum

HALF = jnp.dtype(jnp.bfloat16)
Parts = tuple[Part, ...]


def handles(x: Array | Lazy, dtype: DTypeLike, side: int = 3, strides: int = 2) -> bool:
    """Whether the C++ can compute it: dtype and x are bfloat16, gain and shift float32, sizes known and not 0.

    It has kernels of 3x3 with strides of 1 and 2, and of 1x1.
    """
    opened_parts = [opened(part) for part in parts_of(x)]
    return (
        dtype == HALF
        and (side, strides) in ((1, 1), (3, 1), (3, 2))
        and all(array.dtype == HALF for array, _, _ in opened_parts)
        and all(array.dtype == np.float32 for _, *others in opened_parts for array in others)
        and has_known_sizes(x)
        and has_bfloat16()
    )


def _conv(shape: tuple[int, ...], parts: Parts, kernel: Array, bias: Array | np.ndarray, step: int) -> Array:
    """The C++ convolution to [N, H, W, O]. Step -2 is the transposed convolution of stride 2."""
    results = [jax.ShapeDtypeStruct(shape, HALF)]
    return call_library("bfloat16_conv", results, parts, kernel, bias, turned=step < 0, step=np.int64(step))[0]


def _kernel_gradient(parts: Parts, g: Part, kernel: Array, step: int) -> Array:
    results = [jax.ShapeDtypeStruct(kernel.shape, np.float32)]
    gradient: Array = call_library("bfloat16_kernel_gradient", results, (*parts, g), step=np.int64(step))[0]
    return gradient


def conv(x: Array | Lazy, kernel: Array, bias: Array, strides: int = 1) -> Array:
    """As `layers.Conv`: x [N, H, W, I] with kernel [k, k, I, O] to [N, ceil(H/strides), ceil(W/strides), O]."""
    parts = parts_of(x)
    if strides == 1 and _winograd_is_faster(parts, kernel):
        return same_conv(Joined(parts), kernel, bias)
    return _any_conv(parts, kernel, bias, strides)


def _winograd_is_faster(parts: Parts, kernel: Array) -> bool:
    """Whether F(4x4, 3x3) in float32 can compute it, and sooner than products in bfloat16 (measured: LOG.md)."""
    fits = len(kernel) == 3 and has_whole_vectors(parts, kernel)
    return fits and tile_side(parts[0], kernel) == 4 and not has_matrix_units()


def transposed_conv(x: Array | Lazy, kernel: Array, bias: Array) -> Array:
    """As `layers.TransposedConv`: x [N, H, W, I] with kernel [3, 3, O, I] to [N, 2H, 2W, O], plus bias [O]."""
    return _transposed_conv(*parts_of(x), kernel, bias)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _any_conv(parts: Parts, kernel: Array, bias: Array, strides: int) -> Array:
    n, h, w, _ = parts[0].shape
    shape = (n, -(-h // strides), -(-w // strides), len(bias))
    return _conv(shape, parts, kernel, bias, strides)


def _any_conv_fwd(parts: Parts, kernel: Array, bias: Array, strides: int) -> tuple[Array, tuple[Parts, Array]]:
    return _any_conv(parts, kernel, bias, strides), (parts, kernel)


def _any_conv_bwd(strides: int, residuals: tuple[Parts, Array], g: Array) -> tuple[Parts, Array, Array]:
    parts, kernel = residuals
    step = np.int64(1 if strides == 1 else -2)
    results = [jax.ShapeDtypeStruct(part.shape, HALF) for part in parts]
    to_values = call_library("bfloat16_conv", results, (g,), kernel, NONE, turned=True, step=step)
    to_kernel = _kernel_gradient(parts, g, kernel, strides)
    return tuple(map(to_part, parts, to_values)), to_kernel, channel_sum(g.astype(np.float32))


_any_conv.defvjp(_any_conv_fwd, _any_conv_bwd)


@jax.custom_vjp
def _transposed_conv(x: Part, kernel: Array, bias: Array) -> Array:
    n, h, w, _ = x.shape
    return _conv((n, 2 * h, 2 * w, len(bias)), (x,), kernel, bias, -2)


def _transposed_conv_bwd(residuals: tuple[Part, Array], g: Array) -> tuple[Part, Array, Array]:
    x, kernel = residuals
    to_value = _conv(x.shape, (g,), kernel, NONE, 2)
    return to_part(x, to_value), _kernel_gradient((g,), x, kernel, 2), channel_sum(g.astype(np.float32))


_transposed_conv.defvjp(lambda x, kernel, bias: (_transposed_conv(x, kernel, bias), (x, kernel)), _transposed_conv_bwd)
