"""A run as one file that needs no unet_jax: its network and weights as StableHLO, by `jax.export`."""

import dataclasses
import hashlib
import importlib.metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, export, lax

from unet_jax import device, layers, runs
from unet_jax.config import RunConfig, to_dict
from unet_jax.errors import InputError
from unet_jax.predict import probabilities_step
from unet_jax.train import TrainState, inference_state, make_model

PLATFORMS = ("cpu", "cuda", "tpu")
ARTIFACT = "model.jaxexport"
USAGE = """\
import jax, pathlib
model = jax.export.deserialize(bytearray(pathlib.Path("model.jaxexport").read_bytes()))
labels = jax.jit(model.call)(images).argmax(-1)"""


def input_shape(config: RunConfig) -> str:
    """The shape of the artifact's pictures, in the notation of `jax.export.symbolic_shape`."""
    multiple = 2 ** (len(config.model.widths) - 1)
    return f"n, {multiple}*h, {multiple}*w, 3"


def export_step(config: RunConfig, state: TrainState) -> export.Exported:
    """Class probabilities of uint8 pictures as a program for PLATFORMS, with the state inside."""
    # Any device is to run it, at any size: the plain layers.
    model = make_model(config.model, len(config.data.class_names), device.placement()).clone(layers=layers)

    def step(images: Array) -> Array:
        # Behind the barrier weights are no constants to fold: rounding stays the checkpoint's, and compiling quick.
        return probabilities_step(lax.optimization_barrier(state), images, model=model)

    shape = export.symbolic_shape(input_shape(config))
    limit = jax.config.jax_traceback_in_locations_limit  # type: ignore[attr-defined]
    jax.config.update("jax_traceback_in_locations_limit", 0)  # no file names of this machine in the artifact
    try:
        return export.export(jax.jit(step), platforms=PLATFORMS)(jax.ShapeDtypeStruct(shape, jnp.uint8))
    finally:
        jax.config.update("jax_traceback_in_locations_limit", limit)


def describe(config: RunConfig, step: int, artifact: bytes, version: int) -> dict[str, Any]:
    """What model.json says: all that a user of the artifact has to know."""
    names = list(config.data.class_names)
    shape = [int(d) if d.isdecimal() else d for d in input_shape(config).split(", ")]
    return {
        "artifact": {"file": ARTIFACT, "bytes": len(artifact), "sha256": hashlib.sha256(artifact).hexdigest()},
        "platforms": PLATFORMS,
        "needs": ["jax", "flatbuffers"],
        "usage": USAGE.split("\n"),
        # The option of device.compiler_options belongs to the caller's jit and cannot travel in the artifact.
        "optional_on_cpu": {
            "compiler_options": {"xla_cpu_experimental_ynn_fusion_type": ""},
            "why": "faster, with the run's own rounding; leave it out where this XLA does not know it",
        },
        "input": {"name": "images [pictures, height, width, RGB]", "dtype": "uint8", "shape": shape},
        "output": {"name": "class probabilities", "dtype": "float32", "shape": [*shape[:3], len(names)]},
        "class_names": names,
        "preprocessing": "values 0 to 255 as they are; best at the training size, by antialiased bilinear resizing",
        "training_size": config.data.image_size,
        "config": to_dict(config),
        "step": step,
        "calling_convention_version": version,
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")},
    }


def export_run(run: Path, out: Path) -> dict[str, Any]:
    """Writes a run's checkpoint (that of `runs.load`) to `out` as ARTIFACT, and model.json; returns what that says.

    Its layers compute in float32, whatever the run's did: the artifact is for any device.

    Raises:
      InputError: there is no run or no complete checkpoint, `out` cannot be written, or flatbuffers is not installed.
    """
    config, restored = runs.load(run, device.placement())
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, precision="float32"))
    exported = export_step(config, jax.device_get(inference_state(restored.state)))
    try:
        artifact = bytes(exported.serialize())
        out.mkdir(parents=True, exist_ok=True)
        description = describe(config, int(restored.state.step), artifact, exported.calling_convention_version)
        (out / "model.json").unlink(missing_ok=True)  # it is written last: with it the folder is complete
        with runs.replacing(out / ARTIFACT) as file:
            file.write(artifact)
        runs.write_json(out / "model.json", description)
    except ImportError:
        raise InputError("exporting needs flatbuffers: pip install 'unet-jax[export]'") from None
    except OSError as error:
        raise InputError(f"--out {out} cannot be written ({error.strerror}): choose another folder") from None
    return description
