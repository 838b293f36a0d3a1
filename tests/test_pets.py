import dataclasses
import json

import jax
import numpy as np
import pytest
from PIL import Image
from test_predict import picture

import unet_jax
from unet_jax import device, runs, weights
from unet_jax.commands import predict
from unet_jax.config import default_config
from unet_jax.errors import InputError
from unet_jax.start import start_from


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photos" / "cat.png"
    path.parent.mkdir()
    Image.fromarray(picture(40, 56)).save(path)
    return path


def test_the_network_that_comes_with_the_package_is_small_and_names_no_folder():
    files = list(weights.PETS.iterdir())
    assert {file.name for file in files} == {"README.md", "config.json", "model.json", "weights.msgpack"}
    assert sum(file.stat().st_size for file in files) < 5e6
    config = runs.read_config(weights.PETS)
    assert (config.data.data_dir, config.train.init_from) == (None, None)
    assert config.data.class_names == ("pet", "background", "border")


def test_the_card_gives_the_networks_size_and_training_size():
    config, restored = runs.load(weights.PETS, device.placement())
    card = (weights.PETS / "README.md").read_text()
    assert f"{sum(x.size for x in jax.tree.leaves(restored.state.params)):,} parameters" in card
    assert f"{config.data.image_size}x{config.data.image_size}" in card
    assert json.loads((weights.PETS / "model.json").read_text())["class_names"] == list(config.data.class_names)


@pytest.mark.parametrize("run", [[], ["pets"]])
@pytest.mark.parametrize("pictures", ["photos", "photos/cat.png", "photos/*.png"])
def test_predict_needs_no_run(photo, monkeypatch, run, pictures):
    monkeypatch.chdir(photo.parent.parent)
    with pytest.raises(SystemExit) as end:
        predict.command([*run, pictures, "--out", "masks"])
    assert not end.value.code
    with Image.open("masks/cat_mask.png") as mask:
        np.testing.assert_array_equal(mask, unet_jax.load()(picture(40, 56)))


def test_predict_takes_many_pictures_without_a_run(photo, tmp_path, capsys):
    Image.fromarray(picture(24, 24)).save(tmp_path / "dog.png")
    with pytest.raises(SystemExit) as end:
        predict.command([str(photo), str(tmp_path / "dog.png"), "--out", str(tmp_path / "masks")])
    assert not end.value.code
    assert len(list((tmp_path / "masks").glob("*_mask.png"))) == 2
    assert "that comes with unet_jax" in capsys.readouterr().out


def test_a_run_without_pictures_and_a_mistyped_run_are_refused(photo, tmp_path):
    runs.write_json(tmp_path / "config.json", {})
    for run, pictures, text in ((tmp_path, (), "no pictures are given"), (tmp_path / "no", (str(photo),), "no run")):
        with pytest.raises(InputError, match=text):
            predict.main(predict.Options(run, pictures, tmp_path / "masks"))


def test_a_run_in_a_folder_named_pets_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert weights.find("pets") == weights.PETS
    (tmp_path / "pets").mkdir()
    assert weights.find("pets") == weights.PETS
    runs.write_json(tmp_path / "pets" / "config.json", {})
    assert weights.find("pets").resolve() == tmp_path / "pets"


def test_training_starts_from_it():
    config = default_config("mp_tr_ce", "synthetic")
    model = dataclasses.replace(config.model, widths=(16, 32, 64, 128, 256))
    config = dataclasses.replace(config, model=model, train=dataclasses.replace(config.train, init_from="pets"))
    ours = start_from(config, device.placement()).state
    theirs = runs.load(weights.PETS, device.placement())[1].state
    for name in ("params", "batch_stats"):
        jax.tree.map(np.testing.assert_array_equal, getattr(ours, name), getattr(theirs, name))
