"""Each layer against its textbook form: values to 1e-5, gradients to 1e-4."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from unet_jax.device import compiler_options
from unet_jax.layers import BatchNorm, Conv, TransposedConv, max_pool, resize_double


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng((seed, *shape)).normal(size=shape).astype(np.float32)


def value_and_gradients(f, *args):
    """f(*args), and its vector-Jacobian product for each argument with a fixed random cotangent."""
    cotangent = normal(*jax.eval_shape(f, *args).shape, seed=1)

    def both(args, cotangent):
        y, pullback = jax.vjp(f, *args)
        return y, pullback(cotangent.astype(y.dtype))

    return jax.jit(both)(args, cotangent)


def assert_same(ours, textbook, *args) -> None:
    (y, grads), (expected, expected_grads) = value_and_gradients(ours, *args), value_and_gradients(textbook, *args)
    chex.assert_trees_all_close(y, expected, atol=1e-5, rtol=1e-5)
    chex.assert_trees_all_close(grads, expected_grads, atol=1e-4, rtol=1e-4)
    assert all(np.abs(g).max() > 0.01 for g in jax.tree.leaves(expected_grads))


def apply_params(module: nn.Module):
    return lambda params, x: module.apply({"params": params}, x)


@pytest.mark.parametrize(
    ("kernel_size", "strides", "shape"),
    [(3, 1, (2, 8, 6, 3)), (3, 2, (2, 8, 6, 3)), (3, 2, (2, 7, 4, 3)), (1, 1, (1, 7, 1, 3))],
)
def test_conv_is_linens_with_padding_that_keeps_the_size(kernel_size, strides, shape):
    params = {"kernel": normal(kernel_size, kernel_size, 3, 5), "bias": normal(5)}
    size = (kernel_size, kernel_size)
    linen = nn.Conv(5, size, strides=strides, padding=kernel_size // 2)
    assert_same(apply_params(Conv(5, kernel_size, strides)), apply_params(linen), params, normal(*shape))


TRANSPOSED_PARAMS = {"kernel": normal(3, 3, 5, 4), "bias": normal(5)}


@pytest.mark.parametrize("size", [(3, 4), (1, 1)])
def test_transposed_conv_is_linens(size):
    linen = nn.ConvTranspose(5, (3, 3), strides=(2, 2), padding=((1, 2), (1, 2)), transpose_kernel=True)
    assert_same(apply_params(TransposedConv(5)), apply_params(linen), TRANSPOSED_PARAMS, normal(2, *size, 4))


def test_transposed_conv_is_pytorchs_by_its_definition():
    # ConvTranspose2d(4, 5, 3, stride=2, padding=1, output_padding=1): x[i] adds w[k] x[i] to the output at 2i + k - 1.
    x = normal(2, 3, 4, 4)
    n, h, w, _ = x.shape
    expected = np.zeros((n, 2 * h, 2 * w, 5)) + TRANSPOSED_PARAMS["bias"]
    for i, j, k, m in np.ndindex(h, w, 3, 3):
        row, column = 2 * i + k - 1, 2 * j + m - 1
        if 0 <= row < 2 * h and 0 <= column < 2 * w:
            expected[:, row, column] += np.einsum("ni,oi->no", x[:, i, j], TRANSPOSED_PARAMS["kernel"][k, m])
    y = jax.jit(apply_params(TransposedConv(5)))(TRANSPOSED_PARAMS, x)
    np.testing.assert_allclose(y, expected, atol=1e-5)


def reduce_window_pool(x):
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")


@pytest.mark.parametrize(
    ("textbook", "shape"),
    [(lambda x: nn.max_pool(x, (2, 2), (2, 2)), (2, 4, 6, 3)), (reduce_window_pool, (2, 5, 7, 3))],
)
def test_max_pool_with_ties_and_odd_sizes(textbook, shape):
    ties = np.random.default_rng(0).integers(0, 2, shape).astype(np.float32)
    assert_same(max_pool, textbook, ties)
    assert_same(max_pool, textbook, normal(*shape))


def test_max_pool_gives_the_gradient_to_the_first_maximum():
    windows = np.array([[[0, 0], [0, 0]], [[0, 1], [1, 1]], [[0, 0], [2, 2]], [[1, 2], [1, 2]]], np.float32)
    first = np.array([[[1, 0], [0, 0]], [[0, 1], [0, 0]], [[0, 0], [1, 0]], [[0, 1], [0, 0]]], np.float32)
    y, (gradient,) = jax.jit(lambda x: (max_pool(x), jax.grad(lambda x: 3 * max_pool(x).sum(), (0,))(x)))(
        windows[..., None]
    )
    np.testing.assert_array_equal(y[:, 0, 0, 0], [0, 1, 2, 2])
    np.testing.assert_array_equal(gradient[..., 0], 3 * first)


def aligned_corners(x: np.ndarray) -> np.ndarray:
    """Output i of 2n lies at i (n-1)/(2n-1) of the input, between its two neighbours."""
    for axis in (1, 2):
        n = x.shape[axis]
        rows = []
        for i in range(2 * n):
            position = i * (n - 1) / (2 * n - 1)
            low = int(np.floor(position))
            part = position - low
            rows.append((1 - part) * x.take(low, axis) + part * x.take(min(low + 1, n - 1), axis))
        x = np.stack(rows, axis)
    return x


@pytest.mark.parametrize("size", [(5, 4), (1, 2), (1, 1)])
def test_resize_double_aligns_the_corners(size):
    x = normal(2, *size, 3)
    y = np.asarray(jax.jit(resize_double)(x))
    np.testing.assert_allclose(y, aligned_corners(x), atol=1e-6)
    np.testing.assert_array_equal(y[:, [0, 0, -1, -1], [0, -1, 0, -1]], x[:, [0, 0, -1, -1], [0, -1, 0, -1]])


def scale_and_translate(x):
    scale = jnp.array([(2 * n - 1) / (n - 1) for n in x.shape[1:3]])
    shape = (x.shape[0], 2 * x.shape[1], 2 * x.shape[2], x.shape[3])
    return jax.image.scale_and_translate(x, shape, (1, 2), scale, (1 - scale) / 2, "linear", antialias=False)


def test_resize_double_is_jaxs():
    assert_same(resize_double, scale_and_translate, normal(2, 5, 4, 3))


def test_resize_double_is_numpys_interpolation_at_every_size():
    for n in (1, 2, 15, 129):
        x = normal(1, n, 1, 1)
        expected = np.interp(np.linspace(0, n - 1, 2 * n), np.arange(n), x.ravel())
        np.testing.assert_allclose(jax.jit(resize_double)(x)[0, :, 0, 0], expected, atol=1e-6)


def test_1x1_conv_commutes_with_resize():
    conv = apply_params(Conv(5, kernel_size=1))
    params, x = {"kernel": normal(1, 1, 3, 5), "bias": normal(5)}, normal(2, 3, 4, 3)
    assert_same(lambda p, x: resize_double(conv(p, x)), lambda p, x: conv(p, resize_double(x)), params, x)


def batch_norms(relu_first: bool):
    """Ours, and linen's, as functions of (params, stats, x, train) that give (y, new stats)."""

    def ours(params, stats, x, train):
        variables = {"params": params, "batch_stats": stats}
        return BatchNorm().apply(variables, nn.relu(x) if relu_first else x, train, mutable=["batch_stats"])

    def linen(params, stats, x, train):
        norm = nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5)
        variables = {"params": params, "batch_stats": stats}
        return norm.apply(variables, nn.relu(x) if relu_first else x, mutable=["batch_stats"])

    return ours, linen


