"""Segments pictures with a run's checkpoint: `python experiments/predict.py runs/mp_tr_dice photos/ --out masks`."""

import dataclasses
import functools
import glob
import itertools
import os
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import tyro
from PIL import Image

from unet_jax.errors import InputError, exit_on_input_error

if TYPE_CHECKING:
    from unet_jax.config import DataConfig
    from unet_jax.predict import Predictor

tell_once = functools.cache(print)
GROUP_PIXELS = 2**24  # pictures read, segmented and written together, unless a single one has more


@dataclasses.dataclass(frozen=True)
class Options:
    """What to segment, how, and where to."""

    run: Annotated[Path, tyro.conf.Positional]
    """The run's folder."""
    pictures: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Files, folders (the pictures in them) and globs."""
    out: Path
    """Folder for NAME_mask.png and NAME_overlay.png of each picture."""
    mode: Literal["resize", "tile", "native"] = "resize"
    """resize: to the training size and back. tile: in overlapping windows at the scale of training, for pictures that
    show more than those of training did. native: the same at the picture's own resolution."""
    tile_size: int | None = None
    """Side of the windows; smaller ones take less memory and more time. Default: what suits the network."""
    tta: Literal["none", "horizontal", "all"] = "none"
    """Average the probabilities over a picture and its mirror image (horizontal, which a bare --tta means), twice the
    work, or over all four flips, four times, for what has no up and down."""
    white: int | None = None
    """The value of 16-bit grey pictures that is white. Default: as in the run's pictures."""
    max_megapixels: float = 89.4
    """Larger pictures are refused, as a small file may hold one that no memory does: raise it for those you know."""
    probabilities: bool = False
    """Write NAME_probabilities.npz too: float32 [H, W, classes] as `probabilities`, and `class_names`."""


def find(patterns: Sequence[str]) -> tuple[list[Path], list[str]]:
    """The files that are meant, each once, and a line for each pattern that means none."""
    from unet_jax.data.pictures import FORMATS, kinds

    suffixes = {suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS}
    found: dict[Path, Path] = {}
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
            literal = pattern.replace("[", "[[]")  # brackets in names are commoner than in globs
            matches = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
            matches = matches or sorted(glob.glob(literal, recursive=True))
            files = [p for p in map(Path, matches) if p.is_file()]
        if not files:
            nothing = f"the folder has no pictures of known formats{others and f' ({others})'}"
            bad.append(f"{pattern}: {nothing if is_folder else 'there is no such file'}")
        for file in files:
            found.setdefault(file.resolve(), file)
    return list(found.values()), bad


def name_outputs(pictures: Sequence[Path]) -> list[str]:
    """A name for each picture's files: its stem; where others have that too, FOLDER-STEM, with a number if need be."""
    stems = Counter(path.stem.lower() for path in pictures)  # some file systems know no case
    names: dict[str, str] = {}
    for path in pictures:
        name = path.stem if stems[path.stem.lower()] == 1 else f"{path.resolve().parent.name}-{path.stem}"
        name = name.encode(errors="ignore")[:200].decode(errors="ignore")  # file names have 255 bytes at most
        numbered = (f"{name}{end}" for end in itertools.chain([""], (f"-{i}" for i in itertools.count(2))))
        free = next(n for n in numbered if n.lower() not in names)
        names[free.lower()] = free
    return list(names.values())


def prepare_folder(out: Path, names: Sequence[str], pictures: Sequence[Path]) -> None:
    """Makes the output folder; raises InputError if it cannot be written, or a picture would be overwritten."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise InputError(f"--out {out} cannot be written ({error.strerror}): choose another folder") from None
    ours = {(out / f"{name}_{kind}.png").resolve() for name in names for kind in ("mask", "overlay")}
    if clash := ours & {path.resolve() for path in pictures}:
        raise InputError(f"{min(clash)} would be overwritten: choose an --out that does not hold the pictures")


def groups(pictures: Sequence[Path], names: Sequence[str], most: int) -> Iterator[list[tuple[Path, str]]]:
    """Pictures and names in groups of at most `most` and GROUP_PIXELS: what is in memory at once is bounded."""
    from unet_jax.data.pictures import FORMATS

    group: list[tuple[Path, str]] = []
    total = 0
    for path, name in zip(pictures, names, strict=True):
        try:
            with Image.open(path, formats=FORMATS) as image:
                pixels = image.width * image.height
        except Exception:  # told when it is decoded
            pixels = 0
        if group and (len(group) == most or total + pixels > GROUP_PIXELS):
            yield group
            group, total = [], 0
        group.append((path, name))
        total += pixels
    yield group


def read(path: Path, name: str, options: Options, predictor: "Predictor") -> tuple[str, np.ndarray, np.ndarray | None]:
    """The name, the picture, and in resize mode what the network is to see of it."""
    from unet_jax.data.pictures import WHITE, decode, scale, white_of

    white = options.white or predictor.config.data.white or WHITE
    pixels = decode(path)
    if 0 < 16 * pixels.brightest < white:
        text = f"{path.parent} has 16-bit pictures that are nearly black, if {white} is white as the run has it"
        tell_once(f"{text}: --white {white_of(pixels.brightest)} suits them", file=sys.stderr)
    image = scale(pixels.values, white)
    return name, image, predictor.shrink(image) if options.mode == "resize" else None


def segment(pictures: Sequence[tuple], options: Options, predictor: "Predictor") -> list[np.ndarray]:
    """What the network says of pictures that were read: in resize mode at the training size, else at their own."""
    from unet_jax.predict import assemble

    if options.mode != "resize":
        bands = (predictor.windowed(image, options.mode, options.tta) for _, image, _ in pictures)
        return [assemble(of_picture, options.probabilities) for of_picture in bands]
    return list(predictor.network(np.stack([small for _, _, small in pictures]), options.tta)) if pictures else []


def write(name: str, image: np.ndarray, answer: np.ndarray, options: Options, data: "DataConfig") -> None:
    """Takes an answer to the picture's own size, if it is not yet, and writes the files."""
    from unet_jax import runs
    from unet_jax.plots import overlay, palette
    from unet_jax.predict import assemble, grow

    out, class_names, colours = options.out, data.class_names, data.class_colours
    if options.mode == "resize":
        answer = assemble(grow(answer, *image.shape[:2]), options.probabilities)
    labels = answer.argmax(-1).astype(np.uint8) if options.probabilities else answer
    mask = Image.fromarray(labels)
    mask.putpalette(palette(len(class_names), colours).tobytes())
    with runs.replacing(out / f"{name}_mask.png") as file:
        mask.save(file, "PNG")
    with runs.replacing(out / f"{name}_overlay.png") as file:
        # Lightly compressed: it takes a third of the time, and a few percent more room.
        Image.fromarray(overlay(image, labels, class_names, colours)).save(file, "PNG", compress_level=1)
    if options.probabilities:
        with runs.replacing(out / f"{name}_probabilities.npz") as file:
            np.savez(file, probabilities=answer, class_names=np.array(class_names))


