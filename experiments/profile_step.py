"""Where a step's time goes: `python experiments/profile_step.py --variant mp_tr_ce --out trace`.

Traces a few steps on a constant batch, for TensorBoard or Perfetto (the .trace.json.gz inside), and prints a table of
time by layer and operation. On the CPU several threads work at once, and the threads of a convolution are not told
apart. Times are the busy time of what XLA names, so read the shares; "untold" is the rest.
"""

import collections
import dataclasses
import re
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

from unet_jax import device, runs, train
from unet_jax.config import Precision, default_config
from unet_jax.cpu.memory import keep_freed_memory
from unet_jax.data.batches import Batch
from unet_jax.errors import exit_on_input_error
from unet_jax.model import UNet


@dataclasses.dataclass(frozen=True)
class Options:
    """What to trace."""

    variant: str = "mp_tr_dice"
    """The variant, at full width."""
    image_size: int = 128
    """Height and width."""
    batch_size: int = 8
    """Pictures in the batch."""
    steps: int = 3
    """Traced training steps."""
    rows: int = 30
    """Rows of the table."""
    precision: Precision = "auto"
    """What the layers compute in."""
    out: Path = Path("trace")
    """Folder of the trace."""


def constant_batch(size: int, count: int) -> Batch:
    """Random images uint8 [count, size, size, 3] and labels uint8 [count, size, size], the same at each call."""
    rng, shape = np.random.default_rng(0), (count, size, size)
    images, labels = rng.integers(0, 256, (*shape, 3), np.uint8), rng.integers(0, 3, shape, np.uint8)
    return Batch(images, labels, np.ones(count, np.float32))


def set_up(
    variant: str, batch: Batch, layers: Any = None, precision: Precision = "auto"
) -> tuple[UNet, train.Steps, train.TrainState, Batch]:
    """A variant's network, its steps, its fresh state and the batch, both on the device; maybe with other layers."""
    config, place = default_config(variant, "synthetic"), device.placement()
    precision = device.fastest_precision(place) if precision == "auto" else precision
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, precision=precision))
    state = jax.device_put(runs.fresh_state(config, place), place.replicated)
    model = train.make_model(config.model, len(config.data.class_names), place)
    model = model.clone(layers=layers or model.layers)
    return model, train.make_steps(config, place, 1, model=model), state, jax.device_put(batch, place.batch)


def busy_seconds(folder: Path) -> dict[str, float]:
    """Seconds by HLO operation, of the newest trace in the folder."""
    newest = max(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    seconds: dict[str, float] = collections.defaultdict(float)
    for plane in jax.profiler.ProfileData.from_file(str(newest)).planes:
        for line in plane.lines:
            for event in line.events:
                if operation := dict(event.stats).get("hlo_op"):
                    seconds[str(operation)] += event.duration_ns / 1e9
    return seconds


def layer_of(hlo: str) -> dict[str, str]:
    """{operation: "forward encoder1/conv1 (convolution)"} from the metadata of a compiled program."""
    names = {}
    for name, opcode, path in re.findall(r'%?([\w.-]+) = .*? ([\w-]+)\(.*op_name="([^"]*)"', hlo):
        layer = re.search(r"(?:encoder|decoder|down|up)\d+(?:/(?:conv|norm)\d*)?|head|logits", path)
        direction = "gradient" if "transpose(" in path else "forward"
        names[name] = f"{direction} {layer[0]} ({opcode})" if layer else f"loss, optimizer and others ({opcode})"
    return names


def main(options: Options) -> None:
    keep_freed_memory()  # as run.py does
    batch = constant_batch(options.image_size, options.batch_size)
    _, steps, state, batch = set_up(options.variant, batch, precision=options.precision)
    step = steps.train.lower(state, batch).compile()  # type: ignore[attr-defined]
    state, _ = jax.block_until_ready(step(state, batch))
    with jax.profiler.trace(options.out):
        start = time.perf_counter()
        for _ in range(options.steps):
            state, _ = jax.block_until_ready(step(state, batch))
        wall = time.perf_counter() - start
    names, totals = layer_of(step.as_text()), collections.Counter[str]()
    for operation, seconds in busy_seconds(options.out).items():
        totals[names.get(operation, f"others ({operation.split('.')[0]})")] += seconds  # type: ignore[assignment]
    print(f"{device.describe()}; {1e3 * wall / options.steps:.1f} ms a step; trace in {options.out}\n")
    print("| layer (operation) | ms a step | share of the step |\n|---|---|---|")
    rest = [("untold", max(0.0, wall - sum(totals.values())))]
    for name, seconds in totals.most_common(options.rows) + rest:
        print(f"| {name} | {1e3 * seconds / options.steps:.2f} | {seconds / wall:.1%} |")


if __name__ == "__main__":
    with exit_on_input_error():
        main(tyro.cli(Options, description=__doc__))
