"""A run as one file: as StableHLO or ONNX, which need no unet_jax, or its weights alone, which every command reads."""

import dataclasses
import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, export, lax

from unet_jax import checkpoint, device, layers, runs, weights
from unet_jax.config import ExportFormat, RunConfig, sides, to_dict
from unet_jax.data.pictures import WHITE
from unet_jax.errors import InputError, quiet
from unet_jax.predict import probabilities_step
from unet_jax.train import TrainState, inference_state, make_model

PLATFORMS = ("cpu", "cuda", "tpu")
# The option of device.compiler_options belongs to the caller's jit and cannot travel in the file.
OPTIONAL = {
    "compiler_options": {"xla_cpu_experimental_ynn_fusion_type": ""},
    "why": "faster, with the run's own rounding; leave it out where this XLA does not know it",
}


class Artifact(NamedTuple):
    """The file of a format, and what its user has to know."""

    name: str
    content: bytes
    shape: str  # of the pictures, in the notation of `jax.export.symbolic_shape`
    usage: str  # the lines that call it
    facts: Mapping[str, Any]  # what else model.json says
    labels: bool = False  # what those lines get: labels, else class probabilities
    config: RunConfig | None = None  # written as config.json, for a folder that stands for the run


def any_size(config: RunConfig) -> str:
    """Artifact.shape of any batch, and any size that fits the levels."""
    multiple = 2 ** (len(config.model.widths) - 1)
    return f"n, {multiple}*h, {multiple}*w, 3"


def plain_step(config: RunConfig, state: TrainState, images: Array) -> Array:
    """Class probabilities of uint8 pictures with the plain layers, which any device can run."""
    model = make_model(config.model, len(config.data.class_names), device.placement()).clone(layers=layers)
    return probabilities_step(state, images, model=model)


def stablehlo(config: RunConfig, state: TrainState) -> Artifact:
    """The run as a program for PLATFORMS, for any batch and size."""
    shape = any_size(config)

    def step(images: Array) -> Array:
        # The barrier keeps XLA from folding the weights as constants: rounding does not change, and compiling is quick.
        return plain_step(config, lax.optimization_barrier(state), images)

    limit = jax.config.jax_traceback_in_locations_limit  # type: ignore[attr-defined]
    jax.config.update("jax_traceback_in_locations_limit", 0)  # no file names of this machine in the artifact
    try:
        pictures = jax.ShapeDtypeStruct(export.symbolic_shape(shape), jnp.uint8)
        exported = export.export(jax.jit(step), platforms=PLATFORMS)(pictures)
    finally:
        jax.config.update("jax_traceback_in_locations_limit", limit)
    usage = """\
import jax, pathlib
model = jax.export.deserialize(bytearray(pathlib.Path("model.jaxexport").read_bytes()))
labels = jax.jit(model.call)(images).argmax(-1)"""
    facts = {
        "platforms": PLATFORMS,
        "needs": ["jax", "flatbuffers"],
        "optional_on_cpu": OPTIONAL,
        "calling_convention_version": exported.calling_convention_version,
    }
    return Artifact("model.jaxexport", bytes(exported.serialize()), shape, usage, facts)


def onnx(config: RunConfig, state: TrainState) -> Artifact:
    """The run as an ONNX graph, for any batch of the training size only."""
    import jax2onnx

    height, width = sides(config.data.image_size)
    shape = f"n, {height}, {width}, 3"
    pictures = jax.ShapeDtypeStruct(export.symbolic_shape(shape), jnp.uint8)
    with quiet("onnx_ir"):  # it warns of names that no value has
        model = jax2onnx.to_onnx(
            partial(plain_step, config, state),
            [pictures],
            model_name="unet_jax",
            input_names=["images"],
            output_names=["probabilities"],
        )
    usage = """\
import onnxruntime
session = onnxruntime.InferenceSession("model.onnx")
labels = session.run(None, {"images": images})[0].argmax(-1)"""
    facts = {"needs": ["onnxruntime"], "opset": model.opset_import[0].version}
    return Artifact("model.onnx", model.SerializeToString(), shape, usage, facts)


def weights_alone(config: RunConfig, state: TrainState) -> Artifact:
    """The run's parameters and batch statistics alone; `runs.load` reads them with config.json.

    That config leaves the precision to the device.
    """
    usage = 'import unet_jax\nlabels = unet_jax.load(".")(image)'
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, precision="auto"))
    facts = {"needs": ["unet_jax"]}
    return Artifact(weights.FILE, weights.to_bytes(state), "height, width, 3", usage, facts, labels=True, config=config)


