"""What every dataset looks like to the rest: a numbered list of pictures with their labels, not yet read."""

from collections.abc import Callable, Mapping
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
    may be called from many threads and raises InputError, naming the picture, for one that cannot be read. `validation`
    are the names of those that are to be kept for validation, where the dataset itself says so.
    """

    dataset: str
    split: str
    class_names: tuple[str, ...]
    identity: Mapping[str, object]
    size: int
    read: Callable[[int], Example]
    validation: frozenset[str] = frozenset()
