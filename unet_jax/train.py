"""Training as pure functions: a state, the steps that train and evaluate it, and how they are compiled."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from unet_jax.augment import augment
from unet_jax.config import Augment, ModelConfig, RunConfig, TrainConfig
from unet_jax.data.batches import Batch
from unet_jax.device import Placement, compiler_options, compute_dtype, fast_layers
from unet_jax.errors import InputError
from unet_jax.losses import Loss, make_loss
from unet_jax.metrics import PictureSums, picture_sums
from unet_jax.model import UNet

Views = tuple[tuple[int, ...], ...]  # for test-time augmentation: axes of [N, H, W, C] that each view flips; (): none


class TrainState(NamedTuple):
    """All that training changes: arrays only. step is an int32 scalar, the steps taken so far.

    With TrainConfig.ema, averaged holds the averaged params and their batch statistics as linen's variables. During an
    epoch the statistics are training's own; at its end they are computed anew for the averaged params.
    """

    step: Array
    params: Any
    batch_stats: Any
    opt_state: Any
    averaged: dict[str, Any] | None = None


def make_model(config: ModelConfig, num_classes: int, placement: Placement) -> UNet:
    """The network of a config, in its precision and with the layers that are fast where it is placed."""
    return UNet(
        downsampling=config.downsampling,
        upsampling=config.upsampling,
        widths=config.widths,
        num_classes=num_classes,
        dropout_rate=config.dropout_rate,
        dtype=compute_dtype(config.precision, placement.platform),
        remat=config.remat,
        layers=fast_layers(placement),
    )


def make_schedule(config: TrainConfig, steps_per_epoch: int) -> float | optax.Schedule:
    """The learning rate: a number, or a function of the steps taken so far if it changes."""
    peak, warmup = config.learning_rate, config.warmup_epochs * steps_per_epoch
    if config.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, config.epochs * steps_per_epoch)
    return optax.warmup_constant_schedule(0.0, peak, warmup) if warmup else peak


def make_optimizer(config: TrainConfig, steps_per_epoch: int) -> optax.GradientTransformation:
    """Adam as in the published runs, or AdamW; the shape of its state does not depend on `steps_per_epoch`."""
    rate = make_schedule(config, steps_per_epoch)
    adam = optax.adam(rate)
    if config.weight_decay:
        # Decoupled (Loshchilov and Hutter 2019, arXiv:1711.05101), of kernels alone: they have more than one axis.
        adam = optax.adamw(rate, weight_decay=config.weight_decay, mask=partial(jax.tree.map, lambda p: p.ndim > 1))
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adam) if config.clip_norm else adam


def init_state(model: UNet, optimizer: optax.GradientTransformation, seed: int, ema: float = 0.0) -> TrainState:
    """A fresh state; its parameters depend on the seed and the network alone, not on the size of pictures.

    They are float32, whatever JAX's default is. With `ema`, the average starts at 0, and the first step replaces it.
    """
    side = 2 ** (len(model.widths) - 1)
    with jax.enable_x64(False):  # else initial values would be other ones, in float64
        # jit drops the forward pass. Run eagerly, each operation of that pass would be compiled separately.
        variables = jax.jit(model.init)(jax.random.key(seed), jnp.zeros((1, side, side, 3), jnp.float32))
    params, batch_stats = variables["params"], variables.get("batch_stats", {})  # none without batch norm
    averaged = jax.tree.map(jnp.zeros_like, {"params": params, "batch_stats": batch_stats}) if ema else None
    return TrainState(jnp.zeros((), jnp.int32), params, batch_stats, optimizer.init(params), averaged)


def prepare(images: ArrayLike, dtype: DTypeLike) -> Array:
    """Scales pictures from 0 to 255 to the network's input: values in [0, 1]."""
    wide = np.promote_types(dtype, np.float32)  # bfloat16 holds 1/255 too coarsely
    return (jnp.asarray(images, wide) * jnp.asarray(1 / 255, wide)).astype(dtype)


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    seed: int,
    model: UNet,
    optimizer: optax.GradientTransformation,
    loss_fn: Loss,
    ema: float = 0.0,
    strength: Augment = "none",
) -> tuple[TrainState, Array]:
    """One update, pure: the new state, and the batch's loss (a scalar) before the update.

    Random keys come from (seed, step) only, so that continuing from a checkpoint is exact. The average's decay is
    step / (step + 10), at most `ema`, so that early steps are forgotten (the polynomial-decay averaging of Shamir and
    Zhang 2013, arXiv:1212.1824, with eta 9).

    Raises:
      InputError: the state has no average for `ema`, or one without it.
    """
    if bool(ema) != (state.averaged is not None):
        raise InputError(f"ema is {ema}, and the state was made for another: init_state(..., ema={ema})")
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    if strength != "none":
        own_key = jax.random.fold_in(key, 1)  # not dropout's
        images, labels = augment(own_key, batch.images, batch.labels, strength)
        batch = Batch(images, labels, batch.weights)

    def loss_of(params: Any) -> tuple[Array, Any]:
        logits, updated = model.apply(
            {"params": params, "batch_stats": state.batch_stats},
            prepare(batch.images, model.dtype),
            train=True,
            rngs={"dropout": key},
            mutable=["batch_stats"],
        )
        return loss_fn(logits, batch.labels, batch.weights), updated.get("batch_stats", {})

    (loss, batch_stats), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    averaged = state.averaged
    if averaged is not None:
        decay = jnp.minimum(ema, state.step / (state.step + 10))
        averaged = {
            "params": optax.incremental_update(params, averaged["params"], 1 - decay),
            "batch_stats": batch_stats,
        }
    return TrainState(state.step + 1, params, batch_stats, opt_state, averaged), loss


