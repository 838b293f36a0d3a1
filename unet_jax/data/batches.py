"""Batches on the device, in an order that depends on (seed, epoch) alone."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array
from jax.sharding import NamedSharding

from unet_jax.data.cache import Split
from unet_jax.device import Placement


class Batch(NamedTuple):
    """images uint8 [B, H, W, C], labels uint8 [B, H, W], weights float32 [B] (0 for a padding example)."""

    images: Array | np.ndarray
    labels: Array | np.ndarray
    weights: Array | np.ndarray


def shuffled(count: int, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch: a permutation of range(count), the same on every machine."""
    return np.random.default_rng((seed, epoch)).permutation(count)


def _take(images: Array, labels: Array, indices: Array, weights: Array) -> Batch:
    return Batch(images[indices], labels[indices], weights)


def _place(array: np.ndarray, sharding: NamedSharding, rows: np.ndarray | None = None) -> Array:
    """The array, or those rows of it, as a global array: each process reads what its own devices hold, no more."""

    def part(index: Any) -> np.ndarray:
        return array[index] if rows is None else array[rows[index[0]]]

    shape = array.shape if rows is None else (len(rows), *array.shape[1:])
    return jax.make_array_from_callback(shape, sharding, part)


class Loader:
    """Cuts a split into batches; the split lives on the accelerator where it fits well, else its batches go there.

    The host's share of a batch (a gather of uint8 rows, or just indices) is done while the device is still busy with
    the batches before, since dispatch is asynchronous.
    """

    def __init__(self, split: Split, batch_size: int, placement: Placement) -> None:
        """Moves the split to the device if `placement.fits` says that it may."""
        self.split, self.batch_size, self.placement = split, batch_size, placement
        self._resident = None
        if placement.fits(split.images.nbytes + split.labels.nbytes):
            self._resident = tuple(_place(a, placement.replicated) for a in (split.images, split.labels))
            self._take = jax.jit(_take, out_shardings=placement.batch)

    def __len__(self) -> int:
        """Batches in an epoch, a short last one included."""
        return -(-len(self.split.names) // self.batch_size)

    def train(self, seed: int, epoch: int, skip: int = 0) -> Iterator[Batch]:
        """The epoch's shuffled batches but for the first `skip`; the last may be short."""
        order = shuffled(len(self.split.names), seed, epoch)
        for start in range(skip * self.batch_size, len(order), self.batch_size):
            yield self._batch(order[start : start + self.batch_size])

    def evaluation(self) -> Iterator[Batch]:
        """All pictures in order, the last batch filled up with weightless copies of the first picture."""
        indices = np.arange(len(self) * self.batch_size)
        indices[len(self.split.names) :] = -1
        for rows in indices.reshape(len(self), self.batch_size):
            yield self._batch(rows)

    def _batch(self, rows: np.ndarray) -> Batch:
        weights = (rows >= 0).astype(np.float32)
        rows = np.maximum(rows, 0)
        if self._resident is not None:
            return self._take(*self._resident, rows, weights)
        sharding = self.placement.batch
        images, labels = (_place(a, sharding, rows) for a in (self.split.images, self.split.labels))
        return Batch(images, labels, _place(weights, sharding))
