"""Your own pictures and masks: a folder, checked as a whole before any of them is used.

    DIR/images/       pictures, of the formats that unet_jax.data.pictures reads
    DIR/masks/        for each a PNG (or GIF, TIFF, BMP) of the same size, named like it or NAME_mask: class indices, or
                      what classes.json lists
    DIR/classes.json  optional: {"names": ["road", ...], "colours": [[128, 64, 128], ...], "ignore": [[0, 0, 0], ...]},
                      where names may be left out (the classes are numbered), or colours and ignore
    DIR/train.txt     optional: a stem (or a file name) a line; likewise test.txt. With both, pictures in neither are
                      left out; with one, the rest is the other split; with none, a fraction drawn by the seed is the
                      test split
    DIR/val.txt       optional: the pictures that are kept from training and choose the best epoch

The other layouts (unet_jax.data.layouts) are read in the same way. Folders train, val and test, in images/ and masks/
or around them, may replace the lists. Pascal VOC's JPEGImages/ and SegmentationClass/ have their lists in
ImageSets/Segmentation/, and may have labelmap.txt for classes.json. Masks NAME_mask may lie beside the pictures.

Without colours a mask holds indices: grey of 1, 8 or 16 bits, the indices of a palette (with the same colours in all
masks), or RGB that is all grey. A palette of different greys alone is grey, too. 255 is ignored, but if all masks hold
only 0 and 255 it is the second of two classes.
With colours in classes.json every mask is read by its colours, whether it is stored as RGB, with a palette or as grey.
If all of these are numbers, it is read by its values: {"colours": [1, 2, 3], "ignore": [0]}. "ignore" is no class.

Pictures and masks are turned upright, each by its own EXIF orientation, which says how the camera was held. Grey
pictures of 16 bits are scaled by the bits that all of them together use.
"""

import functools
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from unet_jax.config import IGNORE_LABEL, DataConfig, Meaning
from unet_jax.data import classes, layouts, masks, pictures
from unet_jax.data.classes import Table, some
from unet_jax.data.masks import Reading, Seen
from unet_jax.data.pairs import LISTS, Pair, Problems, Splits, split
from unet_jax.data.source import Example, Source
from unet_jax.errors import InputError

READING = 3  # of masks and pictures: after a change every cache is made again


class Folder(NamedTuple):
    """A checked folder, and how it is read. palette is that of `classes.palette_of`; sizes has heights and widths."""

    splits: Splits
    table: Table
    reading: Reading
    white: int
    palette: tuple[str, ...]
    sizes: Mapping[str, tuple[int, int]]


def fill_in(data: DataConfig, seed: int) -> DataConfig:
    """The config of a run to be trained, completed with what the folder decides: class names, how its files are read.

    Raises:
      InputError: one line with all problems, for example pictures without a mask and masks of other sizes.
    """
    folder = _checked(data, seed, to_train=True)
    kept, trained = (len(folder.splits[split]) for split in ("validation", "train"))
    if kept and data.validation_fraction:
        raise InputError(f"{data.data_dir} says itself what is kept for validation: leave --validation-fraction out")
    return replace(
        data,
        class_names=folder.reading.names,
        class_colours=data.class_colours or classes.colours_of(folder.table, folder.palette),
        mask_255=folder.reading.meaning,
        white=folder.white,
        mask_values=classes.values_of(folder.table),
        mask_palette=folder.palette,
        validation_fraction=kept / (kept + trained) if kept else data.validation_fraction,
    )


