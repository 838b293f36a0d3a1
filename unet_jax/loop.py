"""The loop of epochs: a generator that trains and evaluates, and owns no files."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax.training.early_stopping import EarlyStopping
from jax import Array

from unet_jax.checks import check_patience
from unet_jax.config import RunConfig
from unet_jax.data.batches import Loader
from unet_jax.metrics import PictureSums, scores
from unet_jax.train import Steps, TrainState, make_schedule

STATISTICS_BATCHES = 20  # for the batch statistics of averaged params


def evaluate(
    evaluate_step: Callable, state: TrainState, loader: Loader, class_names: Sequence[str]
) -> tuple[dict[str, Any], PictureSums]:
    """The metrics of a split (metrics.scores), and its pictures' sums [N, ...] on the host.

    test_loss is defined as published: the mean of the batches' losses, however short the last batch is. Batches in
    which no pixel counts are left out, since their loss is 0.
    """
    results = [evaluate_step(state, batch) for batch in loader.evaluation()]
    losses, batches = zip(*jax.device_get(results), strict=True)  # the one transfer
    count = len(loader.rows)
    pictures = slice(loader.batch_size)  # before those that fill a batch up for the devices
    sums = PictureSums(*(np.concatenate([a[pictures] for a in parts])[:count] for parts in zip(*batches, strict=True)))
    # A loss of NaN stays: its batch may have no pixel that counts because its labels are no classes.
    counting = [loss for loss, batch in zip(losses, batches, strict=True) if batch.confusion.any() or np.isnan(loss)]
    return {"test_loss": float(np.mean(counting)), **scores(sums, class_names)}, sums


class NonFiniteLossError(Exception):
    """The loss of `step` (counted from 1) in `epoch` was not finite, or the parameters after it are not."""

    def __init__(self, epoch: int, step: int, value: float, what: str = "loss") -> None:
        """Says where it happened."""
        super().__init__(f"the {what} is {value} at step {step} (epoch {epoch})")


class StepResult(NamedTuple):
    """After each step: the new state, its loss (on the device, maybe not ready), and the epoch's earlier losses."""

    epoch: int
    step_of_epoch: int
    state: TrainState
    loss: Array
    losses: list[float]


class EpochResult(NamedTuple):
    """After each epoch: the state, and the record that becomes a line of metrics.jsonl."""

    state: TrainState
    record: dict[str, Any]


def out_of_patience(records: Sequence[Mapping[str, Any]], patience: int) -> bool:
    """Whether anywhere in these records the validation part's mean IoU did not rise for `patience` epochs in a row.

    Patience of 0 never runs out. The records start at the first epoch, so a resumed run counts the same.
    """
    if not patience:
        return False
    stopping = EarlyStopping(patience=patience - 1)  # Flax's stops after patience + 1 epochs without a rise
    for record in records:
        stopping = stopping.update(-(record["validation_mean_iou"] or 0))
    return stopping.should_stop


def fit(
    config: RunConfig,
    steps: Steps,
    state: TrainState,
    train: Loader,
    held_out: Loader | None,
    losses: Sequence[float] = (),
    records: Sequence[Mapping[str, Any]] = (),
) -> Iterator[StepResult | EpochResult]:
    """Trains from `state`, which may be mid-epoch, to the config's last epoch or until patience runs out.

    Yields a StepResult after each step and an EpochResult after each epoch. A yielded state is valid until the next
    step, to which its memory is donated. `held_out` is evaluated after each epoch: the test split, or with a validation
    fraction the validation part, or None for neither. The validation part's metrics are recorded as validation_loss,
    validation_mean_iou and so on. `records` are those of the finished epochs. If `state` is in the middle of an epoch,
    `losses` are those of the steps that this epoch has taken already.

    Raises:
      NonFiniteLossError: noticed at the latest when the epoch ends, before its EpochResult. `held_out`'s counts, too.
      InputError: patience without a validation part.
    """
    check_patience(config)
    done, first = divmod(int(state.step), len(train))
    rate = make_schedule(config.train, len(train))
    for epoch in range(done + 1, config.train.epochs + 1):
        if out_of_patience(records, config.train.patience):
            return
        start = time.perf_counter()
        known, pending = list(losses), None
        for i, batch in enumerate(train.epoch(config.train.seed, epoch, skip=first), first + 1):
            state, loss = steps.train(state, batch)
            if pending is not None:  # fetched a step late, so that the device always has its next step queued
                known.append(_finite(pending, epoch, i - 1))
            pending = loss
            yield StepResult(epoch, i, state, loss, known)
        known.append(_finite(pending, epoch, len(train)))
        if state.averaged is not None:
            state = _with_statistics(steps, state, train, config.train.seed)
        seconds = time.perf_counter() - start
        scores_: dict[str, Any] = {}
        if held_out is not None:
            scores_, _ = evaluate(steps.evaluate, state, held_out, config.data.class_names)
            _finite(scores_["test_loss"], epoch, len(train))
        else:  # nothing else would notice what the last step did
            _finite(optax.tree.norm(state.params), epoch, len(train), "norm of the parameters")
        if config.data.validation_fraction:
            scores_ = {f"validation_{name.removeprefix('test_')}": value for name, value in scores_.items()}
        counts = np.full(len(known), train.batch_size)
        counts[-1] = len(train.rows) - train.batch_size * (len(train) - 1)
        record = {
            "epoch": epoch,
            "train_loss": float(np.average(known, weights=counts)),
            "last_batch_loss": known[-1],
            **scores_,
            "learning_rate": float(rate(epoch * len(train) - 1)) if callable(rate) else rate,
            "seconds": seconds,
            "evaluation_seconds": time.perf_counter() - start - seconds,
            "images_per_second": float(counts[first:].sum()) / seconds,
        }
        yield EpochResult(state, record)
        losses, first, records = (), 0, [*records, record]


def _with_statistics(steps: Steps, state: TrainState, train: Loader, seed: int) -> TrainState:
    # Epochs count from 1, so epoch 0 is an order of its own, the same at each call. A short last batch is left out,
    # unless it is the only one.
    whole = max(1, len(train.rows) // train.batch_size)
    for i, batch in enumerate(islice(train.epoch(seed, 0), min(whole, STATISTICS_BATCHES))):
        state = steps.statistics(state, batch, i)
    return state


def _finite(number: Any, epoch: int, step: int, what: str = "loss") -> float:
    value = float(number)
    if not math.isfinite(value):
        raise NonFiniteLossError(epoch, step, value, what)
    return value
