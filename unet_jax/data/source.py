"""What every dataset is to the rest of the code: a numbered list of pictures with labels, not yet read."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np


class Example(NamedTuple):
    """One picture: name, image uint8 [H, W, 3], labels uint8 [H, W] (classes from 0, or config.IGNORE_LABEL)."""

    name: str
    image: np.ndarray
    labels: np.ndarray


class Source(NamedTuple):
    """One split of a dataset. Nothing is opened before the first `read`.

    `identity` is what the pictures depend on, in JSON's types: the cache is keyed by it. `read(i)`, for 0 <= i < size,
    may be called from many threads. It raises an InputError that names the picture, if this cannot be read. `names` are
    the names of the pictures, and `sizes` their heights and widths, if these are known before. `validation` has the
    names of those that the dataset itself keeps for that. If the examples are tiles, `pictures` has what was cut.
    """

    dataset: str
    split: str
    class_names: tuple[str, ...]
    identity: Mapping[str, object]
    size: int
    read: Callable[[int], Example]
    names: Sequence[str] = ()
    sizes: Sequence[tuple[int, int]] = ()
    validation: frozenset[str] = frozenset()
    pictures: "Source | None" = None
