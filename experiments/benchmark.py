"""Times our steps against PyTorch's on this device: `pip install -e '.[bench]' && python experiments/benchmark.py`.

Every contender of a cell (variant, train step or inference, picture size, batch) runs in turn within one process, so
that a drift of the machine's speed hits all alike; read the ratios, not the seconds. A step is one on a constant batch
that lies on the device: training is forward, loss, gradient and Adam; inference is pictures to logits. PyTorch runs
eager and through torch.compile (inference; on a GPU training too), channels_last, on a GPU with bfloat16 autocast.
"linen" is our network with linen's own layers in place of ours. Peak memory is that of a process of its own for each
contender: of the device on a GPU, else of the process.
"""

import contextlib
import dataclasses
import functools
import json
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal
from unittest import mock

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # two frameworks share the GPU's memory here

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytorch_reference
import torch
import tyro
from profile_step import constant_batch, set_up
from torch.utils.flop_counter import FlopCounterMode

from unet_jax import device, model, plots, runs, train
from unet_jax.config import PUBLISHED, VARIANTS
from unet_jax.data.batches import Batch
from unet_jax.errors import exit_on_input_error

ON_GPU = jax.default_backend() == "gpu"
Work = Literal["train", "inference"]


@dataclasses.dataclass(frozen=True)
class Options:
    """The grid of cells."""

    variants: tuple[str, ...] = PUBLISHED
    work: tuple[Work, ...] = ("train", "inference")
    sizes: tuple[int, ...] = (128, 240)
    batches: tuple[int, ...] = (32, 64, 128) if ON_GPU else (8, 16)
    repeats: int = 20 if ON_GPU else 5
    """Timed runs of each contender, after one that compiles."""
    torch_compile: bool = True
    """Include torch.compile, which takes its minute a cell."""
    linen: bool = False
    """Include linen's own layers."""
    memory: bool = False
    """Measure peak memory too, ours and eager PyTorch's."""
    out: Path = Path("benchmark")
    """Folder for benchmark.json, benchmark.md and benchmark.png."""


def ours(variant: str, work: Work, batch: Batch) -> Callable[[], Any]:
    """A function that does one step of ours and waits for it."""
    config, steps, state, batch = set_up(variant, batch)
    network = train.make_model(config.model, 3)
    if work == "inference":
        infer = jax.jit(functools.partial(train.infer, model=network), compiler_options=device.compiler_options())
        return lambda: jax.block_until_ready(infer(state, batch.images))
    states = [state]

    def step() -> None:
        states[0], loss = steps.train(states[0], batch)
        jax.block_until_ready((states[0], loss))

    return step


class LinenBatchNorm(nn.Module):
    """linen's batch norm behind the interface of ours."""

    relu_first: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = nn.relu(x) if self.relu_first else x
        return nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)


def linen_conv(features: int, kernel_size: int = 3, strides: int = 1, **kwargs: Any) -> nn.Module:
    return nn.Conv(features, (kernel_size, kernel_size), strides, kernel_size // 2, **kwargs)


def linen_transposed_conv(features: int, **kwargs: Any) -> nn.Module:
    return nn.ConvTranspose(features, (3, 3), (2, 2), ((1, 2), (1, 2)), transpose_kernel=True, **kwargs)


def aligned_resize(x: jax.Array) -> jax.Array:
    scale = jnp.array([(2 * side - 1) / max(side - 1, 1) for side in x.shape[1:3]], x.dtype)
    shape = (len(x), 2 * x.shape[1], 2 * x.shape[2], x.shape[3])
    return jax.image.scale_and_translate(x, shape, (1, 2), scale, (1 - scale) / 2, "linear", antialias=False)


LINEN = {
    "Conv": linen_conv,
    "TransposedConv": linen_transposed_conv,
    "BatchNorm": LinenBatchNorm,
    "max_pool": functools.partial(nn.max_pool, window_shape=(2, 2), strides=(2, 2)),
    "resize_double": aligned_resize,
}


def linen(variant: str, work: Work, batch: Batch) -> Callable[[], Any]:
    """The same with linen's own layers, compiled as jit does by itself."""
    with contextlib.ExitStack() as exchanged:
        for name, layer in LINEN.items():
            exchanged.enter_context(mock.patch.object(model, name, layer))
        for module in (device, train):
            exchanged.enter_context(mock.patch.object(module, "compiler_options", return_value={}))
        step = ours(variant, work, batch)
        step()  # is traced now
    return step


def theirs(variant: str, work: Work, batch: Batch, compiled: bool) -> Callable[[], Any]:
    """The same of PyTorch, with what its users would turn on."""
    row, where = VARIANTS[variant], "cuda" if ON_GPU else "cpu"
    torch.backends.cudnn.benchmark = True
    network: Any = pytorch_reference.UNet(row.downsampling, row.upsampling).to(where, memory_format=torch.channels_last)
    x = torch.from_numpy(batch.images).to(where).permute(0, 3, 1, 2)  # NHWC in memory: channels_last
    y = torch.from_numpy(batch.labels).long().to(where)
    network.train(work == "train")
    forward = torch.compile(network) if compiled else network
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3, fused=True)
    autocast = functools.partial(torch.autocast, "cuda", torch.bfloat16, enabled=ON_GPU)

    def synchronize(value: Any) -> None:
        if ON_GPU:
            torch.cuda.synchronize()

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with autocast():
            logits = forward(x.float() / 255)
        getattr(pytorch_reference, row.loss)(logits.float(), y).backward()
        synchronize(optimizer.step())

    @torch.inference_mode()
    def infer() -> None:
        with autocast():
            synchronize(forward(x.float() / 255))

    return step if work == "train" else infer