FORMATS = {"jax": stablehlo, "onnx": onnx, "weights": weights_alone}
MISSING = {"jax": "flatbuffers: pip install 'unet-jax[export]'", "onnx": "jax2onnx: pip install 'unet-jax[onnx]'"}


def best_at(config: RunConfig) -> str:
    """The size at which pictures are as in training."""
    if config.data.tiles:
        down, across = config.data.scale or (1, 1)
        return (
            f"best at {down:g} of the pictures' own height and {across:g} of their width, whole or in windows of the"
            " training size or larger, since training saw tiles; not resized to the training size"
        )
    return "best at the training size, by antialiased bilinear resizing"


def greys(config: RunConfig) -> str:
    """How 16-bit greys become values from 0 to 255, if the run had some that use a part of the range."""
    white = config.data.white
    return f", 16-bit greys as min(value, {white}) * 255 // {white}" if white not in (None, WHITE) else ""


def describe(config: RunConfig, step: int, artifact: Artifact) -> dict[str, Any]:
    """What model.json says: all that a user of the artifact has to know."""
    names, content = list(config.data.class_names), artifact.content
    shape = [int(d) if d.isdecimal() else d for d in artifact.shape.split(", ")]
    images = "image [height, width, RGB]" if artifact.labels else "images [pictures, height, width, RGB]"
    output: dict[str, Any] = {"name": "class probabilities", "dtype": "float32", "shape": [*shape[:-1], len(names)]}
    if artifact.labels:
        output = {"name": "labels", "dtype": "uint8", "shape": shape[:-1]}
    return {
        "artifact": {"file": artifact.name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()},
        "usage": artifact.usage.split("\n"),
        **artifact.facts,
        "input": {"name": images, "dtype": "uint8", "shape": shape},
        "output": output,
        "class_names": names,
        "preprocessing": f"values 0 to 255 as they are{greys(config)}; {best_at(config)}",
        "training_size": config.data.image_size,
        "config": to_dict(config),
        "step": step,
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")},
    }


def export_run(run: str | Path, out: str | Path, format: ExportFormat = "jax") -> dict[str, Any]:
    """Writes a run's checkpoint (that of `runs.load`) to `out` as one file, and model.json, whose content it returns.

    The layers compute in float32, whatever the run's precision, since the file is for any device. With the format
    "weights" there is a config.json too, and the device chooses.

    Raises:
      InputError: there is no run or no complete checkpoint, `out` cannot be written, the format is unknown, or what it
        needs is not installed.
    """
    run, out = Path(run), Path(out)
    if format not in FORMATS:
        raise InputError(f"unknown format {format!r}: choose from {', '.join(FORMATS)}")
    config, restored = runs.load(run, device.placement())
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, precision="float32"),
        data=dataclasses.replace(config.data, data_dir=None),  # no folder of this machine
        train=dataclasses.replace(config.train, init_from=None),
    )
    try:
        artifact = FORMATS[format](config, jax.device_get(inference_state(restored.state)))
        if artifact.config and checkpoint.exists(out / "checkpoints"):
            raise InputError(f"--out {out} holds a run, whose config.json would be replaced: choose another folder")
        _refuse_another_export(out, artifact.name)
        out.mkdir(parents=True, exist_ok=True)
        description = describe(artifact.config or config, int(restored.state.step), artifact)
        (out / "model.json").unlink(missing_ok=True)  # it is written last: with it the folder is complete
        with runs.replacing(out / artifact.name) as file:
            file.write(artifact.content)
        if artifact.config:
            runs.write_json(out / "config.json", to_dict(artifact.config))
        runs.write_json(out / "model.json", description)
    except ImportError:
        raise InputError(f"this export needs {MISSING[format]}") from None
    except OSError as error:
        raise InputError(f"--out {out} cannot be written ({error.strerror}): choose another folder") from None
    return description


def _refuse_another_export(out: Path, name: str) -> None:
    # Its model.json would be replaced by that of `name`, and its artifact be left without one.
    try:
        other = json.loads((out / "model.json").read_text())["artifact"]["file"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    if other != name:
        raise InputError(f"--out {out} holds another export, {other}: choose another folder")
