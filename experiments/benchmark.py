"""Times our steps against PyTorch's on this device: `pip install -e '.[bench]' && python experiments/benchmark.py`.

Every contender of a cell (variant, train step or inference, picture size, batch) has a process of its own. They run in
turn, so that a drift of the machine's speed affects all alike: read the ratios, not the seconds. A step uses a constant
batch that is on the device. Training is forward, loss, gradient and Adam; inference is pictures to logits. Peak memory
is the device's on a GPU, else the process's, compilation included.

"ours" has the precision that `--precision auto` gives a new run. "linen" is our step with linen's own layers. PyTorch
runs channels_last, on a GPU with bfloat16 autocast. "eager" is PyTorch as it is. "eager, kept" (on the CPU) and
"compile, kept" (torch.compile; inference, on a GPU training too) have our malloc settings
(`cpu.memory.keep_freed_memory`). If the CPU has instructions for bfloat16, PyTorch's autocast to it is a contender too.
"""

import dataclasses
import functools
import json
import multiprocessing
import os
import platform
import statistics
import time
import types
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # two frameworks share the GPU's memory here

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytorch_reference
import torch
import tyro
from profile_step import constant_batch, set_up
from torch.utils.flop_counter import FlopCounterMode

from unet_jax import device, environment, plots, runs, train
from unet_jax.config import PUBLISHED, VARIANTS, Precision
from unet_jax.cpu.memory import keep_freed_memory
from unet_jax.data.batches import Batch
from unet_jax.errors import InputError, exit_on_input_error

ON_GPU = torch.cuda.is_available()  # asking JAX would start its backend before contend has set its options
CPU_FLAGS = {"amx_bf16", "avx512_bf16", "avx512f", "avx2"}  # those in /proc/cpuinfo that matter here
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
    contenders: tuple[str, ...] = ()
    """Some of: ours; "ours, float32"; linen; eager; "eager, kept"; "compile, kept"; "eager, bfloat16"; "compile,
    bfloat16". Default: all that this device can run, linen only on a GPU. torch.compile takes a minute a cell."""
    out: Path = Path("benchmark")
    """Folder for benchmark.json, benchmark.md and benchmark.png."""


def cpu_features() -> list[str]:
    """The CPU_FLAGS that this CPU has, if there is a /proc/cpuinfo."""
    info = Path("/proc/cpuinfo")
    return sorted(CPU_FLAGS & set(info.read_text().split())) if info.exists() else []


def ours(
    variant: str, work: Work, batch: Batch, layers: Any = None, precision: Precision = "auto"
) -> Callable[[], Any]:
    """A function that does one step of ours, maybe with other layers, and waits for it."""
    network, steps, state, batch = set_up(variant, batch, layers, precision)
    if work == "inference":
        options = device.compiler_options(device.placement().platform)
        infer = jax.jit(functools.partial(train.infer, model=network), compiler_options=options)
        return lambda: jax.block_until_ready(infer(state, batch.images))
    states = [state]

    def step() -> None:
        states[0], loss = steps.train(states[0], batch)
        jax.block_until_ready((states[0], loss))

    return step


