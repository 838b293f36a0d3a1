"""split.json: the names of the pictures in each split of a run, and so which ones its network has seen."""

import contextlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from unet_jax import runs, weights
from unet_jax.config import RunConfig
from unet_jax.data.layouts import SPLITS
from unet_jax.data.tiles import picture_of
from unet_jax.errors import InputError

UNKNOWN = "has no split.json, so it is not known which pictures it was trained on: on those, scores are too good"


class Seen(NamedTuple):
    """Names of pictures, also for tiles: those that weights were trained on, and those that chose an epoch."""

    train: frozenset[str]
    validation: frozenset[str]

    @property
    def either(self) -> frozenset[str]:
        return self.train | self.validation


def write(folder: Path, split: Mapping[str, Sequence[str]], goes_on: bool) -> None:
    """Makes split.json hold the names of the pictures in each split.

    Raises:
      InputError: the run continues, and its split.json has other names. A run of an older version has no split.json.
    """
    before = read(folder) if goes_on else {}
    changed = [part for part in before if before[part] != list(split[part])]
    if changed:
        others = sorted(set(before[changed[0]]) ^ set(split[changed[0]])) or ["in another order"]
        raise InputError(
            f"{folder} has other pictures in its {' and '.join(changed)} split, by the names in its split.json"
            f" ({', '.join(others[:3])}{', ...' * (len(others) > 3)}): choose another --workdir, or --overwrite"
        )
    runs.write_json(folder / "split.json", split)


def read(folder: Path) -> dict[str, list[str]]:
    """The names of the pictures in each split of the run in `folder`; {} of a run that an older version made.

    Raises:
      InputError: the file cannot be read.
    """
    try:
        names = json.loads((folder / "split.json").read_text())
        if not isinstance(names, dict) or not all(isinstance(part, list) for part in names.values()):
            raise ValueError("it has no lists of names")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise InputError(
            f"{folder}/split.json cannot be read ({error}): remove it, and training writes it again"
        ) from None
    return names


def trained_on(names: Mapping[str, Sequence[str]]) -> set[str]:
    """The names of the pictures in a run's training and validation parts, from those of all its splits."""
    return {*names.get("train", []), *names.get("validation", [])}


def among(asked: Iterable[str], known: Collection[str]) -> list[str]:
    """Those of the names asked about, of pictures or tiles, that are known, too.

    A folder of a split (train/x) does not count beside a name without one: the same pictures may have been divided
    later. But train/x and test/x are two pictures.
    """

    def bare(name: str) -> str:
        folder, _, rest = name.partition("/")
        return rest if rest and folder in SPLITS else name

    undivided = {bare(name) for name in known}
    pictures = ((name, picture_of(name)) for name in asked)
    return [
        name
        for name, picture in pictures
        if picture in known or (picture in undivided if bare(picture) == picture else bare(picture) in known)
    ]


def lineage(run: Path) -> Iterator[tuple[Path, RunConfig]]:
    """A run, the one whose weights it started from (--init-from), and so on, as far as these are there to be read."""
    folders: list[Path] = []
    name: str | Path | None = run
    with contextlib.suppress(InputError):  # no run: a file of weights, or a folder that is gone
        while name and (folder := weights.find(name).resolve()) not in folders:
            folders.append(folder)
            config = runs.read_config(folder)
            yield folder, config
            name = config.train.init_from


def seen(run: Path, seed: int) -> Seen:
    """The pictures that a run and its `lineage` have seen. `seed` is that of the pictures asked about.

    Raises:
      InputError: a split.json cannot be read.
    """
    splits = [
        read(folder)
        for folder, config in lineage(run)
        if config.data.dataset != "synthetic" or config.train.seed == seed  # another seed draws others, so named
    ]
    train, validation = (
        frozenset(picture_of(name) for split in splits for name in split.get(part, []))
        for part in ("train", "validation")
    )
    return Seen(train, validation)


def seen_before(config: RunConfig, names: Sequence[str]) -> list[str]:
    """Those of these pictures or tiles that the run of --init-from and its `lineage` have seen."""
    first = config.train.init_from
    return among(names, seen(Path(first), config.train.seed).either) if first else []
