"""What depends on the device: placement of arrays, precision, compiler options, memory, the compilation cache."""

import contextlib
import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from unet_jax import layers
from unet_jax.config import Precision
from unet_jax.cpu.memory import keep_freed_memory
from unet_jax.errors import InputError
from unet_jax.processes import quiet


class Placement(NamedTuple):
    """Data parallelism over all devices: state replicated, batches split along their first axis."""

    replicated: NamedSharding
    batch: NamedSharding
    devices: int

    @property
    def platform(self) -> str:
        """The kind of the devices: "cpu", "gpu", "tpu" and so on."""
        device: jax.Device = next(iter(self.replicated.device_set))
        return device.platform

    def fits(self, nbytes: int) -> bool:
        """Whether data of this size may stay on an accelerator: less than a third of its memory, beside training."""
        # On the CPU a copy would be no faster to read than the memory-mapped arrays.
        stats = None if self.platform == "cpu" else jax.local_devices()[0].memory_stats()
        return stats is not None and nbytes < stats["bytes_limit"] / 3

    def check_batch(self, batch_size: int, examples: int, kept: int = 0) -> None:
        """Raises InputError if the devices do not divide the batches, or the short last batch of an epoch.

        `kept` is the number of pictures in the validation part.
        """
        advice = []
        for flag, size in (("batch-size", batch_size), ("train-examples", examples)):
            if size % self.devices:
                down = size // self.devices * self.devices
                # Pictures can only be left out. Unless the devices divide their number, no batch size works.
                sizes = [down, down + self.devices] if flag == "batch-size" else [down]
                numbers = " or ".join(str(s) for s in sizes if 0 < s <= examples)
                if kept and flag == "train-examples":
                    advice.append(f"a --{flag} or --validation-fraction that leaves {numbers} to train on")
                else:
                    advice.append(f"--{flag} {numbers}")
        if examples < self.devices:
            raise InputError(f"{examples} training pictures are too few for {self.devices} devices: use fewer devices")
        if advice:
            raise InputError(
                f"{self.devices} devices do not divide the batches of {batch_size} pictures, or the last one of"
                f" {examples % batch_size or batch_size}: choose {' and '.join(advice)}"
            )

    def out_of_memory(self, batch_size: int) -> InputError:
        """What to tell a user whose batch does not fit into the devices' memory."""
        half = batch_size // 2 // self.devices * self.devices
        smaller = f"--batch-size {half} (as another run)" if half else "a smaller --image-size"
        return InputError(f"batches of {batch_size} need more memory than the devices have: try --remat, or {smaller}")


def placement(devices: Sequence[jax.Device] | None = None) -> Placement:
    """The placement on these devices, by default all that JAX sees."""
    devices = jax.devices() if devices is None else devices
    # Explicit axes, the default, are refused by linen's Dropout.
    mesh: Mesh = jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)
    return Placement(NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data")), len(devices))


def compute_dtype(precision: Precision, platform: str) -> DTypeLike:
    """The dtype that layers compute in. Exported weights have "auto", and runs of older versions."""
    if precision == "auto":
        return jnp.float32 if platform == "cpu" else jnp.bfloat16
    return jnp.dtype(precision)


def fastest_precision(placement: Placement) -> Precision:
    """What "auto" is in a new run: bfloat16 on an accelerator, or on one CPU with such products, else float32."""
    if placement.platform != "cpu":
        return "bfloat16"
    from unet_jax.cpu.library import has_bfloat16

    return "bfloat16" if placement.devices == 1 and has_bfloat16() else "float32"


def fast_layers(placement: Placement) -> Any:
    """The layers for a `UNet` that are the fastest there: `unet_jax.layers`, or on one CPU `unet_jax.cpu.layers`."""
    if placement.platform != "cpu" or placement.devices > 1:  # XLA cannot split a call of the C++ among devices
        return layers
    from unet_jax.cpu import layers as cpu_layers

    return cpu_layers


@functools.cache
def compiler_options(platform: str, deterministic: bool = False) -> dict[str, str | bool]:
    """Options for `jax.jit(..., compiler_options=)` on a platform. The CPU is deterministic without any.

    On the CPU, XLA's "YNN" fusion of convolutions doubles the time of this network's step, most of all in the
    kernel gradients; it is turned off where this jaxlib knows the option.
    """
    if platform != "cpu":
        return {"xla_gpu_deterministic_ops": True} if deterministic and platform == "gpu" else {}
    options: dict[str, str | bool] = {"xla_cpu_experimental_ynn_fusion_type": ""}
    try:
        jax.jit(lambda: 0, compiler_options=options).lower().compile()
    except jax.errors.JaxRuntimeError:  # a jaxlib that does not know an option refuses to compile with it
        return {}
    return options


def set_up(compilation_cache: Path | None) -> None:
    """Sets up JAX, memory and loggers for this process. Call it before JAX's backend starts.

    Compiled programs are kept in the folder, or in JAX_COMPILATION_CACHE_DIR if it is set: a second start is quick.
    Where the folder cannot be written, nothing is kept.
    """
    if compilation_cache and not jax.config.jax_compilation_cache_dir and _can_write(compilation_cache):  # type: ignore[attr-defined]
        jax.config.update("jax_compilation_cache_dir", str(compilation_cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    keep_freed_memory()
    quiet()


def _can_write(folder: Path) -> bool:
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    return os.access(folder, os.W_OK)


def describe() -> str:
    """A line for users that names the devices, with a hint where there is a GPU that JAX cannot use."""
    devices = jax.devices()
    count = f"{len(devices)} x " if len(devices) > 1 else ""
    if devices[0].platform != "cpu":
        return f"device: {count}{devices[0].device_kind}"
    line = f"device: {count}CPU ({os.cpu_count()} cores)"
    if Path("/proc/driver/nvidia/version").exists() or Path("/dev/nvidia0").exists():
        line += "; there is an NVIDIA GPU that JAX cannot use: pip install 'unet-jax[cuda13]' (or [cuda12])"
    return line