class LinenBatchNorm(nn.Module):
    """linen's batch norm, called as ours is."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        return nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)


def linen_conv(features: int, kernel_size: int = 3, strides: int = 1, **kwargs: Any) -> nn.Module:
    return nn.Conv(features, (kernel_size, kernel_size), strides, kernel_size // 2, **kwargs)


def linen_transposed_conv(features: int, **kwargs: Any) -> nn.Module:
    return nn.ConvTranspose(features, (3, 3), (2, 2), ((1, 2), (1, 2)), transpose_kernel=True, **kwargs)


def aligned_resize(x: jax.Array) -> jax.Array:
    scale = jnp.array([(2 * side - 1) / max(side - 1, 1) for side in x.shape[1:3]], x.dtype)
    shape = (len(x), 2 * x.shape[1], 2 * x.shape[2], x.shape[3])
    return jax.image.scale_and_translate(x, shape, (1, 2), scale, (1 - scale) / 2, "linear", antialias=False)


LINEN = types.SimpleNamespace(
    Conv=linen_conv,
    TransposedConv=linen_transposed_conv,
    BatchNorm=LinenBatchNorm,
    Dropout=nn.Dropout,
    relu=nn.relu,
    max_pool=functools.partial(nn.max_pool, window_shape=(2, 2), strides=(2, 2)),
    resize_double=aligned_resize,
    join=functools.partial(jnp.concatenate, axis=-1),
)


def theirs(variant: str, work: Work, batch: Batch, compiled: bool, half: bool = ON_GPU) -> Callable[[], Any]:
    """The same for PyTorch, with what its users would turn on."""
    row, where = VARIANTS[variant], "cuda" if ON_GPU else "cpu"
    torch.backends.cudnn.benchmark = True
    network: Any = pytorch_reference.UNet(row.downsampling, row.upsampling).to(where, memory_format=torch.channels_last)
    x = torch.from_numpy(batch.images).to(where).permute(0, 3, 1, 2)  # NHWC in memory: channels_last
    y = torch.from_numpy(batch.labels).long().to(where)
    network.train(work == "train")
    forward = torch.compile(network) if compiled else network
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3, fused=True)
    autocast = functools.partial(torch.autocast, where, torch.bfloat16, enabled=half)

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


CONTENDERS: dict[str, Callable[[str, Work, Batch], Callable[[], Any]]] = {
    "ours": ours,
    "ours, float32": functools.partial(ours, precision="float32"),
    "linen": functools.partial(ours, layers=LINEN, precision="auto" if ON_GPU else "float32"),
    "eager": functools.partial(theirs, compiled=False),
    "eager, kept": functools.partial(theirs, compiled=False),
    "compile, kept": functools.partial(theirs, compiled=True),
    "eager, bfloat16": functools.partial(theirs, compiled=False, half=True),
    "compile, bfloat16": functools.partial(theirs, compiled=True, half=True),
}
IN_JAX = ("ours", "ours, float32", "linen")


def peak_memory(name: str) -> int:
    """The most bytes of the device that this process has taken at once."""
    if not ON_GPU:  # not getrusage's maximum, which a process inherits from the one that starts it
        status = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line.split()[1] for line in status if line.startswith("VmHWM")))
    if name in IN_JAX:
        return jax.local_devices()[0].memory_stats()["peak_bytes_in_use"]
    return torch.cuda.max_memory_allocated()


def contend(connection: Connection, name: str, variant: str, work: Work, size: int, batch: int) -> None:
    """A contender's process: sends its peak memory after two warm-up steps, then the seconds of a step on each request.

    A turn is two steps, and the second is timed. The first one finds caches full of another contender's data, which
    does not happen in training, where steps follow each other.
    """
    if name != "eager":
        keep_freed_memory()
    step = CONTENDERS[name](variant, work, constant_batch(size, batch))
    step()
    step()
    connection.send(peak_memory(name))
    while connection.recv():
        step()
        start = time.perf_counter()
        step()
        connection.send(time.perf_counter() - start)


def measure(names: Sequence[str], repeats: int, *cell: Any) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds of each contender's steps, in turns, and its peak memory in bytes."""
    spawn, connections, peaks = multiprocessing.get_context("spawn"), {}, {}
    for name in names:  # one after the other: compiling takes all cores
        connections[name], its_end = spawn.Pipe()
        spawn.Process(target=contend, args=(its_end, name, *cell), daemon=True).start()
        its_end.close()  # so that a process that has died is noticed here
        peaks[name] = connections[name].recv()
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(repeats):
        for name, connection in connections.items():
            connection.send(True)
            times[name].append(connection.recv())
    for connection in connections.values():
        connection.send(False)
    return times, peaks


def precision() -> Precision:
    """The precision of "ours"."""
    return device.fastest_precision(device.placement())


def matrix_peak() -> float:
    """FLOP/s of a large matrix product in the precision of training: what the device can do at best."""
    n = 8192 if ON_GPU else 2048
    a = jnp.ones((n, n), precision())
    product, seconds = jax.jit(jnp.matmul), []
    for _ in range(20):
        start = time.perf_counter()
        jax.block_until_ready(product(a, a))
        seconds.append(time.perf_counter() - start)
    return 2 * n**3 / min(seconds)


