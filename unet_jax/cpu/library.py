"""The C++ of `convs` and `bfloat16`, compiled at first use for this processor, and kept in the user's cache."""

import ctypes
import functools
import hashlib
import logging
import os
import shlex
import stat
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jaxlib

from unet_jax.folders import default_cache_dir

FOLDER = Path(__file__).parent
SOURCES = ("convs.cc", "bfloat16.cc")
FUNCTIONS = ("same_conv", "same_kernel_gradient", "transposed_conv", "halving_kernel_gradient")
BFLOAT16_FUNCTIONS = ("bfloat16_conv", "bfloat16_kernel_gradient")
SECONDS = 300  # that a compiler may take; it takes fifteen


@functools.cache
def is_available() -> bool:
    """Whether this process has the functions. Where it cannot have them, a warning says why, and what that costs."""
    library = _load()
    if library:
        _register(library, FUNCTIONS)
    return library is not None


@functools.cache
def has_bfloat16() -> bool:
    """Whether it has the bfloat16 functions too. They need AVX512-BF16, and for AMX Linux's permission."""
    library = _load() if is_available() else None
    if not library:
        return False
    allowed = library.unet_jax_has_bfloat16
    allowed.restype = ctypes.c_bool
    if not allowed():
        return False
    _register(library, BFLOAT16_FUNCTIONS)
    return True


@functools.cache
def has_matrix_units() -> bool:
    """Whether the bfloat16 functions use matrix units (AMX)."""
    library = _load()
    return library is not None and bool(ctypes.c_bool.in_dll(library, "unet_jax_has_matrix_units"))


def _register(library: ctypes.CDLL, names: tuple[str, ...]) -> None:
    for name in names:
        handler = getattr(library, f"unet_jax_{name}")
        jax.ffi.register_ffi_target(f"unet_jax_{name}", jax.ffi.pycapsule(handler), platform="cpu")


@functools.cache
def _load() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(str(compiled(default_cache_dir() / "cpu")))
    except (OSError, RuntimeError, ValueError, subprocess.SubprocessError) as error:
        logging.getLogger(__name__).warning(
            "steps take about twice as long: the convolutions could not be compiled or loaded, which needs a C++"
            " compiler (CXX names it) and a cache folder that can be written (in XDG_CACHE_HOME): %s",
            error,
        )
        return None


def compiled(folder: Path) -> Path:
    """The library in `folder`, which is made if it is missing or incomplete.

    Raises:
      OSError, RuntimeError, ValueError, subprocess.SubprocessError: it cannot be made, or others may write the folder.
    """
    command = [*shlex.split(os.environ.get("CXX") or "c++"), "-std=c++17", "-O3", "-march=native"]
    # Not CXXFLAGS: the flags of other builds may be for older processors.
    command += shlex.split(os.environ.get("UNET_JAX_CXXFLAGS", ""))
    command += ["-ffp-contract=off"]  # fused multiply-adds are written out: see fma in the source
    # The predefined macros tell the compiler's version and the processor's abilities.
    defined = subprocess.run(
        [*command, "-dM", "-E", "-x", "c++", os.devnull], check=True, stdout=subprocess.PIPE, timeout=SECONDS
    ).stdout
    sources = b"".join((FOLDER / name).read_bytes() for name in (*SOURCES, "shared.h"))
    key = hashlib.sha256(defined + sources + repr((command, jaxlib.__version__)).encode()).hexdigest()
    library = folder / f"convs-{key[:16]}.so"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _refuse_what_others_may_write(folder)
    if not _is_whole(library):
        print("compiling the convolutions for this processor: once, in some 20 seconds", file=sys.stderr)
        with tempfile.TemporaryDirectory(dir=folder) as unfinished:
            made = Path(unfinished) / library.name
            _compile(command, made)
            digest = made.with_suffix(".sha256")
            digest.write_text(hashlib.sha256(made.read_bytes()).hexdigest())
            for file in (made, digest):
                file.chmod(0o600)
                with file.open("rb") as written:
                    os.fsync(written.fileno())
                file.replace(folder / file.name)
    return library


def _compile(command: list[str], library: Path) -> None:
    """Makes the library, and in its folder what it is made of: the sources are compiled at the same time."""
    run = functools.partial(subprocess.run, check=True, timeout=SECONDS)
    command = [*command, "-w", "-fPIC", f"-I{jax.ffi.include_dir()}"]
    objects = [str(library.with_name(f"{name}.o")) for name in SOURCES]
    with ThreadPoolExecutor() as pool:
        pairs = zip(SOURCES, objects, strict=True)
        list(pool.map(run, ([*command, "-c", str(FOLDER / name), "-o", made] for name, made in pairs)))
    run([*command, "-shared", *objects, "-o", str(library)])


def _refuse_what_others_may_write(path: Path) -> None:
    status = path.stat()
    if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise RuntimeError(f"{path} belongs to another user, or others may write it: remove it, or chmod go-w it")


def _is_whole(library: Path) -> bool:
    """Whether the library is there and has its digest; a file of somebody else's is refused."""
    try:
        _refuse_what_others_may_write(library)
        return library.with_suffix(".sha256").read_text() == hashlib.sha256(library.read_bytes()).hexdigest()
    except FileNotFoundError:
        return False
