"""The training loop: steps, evaluation, order of batches, compilations, and going on exactly."""

import dataclasses
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from unet_jax import device, layers, loop, runs, train
from unet_jax.config import PUBLISHED, DataConfig, ModelConfig, RunConfig, TrainConfig, default_config
from unet_jax.data.batches import Batch, Loader, shuffled, validation_rows
from unet_jax.data.cache import Split
from unet_jax.errors import InputError
from unet_jax.losses import make_loss
from unet_jax.model import UNet

CONFIG = RunConfig(
    "mp_tr_dice",
    DataConfig("synthetic", image_size=16),
    ModelConfig(widths=(4, 8)),
    TrainConfig("log_dice", batch_size=4, epochs=2, learning_rate=1e-2),
)


def random_split(count: int, size: int = 16, seed: int = 0) -> Split:
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, size, size, 3), np.uint8)
    # Labels that can be learnt: by the brightness of the first channel.
    labels = (images[..., 0] // 86).astype(np.uint8)
    return Split(images, labels, [f"picture_{i}" for i in range(count)])


@pytest.fixture(scope="module")
def placement():
    return device.placement()


@pytest.fixture(scope="module")
def steps(placement):
    return train.make_steps(CONFIG, placement, 3)


def fresh_state(config: RunConfig, placement: device.Placement) -> train.TrainState:
    return jax.device_put(runs.fresh_state(config, placement), placement.replicated)


def loaders(placement: device.Placement) -> tuple[Loader, Loader]:
    return Loader(random_split(10), 4, placement), Loader(random_split(6, seed=1), 4, placement)


def epochs_of(results) -> list[loop.EpochResult]:
    return [r for r in results if isinstance(r, loop.EpochResult)]


def test_training_learns_and_records_every_metric(placement, steps):
    config = dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, epochs=30))
    results = epochs_of(loop.fit(config, steps, fresh_state(config, placement), *loaders(placement)))
    first, last = results[0].record, results[-1].record
    assert [r.record["epoch"] for r in results] == list(range(1, 31))
    assert last["test_loss"] < 0.6 * first["test_loss"]
    assert last["mean_iou"] > 0.5 > first["mean_iou"]
    assert set(last) == {
        "epoch", "train_loss", "last_batch_loss", "test_loss", "test_cross_entropy", "test_log_dice", "pixel_accuracy",
        "mean_iou", "iou", "dice", "binary_iou", "learning_rate", "seconds", "evaluation_seconds", "images_per_second",
    }  # fmt: skip
    assert int(results[-1].state.step) == 30 * 3


def test_two_shapes_in_training_and_one_in_evaluation(placement, monkeypatch):
    chex.clear_trace_counter()
    monkeypatch.setattr(train, "train_step", chex.assert_max_traces(train.train_step, n=2))
    monkeypatch.setattr(train, "eval_step", chex.assert_max_traces(train.eval_step, n=1))
    steps = train.make_steps(CONFIG, placement, 3)
    results = epochs_of(loop.fit(CONFIG, steps, fresh_state(CONFIG, placement), *loaders(placement)))
    assert len(results) == 2
    # The guard works: one more shape is one too many.
    with pytest.raises(AssertionError, match="traced"):
        steps.train(results[-1].state, next(Loader(random_split(1), 1, placement).evaluation()))


def test_same_seed_same_bits_other_seed_other(placement, steps):
    runs = [epochs_of(loop.fit(CONFIG, steps, fresh_state(CONFIG, placement), *loaders(placement))) for _ in range(2)]
    chex.assert_trees_all_equal(runs[0][-1].state, runs[1][-1].state)
    other = dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, seed=1))
    kernels = [fresh_state(c, placement).params["head"]["kernel"] for c in (CONFIG, other)]
    assert np.abs(kernels[0] - kernels[1]).max() > 0.1


@pytest.mark.parametrize(
    ("ious", "patience", "over"),
    [
        ([], 1, False),
        ([0.2], 1, False),
        ([0.2, 0.3], 1, False),
        ([0.2, 0.2], 1, True),  # as good is no better
        ([0.3, 0.2], 2, False),
        ([0.3, 0.2, 0.25], 2, True),
        ([0.3, 0.2, 0.4, 0.1], 2, False),
        ([0.3, 0.2, 0.25, 0.4], 2, True),  # once over it stays over
        ([None, None, 0.1], 3, False),  # no pixel counted
        ([None, None, None], 2, True),
        ([0.3, 0.2, 0.1, 0.0], 0, False),
    ],
)
def test_patience_is_over_after_so_many_epochs_without_a_better_one(ious, patience, over):
    assert loop.out_of_patience([{"validation_mean_iou": iou} for iou in ious], patience) is over


