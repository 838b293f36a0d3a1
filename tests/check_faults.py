"""Kills and damages runs and has them go on: `python tests/check_faults.py --kills 50`.

A run on tiny pictures is killed (-9, by SIGTERM, by Ctrl-C) at random moments and started again each time; files of a
stopped run are damaged; a disk fills up. Each time the run must end with the parameters and metrics, bit for bit, of
one that nothing disturbed. Prints faults tried, survived and lost; exit status 1 if any was lost.
"""

import contextlib
import dataclasses
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import tyro

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

TINY = ["--image-size", "16", "--widths", "4", "4"]
FLAGS = ["--dataset", "synthetic", *TINY, "--train-examples", "40"]
FLAGS += ["--test-examples", "8", "--batch-size", "8", "--dropout-rate", "0.5"]
TIMING = {"seconds", "evaluation_seconds", "images_per_second"}


@dataclasses.dataclass(frozen=True)
class Options:
    kills: int = 50
    terms: int = 5
    interrupts: int = 5
    epochs: int = 20
    widths: tuple[int, ...] = (32, 64, 128, 256, 512)
    image_size: int = 32
    variant: str = "mp_tr_dice"
    seed: int = 0
    """Of the moments."""
    others: tuple[str, ...] = ()
    """Which of DAMAGES and DISKS to try, or none. Default: all."""

    def flags(self) -> list[str]:
        size = ["--image-size", str(self.image_size), "--widths", *map(str, self.widths)]
        return [*size, "--epochs", str(self.epochs), "--variant", self.variant]


@dataclasses.dataclass(frozen=True)
class Ended:
    status: int
    output: str


def own_cache(home: Path) -> str:
    """A cache folder in home, into which the C++ need not be compiled again."""
    from unet_jax.folders import default_cache_dir

    compiled, ours = default_cache_dir() / "cpu", home / "cache" / "unet_jax"
    for folder in (compiled, ours):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        (ours / "cpu").symlink_to(compiled)
    return str(home / "cache")


def start(home: Path, folder: Path, *flags: object, limit: int | None = None, devices: int = 1) -> subprocess.Popen:
    """Starts the command of a run on simulated devices; it can write at most `limit` bytes a file."""
    script = [sys.executable, str(ROOT / "experiments" / "run.py"), *FLAGS]
    env = dict(os.environ, PYTHONPATH=str(ROOT), XDG_CACHE_HOME=own_cache(home), TQDM_DISABLE="1")
    script += ["--workdir", str(folder), *map(str, flags)]
    # Unbuffered: what it prints tells when to kill it.
    env["PYTHONUNBUFFERED"] = "1"
    env["XLA_FLAGS"] = f"{env.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    pipe = subprocess.PIPE
    with heeding_interrupts():
        process = subprocess.Popen(script, env=env, cwd=home, stdout=pipe, stderr=subprocess.STDOUT, text=True)
    if limit:
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit, limit))
    return process


@contextlib.contextmanager
def heeding_interrupts() -> Iterator[None]:
    """Has what is started heed Ctrl-C, even where a shell has put this process in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def finish(process: subprocess.Popen) -> Ended:
    output, _ = process.communicate(timeout=300)
    return Ended(process.returncode, output)


def result(folder: Path) -> tuple[str, list[dict]]:
    """The last checkpoint's parameters as text that differs where a bit does, and the metrics without timings."""
    import jax
    import numpy as np

    from unet_jax import device, runs

    state = runs.load(folder, device.placement())[1].state
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    bits = "".join(np.asarray(leaf).tobytes().hex() for leaf in jax.tree.leaves(state))
    return bits, [{k: v for k, v in record.items() if k not in TIMING} for record in records]


def wait_for(sign: str, process: subprocess.Popen) -> str:
    """What the process prints up to the line that has the sign."""
    lines: list[str] = []
    assert process.stdout is not None
    while sign not in (lines or [""])[-1] and (line := process.stdout.readline()):
        lines.append(line)
    return "".join(lines)


