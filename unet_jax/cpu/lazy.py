"""Arrays that are computed where they are used: the outputs of ReLU, batch norm and concatenation.

`convs` and `bfloat16` read concatenations and scaled parts directly. Other code uses them as arrays, which computes
them; functions of jax.lax need jnp.asarray(x) instead of x.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array

from unet_jax.cpu.sums import channel_sum
from unet_jax.layers import wide_dtype


class Lazy:
    """What the lazy arrays share: shape and dtype, and that they can be used as arrays, which computes them."""

    shape: Any
    dtype: Any

    def value(self) -> Array:
        """The array that it stands for."""
        raise NotImplementedError

    def __jax_array__(self) -> Array:
        return self.value()

    def __getitem__(self, index: Any) -> Array:
        return self.value()[index]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or not hasattr(Array, name):
            raise AttributeError(name)
        return getattr(self.value(), name)


def _operator(name: str) -> Callable[..., Any]:
    return lambda self, *other: getattr(self.value(), name)(*other)


_BINARY = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul")
for _name in (*_BINARY, *(f"r{name}" for name in _BINARY), "neg", "abs", "eq", "ne", "lt", "le", "gt", "ge"):
    setattr(Lazy, f"__{_name}__", _operator(f"__{_name}__"))  # Python looks these up in the class


def as_array(x: Array | Lazy) -> Array:
    """The array that x stands for."""
    return x.value() if isinstance(x, Lazy) else x


@flax.struct.dataclass(eq=False)  # == compares the numbers
class Rectified(Lazy):
    """max(x, 0)."""

    x: Array
    shape = property(lambda self: self.x.shape)
    dtype = property(lambda self: self.x.dtype)

    def value(self) -> Array:
        """The array."""
        return jax.nn.relu(self.x)


@flax.struct.dataclass(eq=False)  # == compares the numbers
class Joined(Lazy):
    """Parts [N, H, W, C1], [N, H, W, C2], ..., concatenated along the channels."""

    parts: "tuple[Array | Scaled, ...]"
    shape = property(lambda self: (*self.parts[0].shape[:3], sum(part.shape[-1] for part in self.parts)))
    dtype = property(lambda self: self.parts[0].dtype)

    def value(self) -> Array:
        """The array."""
        return jnp.concatenate([as_array(part) for part in self.parts], -1)


@flax.struct.dataclass(eq=False)  # == compares the numbers
class Scaled(Lazy):
    """x * gain + shift [N, H, W, C], with max(x, 0) for x if `relu_first`. x is [N, H, W, C], gain and shift are [C].

    It is the output of batch norm. Its gradient is split in two: `_scale` passes the gradient of the value to x as it
    is, and `_with_chain_rule` multiplies the sum over all uses by the gain, once. So only `scaled`, which calls it, may
    make a Scaled.
    """

    x: Array
    gain: Array
    shift: Array
    relu_first: bool = flax.struct.field(pytree_node=False, default=False)
    shape = property(lambda self: self.x.shape)
    dtype = property(lambda self: self.x.dtype)

    def value(self) -> Array:
        """The array, in x's dtype."""
        return _scale(self.x, self.gain, self.shift, self.relu_first)


def rectified(x: Array, relu_first: bool) -> Array:
    """x, or max(x, 0) if `relu_first`, in float32 or wider."""
    return (jnp.maximum(x, 0) if relu_first else x).astype(wide_dtype(x))


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _scale(x: Array, gain: Array, shift: Array, relu_first: bool) -> Array:
    return (rectified(x, relu_first) * gain[None, None, None] + shift[None, None, None]).astype(x.dtype)


def _scale_bwd(relu_first: bool, gain: Array, g: Array) -> tuple[Array, Array, Array]:
    return g, jnp.zeros_like(gain), jnp.zeros_like(gain)


_scale.defvjp(lambda x, gain, shift, relu_first: (_scale(x, gain, shift, relu_first), gain), _scale_bwd)


def scaled(x: Array, gain: Array, shift: Array, relu_first: bool = False) -> Scaled:
    """The `Scaled` of x [N, H, W, C], gain and shift [C]."""
    return Scaled(_with_chain_rule(x, gain, shift, relu_first), gain, shift, relu_first)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _with_chain_rule(x: Array, gain: Array, shift: Array, relu_first: bool) -> Array:
    # Returns x unchanged, but with the gradients of x * gain + shift. The gradients of all uses arrive here as one sum,
    # so that the sums over the pixels are computed once.
    return x


def _with_chain_rule_fwd(x: Array, gain: Array, shift: Array, relu_first: bool) -> tuple[Array, tuple[Array, Array]]:
    # Not x itself: gradients of gradients need this rule too.
    return _with_chain_rule(x, gain, shift, relu_first), (x, gain)


def _with_chain_rule_bwd(relu_first: bool, residuals: tuple[Array, Array], g: Array) -> tuple[Array, Array, Array]:
    x, gain = residuals
    g = g.astype(gain.dtype)
    dx = g * gain[None, None, None]
    dx = jnp.where(x > 0, dx, 0) if relu_first else dx
    return dx.astype(x.dtype), channel_sum(g * rectified(x, relu_first)), channel_sum(g)


_with_chain_rule.defvjp(_with_chain_rule_fwd, _with_chain_rule_bwd)
