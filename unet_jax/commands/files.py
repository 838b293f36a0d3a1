"""The pictures that `predict` is to segment, and the names of what it writes."""

import glob
import itertools
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import get_args

from PIL import Image

from unet_jax.config import Tta
from unet_jax.data.pictures import FORMATS, kinds
from unet_jax.errors import InputError

GROUP_PIXELS = 2**24  # of pictures that are read, segmented and written together, unless a single one has more


def find(patterns: Sequence[str]) -> tuple[list[Path], list[str]]:
    """The files that the patterns match, each once, and a line for each pattern that matches none."""
    suffixes = {suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS}
    found: dict[str, Path] = {}
    bad = []
    for pattern in patterns:
        is_folder = os.path.isdir(pattern)  # False for a name that is too long, where Path raises
        others = ""
        if is_folder:
            inside = [p for p in sorted(Path(pattern).iterdir()) if not p.name.startswith(".")]
            files = [p for p in inside if p.suffix.lower() in suffixes and p.is_file()]
            others = kinds([p for p in inside if p not in files])
            if files and others:
                print(
                    f"{pattern} holds other than pictures of known formats, which is left out: {others}",
                    file=sys.stderr,
                )
        else:
            literal = pattern.replace("[", "[[]")  # brackets are more common in names than in globs
            matches = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
            matches = matches or sorted(glob.glob(literal, recursive=True))
            files = [p for p in map(Path, matches) if p.is_file()]
        if not files:
            nothing = f"the folder has no pictures of known formats{others and f' ({others})'}"
            bad.append(f"{pattern}: {nothing if is_folder else 'there is no such file'}")
        for file in files:
            found.setdefault(os.path.abspath(file), file)
    return list(found.values()), bad


def name_outputs(pictures: Sequence[Path]) -> list[str]:
    """A name for each picture's files: its stem, or FOLDER-STEM if others have the same stem; numbered if needed."""
    stems = Counter(path.stem.lower() for path in pictures)  # some file systems ignore case
    names: dict[str, str] = {}
    for path in pictures:
        name = path.stem if stems[path.stem.lower()] == 1 else f"{path.resolve().parent.name}-{path.stem}"
        name = name.encode(errors="ignore")[:200].decode(errors="ignore")  # file names have 255 bytes at most
        numbered = (f"{name}{end}" for end in itertools.chain([""], (f"-{i}" for i in itertools.count(2))))
        free = next(n for n in numbered if n.lower() not in names)
        names[free.lower()] = free
    return list(names.values())


def prepare_folder(out: Path, pictures: Sequence[Path]) -> None:
    """Makes the output folder; raises InputError if it cannot be written, or holds pictures that are segmented."""
    # The masks would be taken for pictures the next time, and be in the way of training.
    # A picture may be a link: it is both where the link is and where it leads.
    if out.resolve() in {holder for path in pictures for holder in (path.parent.resolve(), path.resolve().parent)}:
        raise InputError(f"--out {out} holds the pictures themselves: choose another folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise InputError(f"--out {out} cannot be written ({error.strerror}): choose another folder") from None


def with_tta_named(argv: Sequence[str]) -> list[str]:
    """The command line, with the value of a bare --tta added."""
    named = []
    for word, following in itertools.zip_longest(argv, argv[1:]):
        named += [word, "horizontal"] if word == "--tta" and following not in get_args(Tta) else [word]
    return named


def groups(pictures: Sequence[Path], names: Sequence[str], most: int) -> Iterator[list[tuple[Path, str]]]:
    """Pictures and names in groups of at most `most` and GROUP_PIXELS, which bounds the memory."""
    group: list[tuple[Path, str]] = []
    total = 0
    for path, name in zip(pictures, names, strict=True):
        try:
            with Image.open(path, formats=FORMATS) as image:
                pixels = image.width * image.height
        except Exception:  # reported when it is decoded
            pixels = 0
        if group and (len(group) == most or total + pixels > GROUP_PIXELS):
            yield group
            group, total = [], 0
        group.append((path, name))
        total += pixels
    yield group
