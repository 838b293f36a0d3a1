"""Writes a run's network to a folder, for jax, ONNX Runtime or unet_jax: `unet-jax export runs/mine --out model`."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from unet_jax.config import ExportFormat
from unet_jax.errors import exit_on_input_error


@dataclasses.dataclass(frozen=True)
class Options:
    """What to export, and where to."""

    run: Annotated[Path, tyro.conf.Positional]
    """The run's folder."""
    out: Path
    """Folder for the artifact and model.json, which says how to use it."""
    format: ExportFormat = "jax"
    """jax: StableHLO for any batch and size, called by jax. onnx: any batch at the training size, for ONNX Runtime.
    weights: a small folder that every command of unet_jax takes for the run, with kernels in bfloat16."""


def main(options: Options) -> None:
    """Writes the artifact, and prints how to use it."""
    from unet_jax.export import export_run

    description = export_run(options.run, options.out, options.format)
    artifact, shape = description["artifact"], ", ".join(map(str, description["input"]["shape"]))
    answer, needs = description["output"]["name"], " and ".join(description["needs"])
    platforms = f", for {', '.join(description['platforms'])}" if "platforms" in description else ""
    size = f"{artifact['bytes'] / 1e6:.1f} MB"
    print(f"{options.out / artifact['file']}: {size}, uint8 [{shape}] to {answer}{platforms}; needs {needs}.\n")
    print("\n".join(description["usage"]))


def command(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Runs the command with these arguments, by default the arguments of the process."""
    with exit_on_input_error():
        main(tyro.cli(Options, args=argv, prog=prog, description=__doc__))
