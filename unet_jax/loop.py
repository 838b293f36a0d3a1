"""The loop of epochs: a generator that trains and evaluates, and owns no files."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array

from unet_jax.config import RunConfig
from unet_jax.data.batches import Loader
from unet_jax.metrics import PictureSums, scores
from unet_jax.train import Steps, TrainState, make_schedule

STATISTICS_BATCHES = 20  # that the batch statistics of averaged params are taken from


def evaluate(
    evaluate_step: Callable, state: TrainState, loader: Loader, class_names: Sequence[str]
) -> tuple[dict[str, Any], PictureSums]:
    """The metrics of a split (metrics.scores), and its pictures' sums [N, ...] on the host.

    test_loss is the published definition: the mean over batches of the batch's loss, however short the last is.
    """
    results = [evaluate_step(state, batch) for batch in loader.evaluation()]
    losses, batches = zip(*jax.device_get(results), strict=True)  # the one transfer
    count = len(loader.rows)
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
    held_out: Loader | None,
    losses: Sequence[float] = (),
) -> Iterator[StepResult | EpochResult]:
    """Trains from `state` to the config's last epoch; a state in the middle of an epoch goes on from there.

    `held_out` is what each epoch evaluates: the test split, or where there is a validation fraction that part, whose
    metrics are recorded as validation_loss, validation_mean_iou and so on; or None, nothing. Yields a StepResult after
    each step and an EpochResult after each epoch. `losses` are those of the steps that the state has behind it in its
    epoch. A yielded state is good until the next step takes its memory.

    Raises:
      NonFiniteLossError: noticed at the latest when the epoch ends, before its EpochResult.
    """
    done, first = divmod(int(state.step), len(train))
    rate = make_schedule(config.train, len(train))
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
        if state.averaged is not None:
            # Of an epoch that is never trained on, the same at each call; whole batches where there is one.
            whole = max(1, len(train.rows) // train.batch_size)
            for i, batch in enumerate(islice(train.train(config.train.seed, 0), min(whole, STATISTICS_BATCHES))):
                state = steps.statistics(state, batch, i)
        seconds = time.perf_counter() - start
        scores_: dict[str, Any] = {}
        if held_out is not None:
            scores_, _ = evaluate(steps.evaluate, state, held_out, config.data.class_names)
        if config.data.validation_fraction:
            scores_ = {f"validation_{name.removeprefix('test_')}": value for name, value in scores_.items()}
        counts = np.full(len(known), train.batch_size)
        counts[-1] = len(train.rows) - train.batch_size * (len(train) - 1)
        yield EpochResult(
            state,
            {
                "epoch": epoch,
                "train_loss": float(np.average(known, weights=counts)),
                "last_batch_loss": known[-1],
                **scores_,
                "learning_rate": float(rate(epoch * len(train) - 1)) if callable(rate) else rate,
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
