"""Pictures cut into tiles: each pixel counts once, a picture's tiles stay in one part, and whole runs on them."""

import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_folder import save
from test_run import execute

from unet_jax.config import IGNORE_LABEL, default_config
from unet_jax.data.batches import divide, validation_rows
from unet_jax.data.cache import Split
from unet_jax.data.datasets import fill_in, load_splits, sources, tiles_line
from unet_jax.data.source import Example, Source
from unet_jax.data.tiles import cut, picture_of
from unet_jax.errors import InputError
from unet_jax.full_size import confusions

RNG = np.random.default_rng(0)
SIZES = [(32, 48), (33, 47), (16, 16), (100, 20), (5, 70), (3, 2)]


def pictures(sizes=SIZES, reads: Counter | None = None) -> tuple[Source, list[Example]]:
    """A source of pictures of these sizes, in which no two pixels are alike, and its examples."""
    examples = [
        Example(f"p_{i}", RNG.integers(0, 256, (h, w, 3), np.uint8), RNG.integers(0, 3, (h, w), np.uint8))
        for i, (h, w) in enumerate(sizes)
    ]

    def read(i: int) -> Example:
        if reads is not None:
            reads[i] += 1
        return examples[i]

    names = [example.name for example in examples]
    return Source("d", "train", ("a", "b", "c"), {}, len(sizes), read, names, sizes, frozenset({"p_1"})), examples


@pytest.mark.parametrize("size", [16, (16, 32)])
def test_each_pixel_of_each_picture_counts_once(size):
    source, examples = pictures()
    tiles = cut(source, size, (1.0, 1.0))
    height, width = size if isinstance(size, tuple) else (size, size)
    counts = {example.name: np.zeros(example.labels.shape, int) for example in examples}
    by_name = {example.name: example for example in examples}
    for n, name in enumerate(tiles.names):
        tile = tiles.read(n)
        assert tile.name == name
        assert tile.image.shape == (height, width, 3)
        assert tile.labels.shape == (height, width)
        picture = by_name[picture_of(name)]
        top, left = map(int, name.rpartition("//")[2].split(","))
        own = np.s_[top : top + height, left : left + width]
        h, w = picture.labels[own].shape
        np.testing.assert_array_equal(tile.image[:h, :w], picture.image[own])
        counted = tile.labels != IGNORE_LABEL
        assert counted.any()
        assert not counted[h:].any()
        assert not counted[:, w:].any()
        np.testing.assert_array_equal(tile.labels[counted], picture.labels[own][counted[:h, :w]])
        counts[picture.name][own] += counted[:h, :w]
    for count in counts.values():
        np.testing.assert_array_equal(count, 1)


def test_a_small_picture_is_mirrored():
    source, examples = pictures([(3, 2)])
    tile = cut(source, 16, (1.0, 1.0)).read(0).image
    np.testing.assert_array_equal(tile[3:6, :2], examples[0].image[::-1])
    np.testing.assert_array_equal(tile[:3, 2:4], examples[0].image[:, ::-1])


def test_pictures_are_resized_by_the_scale_first():
    source, _ = pictures([(64, 96)])
    tiles = cut(source, 16, (0.5, 0.25))
    assert tiles.names == ["p_0//0,0", "p_0//0,8", "p_0//16,0", "p_0//16,8"]
    assert tiles.identity != cut(source, 16, (0.5, 0.5)).identity


def test_a_picture_is_read_once_for_all_of_its_tiles():
    reads: Counter = Counter()
    source, _ = pictures([(80, 80)] * 5, reads)
    tiles = cut(source, 16, (1.0, 1.0))
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(tiles.read, range(tiles.size)))
    assert tiles.size == 125
    assert reads == dict.fromkeys(range(5), 1)


def test_the_tiles_of_a_picture_are_in_one_part():
    source, _ = pictures([(64, 64)] * 10)
    tiles = cut(source, 16, (1.0, 1.0))
    training, validation = validation_rows(tiles.names, 0.3, 0)
    parts = [{picture_of(tiles.names[i]) for i in rows} for rows in (training, validation)]
    assert (len(training), len(validation)) == (7 * 16, 3 * 16)
    assert not parts[0] & parts[1]
    listed = validation_rows(tiles.names, 0.3, 0, tiles.validation)[1]
    assert {picture_of(tiles.names[i]) for i in listed} == {"p_1"}