def test_going_on_from_mid_epoch_is_exact(placement, steps):
    whole = list(loop.fit(CONFIG, steps, fresh_state(CONFIG, placement), *loaders(placement)))
    part = loop.fit(CONFIG, steps, fresh_state(CONFIG, placement), *loaders(placement))
    cut = next(r for r in part if isinstance(r, loop.StepResult) and (r.epoch, r.step_of_epoch) == (2, 2))
    losses = [*cut.losses, float(cut.loss)]
    rest = epochs_of(loop.fit(CONFIG, steps, cut.state, *loaders(placement), losses=losses))
    assert [r.record["epoch"] for r in rest] == [2]
    chex.assert_trees_all_equal(rest[-1].state, whole[-1].state)
    for key in ("train_loss", "last_batch_loss", "test_loss", "mean_iou"):
        assert rest[-1].record[key] == whole[-1].record[key]


def test_published_test_loss_is_the_mean_of_batch_means(placement, steps):
    state, (_, test) = fresh_state(CONFIG, placement), loaders(placement)
    record, sums = loop.evaluate(steps.evaluate, state, test, CONFIG.data.class_names)
    loss = train.make_loss("log_dice")
    model = train.make_model(CONFIG.model, 3, placement)
    parts = [slice(0, 4), slice(4, 6)]
    expected = [loss(train.infer(state, test.split.images[p], model), test.split.labels[p], None) for p in parts]
    np.testing.assert_allclose(record["test_loss"], np.mean(expected), rtol=1e-5)
    chex.assert_shape(sums.confusion, (6, 3, 3))
    assert sums.confusion.sum() == test.split.labels.size


def test_train_loss_is_weighted_by_pictures(placement, steps):
    results = list(loop.fit(CONFIG, steps, fresh_state(CONFIG, placement), *loaders(placement)))
    losses = [float(r.loss) for r in results if isinstance(r, loop.StepResult)][:3]  # of 4, 4 and 2 pictures
    record = epochs_of(results)[0].record
    np.testing.assert_allclose(record["train_loss"], np.dot(losses, [0.4, 0.4, 0.2]), rtol=1e-6)
    assert record["last_batch_loss"] == losses[2]


def test_a_non_finite_loss_is_named(placement, steps):
    state = fresh_state(CONFIG, placement)
    state = state._replace(params=jax.tree.map(lambda x: x * np.nan, state.params))
    with pytest.raises(loop.NonFiniteLossError, match=r"nan at step 1 \(epoch 1\)"):
        list(loop.fit(CONFIG, steps, state, *loaders(placement)))


def test_parameters_that_are_not_finite_end_a_run_that_evaluates_nothing(placement):
    huge = with_train(learning_rate=1e38, epochs=1)
    steps, (loader, _) = train.make_steps(huge, placement, 3), loaders(placement)
    one_step = Loader(loader.split, 10, placement)
    with pytest.raises(loop.NonFiniteLossError, match=r"the norm of the parameters is inf at step 1 \(epoch 1\)"):
        list(loop.fit(huge, steps, fresh_state(huge, placement), one_step, None))


def test_patience_without_a_validation_part_is_refused(placement, steps):
    config = with_train(patience=1)
    with pytest.raises(InputError, match="goes by a validation part, and there is none"):
        next(loop.fit(config, steps, fresh_state(config, placement), *loaders(placement)))


def test_a_test_loss_that_is_not_finite_ends_the_run_before_the_epoch_counts(placement, steps):
    broken = steps._replace(evaluate=lambda state, batch: (jax.numpy.nan, steps.evaluate(state, batch)[1]))
    results = []
    with pytest.raises(loop.NonFiniteLossError, match="nan"):
        results.extend(loop.fit(CONFIG, broken, fresh_state(CONFIG, placement), *loaders(placement)))
    assert not any(isinstance(result, loop.EpochResult) for result in results)


