"""Pictures cut into tiles instead of resized: for pictures with more detail than one input of the network holds."""

import functools
import itertools
import re
import threading
from typing import NamedTuple

import numpy as np

from unet_jax.config import IGNORE_LABEL, DataConfig, ImageSize, sides
from unet_jax.data.cache import resize
from unet_jax.data.source import Example, Source

SCALE = (1.0, 1.0)  # the default: the pictures' own resolution
NAME = re.compile(r"(.*)//\d+,\d+", re.DOTALL)  # no file's name has a slash, and a folder of a split adds only one
AT_ONCE = 8  # pictures that are decoded side by side


class Tile(NamedTuple):
    """Rows from top and columns from left on, of a picture given by its number."""

    picture: int
    top: int
    left: int


def unit(data: DataConfig) -> str:
    """What the examples are."""
    return "tiles" if data.tiles else "pictures"


def starts(length: int, side: int) -> list[int]:
    """Where the tiles of this side begin: next to each other, but the last one ends where the picture does."""
    return [*range(0, length - side, side), max(length - side, 0)]


def picture_of(name: str) -> str:
    """The name of the picture that a tile with this name is of; any other name is that of a picture itself."""
    match = NAME.fullmatch(name)
    return match[1] if match else name


def sizes_at(source: Source, scale: tuple[float, float]) -> list[tuple[int, int]]:
    """Height and width of each picture, resized by the scale."""
    down, across = scale
    return [(max(1, round(h * down)), max(1, round(w * across))) for h, w in source.sizes]


def cut(source: Source, size: ImageSize, scale: tuple[float, float]) -> Source:
    """The source whose examples are the tiles of a source's pictures, named "picture//top,left".

    The pictures, whose `sizes` must be known, are first resized by `scale`. Labels that an earlier tile has are
    ignored, so that each pixel counts once. A picture that is smaller than a tile is mirrored at its borders, and what
    is mirrored is ignored.
    """
    height, width = sides(size)
    scaled = sizes_at(source, scale)
    own = [
        [Tile(i, top, left) for top in starts(h, height) for left in starts(w, width)]
        for i, (h, w) in enumerate(scaled)
    ]
    # The first tiles of AT_ONCE pictures, then their second ones: threads that read them in turn decode all at once.
    groups = [own[k : k + AT_ONCE] for k in range(0, len(own), AT_ONCE)]
    tiles = [tile for group in groups for some in itertools.zip_longest(*group) for tile in some if tile]
    names = [f"{source.names[i]}//{top},{left}" for i, top, left in tiles]

    @functools.lru_cache(maxsize=2 * AT_ONCE)
    def picture(i: int) -> Example:
        return resize(source.read(i), scaled[i])

    locks = [threading.Lock() for _ in scaled]  # a picture is decoded once, and not by two threads

    def read(n: int) -> Example:
        i, top, left = tiles[n]
        with locks[i]:
            _, image, labels = picture(i)
        image, labels = (a[top : top + height, left : left + width] for a in (image, labels))
        missing = ((0, height - labels.shape[0]), (0, width - labels.shape[1]))
        labels = np.pad(labels, missing, constant_values=IGNORE_LABEL)
        labels[: -top % height] = IGNORE_LABEL
        labels[:, : -left % width] = IGNORE_LABEL
        return Example(names[n], np.pad(image, (*missing, (0, 0)), mode="symmetric"), labels)

    return source._replace(
        identity={**source.identity, "tiles": scale},
        size=len(tiles),
        read=read,
        names=names,
        sizes=[(height, width)] * len(tiles),
        validation=frozenset(name for name in names if picture_of(name) in source.validation),
        pictures=source,
    )
