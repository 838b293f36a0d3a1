"""Trains a variant of the U-Net and writes its run folder: `python experiments/run.py --variant mp_tr_dice`."""

from unet_jax.commands.train import command

if __name__ == "__main__":
    command()
