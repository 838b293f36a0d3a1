"""The CPU's layers against their namesakes and linen's: values to 1e-5, gradients to 1e-4."""

import logging
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_layers import apply_params, assert_same, normal

from unet_jax import layers
from unet_jax.cpu import convs, library
from unet_jax.cpu import layers as cpu_layers
from unet_jax.cpu.layers import BatchNorm, Conv, TransposedConv, max_pool, relu, resize_double
from unet_jax.cpu.lazy import as_array, scaled
from unet_jax.model import UNet

ON_ONE_CPU = jax.default_backend() == "cpu" and jax.device_count() == 1
HAS_COMPILER = shutil.which((os.environ.get("CXX") or "c++").split()[0]) is not None
pytestmark = pytest.mark.skipif(not (ON_ONE_CPU and HAS_COMPILER), reason="no C++ compiler, or not on a single CPU")


def test_the_code_compiles_and_loads():
    assert library.is_available()


def calls(f, *args) -> int:
    """How many calls of the C++ there are in f."""
    return jax.jit(f).lower(*args).as_text().count("@unet_jax_")


def conv_params(features: int, out: int) -> dict[str, np.ndarray]:
    return {"kernel": normal(3, 3, features, out) / (3 * features**0.5), "bias": normal(out)}


@pytest.fixture(params=[2, 4])
def tile(request, monkeypatch):
    """m of F(m x m, 3x3), both in turn."""
    monkeypatch.setattr(convs, "tile_side", lambda *_: np.int64(request.param))


@pytest.mark.parametrize("shape", [(2, 8, 6), (3, 5, 7), (2, 1, 1), (1, 15, 2), (6, 13, 30)])
@pytest.mark.parametrize(("features", "out"), [(16, 48), (112, 32)])
def test_conv_is_linens(shape, features, out, tile):
    # Small, so that float32's rounding of the sums over thousands of pixels is too.
    params, x = conv_params(features, out), normal(*shape, features) / 3
    assert calls(apply_params(Conv(out)), params, x) == 1
    assert_same(apply_params(Conv(out)), apply_params(nn.Conv(out, (3, 3), padding=1)), params, x)


def test_conv_whose_sums_a_cache_does_not_hold_is_linens(tile):
    params, x = conv_params(128, 96), normal(5, 30, 24, 128) / 10
    assert_same(apply_params(Conv(96)), apply_params(nn.Conv(96, (3, 3), padding=1)), params, x)


@pytest.mark.parametrize("relu_first", [True, False])
def test_conv_of_parts_and_scaled_ones_is_of_their_values_side_by_side(relu_first, tile):
    params = conv_params(48, 32)
    first, *second = normal(2, 9, 10, 16), normal(2, 9, 10, 32), normal(32), normal(32, seed=1)

    def ours(params, first, *second):
        part = scaled(*second, relu_first=relu_first)
        # Used twice: the gradient is of both.
        return Conv(32).apply({"params": params}, cpu_layers.join([first, part])) + part.value()[..., :1]

    def textbook(params, first, x, gain, shift):
        value = (nn.relu(x) if relu_first else x) * gain[None, None, None] + shift[None, None, None]
        conv = nn.Conv(32, (3, 3), padding=1)
        return conv.apply({"params": params}, jnp.concatenate([first, value], -1)) + value[..., :1]

    assert calls(ours, params, first, *second) == 1
    assert_same(ours, textbook, params, first, *second)


@pytest.mark.parametrize("shape", [(2, 8, 6), (3, 2, 2), (5, 20, 26)])
@pytest.mark.parametrize(("features", "out"), [(16, 48), (96, 32)])
def test_conv_of_stride_2_is_linens(shape, features, out):
    params, x = conv_params(features, out), normal(*shape, features)
    ours, linen = Conv(out, strides=2), nn.Conv(out, (3, 3), 2, padding=1)
    assert calls(jax.grad(lambda *args: apply_params(ours)(*args).sum(), (0, 1)), params, x) == 2
    assert_same(apply_params(ours), apply_params(linen), params, x)


