"""Compares runs with the published ones: `unet-jax report runs/*` writes report.md and report.png."""

import dataclasses
import json
import os
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tyro

from unet_jax.config import VARIANTS, RunConfig, default_config, differences, size_text
from unet_jax.errors import InputError, exit_on_input_error
from unet_jax.published import TEST_LOSSES


class Run(NamedTuple):
    """What the files of a run say. The run is ours, or another framework's with the same files."""

    config: RunConfig
    environment: dict[str, Any]
    records: list[dict[str, Any]]
    part: str  # test, or validation where there was no test
    scores: dict[str, Any]  # of that part by name, after the last epoch or the one that validation chose
    names: frozenset[str]  # of all its pictures; none if an older version made the run
    pictures: str | None  # the real path of the user's own folder of pictures, which may be gone by now
    finished: bool
    folder: Path
    known: int  # pictures of the test split that the run of init_from has seen

    @property
    def framework(self) -> str:
        return self.environment.get("framework", "jax")

    @property
    def data(self) -> str:
        """The dataset, with the folder's name if it is one of the user's own."""
        return f"folder {Path(self.pictures).name}" if self.pictures else self.config.data.dataset

    @property
    def commit(self) -> str:
        """The first digits of each git commit that made the run, and -dirty if the code was changed since; or -."""
        commits = [(commit or "-").partition("-dirty") for commit in self._over_time("git_commit")]
        return ", ".join(commit[:7] + changed for commit, changed, _ in commits) or "-"

    @property
    def device(self) -> str:
        """The devices that made the run."""
        return ", ".join(map(str, self._over_time("device")))

    def _over_time(self, name: str) -> list[str | None]:
        # Of the run's beginning, and of each part of it that was made otherwise (`environment.write`).
        parts = (self.environment, *self.environment.get("resumed", []))
        return list(dict.fromkeys(part[name] for part in parts if name in part))


