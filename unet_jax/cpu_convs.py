"""The 3x3 convolutions on a CPU and their gradients, in C++ (cpu_convs.cc), which is compiled at its first use.

XLA's own reach two thirds of what a CPU can multiply, their kernel gradients a third. Pictures come as parts that stand
side by side in the features, and batch norm's output as its `Scaled`.
"""

import ctypes
import functools
import hashlib
import logging
import os
import shlex
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jaxlib
import numpy as np
from jax import Array

from unet_jax.batch_norm import Scaled, value_of
from unet_jax.folders import default_cache_dir
from unet_jax.ops import channel_sum, conv

LANES = 16  # every number of features is a multiple of it
FUNCTIONS = ("same_conv", "same_kernel_gradient", "transposed_conv", "halving_kernel_gradient")
NONE = np.zeros(0, np.float32)  # stands for a gain, a shift or a bias that is not there
Part = Array | Scaled


@functools.cache
def is_available() -> bool:
    """Whether this process can use them. Where they cannot be compiled, a warning says why, and what that costs."""
    # XLA does not know how to split a custom call among devices.
    if jax.default_backend() != "cpu" or jax.device_count() > 1:
        return False
    try:
        library = ctypes.CDLL(str(_compiled(default_cache_dir())))
    except (OSError, RuntimeError, ValueError, subprocess.CalledProcessError) as error:
        logging.getLogger(__name__).warning(
            "steps take about twice as long: the convolutions could not be compiled or loaded, which takes a C++"
            " compiler (CXX names it) and a cache folder that can be written (in XDG_CACHE_HOME): %s",
            error,
        )
        return False
    for name in FUNCTIONS:
        handler = getattr(library, f"unet_jax_{name}")
        jax.ffi.register_ffi_target(f"unet_jax_{name}", jax.ffi.pycapsule(handler), platform="cpu")
    return True


def _compiled(folder: Path) -> Path:
    source = Path(__file__).with_suffix(".cc")
    command = [*shlex.split(os.environ.get("CXX") or "c++"), "-std=c++17", "-O3", "-march=native"]
    # Not CXXFLAGS: what else is built with may be meant for older processors.
    command += shlex.split(os.environ.get("UNET_JAX_CXXFLAGS", ""))
    command += ["-ffp-contract=off"]  # what is fused is written out: see fma in the source
    # What it defines tells the compiler's version and the processor's abilities.
    defined = subprocess.run(
        [*command, "-dM", "-E", "-x", "c++", os.devnull], check=True, stdout=subprocess.PIPE
    ).stdout
    key = hashlib.sha256(defined + source.read_bytes() + repr((command, jaxlib.__version__)).encode()).hexdigest()
    library = folder / f"cpu_convs-{key[:16]}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as unfinished:
            made = Path(unfinished) / library.name
            command += ["-w", "-shared", "-fPIC", f"-I{jax.ffi.include_dir()}", str(source), "-o", str(made)]
            subprocess.run(command, check=True)
            made.replace(library)
    return library


def suit(parts: Sequence[Part], kernel: Array) -> bool:
    """Whether these can be used here: all float32, features by 16, one size for all parts, known and not 0."""
    arrays = [array for part in parts for array in _opened(part)] + [kernel]
    counts = [part.shape[-1] for part in parts] + [*kernel.shape[2:]]
    return (
        all(array.dtype == np.float32 for array in arrays)
        and all(count % LANES == 0 for count in counts)
        and len({part.shape[:3] for part in parts}) == 1
        and all(isinstance(side, int) and side > 0 for side in parts[0].shape)  # in jax.export it may have symbols
        and is_available()
    )


def _opened(part: Part) -> tuple[Array | np.ndarray, ...]:
    return (part.x, part.gain, part.shift) if isinstance(part, Scaled) else (part, NONE, NONE)


def _call(
    name: str, shapes: Sequence[Sequence[int]], parts: Sequence[Part], *others: Array | np.ndarray, **options: Any
) -> Any:
    arrays = [array for part in parts for array in _opened(part)]
    relu = np.array([isinstance(part, Scaled) and part.relu_first for part in parts], np.int64)
    results = [jax.ShapeDtypeStruct(shape, np.float32) for shape in shapes]
    call = jax.ffi.ffi_call(f"unet_jax_{name}", results, vmap_method="sequential")
    return call(*arrays, *others, relu=relu, **options)


