"""Compares runs with the published ones: `python experiments/report.py runs/*` writes report.md and report.png."""

from unet_jax.commands.report import command

if __name__ == "__main__":
    command()
