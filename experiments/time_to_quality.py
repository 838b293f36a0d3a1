"""How good a network is after how many minutes of training: a figure and a table of runs.

    python experiments/time_to_quality.py runs/short runs/long --levels .65 .7 .75 --out runs

It takes each epoch's mean IoU (of test, or of the validation part) and the time of training up to there, without the
evaluations. A run that began with `--init-from` another run named here counts that one's time too.
"""

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from unet_jax.commands.report import Run, read_run
from unet_jax.errors import InputError, exit_on_input_error
from unet_jax.metrics import cell, held_out
from unet_jax.plots import quality_figure
from unet_jax.runs import labels


class Curve(NamedTuple):
    """A run's epochs."""

    label: str
    minutes: list[float]  # of training, up to the end of each epoch
    mean_iou: list[float]
    part: str  # test or validation


def curves(folders: Sequence[Path]) -> list[Curve]:
    """The curve of each run, in the order of the folders; raises InputError for a run unfinished or without scores."""
    runs = {folder.resolve(): read_run(folder) for folder in folders}

    def minutes(run: Run) -> list[float]:
        """At the end of each epoch, from the start of the run that this one began from."""
        origin = run.config.train.init_from
        before = runs.get(Path(origin).resolve()) if origin else None
        if origin and not before:
            print(f"the run that began from {origin} counts its own minutes alone: name that one, too", file=sys.stderr)
        seconds = itertools.accumulate(record["seconds"] for record in run.records)
        start = minutes(before)[-1] if before else 0.0
        return [start + s / 60 for s in seconds]

    found = []
    for folder, label in zip(folders, labels([folder.resolve() for folder in folders]), strict=True):
        run = runs[folder.resolve()]
        parts, scores = zip(*map(held_out, run.records), strict=True)
        if "mean_iou" not in scores[-1]:
            raise InputError(f"{folder} has no mean IoU: it had neither a test split nor a validation part")
        found.append(Curve(label, minutes(run), [score["mean_iou"] or 0 for score in scores], parts[-1]))
    return found


def table(found: Sequence[Curve], levels: Sequence[float]) -> str:
    """Markdown: for each run the minutes until its mean IoU first reached each level, the best one, and all minutes."""
    head = ["run", "part", *(f"minutes to {level:g}" for level in levels), "best mean IoU", "minutes in all"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for curve in found:
        reached = [[m for m, iou in zip(curve.minutes, curve.mean_iou, strict=True) if iou >= at] for at in levels]
        times = [f"{minutes[0]:.1f}" if minutes else "-" for minutes in reached]
        cells = [cell(curve.label), curve.part, *times, f"{max(curve.mean_iou):.4f}", f"{curve.minutes[-1]:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    parser.add_argument("--levels", nargs="+", type=float, default=[0.65, 0.7, 0.75], help="mean IoU, from 0 to 1")
    parser.add_argument("--out", type=Path, default=Path(), help="for time_to_quality.md and time_to_quality.png")
    options = parser.parse_args()
    found = curves(options.runs)
    text = table(found, options.levels)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "time_to_quality.md").write_text(text)
    quality_figure(found, options.levels).savefig(options.out / "time_to_quality.png")
    print(text)


if __name__ == "__main__":
    with exit_on_input_error():
        main()
