"""Batches on the device, in an order that depends on (seed, epoch) alone."""

from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array
from jax.sharding import NamedSharding

from unet_jax.config import IGNORE_LABEL
from unet_jax.data.cache import Split
from unet_jax.data.classes import some
from unet_jax.data.tiles import picture_of
from unet_jax.device import Placement
from unet_jax.errors import InputError


class Batch(NamedTuple):
    """images uint8 [B, H, W, C], labels uint8 [B, H, W], weights float32 [B] (0 for a padding example)."""

    images: Array | np.ndarray
    labels: Array | np.ndarray
    weights: Array | np.ndarray


def shuffled(count: int, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch: a permutation of range(count), the same on every machine."""
    return np.random.default_rng((seed, epoch)).permutation(count)


def validation_rows(
    names: Sequence[str], fraction: float, seed: int, listed: Collection[str] = ()
) -> tuple[np.ndarray, np.ndarray]:
    """The pictures to train on and those kept for validation: two sorted arrays of indices, the same on every machine.

    Names that are equal before the last underscore are a group (the breeds of the pets). With the groups in a row,
    every 1/fraction-th picture is kept: of each group as near to `fraction` as whole pictures allow. The tiles of a
    picture stay together. If the dataset has `listed` some pictures for validation, these are kept and no others.

    Raises:
      InputError: the fraction comes to no picture, or one of the two parts is empty.
    """
    if listed:
        named = np.array([name in listed for name in names])
        if named.all() or not named.any():
            raise InputError(
                f"of {len(names)} pictures {named.sum()} are listed for validation: give more --train-examples"
            )
        return np.flatnonzero(~named), np.flatnonzero(named)
    rng = np.random.default_rng(seed)
    whole = [picture_of(name) for name in names]
    pictures = list(dict.fromkeys(whole))
    groups = np.array([picture.rpartition("_")[0] for picture in pictures])
    order = np.lexsort((rng.random(len(pictures)), groups))
    kept = np.diff(np.floor(np.arange(len(pictures) + 1) * fraction + rng.random())) > 0
    if fraction and (kept.all() or not kept.any()):
        how_many = "all" if kept.all() else "none"
        raise InputError(
            f"--validation-fraction {fraction} of {len(pictures)} pictures is {how_many}: give more pictures"
        )
    drawn = {pictures[i] for i in order[kept]}
    held_out = np.array([picture in drawn for picture in whole], bool)
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def divide(split: Split, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows of a train split to train on, and those kept for validation: `validation_rows`.

    Pictures in which no pixel counts are left out of training: they would be steps whose loss is 0.

    Raises:
      InputError: as `validation_rows` does.
    """
    training, validation = validation_rows(split.names, fraction, seed, split.validation)
    counting = np.array([(split.labels[row] != IGNORE_LABEL).any() for row in training], bool)
    return training[counting] if counting.any() else training, validation


def _take(images: Array, labels: Array, indices: Array, weights: Array) -> Batch:
    return Batch(images[indices], labels[indices], weights)


def _place(array: np.ndarray, rows: np.ndarray, sharding: NamedSharding) -> Array:
    """These rows of the array as a global array. Each process reads only the rows that its own devices hold."""
    shape = (len(rows), *array.shape[1:])

    def part(index: Any) -> np.ndarray:
        return array[rows[index[0]]]

    return jax.make_array_from_callback(shape, sharding, part)


class Loader:
    """Cuts a split into batches. The split is kept on the accelerator if it fits well, else each batch goes there.

    Dispatch to an accelerator is asynchronous: the host prepares a batch (a gather of uint8 rows, or only indices)
    while the batches before are computed.
    """

    def __init__(self, split: Split, batch_size: int, placement: Placement, rows: np.ndarray | None = None) -> None:
        """Takes only `rows`, if they are given. Moves the split to the device if `placement.fits` says that it may.

        Raises:
          InputError: the arrays are no pictures with their labels and names, or no pixel counts. The loss would be 0,
            the best there is.
        """
        images, labels, count = split.images, split.labels, len(split.names)
        if images.dtype != np.uint8 or labels.dtype != np.uint8 or not count == len(images) == len(labels):
            raise InputError(
                f"pictures are {images.dtype} {images.shape}, labels {labels.dtype} {labels.shape}, names {count}: they"
                " must be uint8 [N, H, W, C], uint8 [N, H, W] and N names"
            )
        self.split, self.batch_size, self.placement = split, batch_size, placement
        self.rows = np.arange(len(split.names)) if rows is None else rows
        if not any((split.labels[row] != IGNORE_LABEL).any() for row in self.rows):
            raise InputError(
                f"in {some(self.names)} every pixel is ignored ({IGNORE_LABEL}): choose pictures with labels"
            )
        self._resident = None
        if placement.fits(split.images.nbytes + split.labels.nbytes):
            self._resident = tuple(_place(a, self.rows, placement.replicated) for a in (split.images, split.labels))
            self._take = jax.jit(_take, out_shardings=placement.batch)

    @property
    def names(self) -> list[str]:
        """The names of the pictures, in order."""
        return [self.split.names[row] for row in self.rows]

    def __len__(self) -> int:
        """Batches in an epoch, a short last one included."""
        return -(-len(self.rows) // self.batch_size)

    def epoch(self, seed: int, number: int, skip: int = 0) -> Iterator[Batch]:
        """The shuffled batches of an epoch without the first `skip` of them; the last may be short."""
        order = shuffled(len(self.rows), seed, number)
        for start in range(skip * self.batch_size, len(order), self.batch_size):
            yield self._batch(order[start : start + self.batch_size])

    def evaluation(self) -> Iterator[Batch]:
        """All pictures in order. Copies of the first picture, with weight 0, fill up the last batch.

        Such copies follow the pictures of each batch if the devices do not divide it: losses are of the same batches
        whatever the devices are.
        """
        indices = np.arange(len(self) * self.batch_size)
        indices[len(self.rows) :] = -1
        fill = np.full(-self.batch_size % self.placement.devices, -1)
        for places in indices.reshape(len(self), self.batch_size):
            yield self._batch(np.concatenate([places, fill]))

    def _batch(self, places: np.ndarray) -> Batch:
        weights = (places >= 0).astype(np.float32)
        places = np.maximum(places, 0)
        if self._resident is not None:
            return self._take(*self._resident, places, weights)
        rows, sharding = self.rows[places], self.placement.batch
        images, labels = (_place(a, rows, sharding) for a in (self.split.images, self.split.labels))
        batch = Batch(images, labels, _place(weights, np.arange(len(weights)), sharding))
        # On a CPU a step whose inputs are not ready runs in another thread, whose heap does not keep its memory. That
        # takes twice the memory, and a quarter of a step's time to zero it (cpu/memory.py).
        return jax.block_until_ready(batch) if self.placement.platform == "cpu" else batch


class Parts(NamedTuple):
    """The pictures of a run: for training, for validation (taken from the training split), and the test split."""

    train: Loader
    validation: Loader | None
    test: Loader | None

    @property
    def held_out(self) -> Loader | None:
        """What each epoch evaluates: the validation part, or the test split if there is no such part."""
        return self.validation or self.test