def interrupted(
    home: Path, folder: Path, options: Options, number: signal.Signals, rng: random.Random, from_start: bool = True
) -> Ended:
    """Starts or resumes the run and sends it the signal at a random moment, of its start or of its training."""
    process = start(home, folder, *options.flags())
    output = wait_for(rng.choice(["device: ", "files in", "Test set"]) if from_start else "Test set", process)
    time.sleep(rng.uniform(0, 1))
    process.send_signal(number)
    ended = finish(process)
    return Ended(ended.status, output + ended.output)


def newest(folder: Path) -> Path:
    return max((p for p in (folder / "checkpoints").iterdir() if p.name.isdecimal()), key=lambda p: int(p.name))


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def halve_checkpoint(folder: Path, cache: Path) -> None:
    for file in filter(Path.is_file, newest(folder).rglob("*")):
        halve(file)


def flip_checkpoint_bit(folder: Path, cache: Path) -> None:
    for file in newest(folder).rglob("d/*"):
        flip_bit(file)


def flip_cache_bit(folder: Path, cache: Path) -> None:
    for file in cache.glob("synthetic-*/images.npy"):
        flip_bit(file)


def tear_metrics(folder: Path, cache: Path) -> None:
    halve(folder / "metrics.jsonl")


def leave_a_half_written_checkpoint(folder: Path, cache: Path) -> None:
    shutil.copytree(newest(folder) / "state", folder / "checkpoints" / "9999.orbax-checkpoint-tmp" / "state")


# How each damages a run's folder or the cache, and what the resumed run must say.
DAMAGES: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "newest checkpoint truncated": (halve_checkpoint, "cannot be used"),
    "bit flipped in the newest checkpoint": (flip_checkpoint_bit, "cannot be used"),
    "newest checkpoint emptied": (lambda f, c: [shutil.rmtree(p) for p in newest(f).iterdir() if p.is_dir()], "cannot"),
    "newest checkpoint removed": (lambda f, c: shutil.rmtree(newest(f)), "going on"),
    "a checkpoint half written": (leave_a_half_written_checkpoint, "going on"),
    "metrics.jsonl torn": (tear_metrics, "going on"),
    "metrics.jsonl removed": (lambda f, c: (f / "metrics.jsonl").unlink(), "going on"),
    "cache removed": (lambda f, c: [shutil.rmtree(p) for p in c.glob("synthetic-*")], "going on"),
    "cache truncated": (lambda f, c: [halve(p) for p in c.glob("synthetic-*/labels.npy")], "going on"),
    "bit flipped in the cache": (flip_cache_bit, "going on"),
}

DISKS = {"file size limit": 3000, "full disk": None}  # bytes a file, or a mounted tmpfs without room


@contextlib.contextmanager
def small_disk(size: str) -> Iterator[Path | None]:
    """A mounted tmpfs of that size; None where mounting is not permitted."""
    with tempfile.TemporaryDirectory() as folder:
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder]
        if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
            yield None
            return
        try:
            yield Path(folder)
        finally:
            subprocess.run(["umount", "-l", folder], check=True)


class Trial:
    """A run that nothing disturbed, and how often each fault to others like it was tried, and survived."""

    def __init__(self, home: Path, options: Options) -> None:
        self.home, self.options = home, options
        self.tried: Counter = Counter()
        self.survived: Counter = Counter()
        ended = finish(start(home, home / "undisturbed", *options.flags()))
        assert ended.status == 0, ended.output
        self.expected = result(home / "undisturbed")

    def note(self, fault: str, good: bool, ended: Ended) -> None:
        self.tried[fault] += 1
        self.survived[fault] += good
        if not good:
            print(f"LOST: {fault}: status {ended.status}\n{ended.output[-2000:]}")

    def survives(self, fault: str, folder: Path, says: str = "", times: int = 1) -> None:
        """Has the run go on to its end, and compares."""
        ended = finish(start(self.home, folder, *self.options.flags()))
        good = ended.status == 0 and says in ended.output and result(folder) == self.expected
        for _ in range(times):
            self.note(fault, good, ended)
        shutil.rmtree(folder)