def sources(data: DataConfig, seed: int) -> dict[str, Source]:
    """The splits "train" (which includes the validation part) and "test", which may be empty.

    `read(i)` gives the RGB image uint8 [H, W, 3] and labels uint8 [H, W].

    Raises:
      InputError: as `fill_in` does, except for what only a training needs.
    """
    splits, table, reading, white, _, sizes = _checked(data, seed, to_train=False)
    data_dir = Path(data.data_dir or ".")

    def source(split: str, pairs: list[Pair]) -> Source:
        files = [
            (str(file.path.relative_to(data_dir)), file.size, file.time)
            for pair in pairs
            for file in (pair.picture, pair.mask)
        ]
        how = {"reading": READING, "table": table, "binary": reading.meaning == "class", "white": white}
        identity = {"folder": str(data_dir.resolve()), "files": files, **how}
        stems = [pair.stem for pair in pairs]
        kept = frozenset(pair.stem for pair in splits["validation"]) & {*stems}
        read = functools.partial(_example, pairs, table, reading.meaning, white)
        own = [sizes[stem] for stem in stems]
        return Source("folder", split, reading.names, identity, len(pairs), read, stems, own, kept)

    # Mixed evenly, so that the first N pictures have their share of both.
    both = [splits["train"], splits["validation"]]
    placed = [((i + 0.5) / len(pairs), pair) for pairs in both for i, pair in enumerate(pairs)]
    train = [pair for _, pair in sorted(placed, key=lambda item: item[0])]
    return {"train": source("train", train), "test": source("test", splits["test"])}


def _example(pairs: list[Pair], table: Table, meaning: Meaning | None, white: int, i: int) -> Example:
    stem, picture, mask = pairs[i]
    values = pictures.decode(picture.path).values  # whose 16-bit colours were judged with those of the others
    return Example(stem, pictures.scale(values, white), masks.read(mask.path, table, meaning))


_print_once = functools.cache(print)


def _checked(data: DataConfig, seed: int, to_train: bool) -> Folder:
    data_dir = Path(data.data_dir or ".")
    layout = layouts.find(data_dir)
    names, own = classes.read(layout.classes, data.class_names)
    table = own or classes.table_of(data.mask_values or (), names)
    splits, problems, left_out = split(layout, data.test_fraction, seed)
    seen, brightest, clear, unusable = _inspect(tuple(pair for pairs in splits.values() for pair in pairs), table)
    reading = masks.judge(seen, names, table, data.mask_255)
    values = _values(table, reading)
    problems |= unusable | reading.problems
    problems |= {} if own else _other_palette(data.mask_palette or (), values, seen)
    if to_train:
        listed = (layout.lists / LISTS["test"]).exists()
        needed = {"train"} if not listed and (data.test_fraction == 0 or splits["validation"]) else {"train", "test"}
        problems |= _too_little(needed, splits, reading, listed)
    if wrong := [f"{kind}: {len(cases)} ({some(sorted(cases))})" for kind, cases in problems.items() if cases]:
        text = "; ".join([*wrong, *left_out, *[reading.advice] * bool(reading.advice)])
        raise InputError(f"{data_dir} has {text}".replace(f"{data_dir}/", ""))
    white = data.white or (pictures.white_of(brightest) if brightest else pictures.WHITE)
    counts = " + ".join(f"{len(splits[part])} {part}" for part in LISTS if splits[part] or part != "validation")
    read_as = f"read as {layout.name}: {len(reading.names)} classes, {counts} pictures"
    if data.mask_values is not None and (theirs := classes.values_of(table)) != data.mask_values:
        left_out.append(
            f"its classes.json lists {', '.join(theirs)}; the run's, {', '.join(data.mask_values) or 'nothing'}"
        )
    if to_train and (unseen := _unseen([seen[pair.stem] for pair in splits["train"]], table, reading)):
        left_out.append(f"no training picture has {some(unseen)}, so that nothing of it can be learnt")
    if clear:
        left_out.append(
            f"{len(clear)} of its pictures ({some(sorted(clear))}) have transparent parts, which are laid on white: if"
            " their last band is no transparency, save them without it"
        )
    for line in (read_as, *left_out, *_notes(seen, reading, brightest, white)):
        _print_once(f"{data_dir}: {line}")
    palette = {index: colour for mask in seen.values() for index, colour in mask.palette.items()}
    sizes = {stem: mask.size for stem, mask in seen.items()}
    return Folder(splits, table, reading, white, classes.palette_of(values, palette), sizes)


def _values(table: Table, reading: Reading) -> Sequence[int]:
    """The value of each class in the masks."""
    return classes.codes_of(table) or ((0, IGNORE_LABEL) if reading.meaning == "class" else range(len(reading.names)))


