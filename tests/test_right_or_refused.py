"""What people report of trainers: each situation is done right or refused in a line, never wrong without a word."""

import dataclasses
import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import chex
import jax
import numpy as np
import pytest
from PIL import Image

from unet_jax import checkpoint, device, runs, train
from unet_jax.augment import augment
from unet_jax.config import ModelConfig, RunConfig, default_config, differences, from_dict, to_dict
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


def tiny_config(variant="mp_tr_ce", **data) -> RunConfig:
    config = default_config(variant, "synthetic")
    data = dataclasses.replace(config.data, image_size=16, **data)
    return dataclasses.replace(config, model=ModelConfig(config.model.downsampling, widths=(4, 6)), data=data)


def save_run(folder, config):
    """A run folder of initial weights, at step 0."""
    folder.mkdir()
    runs.write_json(folder / "config.json", to_dict(config))
    with checkpoint.manager(folder / "checkpoints", 0) as checkpoints:
        checkpoint.save(checkpoints, runs.fresh_state(config), checkpoint.Progress([], []))
    return folder


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


def dtypes(tree) -> set[str]:
    return {str(x.dtype) for x in jax.tree.leaves(tree)}


def test_a_run_is_float32_where_jax_is_float64(tmp_path):
    config = tiny_config("best")
    run = save_run(tmp_path / "run", config)
    state, placement = runs.fresh_state(config), device.placement()
    with jax.enable_x64(True):
        chex.assert_trees_all_equal(runs.fresh_state(config), state)
        chex.assert_trees_all_equal(runs.load(run, placement)[1].state, state)
        steps = train.make_steps(config, placement, steps_per_epoch=1)
        batch = train.Batch(np.zeros((2, 16, 16, 3), np.uint8), np.zeros((2, 16, 16), np.uint8), np.ones(2, np.float32))
        after, _ = jax.eval_shape(steps.train, state, batch)
        assert dtypes(after) == dtypes(jax.eval_shape(steps.statistics, state, batch, 0)) == {"float32", "int32"}
        chex.assert_trees_all_equal_dtypes(after, state)
        change = jax.eval_shape(lambda key: augment(key, batch.images, batch.labels, "strong"), jax.random.key(0))
        assert dtypes(change) == {"float32", "uint8"}


def test_a_run_knows_the_scale_of_its_pictures(scripts, folder, tmp_path):
    flags = ["--dataset", "folder", "--data-dir", folder, "--image-size", 16, "--widths", 4, 4, "--epochs", 1]
    options = parse(scripts, *flags, "--workdir", tmp_path / "run", "--cache-dir", tmp_path / "cache")
    scripts.run.train_run(options, device.placement())
    assert runs.read_config(tmp_path / "run").data.scale == (16 / 24, 16 / 32)
    # A cache of an older version, which does not say, is made again.
    (meta,) = (tmp_path / "cache").glob("folder-train-*/meta.json")
    text = meta.read_text()
    meta.write_text(json.dumps({name: value for name, value in json.loads(text).items() if name != "scale"}))
    assert scripts.run.load_splits(options.config, str(tmp_path / "cache"))["train"].scale == (16 / 24, 16 / 32)
    assert json.loads(meta.read_text()) == json.loads(text)


def test_a_run_without_a_scale_goes_on(scripts):
    old = to_dict(tiny_config())
    del old["data"]["scale"]
    assert differences(from_dict(old), tiny_config(scale=(0.5, 0.5))) == []