def statistics_step(state: TrainState, batch: Batch, count: ArrayLike, *, model: UNet) -> TrainState:
    """Updates the averaged params' batch statistics to the mean over this batch and the `count` batches before it.

    The statistics of training do not fit the averaged params, which have other activations (Izmailov et al. 2018,
    arXiv:1803.05407). As in evaluation, there is no dropout and no augmentation.
    """
    averaged: Any = state.averaged
    before, params = averaged["batch_stats"], averaged["params"]
    images, deterministic = prepare(batch.images, model.dtype), model.clone(dropout_rate=0.0)

    def updated(statistics: Any) -> Any:
        variables = {"params": params, "batch_stats": statistics}
        _, changed = deterministic.apply(variables, images, train=True, mutable=["batch_stats"])
        return changed.get("batch_stats", {})

    # A batch norm gives momentum * old + (1 - momentum) * own. From old = 0 and the derivative follows own.
    zeros, ones = (jax.tree.map(like, before) for like in (jnp.zeros_like, jnp.ones_like))
    new, momentum = jax.jvp(updated, (zeros,), (ones,))
    mean = jax.tree.map(lambda old, new, m: old + (new / (1 - m) - old) / (count + 1), before, new, momentum)
    return state._replace(averaged={"params": params, "batch_stats": mean})


def variables(state: TrainState) -> dict[str, Any]:
    """Linen's variables for evaluation and prediction: the averages if there are any."""
    return state.averaged or {"params": state.params, "batch_stats": state.batch_stats}


def inference_state(state: TrainState) -> TrainState:
    """The state with only what prediction needs; averages, if any, replace parameters and batch statistics."""
    return TrainState(state.step, opt_state=None, **variables(state))


def infer(state: TrainState, images: ArrayLike, model: UNet, views: Views = ((),)) -> Array:
    """Logits [N, H, W, num_classes] of pictures uint8 [N, H, W, C]: running statistics, no dropout.

    Each view flips the pictures along its axes. Several views give the logarithm of their mean probabilities.
    """

    def of_view(axes: tuple[int, ...]) -> Array:
        seen = jnp.flip(images, axes) if axes else images
        logits: Any = model.apply(variables(state), prepare(seen, model.dtype))
        return jnp.flip(logits, axes) if axes else logits

    answers = [of_view(axes) for axes in views]
    if len(views) == 1:
        return answers[0]
    return jax.nn.logsumexp(jnp.stack([jax.nn.log_softmax(a) for a in answers]), 0, b=1 / len(views))


def eval_step(
    state: TrainState, batch: Batch, *, model: UNet, loss_fn: Loss, views: Views = ((),)
) -> tuple[Array, PictureSums]:
    """The batch's loss (a scalar) and its pictures' sums, with running statistics and no dropout."""
    logits = infer(state, batch.images, model, views)
    return loss_fn(logits, batch.labels, batch.weights), picture_sums(logits, batch.labels, batch.weights)


def predict_step(state: TrainState, images: ArrayLike, *, model: UNet, views: Views = ((),)) -> Array:
    """Predicted labels uint8 [N, H, W] of pictures uint8 [N, H, W, C]."""
    return infer(state, images, model, views).argmax(-1).astype(jnp.uint8)


class Steps(NamedTuple):
    """The compiled functions of a run. train and statistics donate their state: it cannot be used after the call."""

    train: Callable[[TrainState, Batch], tuple[TrainState, Array]]
    statistics: Callable[[TrainState, Batch, ArrayLike], TrainState]
    evaluate: Callable[[TrainState, Batch], tuple[Array, PictureSums]]
    predict: Callable[[TrainState, ArrayLike], Array]


def make_steps(
    config: RunConfig,
    placement: Placement,
    steps_per_epoch: int,
    deterministic: bool = False,
    model: UNet | None = None,
    optimizer: optax.GradientTransformation | None = None,
    loss_fn: Loss | None = None,
    views: Views = ((),),
) -> Steps:
    """Jits the steps of a run: state replicated, batch split over the devices, loss and statistics of the whole batch.

    `steps_per_epoch` is the length of the training loader; schedules and warm-up use it. `model`, `optimizer` and
    `loss_fn` are those of the config by default. `views` are those of `infer`, for evaluate and predict.
    """
    model = model or make_model(config.model, len(config.data.class_names), placement)
    optimizer = optimizer or make_optimizer(config.train, steps_per_epoch)
    loss_fn = loss_fn or make_loss(config.train.loss, config.train.class_weights)
    whole, split = placement.replicated, placement.batch
    jit = partial(jax.jit, out_shardings=whole, compiler_options=compiler_options(placement.platform, deterministic))
    step = partial(
        train_step,
        seed=config.train.seed,
        model=model,
        optimizer=optimizer,
        loss_fn=loss_fn,
        ema=config.train.ema,
        strength=config.train.augment,
    )
    return Steps(
        jit(step, in_shardings=(whole, split), donate_argnums=0),
        jit(partial(statistics_step, model=model), in_shardings=(whole, split, whole), donate_argnums=0),
        jit(partial(eval_step, model=model, loss_fn=loss_fn, views=views), in_shardings=(whole, split)),
        jit(partial(predict_step, model=model, views=views), in_shardings=(whole, whole)),
    )
