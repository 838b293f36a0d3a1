"""Draws large pictures of cells and trains on them, resized and in tiles: `python experiments/tiles.py`."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import tyro
from PIL import Image
from scipy.ndimage import gaussian_filter
from scipy.spatial import cKDTree

import unet_jax
from unet_jax.commands.evaluate import Options, evaluate_run
from unet_jax.config import RunConfig, default_config
from unet_jax.errors import exit_on_input_error
from unet_jax.runs import read_records

WALL = 3.0  # pixels


def draw(seed: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """A grey picture uint8 [side, side] of cells and short dark strokes, and its mask: 1 where there is a wall."""
    rng = np.random.default_rng(seed)
    centres = rng.uniform(-60, side + 60, (9 * side * side // 10000, 2))
    bend = [60 * gaussian_filter(rng.normal(size=(side, side)), 12) for _ in range(2)]
    places = np.stack(np.mgrid[:side, :side] + np.array(bend), -1).reshape(-1, 2)
    nearest, second = cKDTree(centres).query(places, k=2)[0].T
    wall = (second - nearest < WALL).reshape(side, side)
    picture = 170 + 120 * gaussian_filter(rng.normal(size=(side, side)), 3)
    for y, x, angle in rng.uniform((0, 0, 0), (side, side, np.pi), (side * side // 900, 3)):
        along = np.arange(rng.integers(6, 16))
        picture[(y + along * np.sin(angle)).astype(int) % side, (x + along * np.cos(angle)).astype(int) % side] -= 90
    picture = gaussian_filter(np.where(wall, 80, picture), 1) + rng.normal(size=(side, side)) * 18
    return picture.clip(0, 255).astype(np.uint8), wall.astype(np.uint8)


def prepare(folder: Path, count: int, side: int) -> None:
    """Writes a folder of so many pictures and masks."""
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for i in range(count):
        for part, image in zip(("images", "masks"), draw(i, side), strict=True):
            Image.fromarray(image).save(folder / part / f"cells{i:02}.png")
    (folder / "classes.json").write_text('{"names": ["cell", "wall"]}')


def row(config: RunConfig, run: Path) -> str:
    """Trains, and returns a line of the table: the test split's mean IoU as training sees it, and at full size."""
    unet_jax.run(config, run)
    evaluate_run(Options(run))
    evaluate_run(Options(run, full_size=True))
    records = read_records(run)
    found = [
        json.loads((run / f"evaluation-test{kind}" / "evaluation.json").read_text()) for kind in ("", "-full-size")
    ]
    walls = [f"{scores['mean_iou']:.3f} | {scores['iou']['wall']:.3f}" for scores in found]
    return f"| {run.name} | {len(records)} | {sum(r['seconds'] for r in records):.0f} | {' | '.join(walls)} |"


def main(
    out: Path = Path("runs/cells"),
    count: int = 20,
    side: int = 1024,
    image_size: int = 256,
    epochs: int = 4,
    widths: Sequence[int] = (8, 16, 32, 64),
    seed: int = 0,
) -> None:
    """Both networks see as many training pictures of image_size: whole ones, or tiles."""
    prepare(out / "data", count, side)
    base = default_config("mp_tr_ce", "folder")
    data = replace(base.data, data_dir=str(out / "data"), image_size=image_size)
    model, train = replace(base.model, widths=tuple(widths)), replace(base.train, batch_size=4, seed=seed)
    longer = epochs * (side // image_size) ** 2
    lines = [
        row(replace(base, data=data, model=model, train=replace(train, epochs=longer)), out / f"resized-{seed}"),
        row(
            replace(base, data=replace(data, tiles=True), model=model, train=replace(train, epochs=epochs)),
            out / f"tiles-{seed}",
        ),
    ]
    print("| training | epochs | seconds | mean IoU | wall | mean IoU at full size | wall |")
    print("\n".join(["|---" * 7 + "|", *lines]))


if __name__ == "__main__":
    with exit_on_input_error():
        tyro.cli(main)
