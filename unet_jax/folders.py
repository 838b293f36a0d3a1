"""Where the package keeps what it can make again."""

import os
from pathlib import Path


def default_cache_dir() -> Path:
    """The package's folder under the user's cache folder (XDG_CACHE_HOME, or ~/.cache)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "unet_jax"