def _other_palette(run: Sequence[str], values: Sequence[int], seen: Mapping[str, Seen]) -> Problems:
    """Masks in whose palette a class has another colour than the run's masks had: one index, two meanings.

    Greys that are the index itself are no colours.
    """
    had = {value: colour for value, colour in zip(values, run, strict=False) if colour}
    found = [
        [
            f"{stem}: {index} is #{colour:06x}, not {had[index]}"
            for index, colour in mask.palette.items()
            if index in had and had[index] != f"#{colour:06x}"
        ]
        for stem, mask in seen.items()
        if any(colour != index * 0x010101 for index, colour in mask.palette.items())
    ]
    kind = (
        "masks whose palettes have other colours than those of the run (a classes.json can list the colours of the"
        f' classes, or if only the indices count: {{"colours": {[*values]}}})'
    )
    return {kind: [others[0] for others in found if others]}


def _too_little(needed: set[str], splits: Splits, reading: Reading, listed: bool) -> Problems:
    """What a folder lacks for a training. listed: it has a list of its test split."""
    empty = [split for split in sorted(needed) if not splits[split]]
    hint = " (--test-fraction 0 trains without a test)" if empty == ["test"] and not listed else ""
    occurring = [name for i, name in enumerate(reading.names) if i in reading.pixels]
    alone = bool(reading.pixels) and len(occurring) < 2 and not any(reading.problems.values())
    return {
        f"splits without pictures{hint}": empty,
        "one class alone in all of its masks": (occurring or ["what is ignored"]) * alone,
    }


def _unseen(trained: Sequence[Seen], table: Table, reading: Reading) -> list[str]:
    """The classes that none of these masks have."""
    labels = dict(table) or ({IGNORE_LABEL: 1} if reading.meaning == "class" else {})
    found = {labels.get(value, value) for mask in trained for value in mask.counts}
    return [name for i, name in enumerate(reading.names) if i not in found]


def _notes(seen: Mapping[str, Seen], reading: Reading, brightest: int, white: int) -> list[str]:
    """What the user should know about how the folder is read."""
    notes = []
    if reading.meaning == "class" and any(IGNORE_LABEL in mask.counts for mask in seen.values()):
        notes.append(f"its masks hold 0 and 255 alone: taken as {reading.names[0]} (0) and {reading.names[1]} (255)")
    if ignored := reading.pixels.get(IGNORE_LABEL, 0):
        share = ignored / sum(reading.pixels.values())
        notes.append(f"{share:.2%} of the pixels of its masks are ignored{' (255)' if reading.meaning else ''}")
    if brightest and (white, pictures.WHITE) != (pictures.WHITE, pictures.white_of(brightest)):
        notes.append(f"its 16-bit pictures use values up to {brightest}: {white} is taken as white (--white)")
    return notes


@functools.lru_cache(maxsize=1)  # a run asks twice: for the class names, and then for the pictures
def _inspect(pairs: tuple[Pair, ...], table: Table) -> tuple[dict[str, Seen], int, list[str], Problems]:
    """Reads everything: what each mask holds, by stem; the largest 16-bit grey; what is transparent; what is wrong."""
    unusable: list[str] = []
    sizes: list[str] = []
    grey: list[int] = [0]
    clear: list[str] = []
    cut: dict[str, int] = {}

    def look(pair: Pair) -> Seen | None:
        try:
            seen, picture = masks.look(pair.mask.path, table), pictures.decode(pair.picture.path)
        except InputError as error:
            unusable.append(str(error))
            return None
        if picture.transparent:
            clear.append(pair.stem)
        if picture.cut:
            cut[pair.stem] = picture.brightest
        else:
            grey.append(picture.brightest)
        height, width = picture.values.shape[:2]
        if (height, width) != seen.size:
            turned = ": is one turned by EXIF?" if (width, height) == seen.size else ""
            sizes.append("{}: {}x{} for {}x{}{}".format(pair.stem, *seen.size[::-1], width, height, turned))
        return seen

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        looks = tqdm(pool.map(look, pairs), "checking the folder", len(pairs), unit="pictures", disable=None)
        seen = {pair.stem: seen for pair, seen in zip(pairs, looks, strict=True) if seen}
    dark = pictures.uses_a_part(max(cut.values(), default=pictures.WHITE))
    problems = {
        "files that cannot be used": unusable,
        "masks that differ from their picture in size": sizes,
        "pictures of 16-bit colours that use a part of the range (save them with 8 bits)": list(cut) * dark,
    }
    return seen, max(grey), clear, problems
