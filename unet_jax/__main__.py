"""The commands: `python -m unet_jax train --variant mp_tr_dice`, or installed `unet-jax train --variant mp_tr_dice`."""

import difflib
import importlib
import sys

from unet_jax import __version__
from unet_jax.errors import InputError, exit_on_input_error

COMMANDS = {
    "train": "train a variant on pets or on your own pictures, or resume its run",
    "evaluate": "score a run on a split of its pictures, or on others",
    "predict": "write a mask and an overlay for each of your pictures",
    "export": "write a run as one file, for jax alone, ONNX Runtime or unet_jax",
    "import-torch": "make a run from PyTorch weights",
    "report": "compare runs with the published ones, in a table and a figure",
}


def main() -> None:
    """Runs the command that the first argument names."""
    name, *rest = sys.argv[1:] or ["--help"]
    if name in COMMANDS:
        sys.argv[0] = "unet-jax"  # the command in a run's environment.json, instead of __main__.py
        module = importlib.import_module(f"unet_jax.commands.{name.replace('-', '_')}")
        module.command(rest, f"unet-jax {name}")
        return
    with exit_on_input_error():
        if name in ("-h", "--help"):
            lines = "".join(f"  {command:14}{text}\n" for command, text in COMMANDS.items())
            print(f"usage: unet-jax COMMAND ...\n\n{lines}\nunet-jax COMMAND --help lists the command's options.")
        elif name == "--version":
            print(__version__)
        else:
            near = difflib.get_close_matches(name, COMMANDS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(COMMANDS)}"
            raise InputError(f"there is no command {name!r}: {hint}")


if __name__ == "__main__":
    main()
