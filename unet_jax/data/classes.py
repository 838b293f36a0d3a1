"""classes.json, or CVAT's labelmap.txt: the names of a folder's classes, and their colours or values in its masks."""

import codecs
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dacite

from unet_jax.config import IGNORE_LABEL
from unet_jax.errors import InputError

COLOUR = 1 << 24  # the code of a colour is this plus 0xRRGGBB, larger than any value
FORM = '{"names": ["road", ...], "colours": [[128, 64, 128], ...], "ignore": [[0, 0, 0]]}'
LABELMAP = "label:red,green,blue:: a line"
BLACK, BORDER = [0, 0, 0], [224, 224, 192]  # in Pascal VOC: the background, and the border between objects

Table = tuple[tuple[int, int], ...]  # (a value or COLOUR + 0xRRGGBB, its label); () if values are labels


@dataclass(frozen=True)
class ClassesFile:
    """classes.json. A colour is [red, green, blue], or a number: a grey value, or a palette's index."""

    names: list[str] = field(default_factory=list)
    colours: list[int | list[int]] = field(default_factory=list)
    ignore: list[int | list[int]] = field(default_factory=list)


def read(path: Path, names: tuple[str, ...]) -> tuple[tuple[str, ...], Table]:
    """The names of the classes, () if they are to be counted, and the label of each colour or value that is listed.

    Raises:
      InputError: the file has another form, or names other classes than `names`.
    """
    form, parse = (LABELMAP, _labelmap) if path.suffix == ".txt" else (FORM, json.loads)
    try:
        values = parse(read_text(path)) if path.exists() else {}
        file = dacite.from_dict(ClassesFile, values, dacite.Config(strict=True))
        listed = file.colours + file.ignore
        in_colours = any(isinstance(colour, list) for colour in listed)
        codes = [_code(colour, in_colours) for colour in listed]
    except (OSError, ValueError, AttributeError, dacite.DaciteError) as error:
        raise InputError(f"{path} is not of the form {form}: {error}") from None
    if names and file.names and names != tuple(file.names):
        raise InputError(f"the classes are to be {', '.join(names)}, but {path} names {', '.join(file.names)}")
    names = names or tuple(file.names) or tuple(f"class_{i}" for i in range(len(file.colours)))
    if len(names) == 1 or len(names) > IGNORE_LABEL or repeated(names):
        raise InputError(f"the classes are {some(names)}: they must be two to {IGNORE_LABEL}, of different names")
    if codes and (repeated(codes) or len(file.colours) != len(names) or not names):
        raise InputError(f"{path} has {len(file.colours)} colours for {len(names)} classes: each must have its own")
    return names, tuple((code, i if i < len(names) else IGNORE_LABEL) for i, code in enumerate(codes))


def read_text(path: Path, errors: str = "strict") -> str:
    """The text of a file in UTF-8, or in UTF-16, which PowerShell writes. `errors` are those of bytes.decode."""
    content = path.read_bytes()
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return content.decode("utf-16", "replace")
    return content.decode("utf-8-sig", errors)


def _labelmap(text: str) -> dict[str, Any]:
    """The lines label:color_rgb:parts:actions in the form of classes.json; "ignored" is no class.

    Black is the background and BORDER is ignored, unless a line says otherwise.
    """
    labels = []
    for line in text.splitlines():
        if line.strip() and not line.startswith("#"):
            name, colour, *_ = line.split(":")
            labels.append((name.strip(), [int(part) for part in colour.split(",")]))
    if not any(name == "background" or colour == BLACK for name, colour in labels):
        labels.insert(0, ("background", BLACK))
    if not any(colour == BORDER for _, colour in labels):
        labels.append(("ignored", BORDER))
    classes = [label for label in labels if label[0] != "ignored"]
    ignore = [colour for name, colour in labels if name == "ignored"]
    return {"names": [name for name, _ in classes], "colours": [colour for _, colour in classes], "ignore": ignore}


def _code(colour: int | list[int], in_colours: bool) -> int:
    if in_colours:
        r, g, b = colour if isinstance(colour, list) else [colour] * 3
        return COLOUR + int.from_bytes(bytes((r, g, b)))
    if not isinstance(colour, int) or not 0 <= colour < 1 << 16:
        raise ValueError(f"{colour} is no value of 8 or 16 bits")
    return colour


def values_of(table: Table) -> tuple[str, ...]:
    """What a table lists, as text: values, and colours as #rrggbb."""
    return tuple(f"{code}" if code < COLOUR else _hex(code) for code, _ in table)


def table_of(values: Sequence[str], names: Sequence[str]) -> Table:
    """The inverse of `values_of`: the values of the classes, and then those that are ignored.

    Raises:
      InputError: one of them is neither a number nor a colour.
    """
    try:
        codes = [COLOUR + int(value[1:], 16) if value.startswith("#") else int(value) for value in values]
    except ValueError:
        raise InputError(f"mask_values are {some(values)}: they must be numbers, or colours as #rrggbb") from None
    return tuple((code, i if i < len(names) else IGNORE_LABEL) for i, code in enumerate(codes))


def in_colours(table: Table) -> bool:
    """Whether masks are read by their colours, and not by their values."""
    return any(code >= COLOUR for code, _ in table)


def codes_of(table: Table) -> list[int]:
    """What a table lists for the classes: all but what is ignored."""
    return [code for code, label in table if label != IGNORE_LABEL]


def stored(values: Sequence[str] | None, names: Sequence[str]) -> list[int]:
    """The value of each class in masks that are written: that of `values_of`, or the index if there are no values."""
    table = table_of(values or (), names)
    return list(range(len(names))) if in_colours(table) or not table else codes_of(table)


def palette_of(values: Iterable[int], palette: Mapping[int, int]) -> tuple[str, ...]:
    """The colour that a palette has for each value, as #rrggbb, "" where it has none; () if it has greys alone."""
    colours = [palette.get(value) for value in values]
    if all(colour is None or colour % 0x010101 == 0 for colour in colours):
        return ()
    return tuple("" if colour is None else _hex(colour) for colour in colours)


def colours_of(table: Table, palette: Sequence[str]) -> tuple[str, ...]:
    """The colours of the classes as #rrggbb: those listed, else those of `palette_of`.

    () if the palette lacks a colour, or has the same for two classes: figures then use our own.
    """
    if in_colours(table):
        return tuple(map(_hex, codes_of(table)))
    return () if "" in palette or repeated(palette) else tuple(palette)


def _hex(code: int) -> str:
    return f"#{code % COLOUR:06x}"


def example(names: Sequence[str], classes: Iterable[int], ignored: Iterable[int] = ()) -> str:
    """The text of a classes.json that lists these codes; classes without a name are numbered."""
    colours, ignore = ([_readable(code) for code in codes] for codes in (classes, ignored))
    names = [*names, *(f"class_{i}" for i in range(len(names), len(colours)))][: len(colours)]
    return json.dumps({"names": names, "colours": colours, "ignore": ignore})


def _readable(code: int) -> int | list[int]:
    return code if code < COLOUR else list((code - COLOUR).to_bytes(3))


def some(cases: Sequence[object]) -> str:
    """The first three cases, as text."""
    return ", ".join(map(str, cases[:3])) + ", ..." * (len(cases) > 3)


def repeated(names: Iterable[Any]) -> list[Any]:
    """The names that occur more than once."""
    return [name for name, count in Counter(names).items() if count > 1]
