"""Segments pictures with a run's checkpoint: `unet-jax predict runs/mp_tr_dice photos/ --out masks`."""

import dataclasses
import functools
import itertools
import os
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import tyro
from PIL import Image

from unet_jax.commands.files import find, groups, name_outputs, prepare_folder, with_tta_named
from unet_jax.config import Tta
from unet_jax.errors import InputError, exit_on_input_error

if TYPE_CHECKING:
    from unet_jax.config import DataConfig
    from unet_jax.predict import Predictor

tell_once = functools.cache(print)


@dataclasses.dataclass(frozen=True)
class Options:
    """What to segment, how, and where to."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="[RUN]")]
    """The run's folder. Without it, or with pets for it: the network for cats and dogs that comes with unet_jax."""
    pictures: Annotated[
        tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="PICTURE ...", help_behavior_hint="")
    ]
    """Files, folders (the pictures in them) and globs."""
    out: Path
    """Folder for NAME_mask.png and NAME_overlay.png of each picture. Masks hold class indices from 0, or the values of
    the run's classes.json."""
    mode: Literal["auto", "resize", "tile", "native"] = "auto"
    """resize: to the training size and back. tile: in overlapping windows at the scale of training, for pictures that
    show more than the training pictures. native: in such windows at the picture's own resolution. auto: tile for a run
    that was trained on tiles, else resize."""
    tile_size: int | None = None
    """Side of the windows; smaller ones take less memory and more time. Default: what suits the network."""
    tta: Tta = "none"
    """Average the probabilities over a picture and its mirror image (horizontal, which a bare --tta means; twice the
    work), or over all four flips (all; four times the work), for pictures that have no up and down."""
    white: int | None = None
    """The value that is white in 16-bit grey pictures. Default: as in the run's pictures."""
    max_megapixels: float = 89.4
    """Larger pictures are refused: a small file may unpack to more than memory holds. Raise it for files you trust."""
    probabilities: bool = False
    """Write NAME_probabilities.npz too: float32 [H, W, classes] as `probabilities`, and `class_names`."""


def read(path: Path, name: str, options: Options, predictor: "Predictor") -> tuple[str, np.ndarray, np.ndarray | None]:
    """The name, the picture, and in resize mode the picture as the network gets it."""
    from unet_jax.data.pictures import WHITE, decode_alone, scale, white_of

    white = options.white or predictor.config.data.white or WHITE
    pixels = decode_alone(path)
    if not pixels.cut and 0 < 16 * pixels.brightest < white:
        text = f"{path.parent} has 16-bit pictures that are nearly black, if {white} is white as the run has it"
        tell_once(f"{text}: --white {white_of(pixels.brightest)} suits them", file=sys.stderr)
    image = scale(pixels.values, white)
    return name, image, predictor.at_training_size(image) if options.mode == "resize" else None


def segment(pictures: Sequence[tuple], options: Options, predictor: "Predictor") -> list[np.ndarray]:
    """The network's answers for pictures that were read: in resize mode at the training size, else at their own."""
    from unet_jax.predict import assemble

    if options.mode != "resize":
        bands = (predictor.windowed(image, options.mode, options.tta) for _, image, _ in pictures)
        return [assemble(of_picture, options.probabilities) for of_picture in bands]
    return list(predictor.network(np.stack([small for _, _, small in pictures]), options.tta)) if pictures else []


def write(name: str, image: np.ndarray, answer: np.ndarray, options: Options, data: "DataConfig") -> None:
    """Resizes an answer to the picture's own size, if it is not yet, and writes the files."""
    from unet_jax import runs
    from unet_jax.plots import overlay
    from unet_jax.predict import assemble, grow

    out, class_names, colours = options.out, data.class_names, data.class_colours
    if options.mode == "resize":
        answer = assemble(grow(answer, *image.shape[:2]), options.probabilities)
    labels = answer.argmax(-1).astype(np.uint8) if options.probabilities else answer
    with runs.replacing(out / f"{name}_mask.png") as file:
        mask_of(labels, data).save(file, "PNG")
    with runs.replacing(out / f"{name}_overlay.png") as file:
        # Light compression takes a third of the time, and a few percent more room.
        Image.fromarray(overlay(image, labels, class_names, colours)).save(file, "PNG", compress_level=1)
    if options.probabilities:
        with runs.replacing(out / f"{name}_probabilities.npz") as file:
            np.savez(file, probabilities=answer, class_names=np.array(class_names))