def try_signals(trial: Trial, rng: random.Random) -> None:
    """Kills a run again and again until it is at its end, and the next."""
    options, run = trial.options, trial.home / "run"
    signals = {
        "kill -9": (signal.SIGKILL, options.kills),
        "SIGTERM": (signal.SIGTERM, options.terms),
        "Ctrl-C": (signal.SIGINT, options.interrupts),
    }
    for fault, (number, times) in signals.items():
        left, hits = times, 0
        while left or hits:
            if left:
                ended = interrupted(trial.home, run, options, number, rng, from_start=fault == "kill -9")
                if ended.status:
                    left, hits = left - 1, hits + 1
                    if number != signal.SIGKILL:
                        trial.note(f"{fault}: status {128 + number}", ended.status == 128 + number, ended)
            if not left or not ended.status:  # no more faults, or it was at its end before one came
                trial.survives(fault, run, times=hits)
                hits = 0


def try_damages(trial: Trial, snapshot: Path) -> None:
    """Damages a stopped run's files in every way asked for."""
    run, cache = trial.home / "run", trial.home / "cache" / "unet_jax"
    for fault, (damage, says) in DAMAGES.items():
        if not trial.options.others or fault in trial.options.others:
            shutil.copytree(snapshot, run)
            damage(run, cache)
            trial.survives(fault, run, says)


def try_disks(trial: Trial, snapshot: Path) -> None:
    """Has a stopped run go on on disks that take no more."""
    room = sum(file.stat().st_size for file in snapshot.rglob("*") if file.is_file()) + 2**22
    for fault, limit in DISKS.items():
        if trial.options.others and fault not in trial.options.others:
            continue
        with contextlib.nullcontext(trial.home) if limit else small_disk(str(room)) as disk:
            if disk is None:
                print(f"{fault}: not tried, mounting a tmpfs is not permitted here")
                continue
            small = disk / "small"
            shutil.copytree(snapshot, small)
            if not limit:
                (disk / "filler").write_bytes(bytes(shutil.disk_usage(disk).free - 16384))
            ended = finish(start(trial.home, small, *trial.options.flags(), limit=limit))
            lines = [line for line in ended.output.splitlines() if line.startswith("error: ")]
            good = ended.status == 2 and len(lines) == 1 and "Traceback" not in ended.output
            trial.note(f"{fault}: one line, status 2", good, ended)
            shutil.copytree(small, trial.home / "run")
            shutil.rmtree(small)
        trial.survives(f"{fault}: goes on later", trial.home / "run")


def try_faults(options: Options) -> tuple[Counter, Counter]:
    """How often each fault was tried, and how often survived."""
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(temporary)
        trial = Trial(home, options)
        try_signals(trial, rng)
        if options.others != ("none",):
            snapshot = home / "snapshot"
            while "is saved" not in interrupted(home, snapshot, options, signal.SIGTERM, rng, from_start=False).output:
                shutil.rmtree(snapshot)
            try_damages(trial, snapshot)
            try_disks(trial, snapshot)
    return trial.tried, trial.survived


def main(options: Options) -> int:
    """Prints the table; the number of faults lost."""
    tried, survived = try_faults(options)
    print("| fault | tried | survived | lost |\n|---|---|---|---|")
    for fault, count in [*tried.items(), ("all", sum(tried.values()))]:
        good = survived[fault] if fault in tried else sum(survived.values())
        print(f"| {fault} | {count} | {good} | {count - good} |")
    return sum(tried.values()) - sum(survived.values())


if __name__ == "__main__":
    sys.exit(int(main(tyro.cli(Options, description=__doc__)) > 0))