@pytest.mark.parametrize(("side", "strides"), [(5, 1), (5, 2), (1, 2), (3, 3), (3, 4)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_other_sizes_and_strides_are_those_of_the_plain_layer(side, strides, dtype):
    ours, plain = cpu_layers.Conv(16, side, strides, dtype), layers.Conv(16, side, strides)
    params = {"kernel": normal(side, side, 16, 16) / side, "bias": normal(16)}
    x = jnp.asarray(normal(2, 12, 12, 16), dtype)
    y, pullback = jax.vjp(apply_params(ours), params, x)
    expected, plain_pullback = jax.vjp(apply_params(plain), params, x.astype(np.float32))
    chex.assert_equal_shape([y, expected])
    limit = {jnp.float32: 1e-5, jnp.bfloat16: 2.0**-6}[dtype]
    g = jnp.asarray(normal(*y.shape), dtype)
    got, exact = jax.tree.leaves((y, pullback(g))), jax.tree.leaves((expected, plain_pullback(g.astype(np.float32))))
    for a, b in zip(got, exact, strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float32), b, rtol=0, atol=limit * float(np.abs(b).max()))


def test_layers_of_ones_own_go_with_the_fast_ones():
    class GroupNorm(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return nn.GroupNorm(num_groups=8, dtype=x.dtype)(x)

    class Zeros(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return jnp.where(x == 0, 1.0, jnp.asarray(x))

    changes = [
        {"BatchNorm": GroupNorm},
        {"max_pool": lambda x: nn.avg_pool(jnp.asarray(x), (2, 2), (2, 2))},
        {"Conv": layers.Conv, "BatchNorm": layers.BatchNorm, "max_pool": layers.max_pool},
        {"max_pool": lambda x: x[:, ::2, ::2]},
        {"max_pool": lambda x: (2 - (abs(x) ** 2 / (1 + x * x) @ np.eye(16, dtype=np.float32)))[:, ::2, ::2]},
        {"max_pool": lambda x: jnp.where((x == 0) | (x != x), 1.0, jnp.where(x >= 0.5, -x, x - 1))[:, ::2, ::2]},
    ]
    images = jnp.asarray(normal(2, 16, 16, 3))
    zeros = {"BatchNorm": Zeros}
    for change in (*changes, zeros):
        logits = []
        for module in (layers, cpu_layers):
            model = UNet(widths=(16, 32), layers=SimpleNamespace(**vars(module) | change))
            logits.append(model.apply(model.init(jax.random.key(0), images), images))
        np.testing.assert_allclose(*logits, atol=1e-5)


def test_conv_of_stride_2_of_many_pictures_is_linens():
    # So many that the kernel's gradient sums over several chunks; small, so that float32's rounding of sums is too.
    params, x = conv_params(96, 32), normal(8, 48, 48, 96) / 10
    assert_same(apply_params(Conv(32, strides=2)), apply_params(nn.Conv(32, (3, 3), 2, padding=1)), params, x)


def test_conv_of_stride_2_of_a_scaled_one_is_linens():
    params, second = conv_params(32, 16), (normal(2, 8, 6, 32), normal(32), normal(32, seed=1))

    def ours(params, *second):
        return apply_params(Conv(16, strides=2))(params, scaled(*second, relu_first=True))

    def textbook(params, x, gain, shift):
        value = nn.relu(x) * gain[None, None, None] + shift[None, None, None]
        return apply_params(nn.Conv(16, (3, 3), 2, padding=1))(params, value)

    assert_same(ours, textbook, params, *second)


def test_stride_2_of_an_odd_side_is_left_to_xla():
    params, x = conv_params(16, 16), normal(2, 7, 6, 16)
    assert calls(apply_params(Conv(16, strides=2)), params, x) == 0
    assert_same(apply_params(Conv(16, strides=2)), apply_params(nn.Conv(16, (3, 3), 2, padding=1)), params, x)


def test_parts_of_different_sizes_are_refused():
    with pytest.raises(TypeError, match="concatenate"):
        cpu_layers.join([normal(2, 4, 4, 16), normal(1, 4, 4, 16)])


@pytest.mark.parametrize("relu_first", [True, False])
def test_nan_stays(relu_first):
    x = normal(1, 8, 8, 16)
    x[0, 3, 3, 5] = np.nan
    part = scaled(jnp.asarray(x), jnp.ones(16), jnp.zeros(16), relu_first=relu_first)
    y = jax.jit(apply_params(Conv(16)))(conv_params(16, 16), part)
    assert np.isnan(y[0, 3, 3]).all()


def test_vmap_is_one_by_one():
    params, x = conv_params(16, 32), normal(3, 2, 5, 6, 16)
    y = jax.vmap(apply_params(Conv(32)), (None, 0))(params, x)
    expected = jax.jit(apply_params(Conv(32)))(params, x.reshape(6, 5, 6, 16)).reshape(y.shape)
    np.testing.assert_allclose(y, expected, atol=1e-5)


@pytest.mark.parametrize(("downsampling", "upsampling"), [("max_pool", "transposed_conv"), ("strided_conv", "resize")])
@pytest.mark.parametrize("remat", [False, True])
def test_the_network_is_that_of_the_plain_layers(downsampling, upsampling, remat):
    model = UNet(downsampling, upsampling, widths=(16, 32, 48), dropout_rate=0, remat=remat)
    x, target = normal(2, 12, 20, 3), normal(2, 12, 20, 3, seed=1)
    variables = jax.jit(model.init)(jax.random.key(0), x)

    def both(params, model):
        def loss(params, train):
            y = model.apply(
                {**variables, "params": params}, x, train=train, mutable=["batch_stats"] if train else False
            )
            y, updated = y if train else (y, {})
            return jnp.square(y - target).mean(), updated

        return [jax.value_and_grad(partial(loss, train=train), has_aux=True)(params) for train in (False, True)]

    ours = partial(both, model=model.clone(layers=cpu_layers))
    assert calls(ours, variables["params"]) > 20
    expected = jax.jit(partial(both, model=model))(variables["params"])
    chex.assert_trees_all_close(jax.jit(ours)(variables["params"]), expected, atol=1e-4, rtol=1e-4)


def test_dropout_of_lazy_arrays_is_linens():
    model = UNet(widths=(16, 16), dropout_rate=0.5)
    x, key = normal(1, 8, 8, 3), jax.random.key(1, impl="unsafe_rbg")
    variables = jax.jit(model.init)(jax.random.key(0), x)

    @partial(jax.jit, static_argnums=0)
    def run(model):
        return model.apply(variables, x, True, rngs={"dropout": key}, mutable=["batch_stats"])[0]

    dropped = run(model.clone(layers=cpu_layers))
    np.testing.assert_allclose(dropped, run(model), atol=1e-5)
    assert np.abs(dropped - run(model.clone(dropout_rate=0.0))).max() > 1e-2


@pytest.mark.parametrize("relu_first", [False, True])
@pytest.mark.parametrize("train", [False, True])
def test_batch_norm_is_its_namesake(relu_first, train):
    x = 2 * normal(4, 3, 5, 3) + np.array([1, 0, -0.5], np.float32)
    x[0, 0] = 0  # exactly on ReLU's corner
    params = {"scale": normal(3), "bias": normal(3, seed=1)}
    stats = {"mean": normal(3, seed=2), "var": np.array([0.5, 2, 1e-5], np.float32)}

    def output(norm, rectify, params, x):
        variables = {"params": params, "batch_stats": stats}
        return norm.apply(variables, rectify(x) if relu_first else x, train, mutable=["batch_stats"])

    ours, plain = partial(output, BatchNorm(), relu), partial(output, layers.BatchNorm(), layers.relu)
    assert_same(lambda *args: as_array(ours(*args)[0]), lambda *args: plain(*args)[0], params, x)
    chex.assert_trees_all_close(jax.jit(ours)(params, x)[1], jax.jit(plain)(params, x)[1], atol=1e-6, rtol=1e-5)


def test_batch_norm_of_a_dead_channel_gives_no_gradient():
    x = np.stack([-np.abs(normal(2, 3, 4)), normal(2, 3, 4)], -1)
    variables = jax.jit(lambda: BatchNorm().init(jax.random.key(0), x, True))()
    norm = lambda x: as_array(BatchNorm().apply(variables, relu(x), True, mutable=["batch_stats"])[0])  # noqa: E731
    dx = jax.jit(jax.grad(lambda x: (norm(x) * normal(2, 3, 4, 2, seed=1)).sum()))(x)
    np.testing.assert_array_equal(dx[..., 0], np.zeros(x.shape[:3]))
    assert np.abs(dx[..., 1]).max() > 0.01


@pytest.mark.parametrize("shape", [(2, 4, 6, 3), (2, 5, 7, 3)])
def test_max_pool_is_its_namesake_with_ties_and_odd_sizes(shape):
    ties = np.random.default_rng(0).integers(0, 2, shape).astype(np.float32)
    assert_same(max_pool, layers.max_pool, ties)
    assert_same(max_pool, layers.max_pool, normal(*shape))


@pytest.mark.parametrize("shape", [(2, 5, 4, 3), (1, 1, 2, 3), (1, 1, 1, 3)])
def test_resize_double_is_its_namesake(shape):
    assert_same(resize_double, layers.resize_double, normal(*shape))


def test_gradients_of_gradients_are_the_plain_layers_or_refused():
    x = normal(1, 4, 4, 3)

    def penalty(model):
        params = UNet(widths=model.widths, dropout_rate=0).init(jax.random.key(0), x)

        def of_gradient(params):
            logits = lambda x: model.apply(params, x, True, mutable=["batch_stats"])[0]  # noqa: E731
            return jnp.square(jax.grad(lambda x: jnp.square(logits(x)).sum())(x)).sum()

        return jax.jit(jax.grad(of_gradient))(params)["params"]

    narrow = UNet(widths=(4, 8), dropout_rate=0)  # too few features for the C++
    chex.assert_trees_all_close(penalty(narrow.clone(layers=cpu_layers)), penalty(narrow), rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="FFI"):
        penalty(UNet(widths=(16, 32), dropout_rate=0, layers=cpu_layers))


def test_float64_switched_on_does_no_harm():
    code = """
import jax, jax.numpy as jnp
from unet_jax.cpu import layers
from unet_jax.cpu.library import is_available
from unet_jax.model import UNet
model = UNet("strided_conv", widths=(16, 32), layers=layers)
x = jnp.ones((1, 8, 8, 3), jnp.float32)
variables = model.init(jax.random.key(0), x)
assert is_available() and model.apply(variables, x).dtype == jnp.float32
assert {a.dtype for a in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
loss = lambda params: model.apply({**variables, "params": params}, x).sum()
assert jnp.isfinite(jax.grad(loss)(variables["params"])["head"]["kernel"]).all()
"""
    done = run_python(code, JAX_ENABLE_X64="1")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("shape", [(2, 3, 4), (3, 1, 1), (5, 10, 13)])
@pytest.mark.parametrize(("features", "out"), [(16, 48), (96, 32)])
def test_transposed_conv_of_a_scaled_one_is_linens(shape, features, out):
    params = {"kernel": normal(3, 3, out, features) / (3 * features**0.5), "bias": normal(out)}
    second = normal(*shape, features), normal(features), normal(features, seed=1)
    linen = nn.ConvTranspose(out, (3, 3), strides=(2, 2), padding=((1, 2), (1, 2)), transpose_kernel=True)

    def ours(params, *second):
        return apply_params(TransposedConv(out))(params, scaled(*second, relu_first=True))

    def textbook(params, x, gain, shift):
        return apply_params(linen)(params, nn.relu(x) * gain[None, None, None] + shift[None, None, None])

    assert calls(ours, params, *second) == 1
    assert_same(ours, textbook, params, *second)


@pytest.mark.parametrize("features", [32, 128, 512])
def test_conv_keeps_float32s_accuracy(features, tile):
    x, params = normal(4, 16, 24, features), conv_params(features, 64)
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))).astype(np.float64)
    wide = params["kernel"].astype(np.float64)
    exact = params["bias"] + sum(padded[:, i : i + 16, j : j + 24] @ wide[i, j] for i, j in np.ndindex(3, 3))
    np.testing.assert_allclose(jax.jit(apply_params(Conv(64)))(params, x), exact, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("n", "features", "out", "dtype"),
    [(1, 16, 24, np.float32), (1, 8, 16, np.float32), (1, 16, 16, jnp.float16), (0, 16, 16, np.float32)],
)
def test_what_the_code_is_not_for_is_left_to_xla(n, features, out, dtype):
    assert calls(apply_params(Conv(out, dtype=dtype)), conv_params(features, out), normal(n, 4, 4, features)) == 0


