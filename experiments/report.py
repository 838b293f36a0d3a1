"""Sets runs beside the published ones: `python experiments/report.py runs/*` writes report.md and report.png."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import tyro

from unet_jax import plots
from unet_jax.config import VARIANTS
from unet_jax.errors import InputError, exit_on_input_error

# Test losses by epoch as the reproduced work printed them; the epochs between were not published.
PUBLISHED = {
    "mp_tr_ce": ([1.3338, 0.8280, 0.6460, 1.1128, 1.0972], 21, [0.9850, 0.8336, 0.6560, 0.6963, 0.5283]),
    "mp_tr_dice": ([0.2559, 0.2501, 0.2115, 0.1905, 0.1816], 21, [0.0948, 0.1257, 0.0909, 0.1136, 0.1120]),
    "strconv_tr_ce": ([1.3183, 0.5862, 0.5981, 0.5238, 0.5245], 21, [0.4071, 0.3076, 0.3325, 0.4501, 0.2871]),
    "strconv_ups_dice": ([0.1596, 0.1661, 0.1223, 0.1148, 0.1261], 20, [0.1391, 0.0642, 0.0651]),
}


def published_losses(variant: str) -> dict[int, float]:
    """The variant's published test losses by epoch; none for a variant of our own."""
    if variant not in PUBLISHED:
        return {}
    first, start, last = PUBLISHED[variant]
    return dict(enumerate(first, 1)) | dict(enumerate(last, start))


def read_run(folder: Path) -> tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]]]:
    """config.json, environment.json and the records of metrics.jsonl.

    Raises:
      InputError: the folder is no run, or has no finished epoch.
    """
    try:
        config, environment = (json.loads((folder / f"{n}.json").read_text()) for n in ("config", "environment"))
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} cannot be read as a run ({error})") from None
    if not records:
        raise InputError(f"{folder} has no finished epoch")
    return config, environment, records


def table(folders: list[Path]) -> str:
    """Markdown: a row for each run, the published loss beside ours."""
    head = ("run", "data", "size", "pictures", "epochs", "seed", "published best loss", "test loss", "best", "mean IoU")
    lines = [f"| {' | '.join((*head, 'pixel accuracy', 's / epoch', 'images/s', 'device'))} |"]
    lines.append("|---" * (len(head) + 4) + "|")
    for folder in folders:
        config, environment, records = read_run(folder)
        data, last, variant = config["data"], records[-1], config["variant"]
        cells = (
            variant, data["dataset"], data["image_size"], data["train_examples"] or "all", len(records),
            config["train"]["seed"], VARIANTS[variant].published_test_loss if variant in VARIANTS else "-",
            f"{last['test_loss']:.4f}", f"{min(r['test_loss'] for r in records):.4f}", f"{last['mean_iou']:.4f}",
            f"{last['pixel_accuracy']:.4f}", f"{sum(r['seconds'] for r in records) / len(records):.1f}",
            f"{sum(r['images_per_second'] for r in records) / len(records):.0f}", environment["device"],
        )  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def write_comparison(folders: list[Path], out: Path | None = None, name: str = "comparison") -> None:
    """Writes NAME.md and NAME.png of these runs, in `out` or the folder that holds the first."""
    out = out or folders[0].parent
    out.mkdir(parents=True, exist_ok=True)
    text = table(folders)
    note = "Published losses are of 240x240 pictures, 25 epochs; test loss is the mean of the batch means.\n"
    (out / f"{name}.md").write_text(f"{text}\n{note}")
    curves = {folder.name: read_run(folder)[2] for folder in folders}
    points = {folder.name: published_losses(read_run(folder)[0]["variant"]) for folder in folders}
    datasets = {read_run(folder)[0]["data"]["dataset"] for folder in folders}
    figure = plots.comparison_figure(curves, points, f"test loss on {', '.join(sorted(datasets))}")
    figure.savefig(out / f"{name}.png")
    print(text)


@dataclasses.dataclass(frozen=True)
class Options:
    """Which runs, and where to."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run folders."""
    out: Path = Path()
    """Folder for report.md and report.png."""


if __name__ == "__main__":
    with exit_on_input_error():
        options = tyro.cli(Options, description=__doc__)
        write_comparison(list(options.runs), options.out, "report")
