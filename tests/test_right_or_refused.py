"""What people report of trainers: each situation is done right or refused in a line, never wrong without a word."""

import dataclasses
import json
import os
import pwd
import tempfile
from types import SimpleNamespace

import chex
import jax
import numpy as np
import pytest
from PIL import Image

import unet_jax
from unet_jax import checkpoint, device, folders, plots, runs, train
from unet_jax.augment import augment
from unet_jax.commands import evaluate as evaluate_command
from unet_jax.commands import predict as predict_command
from unet_jax.commands import train as train_command
from unet_jax.config import ModelConfig, RunConfig, default_config, differences, from_dict, to_dict
from unet_jax.data import masks, oxford_iiit_pet, pictures
from unet_jax.data.datasets import load_splits, sources
from unet_jax.errors import InputError
from unet_jax.start import start_from

SMALL = ["--dataset", "synthetic", "--image-size", "16", "--widths", "4", "4", "--train-examples", "12"]
SMALL += ["--test-examples", "5", "--batch-size", "8", "--epochs", "1"]


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
        checkpoint.save(checkpoints, runs.fresh_state(config, device.placement()), checkpoint.Progress([], []))
    return folder


def parse(*flags):
    (options,) = train_command.parse([*map(str, flags)])
    return options


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("pet", "background"), "have 3 classes, in this order: pet, background, border"),
        (("a", "b", "c", "d"), "--class-names are a, b, c, d, but"),
        (("background", "pet", "border"), "in this order"),
    ],
)
def test_class_names_that_are_not_the_datas(tmp_path, names, message):
    options = parse(*SMALL, "--class-names", *names)
    with pytest.raises(InputError, match=message):
        load_splits(options.config, str(tmp_path))


def test_class_names_may_be_others_of_the_same_number(tmp_path):
    options = parse(*SMALL, "--class-names", "Tier", "Grund", "Rand")
    assert len(load_splits(options.config, str(tmp_path))["train"].names) == 12


@pytest.mark.parametrize("size", [9, 12, 16, 64])
def test_a_batch_size_given_by_hand_is_kept_or_refused(folder, tmp_path, size):
    options = parse("--dataset", "folder", "--data-dir", folder, "--batch-size", size, "--image-size", 16)
    assert options.config.train.batch_size == size
    with pytest.raises(InputError, match=f"--batch-size {size} is larger than the 8 training pictures"):
        load_splits(options.config, str(tmp_path))


@pytest.mark.parametrize(
    ("flags", "size"),
    [((), 8), (("--batch-size", 0), 8), (("--train-examples", 5), 5), (("--validation-fraction", 0.5), 4)],
)
def test_a_batch_size_that_nobody_gave_fits(folder, flags, size):
    options = parse("--dataset", "folder", "--data-dir", folder, "--image-size", 16, *flags)
    assert options.config.train.batch_size == size


def test_a_batch_size_that_nobody_gave_fits_from_python_too(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(device, "set_up", lambda folder: None)
    config = default_config("mp_tr_ce", "folder")
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, data_dir=folder, image_size=16),
        model=ModelConfig(widths=(4, 4)),
        train=dataclasses.replace(config.train, epochs=1),
    )
    for _ in range(2):
        run = unet_jax.run(config, tmp_path / "run", cache_dir=tmp_path / "cache")
    assert runs.read_config(run).train.batch_size == 8
    assert "has its 1 epoch already" in capsys.readouterr().out
    by_hand = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=16))
    with pytest.raises(InputError, match="batch_size 16 is larger than the 8 training pictures"):
        unet_jax.run(by_hand, tmp_path / "by_hand", cache_dir=tmp_path / "cache")


def dtypes(tree) -> set[str]:
    return {str(x.dtype) for x in jax.tree.leaves(tree)}