def read_run(folder: Path) -> Run:
    """Reads config.json, environment.json, metrics.jsonl, and summary.json if the run has a validation part.

    Raises:
      InputError: the folder is no run, has no finished epoch, or has a validation part and is not finished.
    """
    from unet_jax import splits
    from unet_jax.metrics import best_epoch, held_out
    from unet_jax.runs import read_config, read_records

    config = read_config(folder)
    try:
        environment = json.loads((folder / "environment.json").read_text())
        records = read_records(folder)
        scores, finished = records[-1] if records else {}, len(records)
        if not all({"seconds", "images_per_second"} <= part.keys() for part in records) or not environment.keys():
            raise ValueError("records without seconds")
        if "validation_loss" in scores:
            summary = json.loads((folder / "summary.json").read_text())
            finished = summary.get("epochs", len(records))
            scores = summary.get("test", records[best_epoch(records)])
    except FileNotFoundError as error:
        raise InputError(f"{folder} is no finished run: it has no {Path(error.filename).name}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # damaged files, or other programs'
        raise InputError(f"{folder} cannot be read as a finished run ({error})") from None
    if not records:
        raise InputError(f"{folder} has no finished epoch")
    if finished != len(records):
        raise InputError(f"{folder} is no finished run: it has gone on since its summary.json was written")
    parts = splits.read(folder)
    names = frozenset[str]().union(*parts.values())
    known = len(splits.seen_before(config, parts.get("test", [])))
    data, pictures = config.data, None
    if data.dataset == "folder" and data.data_dir:  # environment.json has the way to a relative one
        pictures = os.path.realpath(folder.resolve() / environment.get("data_dir", Path(data.data_dir).absolute()))
    is_finished = len(records) >= config.train.epochs or (folder / "summary.json").exists()
    return Run(config, environment, records, *held_out(scores), names, pictures, is_finished, folder, known)


HEAD = ("variant", "data", "size", "pictures", "epochs", "other settings", "framework", "seeds", "runs",
        "published best loss", "test loss", "best test loss", "mean IoU", "IoU by class", "pixel accuracy",
        "s / epoch", "images/s", "device", "commit")  # fmt: skip
IN_COLUMNS = {f"data.{name}" for name in ("dataset", "image_size", "train_examples", "class_names")}
IN_COLUMNS |= {"train.seed", "train.epochs"}


def spread(values: Iterable[float], form: str = ".4f") -> str:
    """The mean, and for several values also the lowest and the highest."""
    numbers = list(values)
    mean = f"{statistics.mean(numbers):{form}}"
    return mean if len(numbers) == 1 else f"{mean} ({min(numbers):{form}} to {max(numbers):{form}})"


def settings(config: RunConfig) -> str:
    """The settings that differ from the variant's own and have no column."""
    from unet_jax.data import datasets, tiles

    if config.variant not in VARIANTS:
        return "-"
    own = default_config(config.variant, config.data.dataset)
    data = dataclasses.replace(own.data, scale=tiles.SCALE)
    train = dataclasses.replace(own.train, batch_size=own.train.batch_size or datasets.DEFAULT_BATCH_SIZE)
    changed = differences(dataclasses.replace(own, data=data, train=train), config)
    pairs = (text.split(": ", 1) for text in changed)
    return ", ".join(f"{k.split('.')[1]} {v.split(' -> ')[1]}" for k, v in pairs if k not in IN_COLUMNS) or "-"


def published_losses(config: RunConfig) -> dict[int, float]:
    """The published test losses by epoch that a run with this config can be compared with; {} if there are none."""
    recipe = VARIANTS.get(config.variant)
    comparable = recipe and recipe.loss == config.train.loss and config.data.dataset != "folder"
    return dict(TEST_LOSSES.get(config.variant, {})) if comparable else {}


def row(runs: list[Run]) -> str:
    """A line of the table, for runs that differ only in their seeds."""
    from unet_jax.metrics import cell

    config, data = runs[0].config, runs[0].config.data
    published = published_losses(config)
    epochs = f"{len(runs[0].records)}" + f" of {config.train.epochs}" * (not runs[0].finished)
    best = [min(r["test_loss"] for r in run.records) for run in runs if "test_loss" in run.records[-1]]
    told = f"; init_from has seen {runs[0].known} of its test pictures" * bool(runs[0].known)
    iou = [{k: v for k, v in run.scores.get("iou", {}).items() if v is not None} for run in runs]

    def class_score(name: str) -> str:
        values = [scores[name] for scores in iou if name in scores]
        some = f" ({len(values)} of {len(runs)} seeds)" * (len(values) < len(runs))
        return f"{name} {statistics.mean(values):.3f}{some}"

    def score(name: str) -> str:
        values = [run.scores[name] for run in runs if run.scores.get(name) is not None]
        return spread(values) + " (validation)" * (runs[0].part == "validation") if values else "-"

    cells = (
        config.variant, runs[0].data, size_text(data.image_size), data.train_examples or "all", epochs,
        settings(config) + told, runs[0].framework, " ".join(str(run.config.train.seed) for run in runs),
        ", ".join(run.folder.name for run in runs), min(published.values()) if published else "-",
        score("loss"), spread(best) if best else "-", score("mean_iou"),
        ", ".join(map(class_score, dict.fromkeys(name for scores in iou for name in scores))),
        score("pixel_accuracy"),
        spread((statistics.median(r["seconds"] for r in run.records) for run in runs), ".1f"),
        spread((statistics.median(r["images_per_second"] for r in run.records) for run in runs), ".0f"),
        runs[0].device, runs[0].commit,
    )  # fmt: skip
    return f"| {' | '.join(map(cell, cells))} |\n"


def share_a_row(one: Run, other: Run) -> bool:
    """Whether two runs, of the same code and pictures, differ in their seeds and in nothing else that a table tells."""
    made = [(r.framework, r.device, r.commit, len(r.records), r.pictures, r.names, r.known) for r in (one, other)]
    changed = [text.split(": ")[0] for text in differences(one.config, other.config)]
    return made[0] == made[1] and changed == ["train.seed"]


def finished_runs(paths: Iterable[Path]) -> dict[Path, Run]:
    """The finished runs among these folders, and in those that hold runs. Prints a line on each that is left out.

    Raises:
      InputError: there is none.
    """
    runs, faults = {}, []
    for path in paths:
        inside = [] if (path / "config.json").exists() else sorted(file.parent for file in path.glob("*/config.json"))
        for folder in inside or [path]:
            try:
                runs[folder] = read_run(folder)
            except InputError as error:
                faults.append(str(error))
    if not runs:
        raise InputError(faults[0] if faults else "no run folders are given: name them, such as runs/*")
    for fault in faults:
        print(f"left out: {fault}", file=sys.stderr)
    return runs


def table(runs: Iterable[Run]) -> str:
    """Markdown: a row for each group of runs that differ only in their seeds, with the published loss beside ours."""
    groups: list[list[Run]] = []
    for run in runs:
        group = next((group for group in groups if all(share_a_row(one, run) for one in group)), None)
        if group:
            group.append(run)
        else:
            groups.append([run])
    return "".join([f"| {' | '.join(HEAD)} |\n", "|---" * len(HEAD), "|\n", *map(row, groups)])


def write_comparison(runs: dict[Path, Run], out: Path | None = None, name: str = "comparison") -> None:
    """Writes NAME.md and NAME.png about the runs in these folders, to `out` or the folder that holds the first."""
    from unet_jax import plots
    from unet_jax.runs import labels, write_text

    out = out or next(iter(runs)).parent
    out.mkdir(parents=True, exist_ok=True)
    text = table(runs.values())
    note = (
        "Published losses are the best of those printed, for 240x240 pictures and 25 epochs. Test loss is the mean of"
        " the batch means, after the last epoch, or with a validation part after the best; (validation) means that"
        " there was no test. Several seeds: mean (lowest to highest). Times are an epoch's median.\n"
    )
    write_text(out / f"{name}.md", f"{text}\n{note}")
    panels: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for label, run in zip(labels(list(runs)), runs.values(), strict=True):
        panels.setdefault(run.config.variant, {})[label] = run.records
    datasets = sorted({run.config.data.dataset for run in runs.values()})
    points: dict[str, dict[int, float]] = {variant: {} for variant in panels}
    for run in runs.values():
        points[run.config.variant] |= published_losses(run.config)
    plots.comparison_figure(panels, points, f"test loss on {', '.join(datasets)}").savefig(out / f"{name}.png")
    print(text)


@dataclasses.dataclass(frozen=True)
class Options:
    """Which runs, and where to."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run folders, or folders of runs."""
    out: Path = Path()
    """Folder for report.md and report.png."""


def command(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Runs the command with these arguments, by default the arguments of the process."""
    with exit_on_input_error():
        options = tyro.cli(Options, args=argv, prog=prog, description=__doc__)
        runs = finished_runs(path for path in options.runs if not path.is_file())  # runs/* has reports, too
        write_comparison(runs, options.out, "report")