WITH_OTHER_FLAGS = """
import sys
from unet_jax.cpu import convs, library
sys.path.insert(0, "TESTS")
import test_cpu_layers as tests
assert library.is_available()
for m in (2, 4):
    convs.tile_side = lambda *_: tests.np.int64(m)
    tests.test_conv_is_linens((3, 13, 30), 16, 112, None)
    tests.test_conv_whose_sums_a_cache_does_not_hold_is_linens(None)
tests.test_conv_of_stride_2_is_linens((2, 8, 6), 48, 32)
tests.test_transposed_conv_of_a_scaled_one_is_linens((2, 3, 4), 16, 48)
""".replace("TESTS", str(Path(__file__).parent))


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, timeout=300
    )


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the flag is x86's")
def test_other_vector_units_compute_the_same(tmp_path):
    done = run_python(WITH_OTHER_FLAGS, UNET_JAX_CXXFLAGS="-mno-avx512f", XDG_CACHE_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr


def test_one_thread_does_the_work_alone():
    # XLA's pool has as many threads as there are cores that the process may use.
    code = "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])\n" + WITH_OTHER_FLAGS
    assert (done := run_python(code)).returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("name", "flags"),
    [("no-such-compiler", ""), ("c++", "-no-such-flag"), ("c++", "-nostdinc++"), ("an open quote'", "")],
)
def test_without_a_compiler_a_warning_says_so_and_xla_does_the_work(name, flags, monkeypatch, caplog, tmp_path):
    monkeypatch.setenv("CXX", name)
    monkeypatch.setenv("UNET_JAX_CXXFLAGS", flags)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(library, "_load", library._load.__wrapped__)
    monkeypatch.setattr(convs, "is_available", library.is_available.__wrapped__)
    with caplog.at_level(logging.WARNING):
        assert calls(apply_params(Conv(16)), conv_params(16, 16), normal(1, 4, 4, 16)) == 0
    assert "C++ compiler" in caplog.text
    assert not list(tmp_path.rglob("*.so"))


