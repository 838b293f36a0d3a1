"""Makes a run from PyTorch weights: `unet-jax import-torch WEIGHTS.pth --variant mp_tr_dice --out runs/theirs`.

The run folder can be evaluated, predicted with, exported, and trained from (--init-from). Needs torch (extra `bench`),
except for a safetensors file.
"""

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from unet_jax.checks import check_config
from unet_jax.config import (
    DataConfig,
    Downsampling,
    ImageSize,
    ModelConfig,
    RunConfig,
    Upsampling,
    default_config,
    to_dict,
)
from unet_jax.errors import InputError, exit_on_input_error


@dataclasses.dataclass(frozen=True)
class Options:
    """What to import, and where to."""

    weights: Annotated[Path, tyro.conf.Positional]
    """A state dict saved by torch.save, alone or in a checkpoint with other things; or a safetensors file."""
    variant: str
    """The variant that the weights are of."""
    out: Path
    """The run's folder, new or empty."""
    image_size: ImageSize = DataConfig.image_size
    """Side of the squares, or height and width, that the network was trained at."""
    widths: tuple[int, ...] = ModelConfig.widths
    """Features of the encoder's blocks, from full resolution down."""
    class_names: tuple[str, ...] = DataConfig.class_names
    """A name for each class, in the order of the labels."""
    downsampling: Downsampling | None = None
    """Default: the variant's."""
    upsampling: Upsampling | None = None
    """Default: the variant's."""
    loss: str | None = None
    """The loss that the network was trained with, and is evaluated by. Default: the variant's."""


def read_weights(path: Path) -> Any:
    """What torch.save wrote to a file, or the arrays by name of a safetensors file, which may have any file name.

    Raises:
      InputError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            head = file.read(9)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    if head[8:] == b"{":
        return read_safetensors(path)
    try:
        import torch
    except ImportError:
        raise InputError("importing needs torch: pip install 'unet-jax[bench]'") from None
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a file that is no archive of tensors fails in many ways
        text = str(error)
    if found := re.search(r"GLOBAL ([\w.]+)", text):
        reason = f"holds other objects than tensors ({found[1]}), which are not loaded, as they could run any code"
        raise InputError(f"{path} {reason}: {SAVE_WEIGHTS}")
    raise InputError(f"{path} cannot be read as weights, it is damaged or another kind of file: {SAVE_WEIGHTS}")


SAVE_WEIGHTS = "where it was made, save the weights alone by torch.save(network.state_dict(), 'weights.pth')"
SAFETENSORS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "BF16": "<u2"}


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file, which is the length of the JSON in eight bytes, the JSON, the arrays' bytes.

    Raises:
      InputError: it is damaged, or has a dtype that weights do not have.
    """
    try:
        content = path.read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        entries = json.loads(content[8:start])
        entries.pop("__metadata__", None)
        arrays = {}
        for name, entry in entries.items():
            first, end = entry["data_offsets"]
            array = np.frombuffer(content[start + first : start + end], SAFETENSORS[entry["dtype"]])
            if entry["dtype"] == "BF16":  # the upper half of a float32
                array = (array.astype(np.uint32) << 16).view(np.float32)
            arrays[name] = array.reshape(entry["shape"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is damaged, or no safetensors file of weights ({error!r})") from None
    return arrays


def read_state_dict(path: Path) -> dict[str, np.ndarray]:
    """The arrays of the network's state dict by name, found in what the file holds; prints what was left out.

    Raises:
      InputError: the file cannot be read, or does not hold one state dict.
    """
    from unet_jax.from_pytorch import find_state_dict

    content = read_weights(path)
    try:
        tensors, notes = find_state_dict(content)
    except InputError as error:
        raise InputError(f"{path} {error}") from None
    for note in notes:
        print(f"{path}: {note}")
    return {n: np.asarray(t.detach().float().numpy() if hasattr(t, "detach") else t) for n, t in tensors.items()}


def config_of(options: Options) -> RunConfig:
    """The config of the run; raises InputError for one that no run can have."""
    config = default_config(options.variant, "oxford_iiit_pet")
    model, train = config.model, config.train
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, image_size=options.image_size, class_names=options.class_names),
        model=dataclasses.replace(
            model,
            widths=options.widths,
            downsampling=options.downsampling or model.downsampling,
            upsampling=options.upsampling or model.upsampling,
        ),
        # init_from says where the weights come from. No trained run has this value, so train refuses this folder.
        train=dataclasses.replace(train, loss=options.loss or train.loss, init_from=str(options.weights)),
    )
    check_config(config)
    return config


def main(options: Options) -> None:
    """Writes the run's folder; raises InputError for weights or options that no run can have."""
    config = config_of(options)
    arrays = read_state_dict(options.weights)
    if options.out.is_dir() and any(entry.name != ".lock" for entry in options.out.iterdir()):
        raise InputError(f"{options.out} is not empty: choose another --out")
    import jax.numpy as jnp

    from unet_jax import checkpoint, device, environment, runs, train
    from unet_jax.from_pytorch import variables_from_state_dict

    model = train.make_model(config.model, len(config.data.class_names), device.placement())
    variables = variables_from_state_dict(arrays, model)
    moments = train.make_optimizer(config.train, steps_per_epoch=1).init(variables["params"])
    averaged = variables if config.train.ema else None  # no other average is known than these weights
    state = train.TrainState(jnp.zeros((), jnp.int32), variables["params"], variables["batch_stats"], moments, averaged)
    with runs.lock(options.out):
        with checkpoint.manager(options.out / "checkpoints", 0) as checkpoints:
            checkpoint.save(checkpoints, state, checkpoint.Progress([], []))
        environment.write(options.out, config)
        runs.write_json(options.out / "config.json", to_dict(config))
    print(f"{options.out}: {options.variant} with the weights of {options.weights}")


def command(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Runs the command with these arguments, by default the arguments of the process."""
    with exit_on_input_error():
        main(tyro.cli(Options, args=argv, prog=prog, description=__doc__))
