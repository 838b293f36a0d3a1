"""The 3x3 convolutions on a CPU and their gradients, in C++ (convs.cc). They compute in float32.

XLA's own convolutions reach two thirds of a CPU's peak, their kernel gradients a third. The C++ reads lazy arrays
directly: parts to be concatenated along the channels, each of which may be a `Scaled`.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from unet_jax.cpu.lazy import Joined, Lazy, Scaled, as_array
from unet_jax.cpu.library import is_available
from unet_jax.cpu.sums import channel_sum
from unet_jax.layers import convolution

LANES = 16
NONE = np.zeros(0, np.float32)  # stands for a gain, a shift or a bias that is not there
Part = Array | Scaled


def handles(x: Array | Lazy, kernel: Array, strides: int = 1) -> bool:
    """Whether the C++ can compute it: all float32, features multiples of 16, sizes known, not 0, even for stride 2."""
    parts = parts_of(x)
    arrays = [array for part in parts for array in opened(part)] + [kernel]
    return (
        all(array.dtype == np.float32 for array in arrays)
        and has_whole_vectors(parts, kernel)
        and has_known_sizes(x)
        and (strides == 1 or (strides == 2 and len(parts) == 1 and x.shape[1] % 2 == x.shape[2] % 2 == 0))
        and is_available()
    )


def has_known_sizes(x: Array | Lazy) -> bool:
    """Whether every size is a number, and not 0: in jax.export it may be a symbol."""
    return all(isinstance(side, int) and side > 0 for side in x.shape)


def has_whole_vectors(parts: Sequence[Part], kernel: Array) -> bool:
    """Whether every number of features is a multiple of LANES, as the C++ needs."""
    return all(count % LANES == 0 for count in (*(part.shape[-1] for part in parts), *kernel.shape[2:]))


def parts_of(x: Array | Lazy) -> tuple[Part, ...]:
    """What x consists of, as the C++ reads it."""
    parts = x.parts if isinstance(x, Joined) else (x,)
    return tuple(part if isinstance(part, Scaled) else as_array(part) for part in parts)


def opened(part: Part) -> tuple[Array | np.ndarray, ...]:
    """The pictures of a part, and its gain and shift, empty where there are none."""
    return (part.x, part.gain, part.shift) if isinstance(part, Scaled) else (part, NONE, NONE)


def call_library(
    name: str,
    results: Sequence[jax.ShapeDtypeStruct],
    parts: Sequence[Part],
    *others: Array | np.ndarray,
    **options: Any,
) -> Any:
    """The C++ function's results for parts and other arrays."""
    arrays = [array for part in parts for array in opened(part)]
    relu = np.array([isinstance(part, Scaled) and part.relu_first for part in parts], np.int64)
    call = jax.ffi.ffi_call(f"unet_jax_{name}", results, vmap_method="sequential")
    return call(*arrays, *others, relu=relu, **options)


def _call(
    name: str,
    shapes: Sequence[Sequence[int]],
    parts: Sequence[Part],
    *others: Array | np.ndarray,
    dtype: DTypeLike = np.float32,
    **options: Any,
) -> Any:
    results = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    return call_library(name, results, parts, *others, **options)


def tile_side(x: Part, kernel: Array) -> np.int64:
    """m of Winograd's F(m x m, 3x3): 4 if there are enough tiles to outweigh its larger kernels, else 2.

    The bound 4 tiles >= sqrt(I O) was measured (LOG.md).
    """
    n, h, w, _ = x.shape
    return np.int64(4 if 16 * (n * -(-h // 4) * -(-w // 4)) ** 2 >= kernel.shape[2] * kernel.shape[3] else 2)


def to_part(part: Part, to_value: Array) -> Part:
    """The gradient with respect to a part, from the one with respect to its value."""
    return jax.vjp(as_array, part)[1](to_value)[0]


def same_conv(x: Array | Lazy, kernel: Array, bias: Array) -> Array:
    """3x3 convolution of stride 1 of x [N, H, W, I] with kernel [3, 3, I, O] to [N, H, W, O], plus bias [O].

    x and the result may be bfloat16; kernel and bias are float32.
    """
    return _same_conv(parts_of(x), kernel, bias)


def halving_conv(x: Array | Lazy, kernel: Array, bias: Array) -> Array:
    """3x3 convolution of stride 2 of x [N, 2H, 2W, I] with kernel [3, 3, I, O] to [N, H, W, O], plus bias [O]."""
    return _halving_conv(*parts_of(x), kernel, bias)


def transposed_conv(x: Array | Lazy, kernel: Array, bias: Array) -> Array:
    """As `layers.TransposedConv`: x [N, H, W, I] with kernel [3, 3, O, I] to [N, 2H, 2W, O], plus bias [O]."""
    return _transposed_conv(*parts_of(x), kernel, bias)


@jax.custom_vjp
def _same_conv(parts: tuple[Part, ...], kernel: Array, bias: Array) -> Array:
    shape = (*parts[0].shape[:3], len(bias))
    m = tile_side(parts[0], kernel)
    return _call("same_conv", [shape], parts, kernel, bias, dtype=parts[0].dtype, m=m, turned=False)[0]


def _same_conv_bwd(residuals: tuple[tuple[Part, ...], Array], g: Array) -> tuple[tuple[Part, ...], Array, Array]:
    parts, kernel = residuals
    m = tile_side(g, kernel)
    to_values = _call("same_conv", [part.shape for part in parts], [g], kernel, NONE, dtype=g.dtype, m=m, turned=True)
    to_kernel = _call("same_kernel_gradient", [kernel.shape], parts, g, m=m)[0]
    return tuple(map(to_part, parts, to_values)), to_kernel, channel_sum(g.astype(np.float32))


_same_conv.defvjp(lambda parts, kernel, bias: (_same_conv(parts, kernel, bias), (parts, kernel)), _same_conv_bwd)


def _double(x: Part, kernel: Array, bias: Array | np.ndarray) -> Array:
    n, h, w, _ = x.shape
    return _call("transposed_conv", [(n, 2 * h, 2 * w, kernel.shape[2])], [x], kernel, bias)[0]


@jax.custom_vjp
def _halving_conv(x: Part, kernel: Array, bias: Array) -> Array:
    return convolution(as_array(x), kernel, 2) + bias[None, None, None]  # here XLA's own is the fastest


def _halving_conv_bwd(residuals: tuple[Part, Array], g: Array) -> tuple[Part, Array, Array]:
    x, kernel = residuals
    to_kernel = _call("halving_kernel_gradient", [kernel.shape], [x, g])[0]
    return to_part(x, _double(g, kernel, NONE)), to_kernel, channel_sum(g)


_halving_conv.defvjp(lambda x, kernel, bias: (_halving_conv(x, kernel, bias), (x, kernel)), _halving_conv_bwd)


@jax.custom_vjp
def _transposed_conv(x: Part, kernel: Array, bias: Array) -> Array:
    return _double(x, kernel, bias)


def _transposed_conv_bwd(residuals: tuple[Part, Array], g: Array) -> tuple[Part, Array, Array]:
    x, kernel = residuals
    to_kernel = _call("halving_kernel_gradient", [kernel.shape], [g, x])[0]
    return to_part(x, convolution(g, kernel, 2)), to_kernel, channel_sum(g)


_transposed_conv.defvjp(lambda x, kernel, bias: (_double(x, kernel, bias), (x, kernel)), _transposed_conv_bwd)
