"""Many devices and many processes: the same losses, each process reading its own rows, refusals, memory."""

import dataclasses

import check_devices
import chex
import numpy as np
import pytest

from unet_jax import device, train
from unet_jax.errors import InputError

SMALL = check_devices.Options(("strconv_ups_dice",), steps=3, image_size=16, widths=(4, 8), batch_size=8)


@pytest.fixture(scope="module")
def alone() -> check_devices.Seen:
    return check_devices.run_setup(SMALL, "1x1")[0]


def assert_losses_agree(seen: check_devices.Seen, alone: check_devices.Seen) -> None:
    for losses in seen.losses.values():
        assert abs(losses[0] - alone.losses["strconv_ups_dice"][0]) < check_devices.BOUND
        np.testing.assert_allclose(losses, alone.losses["strconv_ups_dice"], rtol=1e-3)


def test_two_devices_give_the_losses_of_one(alone):
    (two,) = check_devices.run_setup(SMALL, "1x2")
    assert_losses_agree(two, alone)


def test_two_processes_give_the_losses_of_one_and_share_the_reading(alone):
    first, second = check_devices.run_setup(dataclasses.replace(SMALL, resident=True), "2x1")
    assert first.losses == second.losses
    assert len(first.losses) == 2
    assert_losses_agree(first, alone)
    assert len(first.rows) == len(second.rows) == 12
    assert first.rows | second.rows == alone.rows == set(range(24))


def of(devices: int) -> device.Placement:
    return device.placement()._replace(devices=devices)


@pytest.mark.parametrize(
    ("devices", "batch", "examples", "advice"),
    [
        (8, 60, 3680, "choose --batch-size 56 or 64$"),
        (8, 3, 3680, "choose --batch-size 8$"),
        (64, 64, 3680, "the last one of 32: choose --train-examples 3648$"),
        (8, 12, 100, "choose --batch-size 8 or 16 and --train-examples 96$"),
        (8, 4, 4, "4 training pictures are too few for 8 devices"),
    ],
)
def test_a_batch_that_does_not_divide_is_refused_with_sizes_that_do(devices, batch, examples, advice):
    with pytest.raises(InputError, match=advice):
        of(devices).check_batch(batch, examples)


def test_advised_sizes_are_accepted():
    for batch, examples in ((56, 3680), (64, 3680), (8, 96), (16, 96)):
        of(8).check_batch(batch, examples)
    of(64).check_batch(64, 3648)


def test_out_of_memory_names_a_batch_that_divides():
    assert "--batch-size 24 " in str(of(8).out_of_memory(56))
    assert "--image-size" in str(of(8).out_of_memory(8))


def test_remat_computes_the_same():
    split = check_devices.pictures(4, 16)
    batch = train.Batch(np.asarray(split.images), split.labels, np.ones(4, np.float32))
    config = check_devices.default_config("strconv_ups_dice", "synthetic")
    results = []
    for remat in (False, True):
        model = dataclasses.replace(config.model, widths=(4, 8, 8), remat=remat)
        state = train.init_state(train.make_model(model, 3), train.make_optimizer(config.train), seed=0)
        steps = train.make_steps(dataclasses.replace(config, model=model), device.placement())
        assert ("optimization_barrier" in steps.train.lower(state, batch).as_text()) == remat
        results.append(steps.train(state, batch))
    chex.assert_trees_all_close(*results, rtol=1e-5, atol=1e-6)
