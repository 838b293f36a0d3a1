"""The layout of a folder of your own pictures, told from the names in it. The rest of the code reads all alike."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from unet_jax.data.classes import some
from unet_jax.errors import InputError

# The names of a split's folder, and the split.
SPLITS = {"train": "train", "val": "validation", "valid": "validation", "validation": "validation", "test": "test"}
PLAIN, VOC, BY_SPLIT = "images/ and masks/", "Pascal VOC", "train/images/ and train/masks/"
PARTS = {  # the folders that make a layout
    PLAIN: ("images", "masks"),
    VOC: ("JPEGImages", "SegmentationClass"),
    BY_SPLIT: ("train/images", "train/masks"),
}


class Place(NamedTuple):
    """A folder of pictures and one of their masks, maybe the same. Their stems in the set begin with the prefix."""

    prefix: str
    images: Path
    masks: Path


class Layout(NamedTuple):
    """Where everything is.

    lists is the folder of train.txt, val.txt and test.txt, and classes the file of classes: neither need exist. In a
    sparse set pictures may have no mask. unpaired are folders of pictures without one of masks, or the other way round.
    """

    name: str
    places: list[Place]
    lists: Path
    classes: Path
    sparse: bool = False
    unpaired: Sequence[Path] = ()


def find(data_dir: Path) -> Layout:
    """The layout of a folder.

    Raises:
      InputError: it has none that is known; the line names the nearest and what is missing.
    """
    missing = _missing(data_dir)
    name = min(missing, key=lambda name: len(missing[name]))  # the first of equals
    classes = data_dir / "classes.json"
    if len(missing[name]) == 2 and any(data_dir.glob("*_mask.*")):
        return Layout("NAME beside NAME_mask", [Place("", data_dir, data_dir)], data_dir, classes)
    if missing[name]:
        raise InputError(f"the folder {data_dir} is to hold {_what(name)}: {_instead(data_dir, missing[name])}")
    whole = Place("", *(data_dir / part for part in PARTS[name]))
    if name == VOC:
        classes = classes if classes.exists() else data_dir / "labelmap.txt"
        return Layout(name, [whole], data_dir / "ImageSets" / "Segmentation", classes, sparse=True)
    form = "{part}/{split}" if name == PLAIN else "{split}/{part}"
    folders = {s: [data_dir / form.format(part=part, split=s) for part in PARTS[PLAIN]] for s in SPLITS}
    there = {split: [folder for folder in both if folder.is_dir()] for split, both in folders.items()}
    places = [Place(f"{split}/", *both) for split, both in there.items() if len(both) == 2]
    return Layout(
        f"{PLAIN} by the folders {', '.join(place.prefix[:-1] for place in places)}" if places else PLAIN,
        [whole, *places] if name == PLAIN else places,
        data_dir,
        classes,
        unpaired=[both[0] for both in there.values() if len(both) == 1],
    )


def _missing(data_dir: Path) -> dict[str, list[str]]:
    """What a folder lacks of each layout."""
    return {name: [part for part in parts if not (data_dir / part).is_dir()] for name, parts in PARTS.items()}


def _what(name: str) -> str:
    parts = " and ".join(f"{part}/" for part in PARTS[name])
    return parts if name != VOC else f"{parts} ({VOC})"


def _instead(data_dir: Path, missing: list[str]) -> str:
    """What is wrong with a folder that lacks these, and what may be meant."""
    if not data_dir.is_dir():
        return "there is no such folder"
    inside = sorted(path for path in data_dir.iterdir() if not path.name.startswith("."))
    if deeper := [path for path in inside if path.is_dir() and not all(_missing(path).values())]:
        return f"it holds such folders, give one of them: {some(deeper)}"
    holds = f"it holds {some([path.name for path in inside]) or 'nothing'}"
    if len(missing) == 1:
        return f"{missing[0]}/ is missing, {holds}"
    return f"{holds} (other ways: {_what(VOC)}, or {_what(BY_SPLIT)}, or NAME_mask beside NAME)"
