"""What each piece of a recipe brings, on the validation part: a table of settings, each trained with several seeds.

    python experiments/ablation.py --seeds 0 1 --dataset oxford_iiit_pet --image-size 64 --epochs 20

`all` has every piece, `base` none, and the other rows lack one, or have another for it, or the two named. Flags that
are not the script's own go to run.py, for every setting alike. Started again it goes on where it was: finished runs are
left alone. ablation.md has the last epoch's validation mean IoU and its difference to `all` with the same seed.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from unet_jax.commands.report import spread
from unet_jax.errors import exit_on_input_error

# name -> flags of run.py
BASE = "--variant mp_tr_ce --loss cross_entropy+soft_dice --batch-size 32 --validation-fraction 0.2"
PIECES = {
    "strong": "--augment strong",
    "cosine": "--schedule cosine --warmup-epochs 1",
    "ema": "--ema 0.998",
    "decay": "--weight-decay 0.01 --clip-norm 1",
}


def without(name: str, instead: str = "") -> str:
    """The flags of all pieces but one."""
    return " ".join([*(flags for other, flags in PIECES.items() if other != name), instead])


SETTINGS = {
    "all": " ".join(PIECES.values()),
    "base": "",
    "all-strong": without("strong"),
    "all-strong+basic": without("strong", "--augment basic"),
    **{f"all-{name}": without(name) for name in ("cosine", "ema", "decay")},
    "strong+ema": f"{PIECES['strong']} {PIECES['ema']}",
}


def table(scores: dict[str, dict[int, float]]) -> str:
    """Markdown, a row a setting: mean over the seeds (lowest to highest), of the score and of its gain on `all`."""
    lines = ["| setting | seeds | validation mean IoU | difference to all |", "|---|---|---|---|"]
    for name, by_seed in scores.items():
        gains = [score - scores["all"][seed] for seed, score in by_seed.items()]
        lines.append(f"| {name} | {len(by_seed)} | {spread(by_seed.values())} | {spread(gains, '+.4f')} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--only", nargs="+", default=list(SETTINGS), choices=SETTINGS, help="all is always among them")
    own, others = parser.parse_known_args()
    scores: dict[str, dict[int, float]] = {}
    for seed in own.seeds:
        for name in dict.fromkeys(["all", *own.only]):
            folder = own.out / f"{name}-{seed}"
            flags = [*BASE.split(), *SETTINGS[name].split(), "--seed", str(seed), "--workdir", str(folder), *others]
            if status := subprocess.run([sys.executable, Path(__file__).with_name("run.py"), *flags]).returncode:
                sys.exit(status)
            last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
            scores.setdefault(name, {})[seed] = last["validation_mean_iou"]
            (own.out / "ablation.md").write_text(table(scores))
    print(table(scores))


if __name__ == "__main__":
    with exit_on_input_error("interrupted; the same command goes on from there"):
        main()
