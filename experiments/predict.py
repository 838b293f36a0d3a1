"""Segments pictures with a run's checkpoint: `python experiments/predict.py runs/mp_tr_dice photos/ --out masks`."""

from unet_jax.commands.predict import command

if __name__ == "__main__":
    command()
