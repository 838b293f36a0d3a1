"""What is refused in a config: values, sizes, classes and losses that no run can have."""

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import get_args

from unet_jax.config import IGNORE_LABEL, Downsampling, RunConfig, Upsampling, sides
from unet_jax.errors import InputError

LOSS_NAMES = ("cross_entropy", "log_dice", "soft_dice")


def check_size(height: int, width: int, levels: int) -> None:
    """Raises InputError unless both sides are positive multiples of 2^(levels-1), and there are levels."""
    if levels < 1:
        raise InputError("the network has no widths: give the features of each level, such as 32 64 128")
    multiple = 2 ** (levels - 1)
    if height % multiple or width % multiple or height < 1 or width < 1:  # no min(): jax.export has symbolic sides
        nearest = [max(1, round(side / multiple)) * multiple for side in (height, width)]
        raise InputError(
            f"pictures of {height}x{width} do not fit {levels} levels: height and width must be multiples of"
            f" {multiple}; the nearest size is {nearest[0]}x{nearest[1]}"
        )


def check_sampling(downsampling: str, upsampling: str) -> None:
    """Raises InputError for a method that the network does not have."""
    for method, known in ((downsampling, get_args(Downsampling)), (upsampling, get_args(Upsampling))):
        if method not in known:
            raise InputError(f"{method!r} is no method of the network: choose from {', '.join(known)}")


def check_config(config: RunConfig) -> None:
    """Raises InputError for the first value that no run can have."""
    data, model, train = config.data, config.model, config.train
    at_least_one = {
        "epochs": train.epochs,
        "batch-size": train.batch_size or None,  # 0 is to be filled in
        "train-examples": data.train_examples,
        "test-examples": data.test_examples,
        "widths": min(model.widths, default=0),
    }
    for flag, value in at_least_one.items():
        if value is not None and value < 1:
            raise InputError(f"--{flag} is {value}: it must be at least 1")
    if not (math.isfinite(train.learning_rate) and train.learning_rate > 0):
        raise InputError(f"--learning-rate is {train.learning_rate}: it must be positive and finite")
    shares = {"dropout-rate": model.dropout_rate, "ema": train.ema, "validation-fraction": data.validation_fraction}
    shares["test-fraction"] = data.test_fraction
    for flag, share in shares.items():
        if not 0 <= share < 1:
            raise InputError(f"--{flag} is {share}: it must be at least 0 and below 1")
    for name in ("patience", "warmup_epochs", "weight_decay", "clip_norm"):
        if not 0 <= (amount := getattr(train, name)) < math.inf:
            raise InputError(f"--{name.replace('_', '-')} is {amount}: it must be finite and not negative")
    if train.warmup_epochs and train.warmup_epochs >= train.epochs:  # it would never train at the full rate
        raise InputError(f"--warmup-epochs is {train.warmup_epochs}: it must be below --epochs {train.epochs}")
    if not 0 <= train.seed < 2**32:  # JAX takes only the last 32 bits of a larger one
        raise InputError(f"--seed is {train.seed}: it must be from 0 to {2**32 - 1}")
    if data.class_colours and (
        (data.class_names and len(data.class_colours) != len(data.class_names))
        or not all(re.fullmatch("#[0-9a-fA-F]{6}", colour) for colour in data.class_colours)
    ):
        raise InputError(f"--class-colours are {', '.join(data.class_colours)}: give each class one, such as '#e69f00'")
    if data.scale and not all(0 < factor < math.inf for factor in data.scale):
        raise InputError(f"--scale is {data.scale}: both must be positive and finite")
    if data.white is not None and not 0 < data.white < 65536:
        raise InputError(f"--white is {data.white}: it must be from 1 to 65535")
    check_size(*sides(data.image_size), len(model.widths))
    if data.class_names or data.dataset != "folder":  # whose classes are yet to be counted
        check_class_names(data.class_names)
    names = [name for _, name in loss_terms(train.loss)]
    if train.class_weights and "cross_entropy" not in names:
        raise InputError(f"--class-weights are those of cross_entropy, which --loss {train.loss} lacks")
    if not all(0 < weight < math.inf for weight in train.class_weights):
        raise InputError(
            f"--class-weights are {train.class_weights}: they must be positive and finite; for pixels that are not to"
            f" count, masks have {IGNORE_LABEL}, or the value that classes.json has as ignore"
        )
    if train.class_weights and data.class_names and len(train.class_weights) != len(data.class_names):
        raise InputError(f"--class-weights are {len(train.class_weights)}, the classes {', '.join(data.class_names)}")


def check_patience(config: RunConfig) -> None:
    """Raises InputError for patience without a validation part. The config is complete: a folder may have a part."""
    if config.train.patience and not config.data.validation_fraction:
        raise InputError(
            f"--patience {config.train.patience} goes by a validation part, and there is none: add"
            " --validation-fraction .1, or list one in a folder's val.txt"
        )


def check_class_names(names: Sequence[str]) -> None:
    """Raises InputError unless they are two or more different names, and no more than labels can hold."""
    if repeated := [name for name, count in Counter(names).items() if count > 1]:
        raise InputError(f"--class-names has {', '.join(repeated)} more than once: each class needs its own name")
    if not 2 <= len(names) <= IGNORE_LABEL:
        raise InputError(f"--class-names are {len(names)}: two classes are the least, {IGNORE_LABEL} the most")


def check_classes_of_data(names: Sequence[str], source: Sequence[str], dataset: str) -> None:
    """Raises InputError if the names differ in number from the dataset's, or are the dataset's in another order."""
    if len(names) != len(source) or (set(names) == set(source) and tuple(names) != tuple(source)):
        raise InputError(
            f"--class-names are {', '.join(names)}, but the masks of {dataset} have {len(source)} classes, in this"
            f" order: {', '.join(source)}"
        )


def loss_terms(text: str) -> tuple[tuple[float, str], ...]:
    """(weight, name) of each term of a loss such as "cross_entropy+0.5*soft_dice".

    Raises:
      InputError: a term is not NAME or WEIGHT*NAME with a known name and a positive weight.
    """
    terms = []
    for term in text.replace(" ", "").split("+"):
        match = re.fullmatch(rf"(?:((?:\d+\.?\d*|\.\d+)(?:e-?\d+)?)\*)?({'|'.join(LOSS_NAMES)})", term)
        weight = float(match[1] or 1) if match else 0.0
        if not match or not 0 < weight < math.inf:
            raise InputError(
                f"--loss has the term {term!r}: write {', '.join(LOSS_NAMES)},"
                " or a sum such as cross_entropy+0.5*soft_dice"
            )
        terms.append((weight, match[2]))
    return tuple(terms)
