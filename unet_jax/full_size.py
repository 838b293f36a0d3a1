"""Scores at the pictures' own size: of the masks that `predict` writes, not of what the network gives in training."""

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from tqdm import tqdm

from unet_jax.config import IGNORE_LABEL, Tta
from unet_jax.data.classes import some
from unet_jax.data.source import Source
from unet_jax.data.tiles import picture_of
from unet_jax.errors import InputError
from unet_jax.predict import Predictor

AT_ONCE, PIXELS_AT_ONCE = 16, 2**24  # pictures in memory, and their pixels unless a single one has more


def confusions(
    predictor: Predictor, source: Source, rows: Iterable[int], most: int | None = None, tta: Tta = "none"
) -> tuple[list[str], np.ndarray]:
    """The names of these examples of a source (of `most` at most), and their confusion matrices [N, C, C] int64.

    Tiles are not scored by themselves: their pictures are, each as a whole. Labels that are ignored do not count.

    Raises:
      InputError: a picture cannot be read, or no pixel counts.
    """
    rows = list(rows)
    if source.pictures:
        wanted = dict.fromkeys(picture_of(source.names[i]) for i in rows)
        numbers = {name: i for i, name in enumerate(source.pictures.names)}
        source, rows = source.pictures, [numbers[name] for name in wanted]
    rows = rows[:most]
    at_once = min(AT_ONCE, max(1, PIXELS_AT_ONCE // max((h * w for h, w in source.sizes), default=1)))
    names, matrices = [], []
    bar = tqdm(total=len(rows), desc="scoring at full size", unit="pictures", disable=None)
    with ThreadPoolExecutor(os.cpu_count()) as pool, bar:
        for start in range(0, len(rows), at_once):
            examples = list(pool.map(source.read, rows[start : start + at_once]))
            predictions = predictor([example.image for example in examples], tta=tta)
            for example, predicted in zip(examples, predictions, strict=True):
                names.append(example.name)
                matrices.append(confusion(example.labels, predicted, len(source.class_names)))
                bar.update()
    if not np.any(matrices):
        raise InputError(f"in {some(names)} every pixel is ignored ({IGNORE_LABEL}): choose pictures with labels")
    return names, np.stack(matrices)


def confusion(labels: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """Pixels [C, C] of true class (row) predicted as class (column), from uint8 [H, W]; labels >= C do not count."""
    counts = labels < classes
    pairs = classes * labels[counts].astype(np.int64) + predicted[counts]
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)
