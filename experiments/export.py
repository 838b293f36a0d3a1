"""Writes a run as one file, for jax or ONNX Runtime: `python experiments/export.py runs/mp_tr_dice --out model`."""

from unet_jax.commands.export import command

if __name__ == "__main__":
    command()