def segment_all(
    groups: Iterator[list[tuple[Path, str]]], options: Options, predictor: "Predictor", bar: Any
) -> tuple[list[str], float]:
    """Takes all groups from their files to their masks: a line for each bad picture, and the seconds in the network.

    Threads read a group and write the one before while the network is at work on the one between.
    """
    bad: list[str] = []
    seconds = 0.0
    reading: list[Future] = []
    writing: list[Future] = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for group in itertools.chain(groups, [[], []]):  # the last two: for what is then still read, and written
            upcoming = [pool.submit(read, path, name, options, predictor) for path, name in group]
            pictures = []
            for future in reading:
                try:
                    pictures.append(future.result())
                except InputError as error:
                    bad.append(str(error))
                    bar.update()
            start = time.perf_counter()
            answers = segment(pictures, options, predictor)
            seconds += time.perf_counter() - start
            for future in writing:
                future.result()
                bar.update()
            reading, writing = (
                upcoming,
                [
                    pool.submit(write, name, image, answer, options, predictor.config.data)
                    for (name, image, _), answer in zip(pictures, answers, strict=True)
                ],
            )
    return bad, seconds


def with_tta_named(argv: Sequence[str]) -> list[str]:
    """The command line, in which a bare --tta has its default."""
    named = []
    for word, following in itertools.zip_longest(argv, argv[1:]):
        named += [word, "horizontal"] if word == "--tta" and following not in ("none", "horizontal", "all") else [word]
    return named


def scale_line(scale: tuple[float, float] | None) -> str:
    """What a user of tile mode is told."""
    if scale is None:
        return "this run does not say at which scale it was trained: tile mode takes the pictures at their own"
    return (
        f"tile mode takes the pictures at the scale of training, {scale[0]:.2f} of their height and {scale[1]:.2f} of"
        " their width; --mode native takes them at their own"
    )


def main(options: Options) -> int:
    """Segments all pictures; the exit status is 1 if some were bad, 2 if all were."""
    from tqdm import tqdm

    from unet_jax import device
    from unet_jax.data import pictures as pictures_files
    from unet_jax.folders import default_cache_dir
    from unet_jax.predict import load

    if options.white is not None and not 0 < options.white < 65536:
        raise InputError(f"--white is {options.white}: it must be from 1 to 65535")
    pictures_files.MAX_PIXELS = Image.MAX_IMAGE_PIXELS = int(options.max_megapixels * 1e6)
    warnings.filterwarnings("ignore", module="PIL")  # what is wrong with a picture is told once, at the end
    pictures, bad = find(options.pictures)
    if not pictures:
        raise InputError("; ".join(bad) or "no pictures are given")
    names = name_outputs(pictures)
    prepare_folder(options.out, names, pictures)
    device.set_up(default_cache_dir() / "xla")
    predictor = load(options.run, options.tile_size)
    for line in predictor.restored.skipped:
        print(line, file=sys.stderr)
    if options.mode == "tile":
        print(scale_line(predictor.config.data.scale))
    size = predictor.config.data.image_size
    start = time.perf_counter()
    bar = tqdm(total=len(pictures), unit=" pictures", desc="segmenting", disable=None)
    with bar:
        unread, in_network = segment_all(
            groups(pictures, names, predictor.batch_size(size, size)), options, predictor, bar
        )
    seconds, good = time.perf_counter() - start, len(pictures) - len(unread)
    bad += unread
    for line in bad:
        print(f"left out: {line}", file=sys.stderr)
    print(
        f"{good} pictures in {seconds:.1f} s: {good / seconds:.1f} a second, {in_network / seconds:.0%}"
        f" of the time in the network, compiling included; files in {options.out}"
    )
    return (1 if good else 2) if bad else 0


if __name__ == "__main__":
    with exit_on_input_error():
        sys.exit(main(tyro.cli(Options, args=with_tta_named(sys.argv[1:]), description=__doc__)))
