"""Set before JAX is imported, here and (through the environment) in the commands that tests start."""

import os
import shutil
import tempfile

import pytest

# Compiling is most of what the tests do: programs compiled twice, in two tests or two processes, come from here.
IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ
if not IS_WORKER:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="unet_jax_tests_")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
# And LLVM's optimizations are most of compiling: without them it takes less than half the time.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"
# A [C] array that meets a [N, H, W, C] one must say so.
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"


def pytest_unconfigure(config: pytest.Config) -> None:
    if not IS_WORKER:
        shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
