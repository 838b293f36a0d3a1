"""A folder's files as pairs of a picture and its mask, and the pairs as splits."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from unet_jax.data.classes import repeated, some
from unet_jax.errors import InputError

LISTS = {"train": "train.txt", "validation": "val.txt", "test": "test.txt"}
FOLDERS = {"train": "train", "val": "validation", "valid": "validation", "validation": "validation", "test": "test"}

Problems = dict[str, list[Any]]  # what is wrong, and where


class File(NamedTuple):
    """A file, and what tells that it has changed."""

    path: Path
    size: int
    time: int


class Pair(NamedTuple):
    """A picture and its mask."""

    stem: str
    picture: File
    mask: File


Splits = dict[str, list[Pair]]  # train, validation, test


def split(data_dir: Path, test_fraction: float, seed: int) -> tuple[Splits, Problems, list[str]]:
    """The pairs of each split, in the order of its list or else in one drawn by the seed.

    Besides what is wrong there, and lines about what is left out.
    """
    images, masks_, problems, left_out = _pairs(data_dir)
    lists = _lists(data_dir, images, images.keys() | masks_.keys())
    unlisted = (images.keys() | masks_.keys()) - {stem for stems in lists.values() for stem in stems}
    # By a hash and not by a shuffle: pictures that are added later leave the others on their side, all but a few.
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
    problems |= {
        "no picture in images/ for": [stem for stem in stems if stem not in images],
        "no mask in masks/ for": [stem for stem in stems if stem not in masks_],
        "stems listed twice": repeated(stems),
    }
    pairs = {
        part: [Pair(stem, images[stem], masks_[stem]) for stem in stems if stem in images and stem in masks_]
        for part, stems in listed.items()
    }
    return pairs, problems, left_out


def _pairs(data_dir: Path) -> tuple[dict[str, File], dict[str, File], Problems, list[str]]:
    """Pictures and masks by the pictures' stems, what is wrong with their names, and lines about what is left out."""
    parts = [data_dir / "images", data_dir / "masks"]
    if missing := [f"{part.name}/" for part in parts if not part.is_dir()]:
        there = some(sorted(path.name for path in data_dir.iterdir())) if data_dir.is_dir() else ""
        what = f"{' and '.join(missing)} is missing, it holds {there or 'nothing'}"
        what = what if data_dir.is_dir() else "there is no such folder"
        raise InputError(f"the folder {data_dir} is to hold images/ and masks/: {what}")
    try:
        folders_of_both = [name for name in FOLDERS if all((part / name).is_dir() for part in parts)]
        (images, more), (masks_, more_masks) = (_files(part, folders_of_both) for part in parts)
    except OSError as error:
        raise InputError(f"the folder {data_dir} cannot be read: {error.filename}: {error.strerror}") from None
    folders = [f"{path.parent.name}/{path.name}/" for path in more + more_masks]
    left_out = [f"folders in images/ and masks/ are left out: {len(folders)} ({some(folders)})"] if folders else []
    by_stem = dict(images)
    beside = {stem.removesuffix("_mask") for stem, _ in masks_ if stem.endswith("_mask")}
    drawn = {stem for stem, _ in masks_ if stem.endswith("_overlay") and stem.removesuffix("_overlay") in beside}
    if drawn:  # by our own predictions
        left_out.append(f"overlays in masks/ are left out: {len(drawn)} ({some(sorted(drawn))})")
    named = [(_picture_of(stem, by_stem), file) for stem, file in masks_ if stem not in drawn]
    twice = [f"images/{stem}" for stem in repeated(stem for stem, _ in images)]
    twice += [f"masks/{stem}" for stem in repeated(stem for stem, _ in named)]
    return by_stem, dict(named), {"several files for": twice}, left_out


def _picture_of(stem: str, images: Mapping[str, File]) -> str:
    shorter = stem.removesuffix("_mask")
    return shorter if stem not in images and shorter in images else stem


def _files(folder: Path, splits: Sequence[str]) -> tuple[list[tuple[str, File]], list[Path]]:
    """Files by stem, those in the folders of splits by FOLDER/STEM; and the other folders."""
    inside = [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
    parts = [folder / name for name in splits]
    inside += [path for part in parts for path in sorted(part.iterdir()) if not path.name.startswith(".")]
    files = [
        (path.relative_to(folder).with_suffix("").as_posix(), File(path, path.stat().st_size, path.stat().st_mtime_ns))
        for path in inside
        if path.is_file()
    ]
    return files, [path for path in inside if path.is_dir() and path not in parts]


def _lists(data_dir: Path, images: Mapping[str, File], stems: Iterable[str]) -> dict[str, list[str]]:
    """The stems of each split that has a list, or else a folder."""
    lists = {part: _lines(data_dir / name, images) for part, name in LISTS.items() if (data_dir / name).exists()}
    folders: dict[str, list[str]] = {}
    for stem in sorted(stems):
        if "/" in stem:
            folders.setdefault(FOLDERS[stem.partition("/")[0]], []).append(stem)
    return folders | lists


def _lines(path: Path, images: Mapping[str, File]) -> list[str]:
    """The stems in a list: of a line that is none, that of the file that it names."""
    lines = [line.strip() for line in path.read_text("utf-8-sig", "surrogateescape").splitlines() if line.strip()]
    readings = [(line, line.rpartition(".")[0], PurePath(line).stem) for line in lines]
    return [next((stem for stem in reading if stem in images), reading[0]) for reading in readings]
