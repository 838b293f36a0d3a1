"""The same steps on 1, 2, 4, 8 simulated devices and on 2 processes of 2 devices: `python tests/check_devices.py`.

Prints the losses of each variant side by side and the largest difference to one device. Exit status 1: more than 1e-5
at the first step. Later steps differ more: each update feeds the rounding of the one before.
"""

import dataclasses
import socket
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import jax
import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))

from unet_jax import device, processes, runs, train
from unet_jax.config import VARIANTS, default_config
from unet_jax.data import synthetic
from unet_jax.data.batches import Loader
from unet_jax.data.cache import Split

BOUND = 1e-5  # of the first step's loss


@dataclasses.dataclass(frozen=True)
class Options:
    variants: tuple[str, ...] = tuple(VARIANTS)
    setups: tuple[str, ...] = ("1x1", "1x2", "1x4", "1x8", "2x2")
    """PROCESSESxDEVICES of each; the first is what the others are compared with."""
    steps: int = 10
    image_size: int = 32
    widths: tuple[int, ...] = (8, 16, 32)
    batch_size: int = 16
    resident: bool = False
    """Once more with the pictures kept on the devices, as on an accelerator with room for them: VARIANT-resident."""


@dataclasses.dataclass(frozen=True)
class Seen:
    """What one process saw: each variant's losses, and which rows of the pictures it read."""

    losses: dict[str, list[float]]
    rows: set[int]


class Recorded(np.ndarray):
    """An array that notes the rows read from it."""

    rows: set[int]

    def __getitem__(self, key):
        if isinstance(key, np.ndarray):
            self.rows.update(key.tolist())
        return np.asarray(self)[key]


def pictures(count: int, size: int) -> Split:
    source = synthetic.source("train", count, size)
    examples = [source.read(i) for i in range(count)]
    images = np.stack([e.image for e in examples]).view(Recorded)
    images.rows = set()
    return Split(images, np.stack([e.labels for e in examples]), [e.name for e in examples])


def take_steps(options: Options, variant: str, split: Split) -> list[float]:
    placement = device.placement()
    config = default_config(variant, "synthetic")
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, widths=options.widths),
        train=dataclasses.replace(config.train, batch_size=options.batch_size),
    )
    state = jax.device_put(runs.fresh_state(config, placement), placement.replicated)
    steps = train.make_steps(config, placement, steps_per_epoch=options.steps)
    losses = []
    for batch in Loader(split, options.batch_size, placement).epoch(seed=0, number=1):
        state, loss = steps.train(state, batch)
        losses.append(float(loss))
    return losses


def child(options: Options, devices: int, processes_: int, index: int, port: int) -> Seen:
    """One process of a setup."""
    jax.config.update("jax_num_cpu_devices", devices)
    if processes_ > 1:
        processes.join(f"127.0.0.1:{port}", processes_, index)
    split = pictures(options.steps * options.batch_size, options.image_size)
    losses = {variant: take_steps(options, variant, split) for variant in options.variants}
    rows = set(split.images.rows)
    if options.resident:
        device.Placement.fits = lambda self, nbytes: True
        losses |= {f"{variant}-resident": take_steps(options, variant, split) for variant in options.variants}
    if processes_ > 1:
        jax.distributed.shutdown()
    return Seen(losses, rows)


def free_port() -> int:
    """A port of this machine that nothing listens on now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def run_setup(options: Options, setup: str) -> list[Seen]:
    """What each process of the setup saw."""
    count, devices = map(int, setup.split("x"))
    port = free_port()
    with ProcessPoolExecutor(count, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(child, options, devices, count, i, port) for i in range(count)]
        return [future.result(timeout=600) for future in futures]


def compare(options: Options) -> dict[str, tuple[float, float]]:
    """Prints the table; each variant's largest difference to the first setup at the first step, and at any."""
    seen = {setup: run_setup(options, setup)[0].losses for setup in options.setups}
    differences = {}
    for variant in options.variants:
        columns = np.array([seen[setup][variant] for setup in options.setups])
        apart = np.abs(columns - columns[0]).max(0)
        differences[variant] = float(apart[0]), float(apart.max())
        print(f"\n{variant}: loss at each step, by processes x devices\n\n| step | {' | '.join(options.setups)} |")
        print("|---" * (len(columns) + 1) + "|")
        for step, row in enumerate(columns.T, 1):
            print(f"| {step} | {' | '.join(f'{loss:.7f}' for loss in row)} |")
        print(f"\nlargest difference: {apart[0]:.1e} at step 1, {apart.max():.1e} at any")
    return differences


if __name__ == "__main__":
    found = compare(tyro.cli(Options, description=__doc__))
    sys.exit(int(max(first for first, _ in found.values()) > BOUND))
