"""A split decoded once into uint8 arrays on disk, memory-mapped from then on."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from unet_jax.config import ImageSize, sides, size_text
from unet_jax.data.source import Example, Source
from unet_jax.errors import InputError

VERSION = 1  # of the files and of the resizing: after a change every cache is made again
ARRAYS = ("images", "labels")


class Split(NamedTuple):
    """images uint8 [N, H, W, 3], labels uint8 [N, H, W] (both may be memory-mapped), names of the N pictures.

    scale has two medians: of H over the pictures' own heights, and of W over their own widths. validation has the names
    of the pictures that the dataset itself keeps for validation. checksums are those of images and of labels.
    """

    images: np.ndarray
    labels: np.ndarray
    names: list[str]
    scale: tuple[float, float] | None = None
    validation: frozenset[str] = frozenset()
    checksums: tuple[int, ...] = ()


def check_example(example: Example) -> None:
    """Raises InputError unless the picture is uint8 [H, W, 3] and its labels uint8 [H, W]."""
    image, labels = example.image, example.labels
    if image.dtype != np.uint8 or labels.dtype != np.uint8 or image.shape != (*labels.shape, 3) or labels.ndim != 2:
        raise InputError(
            f"{example.name}: the picture is {image.dtype} {image.shape} and its labels {labels.dtype} {labels.shape};"
            " they must be uint8 [H, W, 3] and uint8 [H, W]"
        )


def resize(example: Example, size: ImageSize) -> Example:
    """The example at this size: the picture by antialiased bilinear, labels by nearest, which invents no class."""
    height, width = sides(size)
    if example.labels.shape == (height, width):
        return example
    image = Image.fromarray(example.image).resize((width, height), Image.Resampling.BILINEAR)
    labels = Image.fromarray(example.labels).resize((width, height), Image.Resampling.NEAREST)
    return Example(example.name, np.asarray(image), np.asarray(labels))


def load_split(source: Source, size: ImageSize, examples: int | None, cache_dir: Path) -> Split:
    """The first `examples` pictures (None: all) of a source at this size, from the cache or decoded into it.

    The cache is keyed by everything that the arrays depend on. A folder gets its name only when it is complete, also if
    several processes build it at once. A folder whose bytes have changed since is made again.

    Raises:
      InputError: a picture cannot be read, or the disk is full.
    """
    count = source.size if examples is None else min(examples, source.size)
    key = {"version": VERSION, "size": size, "count": count, **source.identity}
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    folder = cache_dir / f"{source.dataset}-{source.split}-{size_text(size)}-{digest}"
    split = _open(folder)
    if split is None:
        try:
            _build(source, size, count, folder)
        except OSError as error:
            raise InputError(
                f"the cache in {cache_dir} cannot be written ({error.strerror}): give another --cache-dir"
            ) from None
        split = _open(folder)
        if split is None:
            raise InputError(f"the cache in {folder} cannot be read back: check the disk, or give another --cache-dir")
    return split._replace(validation=source.validation)


def _open(folder: Path) -> Split | None:
    """The split in a cache folder, or None where it is absent, incomplete or damaged."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in ARRAYS}
        with ThreadPoolExecutor(len(ARRAYS)) as pool:  # zlib releases the interpreter's lock
            sums = dict(zip(ARRAYS, pool.map(_checksum, arrays.values()), strict=True))
        if sums != meta["checksums"] or len(meta["names"]) != len(arrays["images"]):
            return None
        down, across = meta["scale"]  # caches of older versions lack it, and are made again
        return Split(arrays["images"], arrays["labels"], meta["names"], (down, across), checksums=(*sums.values(),))
    except Exception:  # damaged files fail in many ways
        return None


def _checksum(array: np.ndarray) -> int:
    value = 0
    for start in range(0, len(array), 256):
        value = zlib.crc32(np.ascontiguousarray(array[start : start + 256]).data, value)
    return value


def _build(source: Source, size: ImageSize, count: int, folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(folder)
    building = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    held = os.open(building, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        _decode(source, size, count, building)
        try:
            building.rename(folder)
        except OSError:  # _open refused the folder there, unless another process was faster
            if _open(folder) is None:
                shutil.rmtree(folder, ignore_errors=True)
                building.rename(folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)
        os.close(held)


def _remove_abandoned(folder: Path) -> None:
    """Removes what killed processes have left of this cache, which no process holds any more."""
    for building in folder.parent.glob(f".{folder.name}-*"):
        with contextlib.suppress(OSError):
            held = os.open(building, os.O_RDONLY)
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if time.time() - building.stat().st_mtime > 60:  # a newer one may be about to be held
                    shutil.rmtree(building, ignore_errors=True)
            finally:
                os.close(held)


def _decode(source: Source, size: ImageSize, count: int, building: Path) -> None:
    shapes: dict[str, tuple[int, ...]] = {"images": (count, *sides(size), 3), "labels": (count, *sides(size))}
    try:
        arrays = {name: _allocate(building / f"{name}.npy", shape) for name, shape in shapes.items()}
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        needed = sum(int(np.prod(shape)) for shape in shapes.values())
        raise InputError(
            f"no room for the cache: {needed / 1e6:.0f} MB needed in {building.parent}; free some, give another"
            " --cache-dir, or fewer --train-examples"
        ) from None
    scales = np.zeros((count, 2))

    def decode(i: int) -> str:
        example = source.read(i)
        check_example(example)
        scales[i] = np.divide(size, example.labels.shape)
        example = resize(example, size)
        arrays["images"][i], arrays["labels"][i] = example.image, example.labels
        return example.name

    progress = tqdm(desc=f"decoding {source.dataset} {source.split}", total=count, unit="pictures", disable=None)
    with ThreadPoolExecutor(os.cpu_count()) as pool, progress:
        futures = [pool.submit(decode, i) for i in range(count)]
        try:
            names = [(future.result(), progress.update())[0] for future in futures]
        except BaseException:
            pool.shutdown(cancel_futures=True)  # one bad picture ends it: no need to decode the rest first
            raise
    for array in arrays.values():
        array.flush()
    checksums = {name: _checksum(array) for name, array in arrays.items()}
    # Written last: a folder without it is no cache.
    meta = {"checksums": checksums, "names": names, "scale": np.median(scales, axis=0).tolist()}
    (building / "meta.json").write_text(json.dumps(meta))


def _allocate(path: Path, shape: tuple[int, ...]) -> np.memmap:
    create: Callable[..., np.memmap] = np.lib.format.open_memmap
    array = create(path, "w+", np.uint8, shape)
    with path.open("r+b") as file:  # writing to a memory-mapped file on a full disk ends in SIGBUS, not in an exception
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array
