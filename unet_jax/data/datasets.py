"""The sources of a config's dataset: which dataset "auto" is, and where the pictures come from."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from unet_jax.checks import check_classes_of_data
from unet_jax.config import SYNTHETIC_EXAMPLES, DataConfig, DatasetName, RunConfig, sides, size_text
from unet_jax.data import folder, oxford_iiit_pet, synthetic, tiles
from unet_jax.data.cache import Split, load_split
from unet_jax.data.source import Source
from unet_jax.errors import InputError
from unet_jax.folders import default_cache_dir

DEFAULT_BATCH_SIZE = 16  # where a config has 0, and never more than there are pictures to train on


def resolve(dataset: DatasetName, data_dir: str | None, download: bool) -> tuple[DatasetName, str | None]:
    """The dataset that "auto" means here, and a notice for the user if it is not the real pets. Downloads nothing.

    Raises:
      InputError: the dataset is neither there nor can it be downloaded; the message says what to do.
    """
    if dataset == "synthetic":
        return "synthetic", None
    if dataset == "folder":
        if not data_dir:
            raise InputError("--dataset folder needs --data-dir, a folder that holds images/ and masks/")
        return "folder", None
    folder = Path(data_dir) if data_dir else oxford_iiit_pet.default_data_dir()
    if oxford_iiit_pet.is_prepared(folder):
        return "oxford_iiit_pet", None
    if data_dir and not download:
        raise InputError(
            f"no prepared oxford_iiit_pet in --data-dir {data_dir}: add --dataset folder for pictures of your own; for"
            " the pets, give the folder that holds oxford_iiit_pet/, or add --download to prepare it there"
        )
    if oxford_iiit_pet.is_reachable():
        return "oxford_iiit_pet", None
    missing = f"oxford_iiit_pet is not prepared in {folder}, and the site that it is downloaded from cannot be reached"
    if dataset == "oxford_iiit_pet" or data_dir:
        raise InputError(f"{missing}: go online, or give the --data-dir of a prepared copy, or --dataset synthetic")
    return "synthetic", f"{missing}.\nTraining on SYNTHETIC PETS instead: the scores say nothing about real pictures."


def fill_in(config: RunConfig) -> RunConfig:
    """A resolved config, completed with what a folder decides: class names, how its files are read, the batch size.

    Raises:
      InputError: the folder cannot be used.
    """
    data, batch_size = config.data, config.train.batch_size
    if data.dataset == "folder":
        data = folder.fill_in(data, config.train.seed)
        data = dataclasses.replace(data, scale=data.scale or tiles.SCALE) if data.tiles else data
    if not batch_size:
        available = training_pictures(data, sources(data, config.train.seed)["train"], config.train.seed)
        batch_size = min(DEFAULT_BATCH_SIZE, max(available, 1))
    return dataclasses.replace(config, data=data, train=dataclasses.replace(config.train, batch_size=batch_size))


def training_pictures(config: DataConfig, train: Source, seed: int) -> int:
    """How many pictures (or tiles) of a train split are trained on; except for rounding, if it has no names yet.

    Raises:
      InputError: they cannot be divided into a training and a validation part.
    """
    from unet_jax.data.batches import validation_rows  # which imports JAX

    taken = min(train.size, config.train_examples or train.size)
    if train.names:
        rows, _ = validation_rows(train.names[:taken], config.validation_fraction, seed, train.validation)
        return len(rows)
    return taken - round(taken * config.validation_fraction)


def sources(config: DataConfig, seed: int) -> dict[str, Source]:
    """The sources of a resolved config by split name, cut into tiles if the config says so.

    The pets are downloaded and prepared if they are not there.

    Raises:
      InputError: they cannot be prepared or read.
    """
    if config.tiles and config.dataset != "folder":
        raise InputError("--tiles is for pictures of your own: it goes with --dataset folder")
    if config.dataset == "synthetic":
        asked = {"train": config.train_examples, "test": config.test_examples}
        counts = {split: asked[split] or default for split, default in SYNTHETIC_EXAMPLES.items()}
        side = max(sides(config.image_size))  # drawn as squares, and resized like any other picture
        return {split: synthetic.source(split, n, side, seed) for split, n in counts.items()}
    if config.dataset == "folder":
        found = folder.sources(config, seed)
        scale = config.scale or tiles.SCALE
        return {part: tiles.cut(s, config.image_size, scale) for part, s in found.items()} if config.tiles else found
    data_dir = Path(config.data_dir) if config.data_dir else oxford_iiit_pet.default_data_dir()
    if not oxford_iiit_pet.is_prepared(data_dir):
        oxford_iiit_pet.prepare(data_dir)
    return {split: oxford_iiit_pet.source(data_dir, split) for split in ("train", "test")}


def load_splits(config: RunConfig, cache_dir: str | Path | None = None) -> dict[str, Split]:
    """The splits of a complete config that have pictures, as cached arrays. First come the checks that need only sizes.

    Raises:
      InputError: they cannot be read, have other classes, or are fewer than a batch.
    """
    data = config.data
    counts = {"train": data.train_examples, "test": data.test_examples}
    found = sources(data, config.train.seed)
    check_classes_of_data(data.class_names, found["train"].class_names, data.dataset)
    available = training_pictures(data, found["train"], config.train.seed)
    if config.train.batch_size > available:
        raise InputError(
            f"--batch-size {config.train.batch_size} is larger than the {available} training {tiles.unit(data)}"
        )
    cache = Path(cache_dir) if cache_dir else default_cache_dir()
    if data.tiles:
        print(tiles_line(data, found))
    if not found["test"].size:
        print("there are no pictures to test on: all are trained on, but for what is kept for validation")
    return {
        name: load_split(source, data.image_size, counts[name], cache) for name, source in found.items() if source.size
    }


def tiles_line(data: DataConfig, found: Mapping[str, Source]) -> str:
    """What is said about a folder that was cut."""
    counts = " + ".join(f"{source.size} {name}" for name, source in found.items())
    height, width = sides(data.image_size)
    pictures = [source.pictures for source in found.values() if source.pictures]
    own = [size for source in pictures for size in tiles.sizes_at(source, data.scale or tiles.SCALE)]
    small = sum(h < height or w < width for h, w in own)
    mirrored = f"; {small} of {len(own)} pictures are smaller than a tile, and mirrored at their borders" * bool(small)
    return f"cut into tiles of {size_text(data.image_size)}: {counts}{mirrored}"


def whole(parts: Mapping[str, Source]) -> Source:
    """All pictures of all splits as one split, "all"."""
    where = [(part, i) for part in parts.values() for i in range(part.size)]
    first = next(iter(parts.values()))
    identity = {"parts": [dict(part.identity) for part in parts.values()]}
    uncut = {name: part.pictures for name, part in parts.items() if part.pictures}
    return Source(
        first.dataset,
        "all",
        first.class_names,
        identity,
        len(where),
        lambda i: where[i][0].read(where[i][1]),
        [name for part in parts.values() for name in part.names],
        [size for part in parts.values() for size in part.sizes],
        pictures=whole(uncut) if uncut else None,
    )