def test_threads_decode_many_pictures_at_once():
    source, _ = pictures([(32, 32)] * 10 + [(16, 16)])
    tiles = cut(source, 16, (1.0, 1.0))
    assert [picture_of(name) for name in tiles.names[:9]] == [*(f"p_{i}" for i in range(8)), "p_0"]
    assert len(set(tiles.names)) == tiles.size == 41


def test_names_that_look_like_places():
    names = [f"scan[{i},{j}]" for i in range(3) for j in range(3)] + ["a/b,c", "train/0,1"]
    assert [picture_of(name) for name in names] == names
    assert [len(rows) for rows in validation_rows(names, 0.3, 0)] == [8, 3]


def test_what_nothing_can_be_learnt_from_is_left_out_of_training():
    labels = np.full((5, 4, 4), IGNORE_LABEL, np.uint8)
    labels[[0, 3], 1, 1] = 0
    split = Split(np.zeros((5, 4, 4, 3), np.uint8), labels, list("abcde"))
    training, validation = divide(split, 0.0, 0)
    assert (training.tolist(), validation.tolist()) == ([0, 3], [])


@pytest.mark.parametrize("seed", range(4))
def test_the_batch_size_is_checked_against_the_tiles_that_are_trained_on(tmp_path, seed):
    for name, side in (("large", 64), ("small", 16)):
        save(tmp_path, name, np.eye(side, dtype=np.uint8))
    config = default_config("mp_tr_ce", "folder")
    data = replace(config.data, data_dir=str(tmp_path), image_size=16, tiles=True, test_fraction=0.0)
    train = replace(config.train, seed=seed)
    filled = fill_in(replace(config, data=replace(data, validation_fraction=0.5), train=train))
    train_source = sources(filled.data, seed)["train"]
    on = validation_rows(train_source.names, 0.5, seed)[0]
    assert len(on) in (1, 16)
    assert filled.train.batch_size == len(on)
    with pytest.raises(InputError, match=f"larger than the {len(on)} training tiles"):
        load_splits(replace(filled, train=replace(train, batch_size=17)), tmp_path / "cache")


def test_a_line_says_how_many_pictures_are_smaller_than_a_tile(tmp_path):
    save(tmp_path, "large", np.eye(64, dtype=np.uint8))
    save(tmp_path, "small", np.eye(16, dtype=np.uint8))
    data = replace(default_config("mp_tr_ce", "folder").data, data_dir=str(tmp_path), image_size=32, tiles=True)
    assert "; 1 of 2 pictures are smaller than a tile" in tiles_line(data, sources(data, 0))
    assert "smaller" not in tiles_line(replace(data, image_size=16), sources(replace(data, image_size=16), 0))


def test_no_score_where_no_pixel_counts():
    source, _ = pictures([(16, 16)])
    blank = source._replace(read=lambda i: source.read(i)._replace(labels=np.full((16, 16), IGNORE_LABEL, np.uint8)))
    with pytest.raises(InputError, match="every pixel is ignored"):
        confusions(lambda images, tta: [np.zeros((16, 16), np.uint8)], blank, [0])


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """Where commands run, with a folder of pictures with lines of one pixel in it, which resizing blurs."""
    home = tmp_path_factory.mktemp("home")
    for i in range(6):
        mask = np.zeros((65 + i, 80), np.uint8)
        mask[RNG.integers(0, 60, 5)] = 1
        mask[:, RNG.integers(0, 80, 5)] = 1
        save(home / "lines", f"line_{i}", mask, np.repeat(255 * mask[..., None], 3, axis=2))
    return home


RUN = ["--dataset", "folder", "--data-dir", "lines", "--image-size", "32", "--widths", "8", "8", "--tiles"]


