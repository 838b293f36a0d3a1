"""Every choice of a run as frozen dataclasses, to and from JSON. The flags of `unet-jax train` are these fields."""

import dataclasses
import difflib
import operator
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, get_args

import tyro

from unet_jax import typed
from unet_jax.errors import InputError
from unet_jax.published import TEST_LOSSES

FORMAT_VERSION = 1  # of config.json
SYNTHETIC_EXAMPLES = {"train": 400, "test": 100}  # the default: any number can be drawn
IGNORE_LABEL = 255  # pixels with this label count in no loss, no gradient and no metric

Downsampling = Literal["max_pool", "strided_conv"]
Upsampling = Literal["transposed_conv", "resize"]
Precision = Literal["auto", "float32", "bfloat16"]
Augment = Literal["none", "basic", "strong"]
Schedule = Literal["constant", "cosine"]
DatasetName = Literal["auto", "oxford_iiit_pet", "synthetic", "folder"]
ExportFormat = Literal["jax", "onnx", "weights"]
Meaning = Literal["class", "ignored"]
Tta = Literal["none", "horizontal", "all"]
ImageSize = int | tuple[int, int]  # the side of a square, or height and width


class Variant(NamedTuple):
    """A variant of the experiment: the settings in which variants differ."""

    downsampling: Downsampling
    upsampling: Upsampling
    loss: str
    batch_size: int
    train: Mapping[str, Any] = MappingProxyType({})  # other fields of TrainConfig
    dropout_rate: float = 0.3


VARIANTS = {
    "mp_tr_ce": Variant("max_pool", "transposed_conv", "cross_entropy", 64),
    "mp_tr_dice": Variant("max_pool", "transposed_conv", "log_dice", 128),
    "strconv_tr_ce": Variant("strided_conv", "transposed_conv", "cross_entropy", 64),
    "strconv_ups_dice": Variant("strided_conv", "resize", "log_dice", 32),
    "best": Variant(
        "max_pool", "transposed_conv", "cross_entropy+soft_dice", 16,
        train={"epochs": 60, "ema": 0.998, "augment": "strong", "schedule": "cosine", "warmup_epochs": 1},
        dropout_rate=0.0,
    ),
}  # fmt: skip
PUBLISHED = tuple(TEST_LOSSES)  # the variants of the published experiment


def sides(size: ImageSize) -> tuple[int, int]:
    """Height and width."""
    return (size, size) if isinstance(size, int) else size


def size_text(size: ImageSize) -> str:
    """The text 240, or 352x480: height by width."""
    return str(size) if isinstance(size, int) else "{}x{}".format(*size)


@dataclass(frozen=True)
class DataConfig:
    """The pictures."""

    dataset: DatasetName = "auto"
    """auto: the prepared pets, else download them, else synthetic pets; folder: the pictures in --data-dir."""
    data_dir: str | None = None
    """Folder of the prepared dataset (default: tensorflow-datasets' own), or your folder with images/ and masks/."""
    image_size: ImageSize = 240
    """Side of the square, or height and width, that pictures are resized to: multiples of 2^(levels-1)."""
    train_examples: int | None = None
    """The first N training pictures. Default: all."""
    test_examples: int | None = None
    """The first N test pictures. Default: all."""
    class_names: tuple[str, ...] = ("pet", "background", "border")
    """A name for each class, in the order of the labels. Default for a folder: from its classes.json, else counted."""
    test_fraction: float = 0.2
    """Share of a folder's pictures in the test split, if the folder has no train.txt or test.txt. 0: no test split."""
    validation_fraction: float = 0.0
    """Share of the training pictures held out to choose the best epoch. Only that epoch is then tested."""
    class_colours: tuple[str, ...] = ()
    """A colour for each class in figures and masks, as #rrggbb. Default: from a folder's classes.json, else our own."""
    scale: tuple[float, float] | None = None
    """The training size over the pictures' own, down and across, for tile mode. Default: medians; 1 1 with --tiles."""
    mask_255: Meaning | None = None
    """What 255 means in a folder's masks: the second of two classes, or no class. Default: judged from all masks."""
    white: int | None = 65535
    """The value of white in 16-bit grey pictures. Default for a folder: the largest value of the bits that they use."""
    mask_values: tyro.conf.Suppress[tuple[str, ...] | None] = None
    """What each class is in a folder's masks, and then what is ignored: values, or colours as #rrggbb. Found in its
    classes.json; () where values are labels."""
    mask_palette: tyro.conf.Suppress[tuple[str, ...] | None] = None
    """The colour of each class in the palettes of a folder's masks, "" for a class without one. Found in the masks."""
    tiles: bool = False
    """Cut a folder's pictures into tiles of --image-size (at --scale), instead of resizing them. Each counts as one."""

    def __post_init__(self) -> None:
        size = self.image_size
        try:
            height, width = map(operator.index, size if isinstance(size, (tuple, list)) else (size, size))
        except (TypeError, ValueError):
            raise InputError(f"image_size is {size!r}: give a whole number, or two, height and width") from None
        # One way to write a square, that of older configs; NumPy's integers become Python's.
        object.__setattr__(self, "image_size", height if height == width else (height, width))


@dataclass(frozen=True)
class ModelConfig:
    """The network."""

    downsampling: Downsampling = "max_pool"
    """2x2 max pool, or 3x3 convolution of stride 2."""
    upsampling: Upsampling = "transposed_conv"
    """3x3 transposed convolution of stride 2, or bilinear resize and 1x1 convolution."""
    widths: tuple[int, ...] = (32, 64, 128, 256, 512)
    """Features of the encoder's blocks, from full resolution down."""
    dropout_rate: float = 0.3
    """Dropout in the two deepest encoder blocks. Default for best: 0."""
    precision: Precision = "auto"
    """What the layers compute in; auto is bfloat16 on a GPU, a TPU and a CPU with AMX or AVX512-BF16, else float32."""
    remat: bool = False
    """Compute each block's inner activations again for the gradient instead of keeping them: less memory, more time."""