def test_order_of_batches(placement):
    assert sorted(shuffled(100, 0, 1)) == list(range(100))
    assert not np.array_equal(shuffled(100, 0, 1), shuffled(100, 0, 2))
    assert not np.array_equal(shuffled(100, 0, 1), shuffled(100, 1, 1))
    np.testing.assert_array_equal(shuffled(5, 0, 1), shuffled(5, 0, 1))
    loader, _ = loaders(placement)
    batches = list(loader.epoch(0, 1))
    assert [len(b.images) for b in batches] == [4, 4, 2]
    np.testing.assert_array_equal(np.concatenate([b.images for b in batches]), loader.split.images[shuffled(10, 0, 1)])
    later = list(loader.epoch(0, 1, skip=1))
    np.testing.assert_array_equal(later[0].images, batches[1].images)


def test_evaluation_pads_with_weight_zero(placement):
    _, loader = loaders(placement)
    weights = [np.asarray(b.weights).tolist() for b in loader.evaluation()]
    assert weights == [[1, 1, 1, 1], [1, 1, 0, 0]]


def test_scores_do_not_depend_on_how_many_devices_fill_the_batches_up(placement, steps):
    state, (_, test) = fresh_state(CONFIG, placement), loaders(placement)
    of_three = Loader(test.split, 4, placement._replace(devices=3))
    assert [np.asarray(b.weights).tolist() for b in of_three.evaluation()] == [[1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]]
    record, sums = loop.evaluate(steps.evaluate, state, test, CONFIG.data.class_names)
    other, other_sums = loop.evaluate(steps.evaluate, state, of_three, CONFIG.data.class_names)
    np.testing.assert_array_equal(sums.confusion, other_sums.confusion)
    np.testing.assert_allclose(record["test_loss"], other["test_loss"], rtol=1e-6)


def test_split_on_the_device_gives_the_same_batches(placement, monkeypatch):
    host, _ = loaders(placement)
    monkeypatch.setattr(device.Placement, "fits", lambda self, nbytes: True)
    resident, _ = loaders(placement)
    for a, b in zip(
        [*host.epoch(0, 1), *host.evaluation()], [*resident.epoch(0, 1), *resident.evaluation()], strict=True
    ):
        chex.assert_trees_all_equal(a, b)


def test_bfloat16_keeps_the_state_in_float32(placement, steps):
    assert device.compute_dtype("auto", "cpu") == jnp.float32
    assert device.compute_dtype("auto", "gpu") == jnp.bfloat16
    one_step, _ = loaders(placement)
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, precision="bfloat16"))
    batch = next(one_step.epoch(0, 1))
    state, loss = train.make_steps(config, placement, 3).train(fresh_state(config, placement), batch)
    floats = [x.dtype for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert set(floats) == {np.dtype("float32")}
    _, reference = steps.train(fresh_state(CONFIG, placement), batch)
    assert loss.dtype == np.float32
    assert 0 < abs(float(loss) - float(reference)) < 0.02 * float(reference)


def with_train(**changes) -> RunConfig:
    return dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, **changes))


def test_defaults_are_plain_adam():
    chex.assert_trees_all_equal_structs(
        train.make_optimizer(CONFIG.train, 3).init({"kernel": jnp.ones(2)}),
        optax.adam(1e-2).init({"kernel": jnp.ones(2)}),
    )
    assert train.make_schedule(CONFIG.train, 7) == 1e-2


def test_schedules():
    rate = train.make_schedule(with_train(schedule="cosine", warmup_epochs=1).train, steps_per_epoch=10)
    # Up to the peak in the first of two epochs, half of it in the middle of the second, nothing at the end.
    np.testing.assert_allclose([rate(s) for s in (0, 5, 10, 15, 20)], [0, 5e-3, 1e-2, 5e-3, 0], atol=1e-8)
    rate = train.make_schedule(with_train(warmup_epochs=2).train, steps_per_epoch=10)
    np.testing.assert_allclose([rate(s) for s in (0, 10, 20, 1000)], [0, 5e-3, 1e-2, 1e-2], atol=1e-8)