def measure(contenders: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each contender's steps, in turns, after two that warm it up.

    A turn is two steps, the second timed: training repeats its step, and the first one after another contender's pays
    for caches and memory that it finds taken.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(-1, repeats):
        for name, step in contenders.items():
            step()
            start = time.perf_counter()
            step()
            if turn >= 0:
                times[name].append(time.perf_counter() - start)
    return times


def matrix_peak() -> float:
    """FLOP/s of a large matrix product in the precision of training: what the device can do at best."""
    n = 8192 if ON_GPU else 2048
    a = jnp.ones((n, n), device.compute_dtype("auto"))
    product = jax.jit(jnp.matmul)
    times = measure({"product": lambda: jax.block_until_ready(product(a, a))}, 10)["product"]
    return 2 * n**3 / min(times)


def peak_memory(name: str, variant: str, work: Work, size: int, batch: int) -> int:
    """Bytes that three steps of a contender take at most; to be called in a process that has done nothing else."""
    data = constant_batch(size, batch)
    step = ours(variant, work, data) if name == "ours" else theirs(variant, work, data, compiled=False)
    for _ in range(3):
        step()
    if not ON_GPU:  # not getrusage's maximum, which a process inherits from the one that starts it
        return 1024 * int(
            next(x.split()[1] for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
        )
    if name == "ours":
        return jax.local_devices()[0].memory_stats()["peak_bytes_in_use"]
    return torch.cuda.max_memory_allocated()


def cell(options: Options, variant: str, work: Work, size: int, batch: int) -> dict[str, Any]:
    """The times of one cell, and what follows from them."""
    data = constant_batch(size, batch)
    contenders = {"ours": ours(variant, work, data), "torch eager": theirs(variant, work, data, compiled=False)}
    if options.torch_compile and (ON_GPU or work == "inference"):
        contenders["torch.compile"] = theirs(variant, work, data, compiled=True)
    if options.linen:
        contenders["linen"] = linen(variant, work, data)
    times = measure(contenders, options.repeats)
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        network = pytorch_reference.UNet(VARIANTS[variant].downsampling, VARIANTS[variant].upsampling)
        network.eval()(torch.zeros(1, 3, size, size))
    flops = counter.get_total_flops() * batch * (3 if work == "train" else 1)
    # The ratio turn by turn: both of a turn met the machine at about the same speed.
    best = min((n for n in times if n.startswith("torch")), key=lambda n: medians[n])
    ratios = [a / b for a, b in zip(times["ours"], times[best], strict=True)]
    result = {
        "variant": variant, "work": work, "size": size, "batch": batch, "seconds": times, "best_torch": best,
        "ratio": statistics.median(ratios), "ratio_range": [min(ratios), max(ratios)], "medians": medians,
        "images_per_second": batch / medians["ours"], "flop_per_second": flops / medians["ours"],
    }  # fmt: skip
    if options.memory:
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            names = ("ours", "torch eager")
            peaks = [pool.apply(peak_memory, (name, variant, work, size, batch)) for name in names]
        result["peak_bytes"] = dict(zip(names, peaks, strict=True))
    return result


def table(cells: list[dict[str, Any]], peak: float) -> str:
    """Markdown, a row a cell."""
    head = [
        "variant", "work", "size", "batch", "ours, s", "PyTorch's best, s", "ratio (min to max)", "images/s",
        "of peak", "linen / ours", "peak memory, ours / PyTorch",
    ]  # fmt: skip
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for c in cells:
        low, high = c["ratio_range"]
        linen_ratio = f"{c['medians']['linen'] / c['medians']['ours']:.2f}" if "linen" in c["medians"] else "-"
        peaks = c.get("peak_bytes")
        memory = " / ".join(f"{bytes_ / 1e9:.2f} GB" for bytes_ in peaks.values()) if peaks else "-"
        row = (
            c["variant"], c["work"], c["size"], c["batch"], f"{c['medians']['ours']:.4g}",
            f"{c['medians'][c['best_torch']]:.4g} ({c['best_torch']})", f"{c['ratio']:.2f} ({low:.2f} to {high:.2f})",
            f"{c['images_per_second']:.1f}", f"{c['flop_per_second'] / peak:.0%}", linen_ratio, memory,
        )  # fmt: skip
        lines.append(f"| {' | '.join(map(str, row))} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    options.out.mkdir(parents=True, exist_ok=True)
    environment = {**runs.environment(), "torch": torch.__version__, "processor": platform.processor()}
    peak, cells = matrix_peak(), []
    print(f"{device.describe()}; matrix peak {peak / 1e9:.0f} GFLOP/s; torch {torch.__version__}")
    for variant in options.variants:
        for work in options.work:
            for size in options.sizes:
                for batch in options.batches:
                    cells.append(cell(options, variant, work, size, batch))
                    print(table(cells[-1:], peak).splitlines()[-1], flush=True)
                    # After every cell, so that an interrupted run keeps what it has measured.
                    result = {"environment": environment, "matrix_peak": peak, "cells": cells}
                    runs.write_json(options.out / "benchmark.json", result)
                    runs.write_text(options.out / "benchmark.md", table(cells, peak))
                    plots.ratio_figure(cells, device.describe()).savefig(options.out / "benchmark.png")
    print(json.dumps(environment["versions"]))


if __name__ == "__main__":
    with exit_on_input_error():
        main()
