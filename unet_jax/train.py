"""Training as pure functions: a state, a step, an evaluation, and a generator of epochs that owns no files."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from unet_jax.config import ModelConfig, RunConfig, TrainConfig
from unet_jax.data.batches import Batch, Loader
from unet_jax.device import Placement, compiler_options, compute_dtype
from unet_jax.losses import Loss, make_loss
from unet_jax.metrics import PictureSums, picture_sums, scores
from unet_jax.model import UNet


class TrainState(NamedTuple):
    """All that training changes: arrays only. step is an int32 scalar, the steps taken so far."""

    step: Array
    params: Any
    batch_stats: Any
    opt_state: Any


def make_model(config: ModelConfig, num_classes: int) -> UNet:
    """The network of a config, computing in its precision on this backend."""
    return UNet(
        downsampling=config.downsampling,
        upsampling=config.upsampling,
        widths=config.widths,
        num_classes=num_classes,
        dropout_rate=config.dropout_rate,
        dtype=compute_dtype(config.precision),
        remat=config.remat,
    )


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """Adam at a constant rate, as in the reproduced runs."""
    return optax.adam(config.learning_rate)


def init_state(model: UNet, optimizer: optax.GradientTransformation, seed: int, channels: int = 3) -> TrainState:
    """A fresh state; its parameters depend on the seed and the network alone, not on the size of pictures."""
    side = 2 ** (len(model.widths) - 1)
    # Under jit, which drops the forward pass: run eagerly, each of its operations would be compiled by itself.
    variables = jax.jit(model.init)(jax.random.key(seed), jnp.zeros((1, side, side, channels), jnp.float32))
    params = variables["params"]
    return TrainState(jnp.zeros((), jnp.int32), params, variables["batch_stats"], optimizer.init(params))


def prepare(images: ArrayLike, dtype: DTypeLike) -> Array:
    """uint8 pictures to what the network is fed: values in [0, 1]."""
    return jnp.asarray(images, dtype) * jnp.asarray(1 / 255, dtype)


def train_step(
    state: TrainState, batch: Batch, *, seed: int, model: UNet, optimizer: optax.GradientTransformation, loss_fn: Loss
) -> tuple[TrainState, Array]:
    """One update, pure: the new state, and the batch's loss (a scalar) before the update.

    Dropout's key is of (seed, step): nothing random is carried along, so that going on from a checkpoint is exact.
    """
    key = jax.random.fold_in(jax.random.key(seed), state.step)

    def loss_of(params: Any) -> tuple[Array, Any]:
        logits, updated = model.apply(
            {"params": params, "batch_stats": state.batch_stats},
            prepare(batch.images, model.dtype),
            train=True,
            rngs={"dropout": key},
            mutable=["batch_stats"],
        )
        return loss_fn(logits, batch.labels, batch.weights), updated["batch_stats"]

    (loss, batch_stats), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return TrainState(state.step + 1, params, batch_stats, opt_state), loss


def infer(state: TrainState, images: ArrayLike, model: UNet) -> Array:
    """Logits [N, H, W, num_classes] of pictures uint8 [N, H, W, C]: running statistics, no dropout."""
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    logits: Any = model.apply(variables, prepare(images, model.dtype))
    return logits


def eval_step(state: TrainState, batch: Batch, *, model: UNet, loss_fn: Loss) -> tuple[Array, PictureSums]:
    """The batch's loss (a scalar) and its pictures' sums, with running statistics and no dropout."""
    logits = infer(state, batch.images, model)
    return loss_fn(logits, batch.labels, batch.weights), picture_sums(logits, batch.labels, batch.weights)


def predict_step(state: TrainState, images: ArrayLike, *, model: UNet) -> Array:
    """Predicted labels uint8 [N, H, W] of pictures uint8 [N, H, W, C]."""
    return infer(state, images, model).argmax(-1).astype(jnp.uint8)


class Steps(NamedTuple):
    """The compiled functions of a run; train takes over the memory of the state that it is given."""

    train: Callable[[TrainState, Batch], tuple[TrainState, Array]]
    evaluate: Callable[[TrainState, Batch], tuple[Array, PictureSums]]
    predict: Callable[[TrainState, ArrayLike], Array]


def make_steps(config: RunConfig, placement: Placement, deterministic: bool = False) -> Steps:
    """Jits the steps of a run: state replicated, batch split over the devices, loss and statistics over all of it."""
    model = make_model(config.model, len(config.data.class_names))
    optimizer, loss_fn = make_optimizer(config.train), make_loss(config.train.loss, config.train.class_weights)
    whole, split = placement.replicated, placement.batch
    jit = partial(jax.jit, out_shardings=whole, compiler_options=compiler_options(deterministic))
    step = partial(train_step, seed=config.train.seed, model=model, optimizer=optimizer, loss_fn=loss_fn)
    return Steps(
        jit(step, in_shardings=(whole, split), donate_argnums=0),
        jit(partial(eval_step, model=model, loss_fn=loss_fn), in_shardings=(whole, split)),
        jit(partial(predict_step, model=model), in_shardings=(whole, whole)),
    )


def evaluate(
    evaluate_step: Callable, state: TrainState, loader: Loader, class_names: Sequence[str]
) -> tuple[dict[str, Any], PictureSums]:
    """The metrics of a split (metrics.scores), and its pictures' sums [N, ...] on the host.

    test_loss is the published definition: the mean over batches of the batch's loss, however short the last is.
    """
    results = [evaluate_step(state, batch) for batch in loader.evaluation()]
    losses, batches = zip(*jax.device_get(results), strict=True)  # the one transfer
    count = len(loader.split.names)
    sums = PictureSums(*(np.concatenate(parts)[:count] for parts in zip(*batches, strict=True)))
    return {"test_loss": float(np.mean(losses)), **scores(sums, class_names)}, sums


class NonFiniteLossError(Exception):
    """The loss of `step` (counted from 1) in `epoch` was not finite."""

    def __init__(self, epoch: int, step: int, loss: float) -> None:
        """Keeps where it happened."""
        super().__init__(f"the loss is {loss} at step {step} (epoch {epoch})")


class StepResult(NamedTuple):
    """After each step: the state after it, its loss (on the device, maybe not ready), those before it."""

    epoch: int
    step_of_epoch: int
    state: TrainState
    loss: Array
    losses: list[float]


class EpochResult(NamedTuple):
    """After each epoch: the state, and the record that becomes a line of metrics.jsonl."""

    state: TrainState
    record: dict[str, Any]


def fit(
    config: RunConfig,
    steps: Steps,
    state: TrainState,
    train: Loader,
    test: Loader,
    losses: Sequence[float] = (),
) -> Iterator[StepResult | EpochResult]:
    """Trains from `state` to the config's last epoch; a state in the middle of an epoch goes on from there.

    Yields a StepResult after each step and an EpochResult after each epoch. `losses` are those of the steps that the
    state has behind it in its epoch. A yielded state is good until the next step takes its memory.

    Raises:
      NonFiniteLossError: noticed at the latest when the epoch ends, before its EpochResult.
    """
    done, first = divmod(int(state.step), len(train))
    for epoch in range(done + 1, config.train.epochs + 1):
        start = time.perf_counter()
        known, pending = list(losses), None
        for i, batch in enumerate(train.train(config.train.seed, epoch, skip=first), first + 1):
            state, loss = steps.train(state, batch)
            if pending is not None:  # fetched a step late, so that the device always has its next step queued
                known.append(_finite(pending, epoch, i - 1))
            pending = loss
            yield StepResult(epoch, i, state, loss, known)
        known.append(_finite(pending, epoch, len(train)))
        seconds = time.perf_counter() - start
        scores_, _ = evaluate(steps.evaluate, state, test, config.data.class_names)
        counts = np.full(len(known), train.batch_size)
        counts[-1] = len(train.split.names) - train.batch_size * (len(train) - 1)
        yield EpochResult(
            state,
            {
                "epoch": epoch,
                "train_loss": float(np.average(known, weights=counts)),
                "last_batch_loss": known[-1],
                **scores_,
                "learning_rate": config.train.learning_rate,
                "seconds": seconds,
                "evaluation_seconds": time.perf_counter() - start - seconds,
                "images_per_second": float(counts[first:].sum()) / seconds,
            },
        )
        losses, first = (), 0


def _finite(loss: Any, epoch: int, step: int) -> float:
    value = float(loss)
    if not math.isfinite(value):
        raise NonFiniteLossError(epoch, step, value)
    return value