NORM_PARAMS = {"scale": normal(3), "bias": normal(3, seed=1)}
NORM_STATS = {"mean": normal(3, seed=2), "var": np.array([0.5, 2, 1e-5], np.float32)}


@pytest.mark.parametrize("relu_first", [False, True])
def test_batch_norm_is_linens(relu_first):
    x = 2 * normal(4, 3, 5, 3) + np.array([1, 0, -0.5], np.float32)
    x[0, 0] = 0  # exactly on ReLU's corner
    ours, linen = batch_norms(relu_first)
    for train in (True, False):
        outputs = (lambda p, x, norm=norm, train=train: norm(p, NORM_STATS, x, train)[0] for norm in (ours, linen))
        assert_same(*outputs, NORM_PARAMS, x)
        (y, updated), (expected, expected_updated) = (
            jax.jit(f, static_argnums=3)(NORM_PARAMS, NORM_STATS, x, train) for f in (ours, linen)
        )
        chex.assert_trees_all_close(y, expected, atol=1e-5, rtol=1e-5)
        chex.assert_trees_all_close(updated, expected_updated, atol=1e-6, rtol=1e-5)
        moved = np.abs(updated["batch_stats"]["mean"] - NORM_STATS["mean"]).min()
        assert (moved > 1e-3) == train