@dataclass(frozen=True)
class TrainConfig:
    """The optimization."""

    loss: str = "cross_entropy"
    """cross_entropy, log_dice, soft_dice, or a weighted sum such as cross_entropy+0.5*soft_dice."""
    batch_size: int = 64
    """Pictures per step, over all devices. 0, the default for a folder: 16, or all that are trained on if fewer."""
    epochs: int = 25
    """Passes over the training pictures."""
    learning_rate: float = 1e-3
    """Adam's step size."""
    seed: int = 0
    """Seed of the initial weights, picture order, dropout, augmentation, the synthetic pets, and the parts of a dataset
    that are drawn: validation, and a folder's test split."""
    init_from: str | None = None
    """Run folder whose parameters and batch norm statistics training starts from; pets: the network that comes with
    unet_jax (with --widths 16 32 64 128 256). In an imported run: the file of weights that it was made from."""
    class_weights: tuple[float, ...] = ()
    """Weight of each class's pixels in cross_entropy, a weighted mean over pixels; above 0. Default: all the same."""
    schedule: Schedule = "constant"
    """Learning rate after the warm-up: constant, or falling to 0 along half a cosine."""
    warmup_epochs: int = 0
    """Epochs in which the learning rate rises from 0, linearly."""
    weight_decay: float = 0.0
    """AdamW's weight decay of the kernels. Each step decays them by this times the learning rate."""
    clip_norm: float = 0.0
    """Gradients with a larger norm (over all parameters) are scaled down to this norm. 0: no clipping."""
    ema: float = 0.0
    """Decay of a moving average of the parameters, which evaluation and prediction then use. 0: no average."""
    augment: Augment = "none"
    """Random changes of the training pictures: basic flips, crops and varies the light a little; strong does more of
    that, turns, and varies colours too."""
    patience: int = 0
    """Stop when the validation part's mean IoU has not risen for this many epochs in a row. 0: never."""


@dataclass(frozen=True)
class RunConfig:
    """All settings of a run."""

    variant: str = "mp_tr_dice"
    """mp_tr_ce, mp_tr_dice, strconv_tr_ce, strconv_ups_dice, or all of these four in turn; or best, our own."""
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()


# Runs that differ only in these fields are the same run: folders, settings of predictions, how long to train, and
# memory traded for time.
NOT_COMPARED = {"data.data_dir", "data.class_colours", "data.scale", "train.epochs", "train.patience", "model.remat"}
# In the data; compared only if the older run has them.
FOUND = {"data.mask_255", "data.white", "data.mask_values", "data.mask_palette"}


def default_config(variant: str, dataset: DatasetName) -> RunConfig:
    """The settings of a variant (as published, if it was), at a size that suits the dataset.

    Raises:
      InputError: no such variant, or no such dataset.
    """
    if dataset not in get_args(DatasetName):
        raise InputError(f"unknown dataset {dataset!r}: choose from {', '.join(get_args(DatasetName))}")
    if variant not in VARIANTS:
        near = difflib.get_close_matches(variant, VARIANTS, n=2, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else f"choose from {', '.join(VARIANTS)}, all"
        raise InputError(f"unknown variant {variant!r}: {hint}")
    row = VARIANTS[variant]
    model = ModelConfig(row.downsampling, row.upsampling, dropout_rate=row.dropout_rate)
    train = TrainConfig(row.loss, row.batch_size, **row.train)
    if dataset == "synthetic":
        # Small enough to take minutes on two cores: the command without flags must show learning on any machine.
        counts = SYNTHETIC_EXAMPLES
        data = DataConfig(dataset, image_size=64, train_examples=counts["train"], test_examples=counts["test"])
        return RunConfig(variant, data, model, replace(train, batch_size=16, epochs=5))
    if dataset == "folder":
        data = DataConfig(dataset, class_names=(), white=None)
        return RunConfig(variant, data, model, replace(train, batch_size=0))
    return RunConfig(variant, DataConfig(dataset), model, train)


def to_dict(config: RunConfig) -> dict[str, Any]:
    """The config in JSON's types, with its format version."""
    return {"format_version": FORMAT_VERSION, **dataclasses.asdict(config)}


def from_dict(values: Mapping[str, Any]) -> RunConfig:
    """The inverse of to_dict, through JSON or not. Fields that an older file lacks take their defaults.

    Raises:
      InputError: another format version, an unknown field, or a value of another type.
    """
    fields = dict(values)
    version = fields.pop("format_version", None)
    if version != FORMAT_VERSION:
        raise InputError(f"the config has format version {version}, this version of unet_jax reads {FORMAT_VERSION}")
    try:
        return typed.build(RunConfig, fields)
    except InputError as error:
        raise InputError(f"the config was made by another version, or edited by hand: {error}") from None


def differences(old: RunConfig, new: RunConfig) -> list[str]:
    """The fields in which two runs differ, as "train.batch_size: 64 -> 32", leaving out NOT_COMPARED.

    Epochs are compared where the learning rate's schedule depends on them, and the scale where tiles do.
    """
    matter = {"train.epochs": new.train.schedule == "cosine", "data.scale": new.data.tiles}
    ignored = {name for name in NOT_COMPARED if not matter.get(name)}
    before, after = _flatten(dataclasses.asdict(old)), _flatten(dataclasses.asdict(new))
    ignored |= {name for name in FOUND if before[name] is None}
    return [f"{k}: {before[k]} -> {after[k]}" for k in after if before[k] != after[k] and k not in ignored]


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(_flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat
