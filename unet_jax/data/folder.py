"""Your own pictures and masks: a folder, checked whole before the first of them is used.

    DIR/images/       pictures, of the formats that unet_jax.predict reads, and as it reads them
    DIR/masks/        for each a PNG of the same stem and size: class indices, or the colours of classes.json
    DIR/classes.json  optional: {"names": ["road", ...], "colours": [[128, 64, 128], ...], "ignore": [[0, 0, 0], ...]},
                      of which each is optional too
    DIR/train.txt     optional: a stem a line; likewise test.txt. With both, pictures in neither are left alone; with
                      one, the rest is the other split; with none, a fraction drawn by the seed is the test split

Without colours a mask holds indices: grey of 1, 8 or 16 bits, the indices of a palette, or RGB that is all grey. 255 is
ignored, but where all masks hold 0 and 255 alone it is the second of two classes. With colours in classes.json every
mask goes by its colours, be it stored as RGB, with a palette or grey; "ignore" are the colours that are no class.

A camera stores beside the pixels how it was held (EXIF orientation): pictures are turned upright by it, and masks are
expected to lie on the upright picture, as every viewer shows it.
"""

import functools
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import dacite
import numpy as np
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from unet_jax.config import IGNORE_LABEL
from unet_jax.data.source import Example, Source
from unet_jax.errors import InputError
from unet_jax.predict import read_picture  # trained on what predictions are made of

BINARY = ("background", "foreground")
COLOUR = 1 << 24  # a mask's colour that is no class is told by this plus 0xRRGGBB: beyond all indices
MAX_COUNTED = 64  # more values are rather the shades of an antialiased mask than classes, unless names say otherwise

Colours = tuple[tuple[int, int], ...]  # 0xRRGGBB and its label
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


@dataclass(frozen=True)
class ClassesFile:
    """classes.json."""

    names: list[str] = field(default_factory=list)
    colours: list[list[int]] = field(default_factory=list)
    ignore: list[list[int]] = field(default_factory=list)


def sources(data_dir: Path, class_names: Sequence[str], test_fraction: float, seed: int) -> dict[str, Source]:
    """The splits "train" and "test" of a folder that has passed the check; class_names (): classes.json's, or counted.

    `read(i)` gives the RGB image uint8 [H, W, 3] and labels uint8 [H, W].

    Raises:
      InputError: one line of all that is wrong, such as pictures without a mask and masks of other sizes.
    """
    names, colours = _read_classes(data_dir / "classes.json", tuple(class_names))
    splits, problems = _split(data_dir, test_fraction, seed)
    values, unusable = _inspect(tuple(pair for pairs in splits.values() for pair in pairs), colours)
    problems |= unusable
    binary = not colours and len(names) in (0, 2) and IGNORE_LABEL in set().union(*values.values()) <= {0, IGNORE_LABEL}
    names = names or (BINARY if binary else _count(values, problems))
    if names and not binary:
        problems[f"masks with values that are none of the {len(names)} classes"] = _beyond(values, len(names))
    if wrong := [f"{kind}: {len(cases)} ({_some(sorted(cases))})" for kind, cases in problems.items() if cases]:
        raise InputError(f"{data_dir} has {'; '.join(wrong)}".replace(f"{data_dir}/", ""))
    if binary:
        _print_once(f"the masks in {data_dir} hold 0 and 255 alone: taken as {names[0]} (0) and {names[1]} (255)")

    def source(split: str, pairs: list[Pair]) -> Source:
        files = [(file.path.name, file.size, file.time) for pair in pairs for file in (pair.picture, pair.mask)]
        identity = {"folder": str(data_dir.resolve()), "colours": colours, "binary": binary, "files": files}
        return Source("folder", split, names, identity, len(pairs), lambda i: _example(pairs[i], colours, binary))

    return {split: source(split, pairs) for split, pairs in splits.items()}


_print_once = functools.cache(print)


def _some(cases: Sequence[object]) -> str:
    return ", ".join(map(str, cases[:3])) + ", ..." * (len(cases) > 3)


def _repeated(names: Iterable[Any]) -> list[Any]:
    return [name for name, count in Counter(names).items() if count > 1]


def _read_classes(path: Path, names: tuple[str, ...]) -> tuple[tuple[str, ...], Colours]:
    """The names of the classes, () if they are to be counted, and the colours, if masks go by them."""
    try:
        values = json.loads(path.read_text()) if path.exists() else {}
        file = dacite.from_dict(ClassesFile, values, dacite.Config(strict=True))
        colours = [int.from_bytes(bytes((r, g, b))) for r, g, b in file.colours + file.ignore]
    except (OSError, ValueError, AttributeError, dacite.DaciteError) as error:
        form = '{"names": ["road", ...], "colours": [[128, 64, 128], ...], "ignore": [[0, 0, 0]]}'
        raise InputError(f"{path} is not of the form {form}: {error}") from None
    if names and file.names and names != tuple(file.names):
        raise InputError(f"the classes are to be {', '.join(names)}, but {path} names {', '.join(file.names)}")
    names = names or tuple(file.names) or tuple(f"class_{i}" for i in range(len(file.colours)))
    if len(names) == 1 or len(names) > IGNORE_LABEL or _repeated(names):
        raise InputError(f"the classes are {_some(names)}: they must be two to {IGNORE_LABEL}, of different names")
    if colours and (_repeated(colours) or len(file.colours) != len(names)):
        raise InputError(f"{path} has {len(file.colours)} colours for {len(names)} classes: each must have its own")
    return names, tuple((colour, i if i < len(names) else IGNORE_LABEL) for i, colour in enumerate(colours))