def test_batch_norm_moves_running_statistics_by_a_tenth():
    x = np.stack([np.full((2, 2, 2), 3.0), np.arange(8.0).reshape(2, 2, 2)], -1).astype(np.float32)
    stats = {"mean": np.array([1, 0], np.float32), "var": np.array([1, 2], np.float32)}
    params = {"scale": np.ones(2, np.float32), "bias": np.zeros(2, np.float32)}
    y, updated = jax.jit(batch_norms(False)[0], static_argnums=3)(params, stats, x, True)
    stats = updated["batch_stats"]
    np.testing.assert_allclose(stats["mean"], [0.9 * 1 + 0.1 * 3, 0.1 * 3.5], rtol=1e-6)
    np.testing.assert_allclose(stats["var"], [0.9 * 1, 0.9 * 2 + 0.1 * 5.25], rtol=1e-6)  # 5.25: over 8, not 7
    np.testing.assert_allclose(y[..., 1], (x[..., 1] - 3.5) / np.sqrt(5.25 + 1e-5), atol=1e-5)


def test_batch_norm_of_a_dead_channel_is_its_bias_and_gives_no_gradient():
    x = np.stack([-np.abs(normal(2, 3, 4)), normal(2, 3, 4)], -1)
    params = {"scale": normal(2), "bias": normal(2, seed=1)}
    stats = {"mean": np.zeros(2, np.float32), "var": np.ones(2, np.float32)}
    ours, _ = batch_norms(True)
    y, (grads, dx) = value_and_gradients(lambda p, x: ours(p, stats, x, True)[0], params, x)
    np.testing.assert_allclose(y[..., 0], np.full(x.shape[:3], params["bias"][0]), rtol=1e-6)
    chex.assert_tree_all_finite((grads, dx))
    np.testing.assert_array_equal(dx[..., 0], np.zeros(x.shape[:3]))
    assert np.abs(dx[..., 1]).max() > 0.01


def test_batch_norm_of_constants_is_its_bias_whatever_the_rounding():
    # In float32 the mean square of most of these is below the squared mean, by far more than epsilon.
    x = np.broadcast_to(np.float32([100.1, 777.7, 3333.3, 4097.3]), (1, 2, 3, 4))
    params = {"scale": np.ones(4, np.float32), "bias": np.zeros(4, np.float32)}
    stats = {"mean": np.zeros(4, np.float32), "var": np.zeros(4, np.float32)}
    y, updated = jax.jit(batch_norms(False)[0], static_argnums=3)(params, stats, x, True)
    assert updated["batch_stats"]["var"].min() >= 0
    np.testing.assert_allclose(y, np.zeros_like(x), atol=1)


def test_batch_norm_starts_as_the_identity_and_init_moves_nothing():
    variables = jax.jit(lambda x: BatchNorm().init(jax.random.key(0), x, True))(5 + normal(2, 2, 3, 4))
    expected = {
        "params": {"scale": np.ones(4, np.float32), "bias": np.zeros(4, np.float32)},
        "batch_stats": {"mean": np.zeros(4, np.float32), "var": np.ones(4, np.float32)},
    }
    chex.assert_trees_all_equal(variables, expected)


@pytest.mark.parametrize("layer", [Conv(32, dtype=jnp.bfloat16), TransposedConv(32, dtype=jnp.bfloat16)])
def test_bias_gradients_in_bfloat16_are_summed_in_float32(layer):
    # Summed in bfloat16, all but a fraction of so many pixels would be lost: sums no longer grow by numbers so small.
    x = np.random.default_rng(0).uniform(size=(8, 64, 64, 32)).astype(np.float32)
    params = layer.init(jax.random.key(0), x)

    def gradient(layer):
        gradients = jax.grad(lambda p: (layer.apply(p, x).astype(jnp.float32)).mean())
        # As training compiles: with XLA's own options the sum is a race on a CPU (LOG.md).
        return jax.jit(gradients, compiler_options=compiler_options("cpu"))(params)["params"]["bias"]

    np.testing.assert_allclose(gradient(layer), 1 / 32, rtol=0.01)
    np.testing.assert_allclose(gradient(layer.clone(dtype=jnp.float32)), 1 / 32, rtol=1e-4)


