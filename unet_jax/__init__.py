"""U-Nets for image segmentation in JAX. What most people want, in a few lines:

    import unet_jax
    from unet_jax.config import default_config

    config = default_config("mp_tr_dice", "synthetic")  # or "oxford_iiit_pet", or "folder" with a data_dir
    folder = unet_jax.run(config, "runs/mp_tr_dice")  # trains; called again, goes on where it was
    predictor = unet_jax.load(folder)
    mask = predictor("photo.jpg")  # uint8 [H, W]: the class of each pixel; or a picture as uint8 [H, W, 3]
    probabilities = predictor("photo.jpg", probabilities=True)  # float32 [H, W, classes]

    network = unet_jax.UNet(num_classes=3)  # a flax.linen module, for a training loop of your own
    loss = unet_jax.cross_entropy  # or log_dice, soft_dice, make_loss("cross_entropy+soft_dice")

`UNet` has the textbook layers of `unet_jax.layers`. `load`, `run`, the commands and `unet_jax.train.make_model` choose
the layers that are fastest on the device. To choose them yourself, write
`UNet(layers=device.fast_layers(device.placement()))`, with `from unet_jax import device`. The parameters are the same.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unet_jax.errors import InputError
    from unet_jax.experiment import run
    from unet_jax.losses import cross_entropy, log_dice, make_loss, soft_dice
    from unet_jax.model import UNet
    from unet_jax.predict import load

__version__ = "0.2.0"
__all__ = ["InputError", "UNet", "__version__", "cross_entropy", "load", "log_dice", "make_loss", "run", "soft_dice"]

# Imported on first use, so that --help and `import unet_jax` do not wait for JAX, nor `UNet` for code that reads files.
_MODULES = {
    "InputError": "errors",
    "UNet": "model",
    **dict.fromkeys(("cross_entropy", "log_dice", "make_loss", "soft_dice"), "losses"),
    "load": "predict",
    "run": "experiment",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