def test_decay_moves_kernels_alone_and_long_gradients_are_clipped():
    params = {"kernel": jnp.ones((1, 1, 2, 2)), "bias": jnp.ones(2)}
    decay = train.make_optimizer(with_train(weight_decay=0.5).train, 3)
    updates, _ = decay.update(jax.tree.map(jnp.zeros_like, params), decay.init(params), params)
    np.testing.assert_allclose(updates["kernel"], -1e-2 * 0.5, rtol=1e-6)
    np.testing.assert_array_equal(updates["bias"], 0)
    clip = train.make_optimizer(with_train(clip_norm=2.0).train, 3)
    _, state = clip.update(jax.tree.map(lambda p: 30 * p, params), clip.init(params), params)
    # Adam's first moment is a tenth of the gradient, whose norm was 30 sqrt(6) and is 2.
    np.testing.assert_allclose(optax.tree.norm(optax.tree.get(state, "mu")), 0.2, rtol=1e-6)


def test_average_of_parameters_has_its_own_batch_statistics(placement):
    config = with_train(ema=0.5, schedule="cosine")
    steps = train.make_steps(config, placement, 3)
    loader, test = loaders(placement)
    model = train.make_model(config.model, 3, placement)
    fresh = train.init_state(model, train.make_optimizer(config.train, 3), 0, ema=0.5)
    trajectory, epochs = [], []
    for result in loop.fit(config, steps, jax.device_put(fresh, placement.replicated), loader, test):
        if isinstance(result, loop.EpochResult):
            epochs.append(jax.device_get(result))
        else:
            trajectory.append(jax.device_get(result.state.params))
    assert [r.record["learning_rate"] for r in epochs] == pytest.approx(
        [5e-3 * (1 + np.cos(np.pi * s / 6)) for s in (2, 5)], rel=1e-5
    )
    expected = trajectory[0]
    for step, params in enumerate(trajectory):
        decay = min(0.5, step / (step + 10))
        expected = jax.tree.map(lambda a, b, d=decay: d * a + (1 - d) * b, expected, params)
    averaged = epochs[-1].state.averaged
    chex.assert_trees_all_close(averaged["params"], expected, rtol=1e-4, atol=1e-6)
    # The first convolution's statistics, from the pictures that it saw: the two whole batches of epoch 0.
    order = shuffled(10, 0, 0)[:8]
    x = train.prepare(loader.split.images[order], jnp.float32)
    kernel, bias = (averaged["params"]["encoder1"]["conv1"][k] for k in ("kernel", "bias"))
    a = np.maximum(np.asarray(layers.convolution(x, kernel)) + bias, 0).reshape(2, -1, 4)
    norm = averaged["batch_stats"]["encoder1"]["norm1"]
    np.testing.assert_allclose(norm["mean"], a.mean(1).mean(0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(norm["var"], a.var(1).mean(0), rtol=1e-3, atol=1e-6)
    # It is the average that evaluates.
    images = test.split.images
    theirs = model.apply(averaged, train.prepare(images, jnp.float32))
    np.testing.assert_allclose(train.infer(epochs[-1].state, images, model), theirs, rtol=1e-5, atol=1e-5)
    plain = train.infer(epochs[-1].state._replace(averaged=None), images, model)
    assert np.abs(plain - theirs).max() > 1e-3


def test_batch_statistics_of_averaged_weights_are_of_the_networks_own_momentum(placement):
    config, (loader, _) = with_train(ema=0.5), loaders(placement)
    model, batch = train.make_model(config.model, 3, placement), next(loader.epoch(0, 1))

    def statistics(momentum):
        norm = partial(model.layers.BatchNorm, momentum=momentum)
        own = model.clone(layers=SimpleNamespace(**vars(model.layers) | {"BatchNorm": norm}))
        state = fresh_state(config, placement)
        state = state._replace(averaged=state.averaged | {"params": state.params})
        return train.statistics_step(state, batch, 0, model=own).averaged["batch_stats"]

    chex.assert_trees_all_close(statistics(0.5), statistics(0.9), rtol=1e-5)


def test_averaged_weights_of_networks_with_other_norms(placement):
    config, (loader, _) = with_train(ema=0.5), loaders(placement)
    batch = next(loader.epoch(0, 1))

    class Group(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return nn.GroupNorm(num_groups=2)(jnp.asarray(x))

    class Flax(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return nn.BatchNorm(use_running_average=not train, momentum=0.99)(jnp.asarray(x))

    for norm, kept in ((Group, 0), (Flax, 2)):
        own = SimpleNamespace(**vars(layers) | {"BatchNorm": norm})
        model = train.make_model(config.model, 3, placement).clone(layers=own)
        optimizer = train.make_optimizer(config.train, 3)
        state = train.init_state(model, optimizer, 0, ema=0.5)
        state = state._replace(averaged={"params": state.params, "batch_stats": state.batch_stats})
        statistics = train.statistics_step(state, batch, 0, model=model).averaged["batch_stats"]
        assert len(jax.tree.leaves(statistics.get("encoder1", {}).get("norm1", {}))) == kept
    x = train.prepare(batch.images, jnp.float32)
    kernel, bias = (state.params["encoder1"]["conv1"][name] for name in ("kernel", "bias"))
    a = np.maximum(np.asarray(layers.convolution(x, kernel)) + np.asarray(bias), 0)
    mean = statistics["encoder1"]["norm1"]["BatchNorm_0"]["mean"]
    np.testing.assert_allclose(mean, a.mean((0, 1, 2)), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    "change",
    [
        {"images": np.zeros((4, 8, 8, 3), np.float32)},
        {"labels": np.zeros((4, 8, 8), np.int64)},
        {"names": ["a", "b"]},
        {"labels": np.zeros((3, 8, 8), np.uint8)},
    ],
)
def test_arrays_of_ones_own_that_are_no_pictures_are_refused(placement, change):
    split = Split(np.zeros((4, 8, 8, 3), np.uint8), np.zeros((4, 8, 8), np.uint8), list("abcd"))
    assert len(Loader(split, 2, placement)) == 2
    with pytest.raises(InputError, match=r"they must be uint8 \[N, H, W, C\], uint8 \[N, H, W\] and N names"):
        Loader(split._replace(**change), 2, placement)


def test_ema_needs_a_state_with_an_average(placement, steps):
    loader, _ = loaders(placement)
    batch, averaging = next(loader.epoch(0, 1)), with_train(ema=0.5)
    with pytest.raises(InputError, match=r"ema is 0.5, and the state was made for another: init_state\(..., ema=0.5\)"):
        train.make_steps(averaging, placement, 3).train(fresh_state(CONFIG, placement), batch)
    with pytest.raises(InputError, match=r"ema is 0.0"):
        steps.train(fresh_state(averaging, placement), batch)


def test_augmented_steps_are_of_the_seed_and_the_step(placement, steps):
    loader, _ = loaders(placement)
    batch = next(loader.epoch(0, 1))
    strong = train.make_steps(with_train(augment="strong"), placement, 3)
    losses = [float(s.train(fresh_state(CONFIG, placement), batch)[1]) for s in (strong, strong, steps)]
    assert losses[0] == losses[1] != losses[2]
    # The next step draws anew.
    later = fresh_state(CONFIG, placement)._replace(step=jax.device_put(jnp.int32(1), placement.replicated))
    assert float(strong.train(later, batch)[1]) != losses[0]


def test_validation_takes_its_share_of_each_breed():
    names = [f"{breed}_{i}" for breed in ("Abyssinian", "Maine_Coon", "pug") for i in range(20 + len(breed))]
    training, validation = validation_rows(names, 0.25, seed=0)
    np.testing.assert_array_equal(np.sort([*training, *validation]), np.arange(len(names)))
    assert abs(len(validation) - len(names) / 4) < 1
    for breed in ("Abyssinian", "Maine_Coon", "pug"):
        own = [i for i, name in enumerate(names) if name.startswith(breed)]
        assert abs(len(set(own) & set(validation)) - len(own) / 4) <= 1
    np.testing.assert_array_equal(validation, validation_rows(names, 0.25, seed=0)[1])
    assert set(validation) != set(validation_rows(names, 0.25, seed=1)[1])
    assert [len(rows) for rows in validation_rows(names, 0.0, seed=0)] == [len(names), 0]
    with pytest.raises(InputError, match=r"--validation-fraction 0.01 of 3 pictures is none"):
        validation_rows(names[:3], 0.01, seed=0)
    with pytest.raises(InputError, match=r"--validation-fraction 0.99 of 3 pictures is all"):
        validation_rows(names[:3], 0.99, seed=1)


def test_a_loader_of_some_rows(placement, monkeypatch):
    split, rows = random_split(10), np.array([1, 4, 7, 8, 9])
    for resident in (False, True):
        monkeypatch.setattr(device.Placement, "fits", lambda self, nbytes, answer=resident: answer)
        loader = Loader(split, 4, placement, rows)
        batches = list(loader.epoch(0, 1))
        expected = rows[shuffled(5, 0, 1)]
        np.testing.assert_array_equal(np.concatenate([b.labels for b in batches]), split.labels[expected])
        assert [np.asarray(b.weights).sum() for b in loader.evaluation()] == [4, 1]
        np.testing.assert_array_equal(next(loader.evaluation()).images, split.images[rows[:4]])


def test_what_does_not_count_is_in_no_mean_of_losses(steps, placement):
    split = random_split(8)
    split.labels[4:] = 255  # the second batch
    state = fresh_state(CONFIG, placement)
    scores = [
        loop.evaluate(steps.evaluate, state, Loader(split, 4, placement, rows), CONFIG.data.class_names)[0]
        for rows in (np.arange(8), np.arange(4))
    ]
    assert scores[0] == scores[1]
    with pytest.raises(InputError, match=r"in picture_4, picture_5, picture_6, ... every pixel is ignored \(255\)"):
        Loader(split, 4, placement, np.arange(4, 8))


@pytest.mark.parametrize("variant", PUBLISHED)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_gpu_is_given_plain_convolutions_and_none_of_the_cpus_forms(variant, dtype):
    """Lowered for CUDA, which needs no GPU: what XLA's compiler for it would be given."""
    config = default_config(variant, "oxford_iiit_pet")
    model = UNet(config.model.downsampling, config.model.upsampling, dtype=jnp.dtype(dtype))
    optimizer, loss_fn = train.make_optimizer(config.train, 3), make_loss(config.train.loss)
    step = partial(train.train_step, seed=0, model=model, optimizer=optimizer, loss_fn=loss_fn)
    state = jax.eval_shape(lambda: train.init_state(model, optimizer, 0))
    batch = Batch(np.zeros((2, 32, 32, 3), np.uint8), np.zeros((2, 32, 32), np.uint8), np.ones(2, np.float32))
    lines = jax.jit(step).trace(state, batch).lower(lowering_platforms=("cuda",)).as_text().splitlines()
    convolutions = [line for line in lines if "stablehlo.convolution" in line]
    # Forward, and two gradients of each but the first layer's, whose input needs none.
    kernels = sum(leaf.ndim == 4 for leaf in jax.tree.leaves(state.params))
    assert len(convolutions) == 3 * kernels - 1
    assert all({"bfloat16": "xbf16>", "float32": "xf32>"}[dtype] in line for line in convolutions)
    assert dtype == "float32" or not any("xf32>" in line for line in convolutions)
    forms = ("unet_jax_", "dot_general", "stablehlo.while")
    assert not any(form in line for form in forms for line in lines)


def test_the_layers_go_by_where_the_steps_are_placed(placement):
    assert train.make_model(CONFIG.model, 3, placement).layers.__name__ == "unet_jax.cpu.layers"
    two = placement._replace(devices=2)
    assert train.make_model(CONFIG.model, 3, two).layers is layers


def test_importing_the_package_changes_nothing_of_the_process():
    code = """
import logging, pkgutil, sys, importlib
hook = sys.unraisablehook
import unet_jax
assert not {"jax", "numpy", "tyro"} & set(sys.modules), "the package imports much"
from unet_jax import UNet, cross_entropy, make_loss
assert not {"PIL", "matplotlib", "orbax", "tensorflow_datasets"} & set(sys.modules), "the model imports much"
assert UNet().layers.__name__ == "unet_jax.layers"
try:
    unet_jax.Unet
except AttributeError as error:
    assert "no attribute 'Unet'" in str(error)
else:
    raise AssertionError("there is no such name")
import absl.logging, asyncio, jax, orbax.checkpoint, tensorflow_datasets, matplotlib.pyplot
levels = lambda: {name: logging.getLogger(name).level for name in sorted(logging.root.manager.loggerDict)}
before = levels(), absl.logging.get_verbosity()
import unet_jax
for module in pkgutil.walk_packages(unet_jax.__path__, "unet_jax."):
    importlib.import_module(module.name)
assert sys.unraisablehook is hook
after = levels()
assert {name: after[name] for name in before[0]} == before[0] and absl.logging.get_verbosity() == before[1]
assert all(getattr(unet_jax, name) for name in unet_jax.__all__) and set(unet_jax.__all__) <= set(dir(unet_jax))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