def test_bfloat16_in_and_out_with_float32_parameters_and_statistics():
    x = (3 + normal(4, 4, 6, 3)).astype(jnp.bfloat16)
    ours, linen = batch_norms(True)
    y, updated = jax.jit(ours, static_argnums=3)(NORM_PARAMS, NORM_STATS, x, True)
    _, expected = jax.jit(linen, static_argnums=3)(NORM_PARAMS, NORM_STATS, x.astype(np.float32), True)
    assert y.dtype == jnp.bfloat16
    chex.assert_trees_all_equal_dtypes(updated["batch_stats"], NORM_STATS)
    chex.assert_trees_all_close(updated["batch_stats"], expected["batch_stats"], rtol=1e-4)

    def down_and_up(x):
        def layers(x):
            x = TransposedConv(5, dtype=jnp.bfloat16).init_with_output(jax.random.key(0), x)
            return Conv(5, strides=2, dtype=jnp.bfloat16).init_with_output(jax.random.key(0), x[0]), x[1]

        (y, params), more_params = layers(resize_double(max_pool(x)))
        return y, params, more_params

    y, *params = jax.eval_shape(down_and_up, x)
    chex.assert_shape(y, (4, 4, 6, 5))
    assert y.dtype == jnp.bfloat16
    assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(params))


def test_float64_is_exact_to_1e_12():
    # Tolerances of 1e-5 would pass an epsilon of 1.1e-5, or weights rounded to bfloat16.
    with jax.enable_x64(True):
        x = np.random.default_rng(0).normal(size=(2, 4, 6, 3))
        params = {"kernel": normal(3, 3, 5, 3).astype(float), "bias": normal(5).astype(float)}
        linen = nn.ConvTranspose(5, (3, 3), (2, 2), ((1, 2), (1, 2)), transpose_kernel=True, param_dtype=float)
        y = jax.jit(apply_params(TransposedConv(5, dtype=jnp.float64)))(params, x)
        assert y.dtype == np.float64
        np.testing.assert_allclose(y, jax.jit(apply_params(linen))(params, x), atol=1e-12)
        np.testing.assert_allclose(jax.jit(resize_double)(x), aligned_corners(x), atol=1e-12)
        norm_params, norm_stats = jax.tree.map(np.float64, (NORM_PARAMS, NORM_STATS))
        y, updated = jax.jit(batch_norms(True)[0], static_argnums=3)(norm_params, norm_stats, x, True)
        a = np.maximum(x, 0)
        mean, var = a.mean((0, 1, 2)), a.var((0, 1, 2))
        expected = (a - mean) / np.sqrt(var + 1e-5) * norm_params["scale"] + norm_params["bias"]
        np.testing.assert_allclose(y, expected, atol=1e-12)
        stats = updated["batch_stats"]
        np.testing.assert_allclose(stats["var"], 0.9 * norm_stats["var"] + 0.1 * var, atol=1e-12)


@pytest.mark.parametrize(("layer", "fan_in"), [(Conv(64), 9 * 32), (TransposedConv(64), 9 * 64)])
def test_initial_weights_are_pytorchs_uniform(layer, fan_in):
    init = jax.jit(lambda key: layer.init(key, jnp.zeros((1, 2, 2, 32)))["params"])
    params = init(jax.random.key(1, impl="unsafe_rbg"))
    bound = fan_in**-0.5
    for values in params.values():
        values = np.asarray(values)
        assert 0.9 * bound < np.abs(values).max() <= bound
        # Uniform: mean 0, standard deviation bound/sqrt(3), each within 5 standard errors.
        assert abs(values.mean()) < 5 * bound / np.sqrt(3 * values.size)
        assert abs(values.std() * np.sqrt(3) / bound - 1) < 5 * np.sqrt(0.2 / values.size)
    other = init(jax.random.key(2, impl="unsafe_rbg"))
    assert not any(np.array_equal(params[name], other[name]) for name in params)