def _tile(x: Part, kernel: Array) -> np.int64:
    """m of Winograd's F(m x m, 3x3): the larger one if there are tiles enough to outweigh its larger kernels.

    Measured (LOG.md): 4 tiles >= sqrt(I O).
    """
    n, h, w, _ = x.shape
    return np.int64(4 if 16 * (n * -(-h // 4) * -(-w // 4)) ** 2 >= kernel.shape[2] * kernel.shape[3] else 2)


def _to_part(part: Part, to_value: Array) -> Part:
    return jax.vjp(value_of, part)[1](to_value)[0]


@jax.custom_vjp
def same_conv(parts: tuple[Part, ...], kernel: Array, bias: Array) -> Array:
    """3x3 convolution of stride 1 of x [N, H, W, I] with kernel [3, 3, I, O] to [N, H, W, O], plus bias [O].

    x comes in parts that stand side by side in the features, [N, H, W, I1], [N, H, W, I2], ...
    """
    shape = (*parts[0].shape[:3], len(bias))
    return _call("same_conv", [shape], parts, kernel, bias, m=_tile(parts[0], kernel), turned=False)[0]


def _same_conv_bwd(residuals: tuple[tuple[Part, ...], Array], g: Array) -> tuple[tuple[Part, ...], Array, Array]:
    parts, kernel = residuals
    m = _tile(g, kernel)
    to_values = _call("same_conv", [part.shape for part in parts], [g], kernel, NONE, m=m, turned=True)
    to_kernel = _call("same_kernel_gradient", [kernel.shape], parts, g, m=m)[0]
    return tuple(map(_to_part, parts, to_values)), to_kernel, channel_sum(g)


same_conv.defvjp(lambda parts, kernel, bias: (same_conv(parts, kernel, bias), (parts, kernel)), _same_conv_bwd)


def _halve(x: Array, kernel: Array) -> Array:
    return conv(x, kernel, strides=2, padding=1)  # of these XLA's own is the fastest


def _double(x: Part, kernel: Array, bias: Array | np.ndarray) -> Array:
    n, h, w, _ = x.shape
    return _call("transposed_conv", [(n, 2 * h, 2 * w, kernel.shape[2])], [x], kernel, bias)[0]


@jax.custom_vjp
def halving_conv(x: Part, kernel: Array, bias: Array) -> Array:
    """3x3 convolution of stride 2 of x [N, 2H, 2W, I] with kernel [3, 3, I, O] to [N, H, W, O], plus bias [O]."""
    return _halve(value_of(x), kernel) + bias[None, None, None]


def _halving_conv_bwd(residuals: tuple[Part, Array], g: Array) -> tuple[Part, Array, Array]:
    x, kernel = residuals
    to_kernel = _call("halving_kernel_gradient", [kernel.shape], [x, g])[0]
    return _to_part(x, _double(g, kernel, NONE)), to_kernel, channel_sum(g)


halving_conv.defvjp(lambda x, kernel, bias: (halving_conv(x, kernel, bias), (x, kernel)), _halving_conv_bwd)


@jax.custom_vjp
def transposed_conv(x: Part, kernel: Array, bias: Array) -> Array:
    """3x3 transposed convolution of stride 2 of x [N, H, W, I] with kernel [3, 3, O, I] to [N, 2H, 2W, O].

    It is `layers.transposed_conv`, plus bias [O].
    """
    return _double(x, kernel, bias)


def _transposed_conv_bwd(residuals: tuple[Part, Array], g: Array) -> tuple[Part, Array, Array]:
    x, kernel = residuals
    to_kernel = _call("halving_kernel_gradient", [kernel.shape], [g, x])[0]
    return _to_part(x, _halve(g, kernel)), to_kernel, channel_sum(g)


transposed_conv.defvjp(lambda x, kernel, bias: (_double(x, kernel, bias), (x, kernel)), _transposed_conv_bwd)
