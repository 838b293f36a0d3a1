"""The half of bfloat16.cc for matrix units (AMX), on a processor without them: matrix_units.h does their work."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from unet_jax.cpu.library import has_bfloat16, has_matrix_units

FOLDER = Path(__file__).parent
FLAGS = ["-mamx-tile", "-mamx-bf16", "-include", str(FOLDER / "matrix_units.h")]
ON_ONE_CPU = jax.default_backend() == "cpu" and jax.device_count() == 1
pytestmark = pytest.mark.skipif(
    not (ON_ONE_CPU and has_bfloat16()) or has_matrix_units(), reason="needs AVX512-BF16, a compiler, and no AMX"
)


def run(tmp_path, *arguments):
    environment = {**os.environ, "UNET_JAX_CXXFLAGS": shlex.join(FLAGS), "XDG_CACHE_HOME": str(tmp_path)}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, cwd=FOLDER)


def test_matrix_units_compute_what_float32_does(tmp_path):
    said = run(
        tmp_path, "-c", "from unet_jax.cpu import library; print(library.has_bfloat16(), library.has_matrix_units())"
    )
    assert said.stdout.split() == ["True", "True"], said.stderr
    tests = run(tmp_path, "-m", "pytest", "-n0", "-rs", "test_bfloat16.py")
    assert tests.returncode == 0, tests.stdout
    assert " passed" in tests.stdout
    assert "skipped" not in tests.stdout, tests.stdout