def contenders(options: Options, work: Work) -> list[str]:
    """The names of the contenders that are wanted and can run here."""
    without = set() if ON_GPU or work == "inference" else {"compile, kept", "compile, bfloat16"}
    if ON_GPU:
        without |= {"ours, float32", "eager, kept"}
    if ON_GPU or not {"amx_bf16", "avx512_bf16"} & set(cpu_features()):
        without |= {"eager, bfloat16", "compile, bfloat16"}
    if precision() == "float32":
        without.add("ours, float32")
    wanted = options.contenders or [name for name in CONTENDERS if name != "linen" or ON_GPU]
    names = [name for name in wanted if name not in without]
    if "ours" not in names or set(names) <= set(IN_JAX) or not set(names) <= set(CONTENDERS):
        known = "; ".join(name for name in CONTENDERS if name not in without)
        raise InputError(f"--contenders: ours and at least one of PyTorch's are needed, of {known}")
    return names


def cell(options: Options, variant: str, work: Work, size: int, batch: int) -> dict[str, Any]:
    """The times of one cell, and what follows from them."""
    names = contenders(options, work)
    times, peaks = measure(names, options.repeats, variant, work, size, batch)
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        network = pytorch_reference.UNet(VARIANTS[variant].downsampling, VARIANTS[variant].upsampling)
        network.eval()(torch.zeros(1, 3, size, size))
    flops = counter.get_total_flops() * batch * (3 if work == "train" else 1)
    best = min((n for n in times if n not in IN_JAX), key=lambda n: medians[n])
    # Turn by turn: within a turn, both met the machine at about the same speed.
    to_best = [a / b for a, b in zip(times["ours"], times[best], strict=True)]
    return {
        "variant": variant, "work": work, "size": size, "batch": batch, "seconds": times, "best_torch": best,
        "ratio": statistics.median(to_best), "ratio_range": [min(to_best), max(to_best)],
        "medians": medians, "peak_bytes": peaks,
        "images_per_second": batch / medians["ours"], "flop_per_second": flops / medians["ours"],
        "precision": precision(),
    }  # fmt: skip


def table(cells: list[dict[str, Any]], peak: float) -> str:
    """Markdown, a row a cell."""
    head = [
        "variant", "work", "size", "batch", "ours, s", "PyTorch's best, s", "ratio (min to max)", "ours in float32, s",
        "images/s", "of peak", "linen / ours", "peak memory, ours / PyTorch's best",
    ]  # fmt: skip
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for c in cells:
        (low, high), medians = c["ratio_range"], c["medians"]
        row = (
            c["variant"], c["work"], c["size"], c["batch"], f"{medians['ours']:.4g} ({c['precision']})",
            f"{medians[c['best_torch']]:.4g} ({c['best_torch']})", f"{c['ratio']:.2f} ({low:.2f} to {high:.2f})",
            f"{medians['ours, float32']:.4g}" if "ours, float32" in medians else "-",
            f"{c['images_per_second']:.1f}", f"{c['flop_per_second'] / peak:.0%}",
            f"{medians['linen'] / medians['ours']:.2f}" if "linen" in medians else "-",
            " / ".join(f"{c['peak_bytes'][name] / 1e9:.2f} GB" for name in ("ours", c["best_torch"])),
        )  # fmt: skip
        lines.append(f"| {' | '.join(map(str, row))} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    if (jax.default_backend() == "gpu") != ON_GPU:
        raise InputError("only one of JAX and PyTorch sees a GPU: install the other's CUDA build, or hide the GPU")
    options.out.mkdir(parents=True, exist_ok=True)
    processor = {"processor": platform.processor(), "features": cpu_features()}
    about = {**environment.current(), "torch": torch.__version__, **processor}
    peak, cells = matrix_peak(), []
    print(
        f"{device.describe()} with {', '.join(cpu_features())}; matrix peak {peak / 1e9:.0f} GFLOP/s in {precision()}"
    )
    for variant in options.variants:
        for work in options.work:
            for size in options.sizes:
                for batch in options.batches:
                    cells.append(cell(options, variant, work, size, batch))
                    print(table(cells[-1:], peak).splitlines()[-1], flush=True)
                    # After every cell, so that an interrupted run keeps what it has measured.
                    result = {"environment": about, "matrix_peak": peak, "cells": cells}
                    runs.write_json(options.out / "benchmark.json", result)
                    runs.write_text(options.out / "benchmark.md", table(cells, peak))
                    plots.ratio_figure(cells, device.describe()).savefig(options.out / "benchmark.png")
    print(json.dumps(about["versions"]))


if __name__ == "__main__":
    with exit_on_input_error():
        main()
