"""Draws augmented synthetic pets with their masks: `python experiments/augment_sheet.py --strength strong`."""

from pathlib import Path

import jax
import numpy as np
import tyro
from PIL import Image

from unet_jax.augment import augment
from unet_jax.config import Augment
from unet_jax.data import synthetic
from unet_jax.plots import colour_labels


def main(strength: Augment = "strong", image_size: int = 128, seed: int = 0, out: Path = Path("augment.png")) -> None:
    """A row for each of six pets: unchanged, and changed in four ways. Ignored pixels are black in the mask."""
    pets = [synthetic.source("train", 6, image_size, seed).read(i) for i in range(6)]
    images, labels = np.stack([p.image for p in pets]), np.stack([p.labels for p in pets])
    versions = [(images, labels), *(augment(jax.random.key(i), images, labels, strength) for i in range(4))]
    colours = [colour_labels(np.asarray(mask), len(synthetic.CLASS_NAMES)) for _, mask in versions]
    pairs = [(np.asarray(image).round().astype(np.uint8), c) for (image, _), c in zip(versions, colours, strict=True)]
    sheet = np.concatenate([np.concatenate(pair, 2) for pair in pairs], 2)  # [pets, H, versions * 2W, 3]
    Image.fromarray(sheet.reshape(-1, *sheet.shape[2:])).save(out)


if __name__ == "__main__":
    tyro.cli(main)
