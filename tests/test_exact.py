"""The same arrays give the same bits, whatever else the machine does, at the published widths."""

import multiprocessing

import check_faults
import chex
import jax
import numpy as np
import pytest
from test_layers import normal

from unet_jax import device, runs, train
from unet_jax.config import PUBLISHED, default_config
from unet_jax.cpu import layers as cpu_layers
from unet_jax.cpu.lazy import Joined, as_array
from unet_jax.data.batches import Batch

WIDTHS = (32, 64, 128, 256, 512)
REPEATS = 6


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


# Pictures of a run's batch, so many that all threads have work at every level.
@pytest.mark.parametrize(("size", "count"), [(32, 16), (64, 8), (128, 2), (240, 1)])
def test_each_function_repeats_at_every_level_of_a_full_width_run(size, count):
    run = jax.jit(output_and_gradients, static_argnums=0)
    for level, width in enumerate(WIDTHS):
        side = size // 2**level
        wide = {} if level == 4 else {"of the decoder": (2 * width, width), "doubled": (2 * width, width)}
        deep = {"between": (width // 2, width)} if level else {}
        for name, (features, out) in {"own": (width, width), "halved": (width, width), **deep, **wide}.items():
            layer = cpu_layers.Conv(out, strides=2 if name == "halved" else 1)
            shape = (count, side, side, features)
            if name == "doubled":
                layer, shape = cpu_layers.TransposedConv(out), (count, side // 2, side // 2, features)
            if name == "halved" and (level == 4 or side % 2):
                continue
            x: object = normal(*shape)
            if name == "of the decoder":
                x = Joined((normal(*shape[:3], width), normal(*shape[:3], width, seed=1)))
            params = layer.init(jax.random.key(0), as_array(x)[:1, :2, :2])["params"]
            g = normal(
                *jax.eval_shape(lambda x, p, layer=layer: layer.apply({"params": p}, x), x, params).shape, seed=2
            )
            assert "@unet_jax_" in run.lower(layer, x, params, g).as_text(), name
            assert_repeats(run, layer, x, params, g)


@pytest.mark.parametrize("variant", PUBLISHED)
def test_a_full_width_step_repeats(variant):
    config, place = default_config(variant, "synthetic"), device.placement()
    state = jax.device_get(runs.fresh_state(config, place))
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (16, 32, 32, 3), np.uint8), rng.integers(0, 3, (16, 32, 32), np.uint8)
    batch = Batch(images, labels, np.ones(16, np.float32))
    steps = train.make_steps(config, place, steps_per_epoch=1)
    assert "@unet_jax_" in steps.train.lower(state, batch).as_text()
    assert_repeats(steps.train, state, batch, repeats=9)


def test_a_full_width_run_killed_and_resumed_is_the_undisturbed_one():
    options = check_faults.Options(kills=1, terms=1, interrupts=0, epochs=3, widths=WIDTHS, others=("none",))
    tried, survived = check_faults.try_faults(options)
    assert tried == survived
    assert (tried["kill -9"], tried["SIGTERM"]) == (1, 1)
