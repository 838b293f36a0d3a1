"""A folder's files as pairs of a picture and its mask, and the pairs as splits."""

import hashlib
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from unet_jax.data.classes import read_text, repeated, some
from unet_jax.data.layouts import SPLITS, Layout
from unet_jax.errors import InputError

SYSTEM_FILES = {"thumbs.db", "desktop.ini"}  # that Windows makes in a folder
LISTS = {"train": "train.txt", "validation": "val.txt", "test": "test.txt"}

Problems = dict[str, list[Any]]  # what is wrong, and where


class File(NamedTuple):
    """A file, and what shows that it has changed."""

    path: Path
    size: int
    time: int


class Pair(NamedTuple):
    """A picture and its mask."""

    stem: str
    picture: File
    mask: File


Splits = dict[str, list[Pair]]  # train, validation, test


def split(layout: Layout, test_fraction: float, seed: int) -> tuple[Splits, Problems, list[str]]:
    """The pairs of each split, what is wrong, and lines about what is left out.

    The pairs have the order of the split's list, or else an order drawn by the seed.
    """
    images, masks_, problems, left_out = _pairs(layout)
    lists = _lists(layout.lists, images, images.keys() | masks_.keys())
    unlisted = (images.keys() | masks_.keys()) - {stem for stems in lists.values() for stem in stems}
    if layout.sparse and (bare := unlisted - masks_.keys()):
        unlisted -= bare
        left_out.append(f"pictures without a mask are left out: {len(bare)} ({some(sorted(bare))})")
    # By a hash and not by a shuffle: if pictures are added later, all but a few of the others stay in their split.
    others = sorted(
        unlisted, key=lambda stem: hashlib.sha256(f"{seed} {stem}".encode(errors="surrogateescape")).digest()
    )
    if not lists.keys() & {"train", "test"}:
        count = min(max(round(test_fraction * len(others)), 1), len(others) - 1) if test_fraction else 0
        lists |= {"train": others[count:], "test": others[:count]}
    elif {"train", "test"} <= lists.keys() and others:
        left_out.append(f"pictures in none of its lists are left out: {len(others)} ({some(sorted(others))})")
    listed = {part: lists.get(part, [] if part == "validation" else others) for part in LISTS}
    stems = [stem for some_stems in listed.values() for stem in some_stems]
    in_images, in_masks = _names(layout)
    problems |= {
        f"no picture in {in_images} for": [stem for stem in stems if stem not in images],
        f"no mask in {in_masks} for": [stem for stem in stems if stem not in masks_],
        "stems listed twice": repeated(stems),
    }
    pairs = {
        part: [Pair(stem, images[stem], masks_[stem]) for stem in stems if stem in images and stem in masks_]
        for part, stems in listed.items()
    }
    return pairs, problems, left_out


def _pairs(layout: Layout) -> tuple[dict[str, File], dict[str, File], Problems, list[str]]:
    """Pictures and masks by the pictures' stems, what is wrong with their names, and lines about what is left out."""
    in_images, in_masks = _names(layout)
    images, more = _files({place.prefix: place.images for place in layout.places})
    masks_, more_masks = _files({place.prefix: place.masks for place in layout.places})
    others = dict.fromkeys([*more, *more_masks, *layout.unpaired])
    folders = [f"{path.parent.absolute().name}/{path.name}/" for path in others]
    where = " and ".join(dict.fromkeys((in_images, in_masks)))
    left_out = [f"folders in {where} are left out: {len(folders)} ({some(folders)})"] if folders else []
    beside = {stem.removesuffix("_mask") for stem, _ in masks_ if stem.endswith("_mask")}
    drawn = {stem for stem, _ in masks_ if stem.endswith("_overlay") and stem.removesuffix("_overlay") in beside}
    if drawn:  # by our own `predict`
        left_out.append(f"overlays in {in_masks} are left out: {len(drawn)} ({some(sorted(drawn))})")
    if in_images == in_masks:  # the lists are in the same folder
        masks_ = [(stem, file) for stem, file in masks_ if stem.endswith("_mask")]
        pictures = [(stem, file) for stem, file in images if file.path.suffix not in (".txt", ".json")]
        images = [(stem, file) for stem, file in pictures if stem not in drawn and not stem.endswith("_mask")]
    by_stem = dict(images)
    known = _known(by_stem)
    named = [(_find((stem, stem.removesuffix("_mask")), known), file) for stem, file in masks_ if stem not in drawn]
    twice = [f"{in_images}{stem}" for stem in repeated(stem for stem, _ in images)]
    twice += [f"{in_masks}{stem}" for stem in repeated(stem for stem, _ in named)]
    return by_stem, dict(named), {"several files for": twice}, left_out


def _names(layout: Layout) -> tuple[str, str]:
    """The folders of pictures and of masks, as messages name them."""
    _, images, masks = layout.places[0]
    return f"{images.absolute().name}/", f"{masks.absolute().name}/"


def _known(images: Iterable[str]) -> dict[str, str]:
    """The pictures' stems by themselves, and as their accents may be written elsewhere: a Mac takes letters apart."""
    stems = list(images)
    return {unicodedata.normalize("NFC", stem): stem for stem in stems} | {stem: stem for stem in stems}


def _find(readings: Sequence[str], known: Mapping[str, str]) -> str:
    """The picture's stem that one of these names means, or else the first of them."""
    forms = [form for reading in readings for form in (reading, unicodedata.normalize("NFC", reading))]
    return next((known[form] for form in forms if form in known), readings[0])


def _files(folders: Mapping[str, Path]) -> tuple[list[tuple[str, File]], list[Path]]:
    """What is in these folders, given by prefix: the files by stem, and other folders."""
    try:
        paths = [(prefix, path) for prefix, folder in folders.items() for path in sorted(folder.iterdir())]
    except OSError as error:
        raise InputError(f"the folder {error.filename} cannot be read: {error.strerror}") from None
    inside = [
        (prefix, path)
        for prefix, path in paths
        if not path.name.startswith(".") and path.name.lower() not in SYSTEM_FILES
    ]
    files = [
        (prefix + path.stem, File(path, path.stat().st_size, path.stat().st_mtime_ns))
        for prefix, path in inside
        if path.is_file()
    ]
    return files, [path for _, path in inside if path.is_dir() and path not in folders.values()]


def _lists(folder: Path, images: Mapping[str, File], stems: Iterable[str]) -> dict[str, list[str]]:
    """The stems of each split that has a list, or else a folder."""
    lists = {part: _lines(folder / name, images) for part, name in LISTS.items() if (folder / name).is_file()}
    folders: dict[str, list[str]] = {}
    for stem in sorted(stems):
        if "/" in stem:
            folders.setdefault(SPLITS[stem.partition("/")[0]], []).append(stem)
    return folders | lists


def _lines(path: Path, images: Mapping[str, File]) -> list[str]:
    """The stems in a list. A line may also name a file, which has the stem."""
    lines = [line.strip() for line in read_text(path, "surrogateescape").splitlines() if line.strip()]
    known = _known(images)
    return [_find((line, line.rpartition(".")[0], PurePath(line).stem), known) for line in lines]