def test_a_run_is_float32_where_jax_is_float64(tmp_path):
    config = tiny_config("best")
    run = save_run(tmp_path / "run", config)
    state, placement = runs.fresh_state(config, device.placement()), device.placement()
    with jax.enable_x64(True):
        chex.assert_trees_all_equal(runs.fresh_state(config, device.placement()), state)
        chex.assert_trees_all_equal(runs.load(run, placement)[1].state, state)
        steps = train.make_steps(config, placement, steps_per_epoch=1)
        batch = train.Batch(np.zeros((2, 16, 16, 3), np.uint8), np.zeros((2, 16, 16), np.uint8), np.ones(2, np.float32))
        after, _ = jax.eval_shape(steps.train, state, batch)
        assert dtypes(after) == dtypes(jax.eval_shape(steps.statistics, state, batch, 0)) == {"float32", "int32"}
        chex.assert_trees_all_equal_dtypes(after, state)
        change = jax.eval_shape(lambda key: augment(key, batch.images, batch.labels, "strong"), jax.random.key(0))
        assert dtypes(change) == {"float32", "uint8"}


def test_a_run_knows_the_scale_of_its_pictures(folder, tmp_path):
    flags = ["--dataset", "folder", "--data-dir", folder, "--image-size", 16, "--widths", 4, 4, "--epochs", 1]
    options = parse(*flags, "--workdir", tmp_path / "run", "--cache-dir", tmp_path / "cache")
    train_command.train_run(options, device.placement())
    assert runs.read_config(tmp_path / "run").data.scale == (16 / 24, 16 / 32)
    # A cache of an older version, which does not say, is made again.
    (meta,) = (tmp_path / "cache").glob("folder-train-*/meta.json")
    text = meta.read_text()
    meta.write_text(json.dumps({name: value for name, value in json.loads(text).items() if name != "scale"}))
    assert load_splits(options.config, str(tmp_path / "cache"))["train"].scale == (16 / 24, 16 / 32)
    assert json.loads(meta.read_text()) == json.loads(text)


def test_a_run_without_a_scale_goes_on():
    old = to_dict(tiny_config())
    del old["data"]["scale"]
    assert differences(from_dict(old), tiny_config(scale=(0.5, 0.5))) == []


def test_bad_input_is_a_value_error_and_tells_what_it_is_of(tmp_path):
    for text, message in (('{"format_version": 9}', "json: the config has format version 9"), ("{", "cannot be read")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=message) as error:
            runs.read_config(tmp_path)
        assert isinstance(error.value, InputError)


def test_fine_tuning_to_other_classes_takes_all_but_the_last_layer(tmp_path, capsys):
    other = save_run(tmp_path / "other", tiny_config())
    config = tiny_config(class_names=("cat", "dog"))
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, init_from=str(other), seed=1))
    params = start_from(config, device.placement()).state.params
    assert f"the last layer starts anew: {other} has other classes (pet, background, border)" in capsys.readouterr().out
    theirs = runs.load(other, device.placement())[1].state.params
    chex.assert_trees_all_equal({**params, "logits": 0}, {**theirs, "logits": 0})
    chex.assert_trees_all_equal(params["logits"], runs.fresh_state(config, device.placement()).params["logits"])
    assert params["logits"]["bias"].shape == (2,)
    # Classes of other names are other classes, though as many.
    renamed = dataclasses.replace(config, data=dataclasses.replace(config.data, class_names=("a", "b", "c")))
    params = start_from(renamed, device.placement()).state.params
    assert (params["logits"]["bias"] != theirs["logits"]["bias"]).all()


def test_fine_tuning_another_network_is_refused_by_what_differs(tmp_path):
    other = save_run(tmp_path / "other", tiny_config())
    config = tiny_config("strconv_tr_ce")
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, init_from=str(other)))
    message = "is a run of another network: downsampling max_pool instead of strided_conv$"
    with pytest.raises(InputError, match=message):
        start_from(config, device.placement())


