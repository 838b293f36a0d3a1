"""What people report of trainers: each situation is done right or refused in a line, never wrong without a word."""

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from unet_jax.errors import InputError

SMALL = ["--dataset", "synthetic", "--image-size", "16", "--widths", "4", "4", "--train-examples", "12"]
SMALL += ["--test-examples", "5", "--batch-size", "8", "--epochs", "1"]


@pytest.fixture(scope="module")
def scripts():
    """The modules of experiments/, by their file names."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "experiments"))
    try:
        return SimpleNamespace(**{name: importlib.import_module(name) for name in ("run", "evaluate", "predict")})
    finally:
        sys.path.pop(0)


def make_folder(folder, count=10, names=None):
    """A folder of pictures of 24x32 with a bright square each, and masks of 0 and 1."""
    rng = np.random.default_rng(0)
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
    for i in range(count):
        mask = np.zeros((24, 32), np.uint8)
        y, x = rng.integers(0, 12, 2)
        mask[y : y + 10, x : x + 10] = 1
        name = names[i] if names else f"p{i}"
        Image.fromarray((mask[..., None] * 150 + rng.integers(0, 60, (24, 32, 3))).astype(np.uint8)).save(
            folder / "images" / f"{name}.png"
        )
        Image.fromarray(mask).save(folder / "masks" / f"{name}.png")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("folder") / "d")


def parse(scripts, *flags):
    (options,) = scripts.run.parse([*map(str, flags)])
    return options


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("pet", "background"), "have 3 classes, in this order: pet, background, border"),
        (("a", "b", "c", "d"), "--class-names are a, b, c, d, but"),
        (("background", "pet", "border"), "in this order"),
    ],
)
def test_class_names_that_are_not_the_datas(scripts, tmp_path, names, message):
    options = parse(scripts, *SMALL, "--class-names", *names)
    with pytest.raises(InputError, match=message):
        scripts.run.load_splits(options.config, str(tmp_path))


def test_class_names_may_be_others_of_the_same_number(scripts, tmp_path):
    options = parse(scripts, *SMALL, "--class-names", "Tier", "Grund", "Rand")
    assert len(scripts.run.load_splits(options.config, str(tmp_path))["train"].names) == 12


@pytest.mark.parametrize("size", [9, 12, 16, 64])
def test_a_batch_size_given_by_hand_is_kept_or_refused(scripts, folder, tmp_path, size):
    options = parse(scripts, "--dataset", "folder", "--data-dir", folder, "--batch-size", size, "--image-size", 16)
    assert options.config.train.batch_size == size
    with pytest.raises(InputError, match=f"--batch-size {size} is larger than the 8 training pictures"):
        scripts.run.load_splits(options.config, str(tmp_path))


@pytest.mark.parametrize(
    ("flags", "size"), [((), 8), (("--train-examples", 5), 5), (("--validation-fraction", 0.5), 4)]
)
def test_a_batch_size_that_nobody_gave_fits(scripts, folder, flags, size):
    options = parse(scripts, "--dataset", "folder", "--data-dir", folder, "--image-size", 16, *flags)
    assert options.config.train.batch_size == size
