"""A run from PyTorch weights: `python experiments/import_torch.py W.pth --variant mp_tr_dice --out runs/theirs`."""

from unet_jax.commands.import_torch import command

if __name__ == "__main__":
    command()