def test_fewer_epochs_than_are_done_are_told_as_they_are(tmp_path, capsys):
    run = save_run(tmp_path / "run", tiny_config())
    runs.write_json(run / "summary.json", {"epochs": 2})
    runs.write_records(run, [{"epoch": 1}, {"epoch": 2}])
    config = tiny_config()
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, epochs=1))
    train_command.train_run(train_command.Options(config, str(run)), device.placement())
    assert "has its 2 epochs already" in capsys.readouterr().out


def test_a_cache_that_cannot_be_written_is_told_with_the_flag(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot be written .*: give another --cache-dir"):
        load_splits(parse(*SMALL).config, str(tmp_path / "file"))


def test_brackets_in_a_name_are_found(tmp_path):
    folder = tmp_path / "br [2024] pets"
    folder.mkdir()
    for name in ("a.jpg", "b.jpg"):
        (folder / name).write_bytes(b"")
    assert predict_command.find([f"{folder}/*.jpg"]) == ([folder / "a.jpg", folder / "b.jpg"], [])
    assert predict_command.find([str(tmp_path / "b[rx] ?2024] pets" / "[ab].jpg")])[0] == [
        folder / "a.jpg",
        folder / "b.jpg",
    ]


def test_a_link_beside_its_picture_is_a_picture_of_its_own(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "0link.png").symlink_to("a.png")
    found, _ = predict_command.find([str(tmp_path), str(tmp_path / ".." / tmp_path.name / "a.png")])
    assert [path.name for path in found] == ["0link.png", "a.png"]


def test_a_cache_that_cannot_be_written_is_left_alone(tmp_path):
    (tmp_path / "file").touch()
    assert device._can_write(tmp_path / "new" / "xla")
    assert not device._can_write(tmp_path / "file" / "xla")


def test_an_empty_word_is_not_the_current_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(SystemExit, match="2"):
        predict_command.command(["", "--out", "out"])
    assert "an argument is empty" in capsys.readouterr().err


def test_tiffs_in_which_0_is_white_are_read_inverted_or_refused(tmp_path):
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    white_is_zero = {262: 0}
    Image.fromarray(grey).save(tmp_path / "8.tif", tiffinfo=white_is_zero)
    np.testing.assert_array_equal(pictures.read_picture(tmp_path / "8.tif")[..., 0], grey)
    Image.fromarray(grey.astype(np.uint16)).save(tmp_path / "16.tif", tiffinfo=white_is_zero)
    with pytest.raises(InputError, match="0 is white: save it with black as 0"):
        pictures.read_picture(tmp_path / "16.tif")
    for name in ("8.tif", "16.tif"):
        with pytest.raises(InputError, match="0 is white: save it with black as 0"):
            masks.look(tmp_path / name, ())


def test_a_larger_picture_is_taken_where_its_size_is_allowed(tmp_path, monkeypatch, capsys):
    for module, name in ((pictures, "MAX_PIXELS"), (Image, "MAX_IMAGE_PIXELS")):
        monkeypatch.setattr(module, name, getattr(module, name))  # put back afterwards
    monkeypatch.setattr(device, "set_up", lambda folder: None)
    run = save_run(tmp_path / "run", tiny_config())
    Image.new("RGB", (50, 40)).save(tmp_path / "x.png")
    options = predict_command.Options(run, (str(tmp_path / "x.png"),), tmp_path / "out", mode="tile")
    assert predict_command.main(dataclasses.replace(options, max_megapixels=0.001)) == 2
    assert "40 pixels, the limit is 0 million (--max-megapixels of predict)" in capsys.readouterr().err
    assert predict_command.main(dataclasses.replace(options, max_megapixels=0.0005)) == 2  # Pillow refuses it itself
    assert "has over 0 million pixels, which is the limit (--max-megapixels" in capsys.readouterr().err
    assert predict_command.main(dataclasses.replace(options, max_megapixels=0.002)) == 0
    with Image.open(tmp_path / "out" / "x_mask.png") as mask:
        assert mask.size == (50, 40)


def test_stems_that_are_not_utf_8_and_have_dollars_train_and_predict(tmp_path, monkeypatch):
    names = [os.fsdecode(b"caf\xe9 %d $x$" % i) for i in range(10)]
    data = make_folder(tmp_path / "d", names=names)
    (data / "classes.json").write_text('{"names": ["$a$", "_b"]}')
    flags = ["--dataset", "folder", "--data-dir", data, "--image-size", 16, "--widths", 4, 4, "--epochs", 1]
    options = parse(*flags, "--workdir", tmp_path / "run", "--cache-dir", tmp_path / "cache")
    train_command.train_run(options, device.placement())
    monkeypatch.setattr(device, "set_up", lambda folder: None)
    evaluate_command.evaluate_run(evaluate_command.Options(tmp_path / "run", cache_dir=str(tmp_path / "cache")))
    assert b"caf\xe9 " in (tmp_path / "run" / "evaluation-test" / "scores.csv").read_bytes()
    assert (tmp_path / "run" / "evaluation-test" / "pictures.png").exists()
    listed = "".join(f"{name}\n" for name in names[:3])
    (data / "test.txt").write_text(listed, errors="surrogateescape")
    assert sources(options.config.data, 0)["test"].names == names[:3]


def test_without_a_home_a_temporary_folder_stands_in(tmp_path, monkeypatch, capsys):
    def nobody(uid):
        raise KeyError(uid)

    for name in ("HOME", "XDG_CACHE_HOME", "TFDS_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folders.home.cache_clear()
    try:
        home = tmp_path / f"unet_jax-{os.getuid()}"
        assert folders.default_cache_dir() == home / ".cache" / "unet_jax"
        assert oxford_iiit_pet.default_data_dir() == home / "tensorflow_datasets"
        assert home.stat().st_mode & 0o777 == 0o700
        lines = capsys.readouterr().err.splitlines()
        assert lines == [f"this user has no home folder, {home} stands in for it: set HOME to keep what is there"]
    finally:
        folders.home.cache_clear()


def test_the_colours_of_classes_json_are_the_runs(tmp_path):
    data = make_folder(tmp_path / "d")
    for path in (data / "masks").iterdir():
        mask = np.asarray(Image.open(path))
        Image.fromarray(np.array([[9, 8, 7], [0, 255, 0]], np.uint8)[mask]).save(path)
    (data / "classes.json").write_text('{"names": ["ground", "square"], "colours": [[9, 8, 7], [0, 255, 0]]}')
    flags = ("--dataset", "folder", "--data-dir", data, "--image-size", 16)
    assert parse(*flags).config.data.class_colours == ("#090807", "#00ff00")
    own = parse(*flags, "--class-colours", "#111111", "#222222").config
    assert own.data.class_colours == ("#111111", "#222222")
    for colours in (["#111111"], ["red", "green"]):
        with pytest.raises(InputError, match="--class-colours are"):
            parse(*flags, "--class-colours", *colours)


def test_a_picture_in_which_nothing_counts_ranks_among_nobodys_worst(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "results_figure", lambda *args: drawn.append(args) or SimpleNamespace(savefig=id))
    confusion = np.zeros((3, 2, 2), int)
    confusion[0], confusion[2] = [[1, 1], [1, 1]], [[2, 0], [0, 2]]
    split = SimpleNamespace(images=np.zeros((3, 4, 4, 3)), labels=np.zeros((3, 4, 4)), names=["a", "void", "c"])
    steps = SimpleNamespace(predict=lambda state, images: images)
    data = SimpleNamespace(class_names=("x", "y"), class_colours=())
    evaluate_command.draw_extremes(steps, None, split, confusion, data, tmp_path, "t")
    assert drawn[0][5] == ["c\nmean IoU 1.000", "a\nmean IoU 0.333"]
