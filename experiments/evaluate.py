"""Evaluates a run's checkpoint on a split of a dataset: `python experiments/evaluate.py runs/mp_tr_dice`."""

from unet_jax.commands.evaluate import command

if __name__ == "__main__":
    command()
