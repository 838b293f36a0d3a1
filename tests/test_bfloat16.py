"""The convolutions in bfloat16 on a CPU against the same in float32, of numbers that bfloat16 holds."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_cpu_layers import calls
from test_layers import normal

from unet_jax import layers
from unet_jax.cpu import layers as cpu_layers
from unet_jax.cpu.lazy import scaled
from unet_jax.cpu.library import has_bfloat16
from unet_jax.train import prepare

ON_ONE_CPU = jax.default_backend() == "cpu" and jax.device_count() == 1
pytestmark = pytest.mark.skipif(not (ON_ONE_CPU and has_bfloat16()), reason="needs AMX or AVX512-BF16, and a compiler")
HALF = jnp.bfloat16


def half(x):
    """The same numbers as bfloat16 holds them."""
    return jnp.asarray(x, HALF)


def assert_close(ours, exact, rounds: bool):
    # Half a unit in the last of 8 bits, of the largest; what is summed and kept in float32 has that much less.
    limit = 2.0**-7 if rounds else 1e-4
    np.testing.assert_allclose(
        np.asarray(ours, np.float32), exact, rtol=0, atol=limit * max(float(np.abs(exact).max()), 1e-3)
    )


def assert_same(ours, exact, kernel_shape, out, *xs):
    """ours(kernel, bias, *xs in bfloat16) and its gradients are those of exact(kernel, bias, *xs in float32)."""
    kernel = half(normal(*kernel_shape) / np.prod(kernel_shape[:3]) ** 0.5).astype(np.float32)
    bias = normal(out, seed=3)
    halves = [half(x) if x.ndim == 4 else x for x in xs]
    wide = [x.astype(np.float32) for x in halves]
    assert calls(ours, kernel, bias, *halves) == 1
    y, pullback = jax.vjp(jax.jit(ours), kernel, bias, *halves)
    expected, exact_pullback = jax.vjp(jax.jit(exact), kernel, bias, *wide)
    assert y.dtype == HALF
    assert_close(y, expected, rounds=True)
    g = half(normal(*y.shape, seed=4))
    for ours_g, exact_g in zip(pullback(g), exact_pullback(g.astype(np.float32)), strict=True):
        assert_close(ours_g, exact_g, rounds=ours_g.dtype == HALF)


@pytest.mark.parametrize("shape", [(3, 5, 7), (2, 1, 1), (6, 13, 30)])
@pytest.mark.parametrize(("features", "out"), [(3, 32), (96, 65), (48, 3), (32, 48)])
@pytest.mark.parametrize(("side", "strides"), [(3, 1), (1, 1), (3, 2)])
def test_conv_is_that_of_float32(shape, features, out, side, strides):
    def ours(kernel, bias, x):
        conv = cpu_layers.Conv(out, kernel_size=side, strides=strides, dtype=HALF)
        return conv.apply({"params": {"kernel": kernel, "bias": bias}}, x)

    def exact(kernel, bias, x):
        conv = nn.Conv(out, (side, side), strides, side // 2)
        return conv.apply({"params": {"kernel": kernel, "bias": bias}}, x)

    assert_same(ours, exact, (side, side, features, out), out, normal(*shape, features))


@pytest.mark.parametrize(("shape", "features", "out"), [((2, 64, 64), 64, 32), ((8, 8, 8), 256, 512)])
def test_conv_whose_sums_a_cache_does_not_hold_is_that_of_float32(shape, features, out):
    test_conv_is_that_of_float32(shape, features, out, 3, 1)


@pytest.mark.parametrize("shape", [(3, 1, 1), (2, 9, 7), (2, 32, 32)])
@pytest.mark.parametrize(("features", "out"), [(64, 32), (33, 17)])
def test_transposed_conv_of_a_scaled_one_is_that_of_float32(shape, features, out):
    def ours(kernel, bias, *second):
        layer = cpu_layers.TransposedConv(out, dtype=HALF)
        return layer.apply({"params": {"kernel": kernel, "bias": bias}}, scaled(*second, relu_first=True))

    def exact(kernel, bias, x, gain, shift):
        layer = nn.ConvTranspose(out, (3, 3), strides=(2, 2), padding=((1, 2), (1, 2)), transpose_kernel=True)
        value = half(nn.relu(x) * gain[None, None, None] + shift[None, None, None]).astype(np.float32)
        return layer.apply({"params": {"kernel": kernel, "bias": bias}}, value)

    # What batch norm's own gain and shift get is not a convolution's business.
    second = normal(*shape, features), np.ones(features, np.float32), np.zeros(features, np.float32)
    assert_same(ours, exact, (3, 3, out, features), out, *second)


@pytest.mark.parametrize("features", [(24, 16), (32, 16)])
def test_conv_of_joined_parts_is_of_their_values(features):
    def ours(kernel, bias, *xs):
        return cpu_layers.Conv(32, dtype=HALF).apply(
            {"params": {"kernel": kernel, "bias": bias}}, cpu_layers.join(list(xs))
        )

    def exact(kernel, bias, *xs):
        conv = nn.Conv(32, (3, 3), padding=1)
        return conv.apply({"params": {"kernel": kernel, "bias": bias}}, jnp.concatenate(xs, -1))

    parts = [normal(2, 9, 10, count, seed=count) for count in features]
    assert_same(ours, exact, (3, 3, sum(features), 32), 32, *parts)


@pytest.mark.parametrize(("side", "reach"), [(8, 5), (32, 8)])
def test_nan_stays(side, reach):
    x = normal(1, side, side, 32)
    x[0, 3, 3, 5] = np.nan
    part = scaled(half(x), jnp.ones(32), jnp.zeros(32), relu_first=True)
    conv = cpu_layers.Conv(32, dtype=HALF)
    params = {"kernel": normal(3, 3, 32, 32), "bias": normal(32)}
    y = np.asarray(jax.jit(lambda part: conv.apply({"params": params}, part))(part), np.float32)
    assert np.isnan(y[0, 2:5, 2:5]).all()
    assert np.isfinite(y[0, reach:]).all()


@pytest.mark.parametrize("side", [8, 32])
def test_a_nan_with_all_its_bits_set_stays(side):
    bias = np.zeros(32, np.float32)
    bias[5] = np.uint32(0x7FFFFFFF).view(np.float32)  # a GPU makes such ones; rounding could carry it over to 0
    params = {"kernel": normal(3, 3, 32, 32), "bias": bias}
    conv, x = cpu_layers.Conv(32, dtype=HALF), half(normal(1, side, side, 32))
    y = np.asarray(jax.jit(lambda x: conv.apply({"params": params}, x))(x), np.float32)
    assert np.isnan(y[..., 5]).all()
    assert np.isfinite(np.delete(y, 5, -1)).all()


def test_what_comes_in_and_what_is_resized_is_rounded_once():
    pictures = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(prepare(pictures, HALF), half(pictures.astype(np.float32) / 255))
    params = {"kernel": normal(3, 3, 3, 32), "bias": normal(32)}
    conv, x = cpu_layers.Conv(32, dtype=HALF), normal(2, 8, 8, 3)
    apply = jax.jit(lambda x: conv.apply({"params": params}, x))
    assert calls(apply, x) == 1  # float32 pictures are not left to XLA, which rounds before the bias too
    np.testing.assert_array_equal(apply(x), apply(half(x)))
    y = half(normal(2, 6, 10, 16))
    exact = layers.resize_double(y.astype(np.float32))
    np.testing.assert_allclose(cpu_layers.resize_double(y).astype(np.float32), exact, rtol=2.0**-8, atol=1e-6)