def _split(data_dir: Path, test_fraction: float, seed: int) -> tuple[dict[str, list[Pair]], Problems]:
    """The pairs of each split, in the order of its list or else in one drawn by the seed, and what is wrong there."""
    try:
        found = [_files(data_dir / part) for part in ("images", "masks")]
        lists = {split: _lines(path) for split in ("train", "test") if (path := data_dir / f"{split}.txt").exists()}
    except OSError as error:
        raise InputError(f"--data-dir {data_dir} is to hold images/ and masks/: {error.strerror}") from None
    images, masks = ({file.path.stem: file for file in files} for files in found)
    unlisted = (images.keys() | masks.keys()) - {stem for stems in lists.values() for stem in stems}
    # By a hash and not by a shuffle: pictures that are added later leave the others on their side, all but a few.
    others = sorted(unlisted, key=lambda stem: hashlib.sha256(f"{seed} {stem}".encode()).digest())
    if not lists:
        count = min(max(round(test_fraction * len(others)), 1), len(others) - 1)
        lists = {"train": others[count:], "test": others[:count]}
    splits = {split: lists.get(split, others) for split in ("train", "test")}
    stems = [stem for listed in splits.values() for stem in listed]
    problems = {
        "splits without pictures": [split for split, listed in splits.items() if not listed],
        "no picture in images/ for": [stem for stem in stems if stem not in images],
        "no mask in masks/ for": [stem for stem in stems if stem not in masks],
        "several files for": _repeated(file.path.with_suffix("") for files in found for file in files),
        "stems listed twice": _repeated(stems),
    }
    pairs = {
        split: [Pair(stem, images[stem], masks[stem]) for stem in listed if stem in images and stem in masks]
        for split, listed in splits.items()
    }
    return pairs, problems


def _files(folder: Path) -> list[File]:
    paths = [path for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith(".")]
    return [File(path, path.stat().st_size, path.stat().st_mtime_ns) for path in paths]


def _lines(path: Path) -> list[str]:
    return [line.strip() for line in path.read_text("utf-8-sig", "replace").splitlines() if line.strip()]


@functools.lru_cache(maxsize=1)  # a run asks twice: for the class names, and then for the pictures
def _inspect(pairs: tuple[Pair, ...], colours: Colours) -> tuple[dict[str, set[int]], Problems]:
    """Reads everything: the values in each mask by its stem, of those beyond 255 only a few, and what is wrong."""
    unusable: list[str] = []
    sizes: list[str] = []

    def look(pair: Pair) -> set[int]:
        try:
            codes, image = _read_mask(pair.mask.path, colours), read_picture(pair.picture.path)
        except InputError as error:
            unusable.append(str(error))
            return set()
        if image.shape[:2] != codes.shape:
            sizes.append("{}: {}x{} for {}x{}".format(pair.stem, *codes.shape[::-1], *image.shape[1::-1]))
        small = codes <= IGNORE_LABEL
        return {*np.bincount(codes[small]).nonzero()[0].tolist(), *np.unique(codes[~small])[:4].tolist()}

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        looks = tqdm(pool.map(look, pairs), "checking the folder", len(pairs), unit="pictures", disable=None)
        values = dict(zip((pair.stem for pair in pairs), looks, strict=True))
    return values, {"files that cannot be used": unusable, "masks that differ from their picture in size": sizes}


def _count(values: Mapping[str, set[int]], problems: Problems) -> tuple[str, ...]:
    """Names for the classes 0, 1, 2 .. that the masks together have; with a gap something else may be meant."""
    classes = sorted(set().union(*values.values()) - {IGNORE_LABEL})
    if classes == list(range(len(classes))) and 2 <= len(classes) <= MAX_COUNTED:
        return tuple(f"class_{i}" for i in classes)
    problems["mask values that do not count two or more classes from 0 (if they are classes, name them)"] = classes
    return ()


def _beyond(values: Mapping[str, set[int]], classes: int) -> list[str]:
    beyond = {stem: sorted(found - {*range(classes), IGNORE_LABEL}) for stem, found in values.items()}
    texts = {stem: [f"{v}" if v < COLOUR else f"#{v - COLOUR:06x}" for v in found] for stem, found in beyond.items()}
    return [f"{stem}: {_some(text)}" for stem, text in texts.items() if text]


def _read_mask(path: Path, colours: Colours) -> np.ndarray:
    """The values [H, W] of a mask; with colours their labels, and COLOUR + 0xRRGGBB where one has none.

    Raises:
      InputError: it is no PNG that can be read whole, or is in colours and there is none in classes.json.
    """
    try:
        with Image.open(path, formats=["PNG"]) as image:
            plain = not colours and not image.mode.startswith(("RGB", "LA"))
            array = np.asarray(image if plain else image.convert("RGBA"))
    except UnidentifiedImageError:
        raise InputError(f"{path}: is no PNG") from None
    except Exception as error:  # damaged files fail in many ways
        raise InputError(f"{path}: {error}".partition("\n")[0]) from None
    if plain:
        return array
    if not colours:
        if (array[..., :1] != array[..., :3]).any():
            raise InputError(f"{path}: is in colours, which need a classes.json that lists them")
        return array[..., 0]
    rgb = array.view(">u4")[..., 0] >> 8
    codes = rgb + COLOUR
    for colour, label in colours:
        codes[rgb == colour] = label
    return codes


def _example(pair: Pair, colours: Colours, binary: bool) -> Example:
    codes = _read_mask(pair.mask.path, colours)
    return Example(pair.stem, read_picture(pair.picture.path), (codes > 0 if binary else codes).astype(np.uint8))
