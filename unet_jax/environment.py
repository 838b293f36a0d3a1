"""environment.json: where and how a run is made, also one that goes on elsewhere."""

import contextlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from unet_jax import runs
from unet_jax.config import RunConfig
from unet_jax.device import describe, fast_layers, placement

PACKAGES = ("unet-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorflow-datasets", "numpy", "pillow")


def current() -> dict[str, Any]:
    """Where and how this process makes a run: versions, devices, command, git commit where there is one."""
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "device": describe().removeprefix("device: "),
        "backend": jax.default_backend(),
        "devices": jax.device_count(),
        "layers": fast_layers(placement()).__name__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "git_commit": _git_commit(Path(__file__).parent),
    }


def _git_commit(package: Path) -> str | None:
    """The commit of the repository that has the package's files, with -dirty if they were changed since."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(package), *words]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # else it is another's, around an installed package
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return None


def write(
    folder: Path, config: RunConfig, epochs: int | None = None, pictures: Mapping[str, Sequence[int]] | None = None
) -> None:
    """Writes the environment.json of a run that begins, or that goes on after this many `epochs`.

    One that goes on keeps what was written before, and adds what differs from it now to the list "resumed". Only the
    way to the data is that of now, as in config.json. `pictures` has the checksums of each split; a line says so if
    they have changed.
    """
    now = current() | ({"pictures": {part: list(sums) for part, sums in pictures.items()}} if pictures else {})
    before = _read(folder) if epochs is not None else {}
    before.pop("data_dir", None)
    resumed = before.pop("resumed", [])
    latest = {name: value for part in (before, *resumed) for name, value in part.items()}
    changed = {name: value for name, value in now.items() if name not in latest or latest[name] != value}
    if latest.get("pictures") and "pictures" in changed:
        print(
            f"{folder} goes on with other pictures or masks than it began with: their names are the same, their pixels"
            " are not",
            file=sys.stderr,
        )
    if before and changed:
        resumed = [*resumed, {"after_epoch": epochs, **changed}]
    value = {**(before or now), **_way_to_data(folder, config), **({"resumed": resumed} if resumed else {})}
    runs.write_json(folder / "environment.json", value)


def _read(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / "environment.json").read_text()))
    except (OSError, ValueError, TypeError):  # lost, or damaged: the run goes on without
        return {}


def _way_to_data(folder: Path, config: RunConfig) -> dict[str, str]:
    """For environment.json: the path from the run's folder to a relative data_dir, so that both can move together."""
    data_dir = config.data.data_dir
    if not data_dir or os.path.isabs(data_dir):
        return {}
    return {"data_dir": os.path.relpath(os.path.realpath(data_dir), folder.resolve())}
