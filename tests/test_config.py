"""Configs: to JSON and back, what is refused, what makes two runs differ."""

import json
import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from unet_jax.checks import check_config, check_size
from unet_jax.config import (
    PUBLISHED,
    VARIANTS,
    DataConfig,
    ModelConfig,
    RunConfig,
    TrainConfig,
    default_config,
    differences,
    from_dict,
    sides,
    size_text,
    to_dict,
)
from unet_jax.errors import InputError
from unet_jax.published import TEST_LOSSES

CONFIG = default_config("mp_tr_ce", "auto")


def through_json(config: RunConfig) -> RunConfig:
    return from_dict(json.loads(json.dumps(to_dict(config), allow_nan=False)))


def refusal(function, *args) -> str:
    with pytest.raises(InputError) as error:
        function(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("dataset", ["auto", "oxford_iiit_pet", "synthetic"])
@pytest.mark.parametrize("variant", PUBLISHED)
def test_defaults_are_valid_and_survive_json(variant, dataset):
    config = default_config(variant, dataset)
    check_config(config)
    assert through_json(config) == config
    assert (config.variant, config.data.dataset) == (variant, dataset)
    row = VARIANTS[variant]
    chosen = (config.model.downsampling, config.model.upsampling, config.train.loss)
    assert chosen == (row.downsampling, row.upsampling, row.loss)
    if dataset != "synthetic":
        assert (config.train.batch_size, config.train.epochs, config.data.image_size) == (row.batch_size, 25, 240)
        assert (config.train.learning_rate, config.model.dropout_rate) == (1e-3, 0.3)


def test_the_published_variants():
    assert {name: (*VARIANTS[name][:4], min(TEST_LOSSES[name].values())) for name in PUBLISHED} == {
        "mp_tr_ce": ("max_pool", "transposed_conv", "cross_entropy", 64, 0.5283),
        "mp_tr_dice": ("max_pool", "transposed_conv", "log_dice", 128, 0.0909),
        "strconv_tr_ce": ("strided_conv", "transposed_conv", "cross_entropy", 64, 0.2871),
        "strconv_ups_dice": ("strided_conv", "resize", "log_dice", 32, 0.0642),
    }
    assert {(*VARIANTS[name].train, VARIANTS[name].dropout_rate) for name in PUBLISHED} == {(0.3,)}


@pytest.mark.parametrize("dataset", ["auto", "oxford_iiit_pet", "synthetic"])
def test_the_recipe_of_our_own(dataset):
    config = default_config("best", dataset)
    check_config(config)
    assert through_json(config) == config
    assert set(VARIANTS) - set(PUBLISHED) == {"best"}
    assert (config.train.augment, config.train.ema, config.train.schedule) == ("strong", 0.998, "cosine")
    assert (config.train.batch_size, config.train.warmup_epochs, config.model.dropout_rate) == (16, 1, 0)


def test_values_that_are_not_defaults_survive_json():
    config = RunConfig(
        "strconv_ups_dice",
        DataConfig("synthetic", "somewhere", 32, 7, 5, ("cat", "background")),
        ModelConfig("strided_conv", "resize", (4, 8), 0.0, "bfloat16"),
        TrainConfig("cross_entropy+0.5*soft_dice", 3, 2, 0.25, 9, "an/older/run"),
    )
    assert through_json(config) == config
    assert isinstance(through_json(config).model.widths, tuple)


def test_fields_that_an_older_file_lacks_take_their_defaults():
    assert from_dict({"format_version": 1, "train": {"loss": "log_dice"}}) == RunConfig(
        train=TrainConfig(loss="log_dice")
    )


@pytest.mark.parametrize(
    ("variant", "hint"),
    [
        ("mp_tr_cee", "did you mean mp_tr_ce or "),
        ("strconv_ups_ce", "strconv_ups_dice"),
        ("zzz", "choose from mp_tr_ce, mp_tr_dice, strconv_tr_ce, strconv_ups_dice, best, all"),
    ],
)
def test_an_unknown_variant_is_refused_with_what_is_near(variant, hint):
    message = refusal(default_config, variant, "auto")
    assert message.startswith(f"unknown variant '{variant}': ")
    assert hint in message


def test_an_unknown_dataset_is_refused_with_the_choices():
    with pytest.raises(InputError, match="unknown dataset 'pets': choose from auto, oxford_iiit_pet, synthetic"):
        default_config("mp_tr_dice", "pets")


@pytest.mark.parametrize(
    ("part", "field", "value", "message"),
    [
        ("train", "epochs", 0, "--epochs is 0: it must be at least 1"),
        ("train", "batch_size", -4, "--batch-size is -4: it must be at least 1"),
        ("data", "train_examples", 0, "--train-examples is 0: it must be at least 1"),
        ("data", "test_examples", -1, "--test-examples is -1: it must be at least 1"),
        ("model", "widths", (8, 0), "--widths is 0: it must be at least 1"),
        ("model", "widths", (), "--widths is 0: it must be at least 1"),
        ("train", "learning_rate", 0.0, "--learning-rate is 0.0: it must be positive and finite"),
        ("train", "learning_rate", math.nan, "--learning-rate is nan: it must be positive and finite"),
        ("train", "learning_rate", math.inf, "--learning-rate is inf: it must be positive and finite"),
        ("model", "dropout_rate", 1.0, "--dropout-rate is 1.0: it must be at least 0 and below 1"),
        ("model", "dropout_rate", -0.1, "--dropout-rate is -0.1: it must be at least 0 and below 1"),
        ("model", "dropout_rate", math.nan, "--dropout-rate is nan: it must be at least 0 and below 1"),
        ("train", "seed", -1, "--seed is -1: it must be from 0 to 4294967295"),
        ("train", "seed", 2**32, "--seed is 4294967296: it must be"),
        ("train", "seed", 2**64, "--seed is 18446744073709551616: it must be"),
        ("data", "class_names", ("a", "a", "b"), "--class-names has a more than once"),
        ("data", "class_names", ("a",), "--class-names are 1: two classes are the least, 255 the most"),
        ("data", "class_names", (), "--class-names are 0: two classes are the least"),
        ("data", "class_names", tuple(map(str, range(256))), "--class-names are 256: two"),
        ("data", "image_size", 100, "pictures of 100x100 do not fit 5 levels"),
        ("data", "image_size", (360, 480), "pictures of 360x480 do not fit 5 levels"),
        ("train", "loss", "dice", "--loss has the term 'dice'"),
        ("train", "ema", 1.0, "--ema is 1.0: it must be at least 0 and below 1"),
        ("train", "weight_decay", -0.1, "--weight-decay is -0.1: it must be finite and not negative"),
        ("train", "clip_norm", math.inf, "--clip-norm is inf: it must be finite and not negative"),
        ("train", "patience", -1, "--patience is -1: it must be finite and not negative"),
        ("train", "warmup_epochs", -1, "--warmup-epochs is -1: it must be finite and not negative"),
        ("train", "warmup_epochs", 25, "--warmup-epochs is 25: it must be below --epochs 25"),
    ],
)
def test_values_that_no_run_can_have_are_refused(part, field, value, message):
    check_config(CONFIG)
    config = replace(CONFIG, **{part: replace(getattr(CONFIG, part), **{field: value})})
    assert message in refusal(check_config, config)


def test_check_size():
    check_size(16, 48, 5)
    check_size(7, 5, 1)
    assert refusal(check_size, 250, 239, 5).endswith("must be multiples of 16; the nearest size is 256x240")
    assert refusal(check_size, 0, 16, 5).endswith("the nearest size is 16x16")


def test_a_square_is_one_number_in_all_configs():
    def read(size: int | list[int]) -> int | tuple[int, int]:
        values = to_dict(CONFIG)
        config = from_dict({**values, "data": {**values["data"], "image_size": size}})
        assert through_json(config) == config
        return config.data.image_size

    assert [read(240), read([240, 240]), read([352, 480])] == [240, 240, (352, 480)]
    assert (sides(240), sides((352, 480))) == ((240, 240), (352, 480))
    assert (size_text(240), size_text((352, 480))) == ("240", "352x480")
    other = replace(CONFIG, data=replace(CONFIG.data, image_size=(352, 480)))
    assert differences(CONFIG, other) == ["data.image_size: 240 -> (352, 480)"]
    assert DataConfig(image_size=np.int64(240)) == DataConfig(image_size=(np.int32(240), 240)) == DataConfig()
    json.dumps(to_dict(RunConfig(data=DataConfig(image_size=(np.int32(352), 480)))))


@pytest.mark.parametrize("size", [(32, 32, 32), (), 32.0, (32, 32.0), "32", None])
def test_an_image_size_that_is_none_is_refused_when_it_is_given(size):
    message = f"image_size is {size!r}: give a whole number, or two, height and width"
    assert refusal(partial(DataConfig, image_size=size)) == message
    assert "image_size" in refusal(from_dict, {"format_version": 1, "data": {"image_size": size}})


def test_differences():
    assert differences(CONFIG, CONFIG) == []
    other = replace(
        CONFIG,
        model=replace(CONFIG.model, widths=(4, 8)),
        train=replace(CONFIG.train, batch_size=32, init_from="run"),
    )
    assert differences(CONFIG, other) == [
        "model.widths: (32, 64, 128, 256, 512) -> (4, 8)",
        "train.batch_size: 64 -> 32",
        "train.init_from: None -> run",
    ]
    assert differences(CONFIG, default_config("mp_tr_dice", "auto"))[0] == "variant: mp_tr_ce -> mp_tr_dice"


def test_folders_and_epochs_make_no_other_run():
    moved = replace(
        CONFIG,
        data=replace(CONFIG.data, data_dir="elsewhere"),
        train=replace(CONFIG.train, epochs=CONFIG.train.epochs + 1, patience=3),
    )
    assert moved != CONFIG
    assert differences(CONFIG, moved) == []


def test_how_files_are_read_is_compared_where_a_run_has_kept_it():
    values = to_dict(default_config("mp_tr_ce", "folder"))
    for name in ("mask_255", "white"):
        del values["data"][name]
    old = from_dict(values)  # of an older version, which took 65535 for white, and 255 as the masks said
    assert (old.data.mask_255, old.data.white) == (None, 65535)
    as_class = replace(old, data=replace(old.data, mask_255="class"))
    assert differences(old, as_class) == []
    ignored = replace(old, data=replace(old.data, mask_255="ignored", white=4095))
    assert differences(as_class, ignored) == ["data.mask_255: class -> ignored", "data.white: 65535 -> 4095"]
    assert "--white is 0" in refusal(check_config, replace(old, data=replace(old.data, white=0)))


def test_a_schedule_that_ends_makes_epochs_part_of_the_run():
    cosine = replace(CONFIG, train=replace(CONFIG.train, schedule="cosine", warmup_epochs=24))
    check_config(cosine)
    longer = replace(cosine, train=replace(cosine.train, epochs=26))
    assert differences(cosine, longer) == ["train.epochs: 25 -> 26"]
    too_short = replace(cosine, train=replace(cosine.train, epochs=24))
    assert "--warmup-epochs is 24: it must be below --epochs 24" in refusal(check_config, too_short)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "the config has format version 2, this version of unet_jax reads 1"),
        ({"format_version": None}, "format version None"),
        ({"optimizer": "sgd"}, "optimizer"),
        ({"train": {"momentum": 0.9}}, "momentum"),
        (
            {"train": {"batch_size": "64"}},
            "by another version, or edited by hand: train.batch_size is '64': it must be int",
        ),
        ({"train": {"batch_size": 6.4}}, "train.batch_size"),
        ({"train": {"loss": None}}, "train.loss"),
        ({"model": {"precision": "float16"}}, "precision is 'float16': choose from auto, float32, bfloat16"),
        ({"model": {"widths": ["4", "8"]}}, "model.widths"),
        ({"model": {"widths": 32}}, "model.widths is 32: it must be tuple[int, ...]"),
        ({"data": 5}, "data is 5: it must be DataConfig"),
        ({"data": {"data_dir": 5}}, "data.data_dir is 5: it must be str or None"),
        ({"data": {"mask_255": "x"}}, "data.mask_255 is 'x': choose from class, ignored"),
        ({"data": {"class_names": "ab"}}, "data.class_names is 'ab': it must be tuple[str, ...]"),
    ],
)
def test_a_config_of_another_kind_is_refused_in_one_line(change, message):
    values = {**json.loads(json.dumps(to_dict(CONFIG))), **change}
    assert message in refusal(from_dict, values)