LOADS = "from unet_jax.cpu import library; assert library.is_available()"


def test_processes_compile_at_once_and_leave_one_whole_library(tmp_path):
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "UNET_JAX_CXXFLAGS": "-O0"}
    processes = [subprocess.Popen([sys.executable, "-c", LOADS], env=environment) for _ in range(2)]
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    folder = tmp_path / "unet_jax" / "cpu"
    assert sorted(path.suffix for path in folder.iterdir()) == [".sha256", ".so"]
    assert folder.stat().st_mode & 0o777 == 0o700

    # One that was cut off, or emptied, is made anew; one that others may write, or their folder, is not loaded.
    (made,) = folder.glob("*.so")
    for size in (made.stat().st_size // 2, 0):
        os.truncate(made, size)
        assert run_python(LOADS, **environment).returncode == 0
        assert made.stat().st_size > 10_000
    for path in (made, folder):
        mode = path.stat().st_mode
        path.chmod(mode | 0o020)
        refused = run_python("from unet_jax.cpu import library; assert not library.is_available()", **environment)
        assert refused.returncode == 0, refused.stderr
        assert f"{path} belongs to another user, or others may write it" in refused.stderr
        path.chmod(mode)


def test_a_compiler_that_never_ends_is_given_up(monkeypatch, caplog, tmp_path):
    slow = tmp_path / "c++"
    slow.write_text("#!/bin/sh\nexec sleep 60\n")
    slow.chmod(0o755)
    monkeypatch.setenv("CXX", str(slow))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(library, "SECONDS", 0.2)
    monkeypatch.setattr(library, "_load", library._load.__wrapped__)
    assert not library.is_available.__wrapped__()
    assert "timed out" in caplog.text