def mask_of(labels: np.ndarray, data: "DataConfig") -> Image.Image:
    """The mask of labels uint8 [H, W] as training reads masks; with a palette if its values have 8 bits."""
    from unet_jax.data.classes import stored
    from unet_jax.plots import palette

    values = stored(data.mask_values, data.class_names)
    if max(values) > 255:
        return Image.fromarray(np.array(values, np.uint16)[labels])
    colours = np.zeros((max(values) + 1, 3), np.uint8)
    colours[values] = palette(len(values), data.class_colours)
    mask = Image.fromarray(np.array(values, np.uint8)[labels])
    mask.putpalette(colours.tobytes())
    return mask


def segment_all(
    groups: Iterator[list[tuple[Path, str]]], options: Options, predictor: "Predictor", bar: Any
) -> tuple[list[str], float]:
    """Segments all groups, from files to masks. Returns a line for each bad picture, and the seconds in the network.

    While the network works on one group, threads read the next and write the one before.
    """
    bad: list[str] = []
    seconds = 0.0
    reading: list[Future] = []
    writing: list[Future] = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for group in itertools.chain(groups, [[], []]):  # the last two: some groups are still being read or written
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


def scale_line(scale: tuple[float, float] | None) -> str:
    """The line that tile mode prints about the scale."""
    if scale is None:
        return "this run does not say at which scale it was trained: tile mode takes the pictures at their own"
    return (
        f"tile mode takes the pictures at the scale of training, {scale[0]:.2f} of their height and {scale[1]:.2f} of"
        " their width; --mode native takes them at their own"
    )


def run_and_pictures(options: Options) -> tuple[Path, tuple[str, ...]]:
    """The run's folder and what to segment, where the first argument may be a picture and the run left out.

    Raises:
      InputError: there is a run and nothing to segment, or something else in the place of the run.
    """
    from unet_jax import weights

    run = weights.find(options.run)
    is_run = (run / "config.json").exists()
    if is_run and not options.pictures:
        raise InputError(f"no pictures are given: {options.run} is a run, and pictures come after it")
    if options.pictures and not options.run.is_file():
        if not is_run:
            text = "the first argument is a run's folder, or pets for the network that comes with unet_jax"
            raise InputError(f"{options.run} is no run folder: {text}")
        return run, options.pictures
    print("segmenting with the network for cats and dogs that comes with unet_jax")
    return weights.PETS, (str(options.run), *options.pictures)


def main(options: Options) -> int:
    """Segments all pictures; the exit status is 1 if some were bad, 2 if all were."""
    from tqdm import tqdm

    from unet_jax import device
    from unet_jax.config import sides
    from unet_jax.data import pictures as pictures_files
    from unet_jax.folders import default_cache_dir
    from unet_jax.predict import load

    if options.white is not None and not 0 < options.white < 65536:
        raise InputError(f"--white is {options.white}: it must be from 1 to 65535")
    if not 0 < options.max_megapixels < 1e6:
        raise InputError(f"--max-megapixels is {options.max_megapixels}: it must be above 0 and below 1e6")
    pictures_files.MAX_PIXELS = Image.MAX_IMAGE_PIXELS = int(options.max_megapixels * 1e6)
    warnings.filterwarnings("ignore", module="PIL")  # what is wrong with a picture is reported once, at the end
    run, patterns = run_and_pictures(options)
    pictures, bad = find(patterns)
    if not pictures:
        raise InputError("; ".join(bad) or "no pictures are given")
    names = name_outputs(pictures)
    prepare_folder(options.out, pictures)
    device.set_up(default_cache_dir() / "xla")
    predictor = load(run, options.tile_size)
    options = dataclasses.replace(options, mode=predictor.own_mode if options.mode == "auto" else options.mode)
    if options.mode == "tile":
        print(scale_line(predictor.config.data.scale))
    at_once = predictor.batch_size(*sides(predictor.config.data.image_size))
    start = time.perf_counter()
    bar = tqdm(total=len(pictures), unit=" pictures", desc="segmenting", disable=None)
    with bar:
        unread, in_network = segment_all(groups(pictures, names, at_once), options, predictor, bar)
    seconds, good = time.perf_counter() - start, len(pictures) - len(unread)
    bad += unread
    for line in bad:
        print(f"left out: {line}", file=sys.stderr)
    print(
        f"{good} picture{'' if good == 1 else 's'} in {seconds:.1f} s: {good / seconds:.1f} a second,"
        f" {in_network / seconds:.0%} of the time in the network, compiling included; files in {options.out}"
    )
    return (1 if good else 2) if bad else 0


def command(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Runs the command with these arguments, by default the arguments of the process."""
    with exit_on_input_error():
        args = with_tta_named(sys.argv[1:] if argv is None else argv)
        if "" in args:  # an unset variable of the shell; as a path it is the folder that one is in
            raise InputError("an argument is empty: give the name of a run, of a picture or of a folder")
        sys.exit(main(tyro.cli(Options, args=args, prog=prog, description=__doc__)))