def test_a_run_on_tiles(home):
    flags = [*RUN, "--variant", "mp_tr_ce", "--learning-rate", ".01", "--validation-fraction", ".2"]
    output = execute(home, "run.py", *flags, "--workdir", "run", "--epochs", 4)
    assert "cut into tiles of 32: 45 train + 9 test" in output  # of the 5 + 1 pictures, nine of each
    splits = json.loads((home / "run" / "split.json").read_text())
    assert {part: len(names) for part, names in splits.items()} == {"train": 36, "validation": 9, "test": 9}
    parts = [{picture_of(name) for name in names} for names in splits.values()]
    assert len(set.union(*parts)) == sum(map(len, parts)) == 6
    data = json.loads((home / "run" / "config.json").read_text())["data"]
    assert (data["tiles"], data["scale"]) == (True, [1, 1])
    execute(home, "evaluate.py", "run")
    scores = json.loads((home / "run" / "evaluation-test" / "evaluation.json").read_text())
    assert f"mean IoU {scores['mean_iou']:.4f} after 4 epochs" in output
    with Image.open(home / "lines" / "masks" / f"{next(iter(parts[2]))}.png") as mask:
        assert np.sum(scores["confusion"]) == mask.width * mask.height  # all of the test picture's pixels, and once
    # Prediction sees pictures as training did, without being told.
    assert "at the scale of training, 1.00" in execute(home, "predict.py", "run", "lines/images", "--out", "masks")
    agree = [
        np.mean(np.asarray(Image.open(home / "masks" / f"line_{i}_mask.png")) == np.asarray(Image.open(path)))
        for i, path in enumerate(sorted((home / "lines" / "masks").iterdir()))
    ]
    assert min(agree) > 0.95
    execute(home, "export.py", "run", "--out", "exported", "--format", "weights")
    exported = json.loads((home / "exported" / "model.json").read_text())
    assert "best at 1 of the pictures' own height" in exported["preprocessing"]
    refused = execute(home, "evaluate.py", "run", "--dataset", "synthetic", status=2)
    assert "run was trained on tiles of a folder's pictures" in refused
    # It goes on as any run does, but not with other tiles.
    assert "going on from step" in execute(home, "run.py", *flags, "--workdir", "run", "--epochs", 5)
    refused = execute(home, "run.py", *flags, "--workdir", "run", "--epochs", 6, "--scale", ".5", ".5", status=2)
    assert "data.scale: (1.0, 1.0) -> (0.5, 0.5)" in refused


@pytest.mark.parametrize("flags", [[], ["--tiles"]])
def test_scores_at_full_size_are_those_of_the_masks_that_predict_writes(home, flags):
    run, masks = home / f"full{len(flags)}", home / f"masks{len(flags)}"
    execute(home, "run.py", *RUN[:-1], *flags, "--variant", "mp_tr_ce", "--workdir", run, "--epochs", 1)
    assert "at full size" in execute(home, "evaluate.py", run, "--full-size", "--split", "train", "--examples", 4)
    found = run / "evaluation-train-full-size"
    scores = json.loads((found / "evaluation.json").read_text())
    names = json.loads((found / "split.json").read_text())["train"]
    assert len(names) == 4  # pictures, also of a run on tiles
    execute(home, "predict.py", run, *[home / "lines" / "images" / f"{name}.png" for name in names], "--out", masks)
    confusion = np.zeros((2, 2), int)
    for name in names:
        true = np.asarray(Image.open(home / "lines" / "masks" / f"{name}.png"))
        np.add.at(confusion, (true, np.asarray(Image.open(masks / f"{name}_mask.png"))), 1)
    assert scores["confusion"] == confusion.tolist()
    assert scores["pixel_accuracy"] == np.trace(confusion) / confusion.sum()
    assert "test_loss" not in scores


def test_the_comparison_of_tiles_and_resizing(home):
    flags = ["--count", 6, "--side", 128, "--image-size", 32, "--epochs", 1, "--widths", 4, 4, "--out", "cells"]
    *_, resized, tiles = execute(home, "tiles.py", *flags).splitlines()
    assert resized.startswith("| resized-0 | 16 |")
    assert tiles.startswith("| tiles-0 | 1 |")


def test_refused_where_pictures_are_no_folders(home):
    flags = ["--dataset", "synthetic", "--tiles", "--workdir", "refused"]
    assert "--tiles is for pictures of your own" in execute(home, "run.py", *flags, status=2)
    assert not (home / "refused").exists()
