"""Which pictures `unet-jax evaluate` scores: a split of the run's own dataset, or of another one."""

import contextlib
import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from unet_jax import runs, splits
from unet_jax.config import DataConfig, RunConfig
from unet_jax.data import batches
from unet_jax.data.cache import Split, load_split
from unet_jax.data.classes import some
from unet_jax.data.datasets import resolve, sources, whole
from unet_jax.data.source import Source
from unet_jax.data.tiles import picture_of
from unet_jax.errors import InputError
from unet_jax.folders import default_cache_dir

if TYPE_CHECKING:
    from unet_jax.commands.evaluate import Options


class Picked(NamedTuple):
    """Pictures to evaluate: the dataset's name and folder, the split's name, and which rows of which source they are.

    elsewhere is the name of the folder (or dataset) if it is not the run's own, else "".
    split has the arrays. It is None if they are to be scored at full size.
    """

    dataset: str
    data_dir: str | None
    elsewhere: str
    name: str
    source: Source
    rows: Sequence[int]
    split: Split | None


def pick(options: "Options", config: RunConfig) -> Picked:
    """The pictures that the options ask for. Lines say what the network has seen of them.

    Raises:
      InputError: there are none, they cannot be read, or they are not what they are taken for.
    """
    data_dir = options.data_dir or runs.data_dir(options.run, config)
    dataset, _ = resolve(options.dataset or config.data.dataset, data_dir, False)
    if dataset == "synthetic" and options.data_dir:
        raise InputError(f"{options.run} is of synthetic pets: add --dataset folder for the pictures in {data_dir}")
    if config.data.tiles and dataset != "folder":
        raise InputError(f"{options.run} was trained on tiles of a folder's pictures: give the --data-dir of a folder")
    data = dataclasses.replace(config.data, dataset=dataset, data_dir=data_dir)
    found, names = sources(data, config.train.seed), splits.read(options.run)
    own = dataset != "folder" or is_own(options, config, found, names)
    elsewhere = "" if own and dataset == config.data.dataset else Path(data_dir or dataset).resolve().name
    name, divided = split_name(options, data, found, own)
    source = whole(found) if name == "all" else found["test" if name == "test" else "train"]
    if not source.size:
        raise InputError(f"{data_dir} has no pictures in the {name} split: choose another --split, such as all")
    if len(source.class_names) != len(data.class_names):
        raise InputError(f"{options.run} knows the classes {data.class_names}, the dataset has {source.class_names}")
    count = {"test": data.test_examples, "all": None}.get(name, data.train_examples)
    cache = Path(options.cache_dir) if options.cache_dir else default_cache_dir()
    first = None if options.full_size and source.pictures else options.examples  # at full size tiles do not count
    most = count if divided else first or count
    known = options.full_size and source.names and not divided  # so that no arrays need be made for them
    split = None if known else load_split(source, data.image_size, most, cache)
    asked = split.names if split else source.names[:most]
    rows: Sequence[int] = range(len(asked))
    if divided and split:
        part = batches.divide(split, data.validation_fraction, config.train.seed)[name == "validation"]
        asked = [asked[i] for i in part]
        if own and asked != names.get(name, asked):  # a run that an older version made has no names
            raise InputError(
                f"{data_dir or dataset} has other {name} pictures than {options.run} had: --split all scores them all"
            )
        rows = part[:first].tolist()
        if not options.full_size:
            split = Split(split.images[rows], split.labels[rows], asked[:first])
    elif name != "train":
        if dataset == "folder" and not names:
            print(f"{options.run} {splits.UNKNOWN}")
        scored = list(dict.fromkeys(map(picture_of, asked))) if options.full_size else asked
        check_unseen(options.run, names, scored, own and name == "test", config.train.seed)
    return Picked(dataset, data_dir, elsewhere, name, source, rows, None if options.full_size else split)


def is_own(
    options: "Options", config: RunConfig, found: Mapping[str, Source], names: Mapping[str, Sequence[str]]
) -> bool:
    """Whether these are the pictures of the run itself. A folder that was moved is recognized by their names."""
    if not (options.data_dir or options.dataset):
        return True
    with contextlib.suppress(InputError, OSError):  # the run's own folder may be gone
        if os.path.samefile(options.data_dir or "", runs.data_dir(options.run, config) or ""):
            return True
    trained, of_train = (set(map(picture_of, some)) for some in (splits.trained_on(names), found["train"].names))
    tested, of_test = (set(map(picture_of, some)) for some in (names.get("test", []), found["test"].names))
    return bool(trained) and trained <= of_train and tested <= of_test


def split_name(options: "Options", data: DataConfig, found: Mapping[str, Source], own: bool) -> tuple[str, bool]:
    """The split to evaluate, and whether it is a part of train, divided for training and validation."""
    held_out = "test" if found["test"].size or not data.validation_fraction else "validation"
    name = options.split or (held_out if own else "all")
    if name == "validation" and not data.validation_fraction:
        raise InputError(f"{options.run} kept no part of train for validation: choose --split test or train")
    divided = data.validation_fraction > 0 and (own or bool(found["train"].validation))
    divided = divided and name in ("train", "validation")
    if name == "validation" and not divided:
        raise InputError(
            f"{data.data_dir} is not divided as the run's pictures were: choose --split train, test or all"
        )
    return name, divided


def check_unseen(run: Path, names: Mapping[str, Sequence[str]], asked: Sequence[str], own: bool, seed: int) -> None:
    """Prints how many pictures have names that the run was trained on; InputError if they are its own test split.

    What the runs were trained on that it started from (--init-from) counts too, but is never refused.
    """

    unit = "tiles" if asked and picture_of(asked[0]) != asked[0] else "pictures"

    def text(seen: list[str], by: str) -> str:
        return f"{len(seen)} of these {len(asked)} {unit} have names that {by} was trained on ({some(seen)})"

    itself = {picture_of(name) for name in splits.trained_on(names)}
    trained = splits.seen(run, seed).either
    if own and (seen := splits.among(asked, itself)):
        raise InputError(
            f"{text(seen, str(run))}: the folder's lists or pictures have changed since; --split all scores them anyway"
        )
    if seen := splits.among(asked, trained):
        alone = seen == splits.among(seen, itself)
        print(text(seen, f"{run}" if alone else f"{run}, or a run that it started from,"))
