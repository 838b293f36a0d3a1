"""Masks: from files to labels, and what must be known of a whole set before one of them is read.

A single mask does not say what it means: 255 is a class in one set and no class in another, and each file's own palette
gives an index its colour. So a set is looked at as a whole, and refused if its masks do not agree.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from unet_jax.config import IGNORE_LABEL, Meaning
from unet_jax.data.classes import COLOUR, Table, example, in_colours, some
from unet_jax.data.pairs import Problems
from unet_jax.data.pictures import check_black_is_zero, check_sums, one_of_one
from unet_jax.errors import InputError

FORMATS = ["PNG", "GIF", "TIFF", "BMP"]  # a JPEG's values are not those that were saved
INDICES = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L")  # Pillow's modes of one value a pixel
MAX_COUNTED = 64  # more values are shades of an antialiased mask and not classes, unless names say otherwise
MAX_KEPT = 512  # of a mask's values: more than can be listed
UNLISTED = -1  # the label of what a table does not list
BINARY = ("background", "foreground")
STRAY = 0.01  # share of the pixels of 0 or of 255, whichever are fewer: less of other values is an accident


class Seen(NamedTuple):
    """What a mask holds: pixels by value (or COLOUR + 0xRRGGBB), and the colour of each palette index that occurs.

    alpha says whether transparency varies: not at all, over a single colour, or beside several values.
    """

    size: tuple[int, int]
    counts: Mapping[int, int]
    palette: Mapping[int, int]
    alpha: Literal["none", "alone", "beside"]


def look(path: Path, table: Table) -> Seen:
    """Reads a mask for what it holds.

    Raises:
      InputError: it cannot be read whole, or is of a format that masks cannot have.
    """
    image = _open(path)
    values = _values(image, path, in_colours(table))
    counts, palette, alpha = _count(values), {}, "none"
    if image.mode == "P" and not in_colours(table):
        colours = np.array(image.getpalette("RGB"), np.uint32).reshape(-1, 3) @ [1 << 16, 1 << 8, 1]
        palette = {index: int(colours[index]) for index in counts if index < len(colours)}
    if image.mode in ("RGBA", "LA", "PA"):
        low, high = image.getchannel("A").getextrema()
        alpha = "none" if low == high else "alone" if len(counts) == 1 else "beside"
    return Seen(values.shape, counts, palette, alpha)  # type: ignore[arg-type]


def read(path: Path, table: Table, meaning: Meaning | None) -> np.ndarray:
    """The labels uint8 [H, W] of a mask, from a set in which `judge` found no problem; raises as `look` does."""
    values = _values(_open(path), path, in_colours(table))
    if not table:
        return np.where(values == IGNORE_LABEL, 1 if meaning == "class" else IGNORE_LABEL, values).astype(np.uint8)
    labels = np.full(values.shape, IGNORE_LABEL, np.uint8)
    for value, label in table:
        labels[values == value] = label
    return labels


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path, formats=FORMATS) as image:
            one_of_one(image)
            image.load()
            check_sums(image, path)
            if image.mode in INDICES[1:]:  # of a bilevel one the colours are meant
                check_black_is_zero(image)
            if "jpeg" in str(image.info.get("compression")):
                raise InputError("is a TIFF compressed as JPEG, whose values are not those that were saved")
            if image.mode == "F":
                raise InputError("has floating-point values: save it with 8 or 16 bits")
            upright = ImageOps.exif_transpose(image)  # a tool may have kept the orientation in either file
            return _with_greys_as_values(upright)
    except UnidentifiedImageError:
        raise InputError(f"{path}: is no PNG (nor a GIF, TIFF or BMP)") from None
    except Exception as error:  # damaged files fail in many ways
        raise InputError(f"{path}: {error}".partition("\n")[0]) from None


def _with_greys_as_values(image: Image.Image) -> Image.Image:
    """Grey in place of a palette that has different greys alone: tools renumber values when they save greys so."""
    if image.mode != "P" or np.ptp(np.array(image.getpalette("RGB")).reshape(-1, 3), axis=1).any():
        return image
    grey = image.convert("L")
    used, shown = (np.count_nonzero(each.histogram()) for each in (image, grey))
    return grey if used == shown else image  # indices that look the same still differ


def _values(image: Image.Image, path: Path, colours: bool) -> np.ndarray:
    """Values [H, W]; for a mask in colours, COLOUR + 0xRRGGBB."""
    if image.mode in INDICES and not colours:
        return np.asarray(image) + np.uint8(0)  # so that masks of one bit are not booleans
    if image.mode.startswith("I") and np.asarray(image).max() > 255:  # Pillow would clip them
        raise InputError(f"{path}: has values above 255, which are no colours")
    rgba = np.asarray(image.convert("RGBA"))
    if not colours and (rgba[..., :1] == rgba[..., :3]).all():
        return rgba[..., 0]
    return (rgba.view(">u4")[..., 0] >> 8).astype(np.uint32) + COLOUR


def _count(values: np.ndarray) -> dict[int, int]:
    """Pixels by value, of at most the MAX_KEPT most frequent values. It counts the runs of a mask, which are few."""
    flat = values.ravel()
    starts = np.flatnonzero(np.concatenate([[True], flat[1:] != flat[:-1]]))
    found, where = np.unique(flat[starts], return_inverse=True)
    pixels = np.bincount(where, np.diff(starts, append=flat.size)).astype(int)
    return dict(Counter(dict(zip(found.tolist(), pixels.tolist(), strict=True))).most_common(MAX_KEPT))


class Reading(NamedTuple):
    """How a set of masks is read, what is wrong with it by kind, and what to do about that."""

    names: tuple[str, ...]
    meaning: Meaning | None  # of 255; None if it does not occur, or if a table says it
    pixels: Mapping[int, int]  # of each label
    problems: Problems
    advice: str = ""


def judge(seen: Mapping[str, Seen], names: tuple[str, ...], table: Table, wanted: Meaning | None) -> Reading:
    """Decides what the masks of a set, given by stem, mean together.

    With `names` () the classes are counted. `wanted` is the meaning of 255; if it is None, the masks decide.
    """
    problems: Problems = {"masks whose shapes are in the alpha channel alone (save them in grey)": _veiled(seen)}
    in_colours = [stem for stem, mask in seen.items() if not table and max(mask.counts) >= COLOUR]
    clashes = _clashes(seen)
    if in_colours or clashes:
        problems["masks in colours, which need a classes.json that lists them"] = in_colours
        problems["palette indices of several colours (classes.json can list the colours)"] = clashes
        others = {stem: mask for stem, mask in seen.items() if stem not in in_colours}
        if names and in_colours and others:
            problems |= judge(others, names, table, wanted).problems
        return Reading(names, None, {}, problems, _listing(names, _colours(seen)))
    total = _sum(mask.counts for mask in seen.values())
    meaning, unclear = (None, {}) if table else _meaning_of_255(seen, len(names), wanted)
    problems |= unclear
    as_class = meaning == "class"
    labels = dict(table or [(value, 1 if as_class and value == IGNORE_LABEL else value) for value in total])
    pixels = _sum({labels.get(value, UNLISTED): count} for value, count in total.items())
    classes = sorted(pixels.keys() - {IGNORE_LABEL})
    if not names and (classes != list(range(len(classes))) or not 2 <= len(classes) <= MAX_COUNTED):
        kind = "mask values that do not count two or more classes from 0 (if they are classes, name them)"
        problems[kind] = sorted(total) if as_class else classes
        return Reading(names, meaning, pixels, problems, _listing(names, classes, total.keys() & {IGNORE_LABEL}))
    names = names or (BINARY if as_class else tuple(f"class_{i}" for i in classes))
    known = {value for value, label in labels.items() if 0 <= label < len(names) or label == IGNORE_LABEL}
    problems[f"masks with values that are none of the {len(names)} classes"] = [
        f"{stem}: {some([f'{v}' if v < COLOUR else f'#{v - COLOUR:06x}' for v in beyond])}"
        for stem, mask in seen.items()
        if (beyond := sorted(mask.counts.keys() - known))
    ]
    if not (unknown := sorted(total.keys() - known)):
        return Reading(names, meaning, pixels, problems)
    if not table:
        classes = classes if len(classes) == len(names) else list(range(len(names)))
        return Reading(names, meaning, pixels, problems, _listing(names, classes, total.keys() - classes))
    classes, ignored = ([v for v, label in table if (label == IGNORE_LABEL) == no] for no in (False, True))
    return Reading(names, meaning, pixels, problems, _listing(names, classes, [*ignored, *unknown]))


def _sum(counts: Iterable[Mapping[int, int]]) -> Counter[int]:
    total: Counter[int] = Counter()
    for some_counts in counts:
        total.update(some_counts)
    return total


def _veiled(seen: Mapping[str, Seen]) -> list[str]:
    """Masks whose alpha varies over a single colour, unless in others it varies beside colours."""
    by_kind = {kind: [stem for stem, mask in seen.items() if mask.alpha == kind] for kind in ("alone", "beside")}
    return [] if by_kind["beside"] else by_kind["alone"]


def _clashes(seen: Mapping[str, Seen]) -> list[str]:
    """A text for each index whose colour differs between the palettes of masks in which it occurs."""
    first: dict[int, tuple[int, str]] = {}
    clashes: dict[int, str] = {}
    for stem, mask in seen.items():
        for index, colour in mask.palette.items():
            other, where = first.setdefault(index, (colour, stem))
            if other != colour:
                clashes.setdefault(index, f"{index}: #{other:06x} in {where} and #{colour:06x} in {stem}")
    return list(clashes.values())


def _colours(seen: Mapping[str, Seen]) -> list[int]:
    """The codes of all colours, the most frequent first; a value without a palette is a grey."""
    pixels: Counter[int] = Counter()
    for mask in seen.values():
        for value, count in mask.counts.items():
            grey = min(value, 255) * 0x010101
            pixels[value if value >= COLOUR else COLOUR + mask.palette.get(value, grey)] += count
    return [code for code, _ in pixels.most_common()]


def _listing(names: Sequence[str], classes: Sequence[int], ignored: Iterable[int] = ()) -> str:
    """What to write if the masks do not speak for themselves: a classes.json, filled in."""
    ignored = sorted(ignored)
    if len(classes) + len(ignored) > max(MAX_COUNTED, len(names)):
        return "so many values are shades: save masks without smoothing, and never as JPEG"
    if len(classes) < 2:
        return ""
    text = example(names, classes, ignored)
    if max(classes) >= COLOUR:
        return f"a classes.json can say what the colours are: {text}"
    return f"labels start at 0; a classes.json can say what the values are: {text}"


def _meaning_of_255(seen: Mapping[str, Seen], classes: int, wanted: Meaning | None) -> tuple[Meaning | None, Problems]:
    """What 255 means, and what speaks against it. It is a class if only 0 occurs beside it."""
    kinds: dict[str, list[str]] = {kind: [] for kind in ("ground", "classes", "binary", "strays", "both")}
    for stem, mask in seen.items():
        kinds[_kind(mask)].append(stem)
    if not (kinds["binary"] or kinds["strays"] or kinds["both"]):
        return wanted, {}
    others = kinds["classes"] + kinds["strays"] + kinds["both"]
    if wanted == "class":
        return "class", {
            "masks with other values than 0 and 255, of which 255 is to be a class": others,
            "names for two classes, 0 and 255 (--mask-255 class)": [classes] if classes not in (0, 2) else [],
        }
    if wanted is None and not others and classes in (0, 2):
        return "class", {}
    if wanted is None and others and not kinds["both"]:
        return "ignored", {
            "masks of 0 and 255": kinds["binary"],
            "masks of 0 and 255 with a few pixels of other values (clean them)": kinds["strays"],
            "masks of other values, by which 255 is no class (save all alike, or give --mask-255 ignored)": (
                kinds["classes"]
            ),
        }
    return "ignored", {}


def _kind(mask: Seen) -> str:
    zero, void = (mask.counts.get(value, 0) for value in (0, IGNORE_LABEL))
    rest = sum(mask.counts.values()) - zero - void
    if not void:
        return "classes" if rest else "ground"
    if not rest:
        return "binary"
    least = min(zero, void)  # if only points are marked, 0 has as few pixels as any class
    return "strays" if rest < max(STRAY * least, min(5, least / 10)) else "both"
