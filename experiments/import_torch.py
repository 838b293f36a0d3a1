"""A run from PyTorch weights: `python experiments/import_torch.py WEIGHTS.pth --variant mp_tr_dice --out runs/theirs`.

The run folder can be evaluated, predicted with, exported, and trained from (--init-from). Needs torch (extra `bench`).
"""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import tyro

from unet_jax.config import DataConfig, ModelConfig, check_config, default_config, to_dict
from unet_jax.errors import InputError, exit_on_input_error


@dataclasses.dataclass(frozen=True)
class Options:
    """What to import, and where to."""

    weights: Annotated[Path, tyro.conf.Positional]
    """A state dict saved by torch.save; it is loaded with weights_only."""
    variant: str
    """The variant that the weights are of."""
    out: Path
    """The run's folder, new or empty."""
    image_size: int = DataConfig.image_size
    """Height and width that the network was trained at."""
    widths: tuple[int, ...] = ModelConfig.widths
    """Features of the encoder's blocks, from full resolution down."""
    class_names: tuple[str, ...] = DataConfig.class_names
    """A name for each class, in the order of the labels."""


def read_state_dict(path: Path) -> dict[str, Any]:
    """The arrays of a state dict by name.

    Raises:
      InputError: the file cannot be read, or holds something else.
    """
    try:
        import torch
    except ImportError:
        raise InputError("importing needs torch: pip install 'unet-jax[bench]'") from None
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a file that is no archive of tensors fails in many ways
        reason = str(error).strip().split("\n")[0][:150] or type(error).__name__
        raise InputError(f"{path} cannot be read as weights: {reason}") from None
    if not isinstance(tensors, dict) or not all(isinstance(t, torch.Tensor) for t in tensors.values()):
        raise InputError(f"{path} holds no state dict: save network.state_dict()")
    return {str(name): tensor.detach().float().numpy() for name, tensor in tensors.items()}


def main(options: Options) -> None:
    config = default_config(options.variant, "oxford_iiit_pet")
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, image_size=options.image_size, class_names=options.class_names),
        model=dataclasses.replace(config.model, widths=options.widths),
        # Where the weights come from, which no run of run.py has: it refuses to train over them.
        train=dataclasses.replace(config.train, init_from=str(options.weights)),
    )
    check_config(config)
    arrays = read_state_dict(options.weights)
    if options.out.is_dir() and any(entry.name != ".lock" for entry in options.out.iterdir()):
        raise InputError(f"{options.out} is not empty: choose another --out")
    import jax.numpy as jnp

    from unet_jax import checkpoint, device, runs, train
    from unet_jax.from_pytorch import variables_from_state_dict

    model = train.make_model(config.model, len(config.data.class_names), device.placement())
    variables = variables_from_state_dict(arrays, model)
    moments = train.make_optimizer(config.train, steps_per_epoch=1).init(variables["params"])
    state = train.TrainState(jnp.zeros((), jnp.int32), variables["params"], variables["batch_stats"], moments)
    with runs.lock(options.out):
        with checkpoint.manager(options.out / "checkpoints", 0) as checkpoints:
            checkpoint.save(checkpoints, state, checkpoint.Progress([], []))
        runs.write_json(options.out / "environment.json", runs.environment())
        runs.write_json(options.out / "config.json", to_dict(config))
    print(f"{options.out}: {options.variant} with the weights of {options.weights}")


if __name__ == "__main__":
    with exit_on_input_error():
        main(tyro.cli(Options, description=__doc__))
