"""Pictures that are not square, from the flag to the export."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_folder import labels, save
from test_run import execute, records

from unet_jax.export import export_run
from unet_jax.predict import load

SIZE = 16, 32
FLAGS = ["--dataset", "folder", "--data-dir", "data", "--image-size", *SIZE, "--widths", "4", "4", "--workdir", "run"]
FLAGS += ["--variant", "strconv_ups_dice", "--augment", "strong"]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """Where a run of one epoch has been made of pictures of 20x48."""
    home = tmp_path_factory.mktemp("home")
    for stem in "abcdefgh":
        save(home / "data", stem, labels(2, (20, 48)))
    execute(home, "train", *FLAGS, "--epochs", 1)
    return home


def test_a_run_goes_on_at_its_own_size_alone(home):
    data = json.loads((home / "run" / "config.json").read_text())["data"]
    assert (data["image_size"], data["scale"]) == ([*SIZE], [16 / 20, 32 / 48])
    assert "going on from step" in execute(home, "train", *FLAGS, "--epochs", 2)
    assert len(records(home / "run")) == 2
    message = execute(home, "train", *FLAGS, "--image-size", 16, "--epochs", 3, status=2)
    assert "data.image_size: (16, 32) -> 16" in message


def test_evaluation_and_report(home):
    execute(home, "evaluate", "run")
    assert json.loads((home / "run" / "evaluation-test" / "evaluation.json").read_text())["pictures"] == 2
    assert "| strconv_ups_dice | folder data | 16x32 |" in execute(home, "report", "run", "--out", "reported")


def test_predictions_and_export(home):
    predictor = load(home / "run")
    picture = np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8)
    assert predictor.at_training_size(picture).shape == (*SIZE, 3)
    for mode in ("resize", "tile", "native"):
        assert predictor(picture, mode).shape == (60, 90)
    execute(home, "predict", "run", "data/images/a.png", "--out", "out")
    with Image.open(home / "out" / "a_mask.png") as mask:
        assert mask.size == (48, 20)
    assert json.dumps(export_run(home / "run", home / "model")["training_size"]) == "[16, 32]"


def test_synthetic_pets_are_drawn_as_squares_and_resized(home):
    flags = ("--dataset", "synthetic", "--image-size", *SIZE, "--widths", 4, 4, "--train-examples", 8)
    execute(home, "train", *flags, "--test-examples", 4, "--batch-size", 8, "--epochs", 1, "--workdir", "pets")
    assert json.loads((home / "pets" / "config.json").read_text())["data"]["scale"] == [0.5, 1]
