"""What a run says while it trains: a progress bar, a line for each epoch, and once how long it will take."""

import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
from tqdm import tqdm

from unet_jax.metrics import held_out, shown


class Clock:
    """Says once, early on, how long the run will take. It times a few steps after the compilation."""

    FIRST, LAST = 2, 6  # the steps timed, counted in this process

    def __init__(self, epochs: int, train_steps: int, test_steps: int, done: int) -> None:
        """Takes the steps of an epoch and of an evaluation, and how many training steps are behind already."""
        # An evaluation is a forward pass, a third of a step's work.
        self.ahead = epochs * (train_steps + test_steps / 3) * max(0.0, 1 - done / (epochs * train_steps))
        self.ticks, self.start = 0, 0.0

    def tick(self) -> str | None:
        """Counts a step. Returns the line at the step when it is known, else None."""
        self.ticks += 1
        if self.ticks == self.FIRST:
            self.start = time.perf_counter()
        if self.ticks != self.LAST:
            return None
        minutes = (time.perf_counter() - self.start) / (self.LAST - self.FIRST) * self.ahead / 60
        line = f"this will take about {minutes:.0f} minutes on this device" if minutes >= 1.5 else None
        if minutes > 30:
            line = f"{line}; shorter: --image-size 64, fewer --train-examples and --epochs, or a GPU"
        return line


def epochs_text(count: int) -> str:
    """The text 1 epoch, or 2 epochs."""
    return f"{count} epoch{'s' * (count != 1)}"


class Display:
    """A progress bar for each epoch in the published log's form, and the line after it."""

    def __init__(self, clock: Clock, steps: int) -> None:
        """Takes the steps of an epoch."""
        self.clock, self.steps = clock, steps
        self.bar: Any = None

    def step(self, epoch: int, step: int, losses: Sequence[float]) -> None:
        if self.bar is None:
            file = sys.stdout if jax.process_index() else None  # stdout leads nowhere there
            self.bar = tqdm(total=self.steps, initial=step - 1, unit="step", desc=f"epoch {epoch}", file=file)
        self.bar.set_postfix_str(f"loss {losses[-1]:.4f}" if losses else "", refresh=False)
        self.bar.update()
        if line := self.clock.tick():
            self.bar.write(line)

    def epoch(self, record: dict[str, Any]) -> None:
        part, scores = held_out(record)
        name = {"test": "Test set", "validation": "Validation part"}[part]
        self.bar.set_postfix_str(f"loss {record['last_batch_loss']:.4f}")
        self.close()
        if "loss" not in scores:
            return
        print(
            f"{name}: average loss {scores['loss']:.4f},"
            f" mean IoU {shown(scores['mean_iou'])}, pixel accuracy {shown(scores['pixel_accuracy'])}"
        )

    def close(self) -> None:
        self.bar.close()
        self.bar = None
