"""The cache of decoded pictures: what it holds, when it is made anew, and that a broken one is never used."""

import errno
import fcntl
import json
import os
import shutil
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

from unet_jax.data import cache, synthetic
from unet_jax.data.source import Example, Source
from unet_jax.errors import InputError


def counting_source(reads: list[int], size: int = 5, marker: int = 0) -> Source:
    def read(i: int) -> Example:
        reads.append(i)
        rng = np.random.default_rng(i)
        return Example(f"p{i}", rng.integers(0, 256, (40, 30, 3), np.uint8), rng.integers(0, 3, (40, 30), np.uint8))

    return Source("counted", "train", ("a", "b", "c"), {"marker": marker}, size, read)


def test_decodes_once_and_again_only_when_something_changed(tmp_path):
    reads: list[int] = []
    first = cache.load_split(counting_source(reads), 16, None, tmp_path)
    assert sorted(reads) == [0, 1, 2, 3, 4]
    again = cache.load_split(counting_source(reads), 16, None, tmp_path)
    assert len(reads) == 5
    np.testing.assert_array_equal(first.images, again.images)
    assert again.names == [f"p{i}" for i in range(5)]
    assert isinstance(again.images, np.memmap)
    assert (again.images.shape, again.labels.shape) == ((5, 16, 16, 3), (5, 16, 16))
    cache.load_split(counting_source(reads), 32, None, tmp_path)
    cache.load_split(counting_source(reads), 16, 2, tmp_path)
    cache.load_split(counting_source(reads, marker=1), 16, None, tmp_path)
    assert len(reads) == 5 + 5 + 2 + 5


DAMAGE = ["flip a byte", "truncate", "empty", "header", "no meta", "half meta", "no labels", "empty folder"]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_cache_is_made_anew(tmp_path, damage):
    reads: list[int] = []
    good = np.array(cache.load_split(counting_source(reads), 16, None, tmp_path).images)
    (folder,) = tmp_path.iterdir()
    images, meta = folder / "images.npy", folder / "meta.json"
    if damage == "flip a byte":
        content = bytearray(images.read_bytes())
        content[-7] ^= 1
        images.write_bytes(content)
    elif damage == "truncate":
        images.write_bytes(images.read_bytes()[:-100])
    elif damage == "empty":
        images.write_bytes(b"")
    elif damage == "header":
        images.write_bytes(images.read_bytes().replace(b"'descr'", b"'descr"))
    elif damage == "no meta":
        meta.unlink()
    elif damage == "half meta":
        meta.write_text(meta.read_text()[:20])
    elif damage == "no labels":
        (folder / "labels.npy").unlink()
    else:
        shutil.rmtree(folder)
        folder.mkdir()
    np.testing.assert_array_equal(cache.load_split(counting_source(reads), 16, None, tmp_path).images, good)
    assert len(reads) == 10
    assert [p.name for p in tmp_path.iterdir()] == [folder.name]


def test_a_bad_picture_ends_it_by_name_and_leaves_nothing(tmp_path):
    def read(i: int) -> Example:
        raise InputError(f"picture {i} is corrupt")

    with pytest.raises(InputError, match="picture 0 is corrupt"):
        cache.load_split(Source("d", "train", ("a",), {}, 3, read), 16, None, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("image", "labels"),
    [
        (np.zeros((8, 8, 3)), np.zeros((8, 8), np.uint8)),
        (np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8), np.int64)),
        (np.zeros((8, 9, 3), np.uint8), np.zeros((8, 8), np.uint8)),
        (np.zeros((8, 8), np.uint8), np.zeros((8, 8), np.uint8)),
    ],
)
def test_what_a_source_gives_is_checked(tmp_path, image, labels):
    source = Source("own", "train", ("a", "b"), {}, 1, lambda i: Example("p0", image, labels))
    with pytest.raises(InputError, match=r"^p0: the picture is .* must be uint8 \[H, W, 3\] and uint8 \[H, W\]$"):
        cache.load_split(source, 8, None, tmp_path)


def test_no_room_is_said_before_anything_is_decoded(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(InputError, match="no room for the cache: 0 MB needed in "):
        cache.load_split(counting_source([]), 16, None, tmp_path)
    assert list(tmp_path.iterdir()) == []


def load_synthetic(folder: Path) -> int:
    split = cache.load_split(synthetic.source("train", 24, 32), 32, None, folder)
    return int(split.images.astype(int).sum())


def test_two_processes_build_it_at_once(tmp_path):
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        sums = list(pool.map(load_synthetic, [tmp_path] * 2))
    assert sums[0] == sums[1] == load_synthetic(tmp_path)
    (folder,) = tmp_path.iterdir()
    assert set(json.loads((folder / "meta.json").read_text())) == {"checksums", "names", "scale"}


def test_resize_antialiases_pictures_and_invents_no_class():
    checks = np.indices((64, 64)).sum(0) % 2
    image = np.repeat(checks[..., None] * 255, 3, -1).astype(np.uint8)
    labels = np.where(np.indices((64, 64))[1] < 20, 0, 2).astype(np.uint8)
    small = cache.resize(Example("x", image, labels), 16)
    assert np.abs(small.image.astype(int) - 127).max() <= 2  # without antialiasing: 0 or 255
    assert set(np.unique(small.labels)) == {0, 2}
    np.testing.assert_array_equal(small.labels, np.where(np.indices((16, 16))[1] < 5, 0, 2))
    flat = cache.resize(Example("x", image, labels), (16, 32))
    assert flat.image.shape == (16, 32, 3)
    np.testing.assert_array_equal(flat.labels, np.where(np.indices((16, 32))[1] < 10, 0, 2))
    unchanged = Example("x", image, labels)
    assert cache.resize(unchanged, 64) is unchanged


def test_what_killed_processes_left_is_removed_and_nothing_that_is_held(tmp_path):
    folder = cache.load_split(synthetic.source("train", 2, 16), 16, None, tmp_path) and next(tmp_path.iterdir())
    shutil.rmtree(folder)
    left, held, young = (tmp_path / f".{folder.name}-{name}" for name in ("left", "held", "young"))
    for building in (left, held, young):
        building.mkdir()
        os.utime(building, (0, 0) if building != young else None)
    holder = os.open(held, os.O_RDONLY)
    try:
        fcntl.flock(holder, fcntl.LOCK_EX)
        cache.load_split(synthetic.source("train", 2, 16), 16, None, tmp_path)
    finally:
        os.close(holder)
    assert {*tmp_path.iterdir()} == {folder, held, young}
