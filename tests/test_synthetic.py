import hashlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from unet_jax.data import synthetic
from unet_jax.errors import InputError

PET, BACKGROUND, BORDER = range(3)


def same(a, b):
    return a.name == b.name and np.array_equal(a.image, b.image) and np.array_equal(a.labels, b.labels)


@pytest.fixture(scope="module")
def examples():
    source = synthetic.source("train", 64, 64)
    return [source.read(i) for i in range(64)]


@pytest.fixture(scope="module")
def labels(examples):
    return np.stack([example.labels for example in examples])


def test_layout(examples):
    source = synthetic.source("train", 64, 64)
    assert source.class_names == ("pet", "background", "border")
    assert (source.dataset, source.split, source.size) == ("synthetic", "train", 64)
    assert examples[7].name == "synthetic_train_00007"
    for example in examples:
        assert example.image.shape == (64, 64, 3)
        assert example.labels.shape == (64, 64)
        assert example.image.dtype == example.labels.dtype == np.uint8
        assert set(np.unique(example.labels)) == {PET, BACKGROUND, BORDER}


def test_identity_is_what_pictures_depend_on():
    identity = synthetic.source("train", 10, 64).identity
    assert identity == synthetic.source("train", 20, 64).identity
    others = [synthetic.source("test", 10, 64), synthetic.source("train", 10, 32), synthetic.source("train", 10, 64, 1)]
    assert all(other.identity != identity for other in others)
    assert synthetic.VERSION in identity.values()


def test_same_again_and_from_threads(examples):
    source = synthetic.source("train", 1000, 64)
    with ThreadPoolExecutor(4) as pool:
        again = list(pool.map(source.read, reversed(range(64))))[::-1]
    assert all(map(same, examples, again))


def test_splits_seeds_and_indices_differ(examples):
    others = [synthetic.source("test", 4, 64), synthetic.source("train", 4, 64, seed=1)]
    pictures = examples[:4] + [source.read(i) for source in others for i in range(4)]
    assert len({picture.image.tobytes() for picture in pictures}) == len(pictures)
    assert len({picture.labels.tobytes() for picture in pictures}) == len(pictures)


def test_golden():
    """The pictures of this VERSION, on every machine. Raise VERSION when these have to change."""
    example = synthetic.source("train", 1, 64).read(0)
    digest = [hashlib.sha256(array.tobytes()).hexdigest()[:16] for array in (example.image, example.labels)]
    assert (synthetic.VERSION, *digest) == (1, "f49d01688a500dcf", "6955dc1f2e4b98c2")


def test_class_shares(labels):
    share = np.bincount(labels.ravel(), minlength=3) / labels.size
    assert share == pytest.approx([0.30, 0.58, 0.12], abs=0.04)
    pet = (labels == PET).mean((1, 2))
    assert pet.min() > 0.1
    assert pet.max() < 0.6


@pytest.mark.parametrize("image_size", [16, 64, 100])
def test_border_separates_pet_from_background(image_size):
    source = synthetic.source("train", 64, image_size)
    for i in range(64):
        labels = source.read(i).labels.astype(int)
        for a, b in ((labels[1:], labels[:-1]), (labels[:, 1:], labels[:, :-1])):
            assert not np.any((a != b) & (a != BORDER) & (b != BORDER))


def mean_iou(predicted, labels):
    hits = [np.sum((predicted == c) & (labels == c)) for c in range(3)]
    return np.mean([hit / np.sum((predicted == c) | (labels == c)) for c, hit in enumerate(hits)])


def test_neither_a_constant_nor_the_colour_solves_it(examples, labels):
    assert all(mean_iou(np.full_like(labels, c), labels) < 0.25 for c in range(3))
    bins = np.stack([example.image for example in examples]).astype(int) // 32 @ [64, 8, 1]
    counts = np.zeros((512, 3))
    np.add.at(counts, (bins.ravel(), labels.ravel()), 1)
    most_frequent = counts.argmax(1)  # the best answer from a pixel's colour, fitted to these very pictures
    assert mean_iou(most_frequent[bins], labels) < 0.35


def test_same_scene_at_another_size(examples):
    large = synthetic.source("train", 8, 192)
    for i in range(8):
        example = large.read(i)
        assert np.mean(example.labels[1::3, 1::3] == examples[i].labels) > 0.99
        difference = example.image[1::3, 1::3].astype(int) - examples[i].image
        assert np.abs(difference).mean() < 8


@pytest.mark.parametrize("wrong", [{"size": 0}, {"image_size": 8}, {"seed": -1}])
def test_wrong_arguments(wrong):
    with pytest.raises(InputError, match="image_size >= 16"):
        synthetic.source(**{"split": "train", "size": 4, "image_size": 64, "seed": 0} | wrong)
