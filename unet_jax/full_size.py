"""Scores at the pictures' own size: of the masks that `predict` writes, not of what the network gives in training."""

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from tqdm import tqdm

from unet_jax.config import Tta
from unet_jax.data.source import Source
from unet_jax.data.tiles import picture_of
from unet_jax.predict import Predictor

AT_ONCE = 16  # pictures in memory


def confusions(
    predictor: Predictor, source: Source, rows: Iterable[int], tta: Tta = "none"
) -> tuple[list[str], np.ndarray]:
    """The names of these examples of a source, and their confusion matrices [N, C, C] int64 as in `metrics`.

    Tiles are not scored by themselves: their pictures are, each as a whole. Labels that are ignored do not count.

    Raises:
      InputError: a picture cannot be read.
    """
    rows = list(rows)
    if source.pictures:
        wanted = dict.fromkeys(picture_of(source.names[i]) for i in rows)
        numbers = {name: i for i, name in enumerate(source.pictures.names)}
        source, rows = source.pictures, [numbers[name] for name in wanted]
    names, matrices = [], []
    bar = tqdm(total=len(rows), desc="scoring at full size", unit="pictures", disable=None)
    with ThreadPoolExecutor(os.cpu_count()) as pool, bar:
        for start in range(0, len(rows), AT_ONCE):
            examples = list(pool.map(source.read, rows[start : start + AT_ONCE]))
            predictions = predictor([example.image for example in examples], tta=tta)
            for example, predicted in zip(examples, predictions, strict=True):
                names.append(example.name)
                matrices.append(confusion(example.labels, predicted, len(source.class_names)))
                bar.update()
    return names, np.stack(matrices)


def confusion(labels: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """Pixels [C, C] of true class (row) predicted as class (column), from uint8 [H, W]; labels >= C do not count."""
    counts = labels < classes
    pairs = classes * labels[counts].astype(np.int64) + predicted[counts]
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)
