"""Segments pictures with a run's checkpoint: `python experiments/predict.py runs/mp_tr_dice photos/ --out masks`."""

import dataclasses
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
    from unet_jax.predict import Predictor

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
    mode: Literal["resize", "tile"] = "resize"
    """resize: to the training size and back. tile: the picture's own resolution, in overlapping windows."""
    tile_size: int | None = None
    """Side of the windows; smaller ones take less memory and more time. Default: what suits the network."""
    tta: bool = False
    """Average the probabilities over the four flips of a picture: four times the work."""
    probabilities: bool = False
    """Write NAME_probabilities.npz too: float32 [H, W, classes] as `probabilities`, and `class_names`."""


def find(patterns: Sequence[str]) -> tuple[list[Path], list[str]]:
    """The files that are meant, each once, and a line for each pattern that means none."""
    from unet_jax.predict import FORMATS

    suffixes = {suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS}
    found: dict[Path, Path] = {}
    bad = []
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            files = [p for p in sorted(path.iterdir()) if p.suffix.lower() in suffixes and p.is_file()]
        else:
            matches = [pattern] if path.exists() else sorted(glob.glob(pattern, recursive=True))
            files = [p for p in map(Path, matches) if p.is_file()]
        if not files:
            bad.append(f"{pattern}: {'the folder has no pictures' if path.is_dir() else 'there is no such file'}")
        for file in files:
            found.setdefault(file.resolve(), file)
    return list(found.values()), bad


def name_outputs(pictures: Sequence[Path]) -> list[str]:
    """A name for each picture's files: its stem; where others have that too, FOLDER-STEM, with a number if need be."""
    stems = Counter(path.stem.lower() for path in pictures)  # some file systems know no case
    names: dict[str, str] = {}
    for path in pictures:
        name = path.stem if stems[path.stem.lower()] == 1 else f"{path.resolve().parent.name}-{path.stem}"
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
    from unet_jax.predict import FORMATS

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


class Pipeline:
    """Reads a group and writes the one before in threads while the network is at work on the one between."""

    def __init__(self, options: Options, predictor: "Predictor", pool: ThreadPoolExecutor, bar: Any) -> None:
        """Nothing is done yet."""
        self.options, self.predictor, self.pool, self.bar = options, predictor, pool, bar
        self.bad: list[str] = []
        self.network_seconds = 0.0

    def run(self, groups: Iterator[list[tuple[Path, str]]]) -> None:
        """Takes all groups from their files to their masks."""
        reading: list[Future] = []
        writing: list[Future] = []
        for group in groups:
            upcoming = [self.pool.submit(self.read, path, name) for path, name in group]
            writing, reading = self.segment(reading, writing), upcoming
        for future in self.segment(reading, writing):
            future.result()

    def read(self, path: Path, name: str) -> tuple[str, np.ndarray, np.ndarray | None]:
        """The name, the picture, and in resize mode what the network is to see of it."""
        from unet_jax.predict import read_picture

        image = read_picture(path)
        return name, image, self.predictor.shrink(image) if self.options.mode == "resize" else None

    def segment(self, reading: list[Future], writing: list[Future]) -> list[Future]:
        """Sends what was read through the network; once the group before is written, has this one written."""
        from unet_jax.predict import assemble

        pictures, options = [], self.options
        for future in reading:
            try:
                pictures.append(future.result())
            except InputError as error:
                self.bad.append(str(error))
                self.bar.update()
        start, answers = time.perf_counter(), []
        if options.mode == "tile":
            for _, image, _ in pictures:
                answers.append(assemble(self.predictor.tiled(image, options.tta), options.probabilities))
        elif pictures:
            answers = list(self.predictor.network(np.stack([small for _, _, small in pictures]), options.tta))
        self.network_seconds += time.perf_counter() - start
        for future in writing:
            future.result()
        triples = zip(pictures, answers, strict=True)
        return [self.pool.submit(self.write, name, image, answer) for (name, image, _), answer in triples]

    def write(self, name: str, image: np.ndarray, answer: np.ndarray) -> None:
        """Takes an answer to the picture's own size, if it is not yet, and writes the files."""
        from unet_jax.plots import palette
        from unet_jax.predict import assemble, grow, overlay

        out, class_names = self.options.out, self.predictor.config.data.class_names
        if self.options.mode == "resize":
            answer = assemble(grow(answer, *image.shape[:2]), self.options.probabilities)
        labels = answer.argmax(-1).astype(np.uint8) if self.options.probabilities else answer
        mask = Image.fromarray(labels)
        mask.putpalette(palette(len(class_names)).tobytes())
        mask.save(out / f"{name}_mask.png")
        # Lightly compressed: it takes a third of the time, and a few percent more room.
        Image.fromarray(overlay(image, labels, len(class_names))).save(out / f"{name}_overlay.png", compress_level=1)
        if self.options.probabilities:
            np.savez(out / f"{name}_probabilities.npz", probabilities=answer, class_names=np.array(class_names))
        self.bar.update()


def main(options: Options) -> int:
    """Segments all pictures; the exit status is 1 if some were bad, 2 if all were."""
    from tqdm import tqdm

    from unet_jax import device
    from unet_jax.data.cache import default_cache_dir
    from unet_jax.predict import load

    warnings.filterwarnings("ignore", module="PIL")  # what is wrong with a picture is told once, at the end
    pictures, bad = find(options.pictures)
    if not pictures:
        raise InputError("; ".join(bad) or "no pictures are given")
    names = name_outputs(pictures)
    prepare_folder(options.out, names, pictures)
    device.set_up_compilation_cache(default_cache_dir() / "xla")
    predictor = load(options.run, options.tile_size)
    for line in predictor.restored.skipped:
        print(line, file=sys.stderr)
    size = predictor.config.data.image_size
    start = time.perf_counter()
    bar = tqdm(total=len(pictures), unit=" pictures", desc="segmenting", disable=None)
    with bar, ThreadPoolExecutor(os.cpu_count()) as pool:
        pipeline = Pipeline(options, predictor, pool, bar)
        pipeline.run(groups(pictures, names, predictor.batch_size(size, size)))
    seconds, good = time.perf_counter() - start, len(pictures) - len(pipeline.bad)
    bad += pipeline.bad
    for line in bad:
        print(f"left out: {line}", file=sys.stderr)
    print(
        f"{good} pictures in {seconds:.1f} s: {good / seconds:.1f} a second, {pipeline.network_seconds / seconds:.0%}"
        f" of the time in the network, compiling included; files in {options.out}"
    )
    return (1 if good else 2) if bad else 0


if __name__ == "__main__":
    with exit_on_input_error():
        sys.exit(main(tyro.cli(Options, description=__doc__)))
