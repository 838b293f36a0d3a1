"""The same arrays give the same bits, whatever else the machine does, at the published widths."""

import dataclasses
import multiprocessing

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_layers import normal

from unet_jax import device, runs, train
from unet_jax.config import default_config
from unet_jax.cpu import layers as cpu_layers
from unet_jax.cpu.lazy import Joined, as_array
from unet_jax.cpu.library import has_bfloat16
from unet_jax.data.batches import Batch

WIDTHS = (32, 64, 128, 256, 512)
REPEATS = 6
HAS_BFLOAT16 = jax.default_backend() == "cpu" and has_bfloat16()
NEEDS_BFLOAT16 = pytest.mark.skipif(not HAS_BFLOAT16, reason="needs AMX or AVX512-BF16, and a compiler")


def spin() -> None:
    while True:
        pass


@pytest.fixture(scope="module", autouse=True)
def busy_core():
    """Another process, which changes from one repetition to the next which thread computes what."""
    process = multiprocessing.get_context("spawn").Process(target=spin, daemon=True)
    process.start()
    yield
    process.kill()


def assert_repeats(f, *args, repeats: int = REPEATS) -> None:
    first = jax.device_get(f(*args))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(first))
    for _ in range(repeats):
        chex.assert_trees_all_equal(jax.device_get(f(*args)), first)


def output_and_gradients(layer, x, params, g):
    y, pullback = jax.vjp(lambda x, params: as_array(layer.apply({"params": params}, x)), x, params)
    return y, pullback(g)


def values(dtype, *shape, seed=0):
    return jnp.asarray(normal(*shape, seed=seed), dtype)


# Pictures of a run's batch, so many that all threads have work at every level.
@pytest.mark.parametrize(
    ("size", "count", "dtype"),
    [
        *[(*shape, "float32") for shape in [(32, 16), (64, 8), (240, 1)]],
        *[pytest.param(*shape, "bfloat16", marks=NEEDS_BFLOAT16) for shape in [(64, 8), (240, 1)]],
    ],
)
def test_each_function_repeats_at_every_level_of_a_full_width_run(size, count, dtype):
    run = jax.jit(output_and_gradients, static_argnums=0)
    for level, width in enumerate(WIDTHS):
        side = size // 2**level
        wide = {} if level == 4 else {"of the decoder": (2 * width, width), "doubled": (2 * width, width)}
        deep = {"between": (width // 2, width)} if level else {}
        for name, (features, out) in {"own": (width, width), "halved": (width, width), **deep, **wide}.items():
            layer = cpu_layers.Conv(out, strides=2 if name == "halved" else 1, dtype=jnp.dtype(dtype))
            shape = (count, side, side, features)
            if name == "doubled":
                layer, shape = (
                    cpu_layers.TransposedConv(out, dtype=jnp.dtype(dtype)),
                    (count, side // 2, side // 2, features),
                )
            if name == "halved" and (level == 4 or side % 2):
                continue
            x: object = values(dtype, *shape)
            if name == "of the decoder":
                x = Joined((values(dtype, *shape[:3], width), values(dtype, *shape[:3], width, seed=1)))
            params = layer.init(jax.random.key(0), as_array(x)[:1, :2, :2])["params"]
            g = values(
                dtype, *jax.eval_shape(lambda x, p, layer=layer: layer.apply({"params": p}, x), x, params).shape, seed=2
            )
            lowered = run.lower(layer, x, params, g)
            assert "@unet_jax_" in lowered.as_text(), name
            assert_repeats(lowered.compile(), x, params, g)


# Two variants that have every kind of layer between them; the test above has their convolutions in both precisions.
@pytest.mark.parametrize(
    ("variant", "precision"),
    [("mp_tr_ce", "float32"), pytest.param("strconv_ups_dice", "bfloat16", marks=NEEDS_BFLOAT16)],
)
def test_a_full_width_step_repeats(variant, precision):
    config, place = default_config(variant, "synthetic"), device.placement()
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, precision=precision))
    state = jax.device_get(runs.fresh_state(config, place))
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (16, 32, 32, 3), np.uint8), rng.integers(0, 3, (16, 32, 32), np.uint8)
    batch = Batch(images, labels, np.ones(16, np.float32))
    steps = train.make_steps(config, place, steps_per_epoch=1)
    step = steps.train.lower(state, batch)
    assert "@unet_jax_" in step.as_text()
    assert_repeats(step.compile(), state, batch, repeats=9)
