"""Which recipe scores best on the validation part: a table of settings, each trained with several seeds.

    python experiments/ablation.py base basic+cosine basic+cosine+ema --seeds 0 1 --dataset oxford_iiit_pet \\
        --image-size 96 --widths 16 32 64 128 256 --epochs 40 --test-examples 32

A setting is `base`, or pieces joined by +. Flags that are not the script's own go to run.py, for every setting alike;
where a piece says otherwise, the piece counts. Started again, it resumes where it was: finished runs are left alone.
ablation.md has the last epoch's validation mean IoU, its difference from the first setting with the same seed, and the
minutes of training.
"""

import argparse
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from unet_jax.commands.report import spread
from unet_jax.errors import InputError, exit_on_input_error
from unet_jax.runs import read_config, read_records

# name -> flags of run.py
BASE = "--variant mp_tr_ce --loss cross_entropy+soft_dice --batch-size 32 --validation-fraction 0.1"
PIECES = {
    "basic": "--augment basic",
    "strong": "--augment strong",
    "cosine": "--schedule cosine --warmup-epochs 1",
    "ema": "--ema 0.998",
    "decay": "--weight-decay 0.01 --clip-norm 1",
    "lr2": "--learning-rate 2e-3",
    "batch16": "--batch-size 16",
    "nodrop": "--dropout-rate 0",
    "strided": "--downsampling strided_conv",
    "ce": "--loss cross_entropy",
    "dice": "--loss soft_dice",
}


class Trained(NamedTuple):
    """The result of a run of a setting."""

    mean_iou: float  # on the validation part, of the last epoch
    minutes: float


def flags(setting: str) -> list[str]:
    """The flags of run.py for a setting; raises InputError for an unknown piece, or two that set the same flag."""
    pieces = [] if setting == "base" else setting.split("+")
    if unknown := [piece for piece in pieces if piece not in PIECES]:
        raise InputError(f"the setting {setting} has the piece {unknown[0]!r}: choose from base, {', '.join(PIECES)}")
    words = " ".join(PIECES[piece] for piece in pieces).split()
    if twice := [word for word in words if word.startswith("--") and words.count(word) > 1]:
        raise InputError(f"the setting {setting} has two pieces that set {twice[0]}: only one of them would count")
    return words


def read(folder: Path) -> Trained:
    """The result of a finished run."""
    records, epochs = read_records(folder), read_config(folder).train.epochs
    if len(records) != epochs:
        raise InputError(
            f"{folder} has {len(records)} epochs for {epochs}: choose another --out, or leave --patience out"
        )
    if records[-1].get("validation_mean_iou") is None:
        raise InputError(f"{folder} has no mean IoU on a validation part: leave --validation-fraction as it is")
    return Trained(records[-1]["validation_mean_iou"], sum(record["seconds"] for record in records) / 60)


def table(results: dict[str, dict[int, Trained]]) -> str:
    """Markdown, a row a setting: means over the seeds (lowest to highest)."""
    first = next(iter(results.values()))
    lines = ["| setting | seeds | validation mean IoU | difference to the first | minutes |", "|---|---|---|---|---|"]
    for setting, by_seed in results.items():
        scores = spread(run.mean_iou for run in by_seed.values())
        gains = spread((run.mean_iou - first[seed].mean_iou for seed, run in by_seed.items()), "+.4f")
        minutes = spread((run.minutes for run in by_seed.values()), ".1f")
        lines.append(f"| {setting} | {len(by_seed)} | {scores} | {gains} | {minutes} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    text = "\n".join(
        ["base, or of these joined by +:", *(f"  {name}: {words}" for name, words in PIECES.items()), f"base is {BASE}"]
    )
    parser.add_argument("settings", nargs="+", help=text)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="each setting is trained with each")
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"), help="for the runs and ablation.md")
    own, others = parser.parse_known_args()
    recipes = {setting: flags(setting) for setting in own.settings}
    results: dict[str, dict[int, Trained]] = {}
    for seed in own.seeds:
        for setting, recipe in recipes.items():
            folder = own.out / f"{setting}-{seed}"
            run = [*BASE.split(), *others, *recipe, "--seed", str(seed), "--workdir", str(folder)]
            if status := subprocess.run([sys.executable, Path(__file__).with_name("run.py"), *run]).returncode:
                sys.exit(status)
            results.setdefault(setting, {})[seed] = read(folder)
            (own.out / "ablation.md").write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    with exit_on_input_error("interrupted; the same command goes on from there"):
        main()
