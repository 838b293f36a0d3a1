"""Where the package keeps what it can make again."""

import functools
import os
import sys
import tempfile
from pathlib import Path


def default_cache_dir() -> Path:
    """The package's folder under the user's cache folder (XDG_CACHE_HOME, or ~/.cache)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or home() / ".cache") / "unet_jax"


@functools.cache
def home() -> Path:
    """The user's home. If there is none, as in some containers: a folder for temporary files, and a line about it."""
    try:
        return Path.home()
    except RuntimeError:  # neither HOME nor an entry in the list of users
        folder = Path(tempfile.gettempdir()) / f"unet_jax-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.stat().st_uid != os.getuid():  # another user made this folder
            folder = Path(tempfile.mkdtemp(prefix="unet_jax-"))
        print(
            f"this user has no home folder, {folder} stands in for it: set HOME to keep what is there", file=sys.stderr
        )
        return folder
