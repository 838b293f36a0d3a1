#!/usr/bin/env bash
# All figures of README and docs that wait for a GPU, in one command that goes on where it was stopped:
#
#     OUT=runs/gpu experiments/gpu.sh --data-dir ~/tensorflow_datasets
#
# Flags go to every run of run.py. SEEDS, VARIANTS, BENCHMARK and PROFILE (flags of benchmark.py and profile_step.py) and
# SKIP_TORCH=1 cut it short. The order is that of worth: what is left undone where time is short is at the end. Expected
# on an H200, none of it measured as yet: speed 4 minutes, the four runs 1 minute each and seed, PyTorch's 3 minutes
# each, best 5 minutes.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-runs/gpu} seeds=${SEEDS:-0 1 2} variants=${VARIANTS:-mp_tr_ce mp_tr_dice strconv_tr_ce strconv_ups_dice}
mkdir -p "$out"
rm -f "$out/failed.txt"
failed() { echo "failed: $*" >>"$out/failed.txt"; }
try() { python "$@" || failed "$@"; } # what fails leaves the others their time
run() { # folder, then flags of run.py
    try experiments/run.py --workdir "$@"
}
for variant in $variants; do run "$out/seed0/$variant" --variant "$variant" --seed 0 "$@"; done
if [ ! -e "$out/benchmark/done" ]; then # its tables are there from the first row on
    benchmark=(experiments/benchmark.py ${BENCHMARK:-} --out "$out/benchmark")
    if python "${benchmark[@]}"; then touch "$out/benchmark/done"; else failed "${benchmark[@]}"; fi
fi
[ -s "$out/profile.md" ] || try experiments/profile_step.py ${PROFILE:---image-size 240 --batch-size 64} --out "$out/trace" >"$out/profile.md"
run "$out/best" --variant best --validation-fraction 0.1 "$@"
for seed in $seeds; do
    for variant in $variants; do
        run "$out/seed$seed/$variant" --variant "$variant" --seed "$seed" "$@"
        theirs=$out/pytorch/$variant
        if [ -z "${SKIP_TORCH:-}" ] && [ "$seed" = 0 ] && [ ! -e "$theirs" ]; then
            rm -rf "$theirs.part" # it cannot go on where it was stopped
            theirs_of=(experiments/train_pytorch.py "$out/seed0/$variant" --out "$theirs.part")
            if python "${theirs_of[@]}"; then mv "$theirs.part" "$theirs"; else failed "${theirs_of[@]}"; fi
        fi
    done
done
for variant in $variants; do # bfloat16, the default there, against float32
    run "$out/float32/$variant" --variant "$variant" --precision float32 "$@"
done
finished=()
for folder in "$out"/{seed*,float32}/* "$out/best"; do # what has failed leaves the others their report
    if [ -e "$folder/summary.json" ]; then finished+=("$folder"); fi
done
for variant in $variants; do
    if [ -e "$out/pytorch/$variant" ]; then finished+=("$out/pytorch/$variant"); fi
done
try experiments/report.py "${finished[@]}" --out "$out"
if [ -e "$out/failed.txt" ]; then
    cat "$out/failed.txt" >&2
    exit 1
fi
