"""What a step needs on an H200, found by compiling it for one: memory, kernels, all-reduces. It needs no GPU.

    pip install -e '.[cuda13]' && python experiments/compile_for_gpu.py --image-size 240 --batch-size 64 --devices 1

Traffic is what the kernels read and write: the full sizes of their inputs and outputs, even if a kernel reads only a
part. It gives a bound on the time and no more: an H200 moves 4.8 TB/s. cuDNN's choices, which it makes by running, are
not made here, so its workspaces are not counted.
"""

import dataclasses
import functools
import math
import os
import re

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0"

import jax
import tyro
from jax.experimental import topologies
from profile_step import constant_batch

from unet_jax import runs, train
from unet_jax.checks import check_size
from unet_jax.config import PUBLISHED, ModelConfig, Precision, default_config
from unet_jax.device import placement
from unet_jax.errors import InputError, exit_on_input_error

H200 = """
platform_name: "CUDA"
device_description_str: "NVIDIA H200"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 13 }
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  registers_per_block_limit: 65536 registers_per_core_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  l2_cache_size: 52428800 memory_bandwidth: 4800000000000 device_memory_size: 150000000000
}
"""
NO_KERNELS = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "all-reduce-done"}


@dataclasses.dataclass(frozen=True)
class Options:
    """What to compile."""

    variants: tuple[str, ...] = PUBLISHED
    image_size: int = 240
    """Height and width."""
    batch_size: int = 64
    """Pictures in the batch, over all devices."""
    devices: int = 1
    """H200s of one node."""
    precision: Precision = "bfloat16"
    remat: bool = False


def size_of(shapes: str) -> float:
    """Bytes of all arrays in an HLO type such as "(bf16[64,240,240,32]{3,2,1,0}, pred[])"."""
    arrays = re.findall(r"\b(pred|[a-z]+(\d+))\[([\d,]*)\]", shapes)
    return sum(int(bits or 8) / 8 * math.prod(int(n) for n in dims.split(",") if n) for _, bits, dims in arrays)


def kernels_of(hlo: str) -> list[tuple[str, float, float]]:
    """(operation, bytes of output, bytes of input and output) of each kernel of a compiled program."""
    types: dict[str, str] = {}
    kernels = []
    for line in hlo[hlo.index("\nENTRY") :].splitlines():
        if found := re.match(r"\s+(?:ROOT )?%([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*?)\)(.*)", line):
            name, types[name], operation, taken, rest = found[1], found[2], *found.groups()[2:]
            target = re.search(r'custom_call_target="([^"]*)"', rest)
            inputs = sum(size_of(types[n]) for n in re.findall(r"%([\w.-]+)", taken))
            given = inputs if operation == "all-reduce-start" else size_of(types[name])  # its type has both
            if operation not in NO_KERNELS:
                kernels.append((target[1] if target else operation, given, inputs + given))
    return kernels


def main(options: Options) -> None:
    try:
        topology = topologies.get_topology_desc(platform="cuda", target_config=H200, topology=f"1x1x{options.devices}")
    except (RuntimeError, ValueError) as error:
        raise InputError(f"jax cannot compile for CUDA here, pip install -e '.[cuda13]': {error}") from None
    place = placement(topology.devices)
    place.check_batch(options.batch_size, options.batch_size * options.devices)
    check_size(options.image_size, options.image_size, len(ModelConfig().widths))
    batch = constant_batch(options.image_size, options.batch_size)
    configs = [default_config(variant, "oxford_iiit_pet") for variant in options.variants]
    print("| variant | work | temporaries, GB | traffic, GB | convolutions | other kernels | all-reduces |")
    print("|---|---|---|---|---|---|---|")
    for config in configs:
        network = dataclasses.replace(config.model, precision=options.precision, remat=options.remat)
        config = dataclasses.replace(config, model=network)
        steps = train.make_steps(config, place, steps_per_epoch=1)
        state = jax.eval_shape(functools.partial(runs.fresh_state, config, place))
        works = {"train": steps.train.lower(state, batch)}  # type: ignore[attr-defined]
        if options.devices == 1:
            inference = train.inference_state(state)
            works["predict"] = steps.predict.lower(inference, batch.images)  # type: ignore[attr-defined]
        for work, lowered in works.items():
            compiled = lowered.compile()
            kernels = kernels_of(compiled.as_text())
            convolutions = sum(operation.startswith("__cudnn$conv") for operation, *_ in kernels)
            reduced = [given for operation, given, _ in kernels if operation.startswith("all-reduce")]
            print(
                f"| {config.variant} | {work} | {compiled.memory_analysis().temp_size_in_bytes / 1e9:.2f}"
                f" | {sum(moved for *_, moved in kernels) / 1e9:.1f} | {convolutions} |"
                f" {len(kernels) - convolutions - len(reduced)}"
                f" | {len(reduced)}{f', largest {max(reduced) / 1e6:.1f} MB' if reduced else ''} |",
                flush=True,
            )


if __name__ == "__main__":
    with exit_on_input_error():
        main(tyro.cli(Options, description=__doc__))
