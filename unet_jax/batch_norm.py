"""Batch norm, whose output is computed where it is used."""

from functools import partial

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax import Array, lax

from unet_jax.ops import channel_sum, statistics_dtype


def _rectified(x: Array, relu_first: bool) -> Array:
    return (jnp.maximum(x, 0) if relu_first else x).astype(statistics_dtype(x))


@flax.struct.dataclass
class Scaled:
    """x * gain + shift of x [N, H, W, C], or of max(x, 0) if `relu_first`, with gain and shift [C]: [N, H, W, C].

    The output of batch norm, to be computed where it is used: `cpu_convs` never writes it as a whole. Made by `scaled`
    alone: the gradient to x here is the one to the value, summed over all places that use it.
    """

    x: Array
    gain: Array
    shift: Array
    relu_first: bool = flax.struct.field(pytree_node=False, default=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """That of x."""
        return self.x.shape

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
    # The identity, whose gradient is the whole one of batch norm's output but for the statistics' share.
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
