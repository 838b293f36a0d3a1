"""What ends a command: Ctrl-C, output that nobody reads, a device that is not there; and text that is not UTF-8."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from check_faults import heeding_interrupts

from unet_jax import signals

START = "from unet_jax.errors import exit_on_input_error\nwith exit_on_input_error('good night'):\n"


def start(code: str, **env: str) -> subprocess.Popen:
    """A command whose body is `code`."""
    body = "".join(f"    {line}\n" for line in code.splitlines())
    with heeding_interrupts():
        return subprocess.Popen(
            [sys.executable, "-c", START + body],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


SLEEPS = "import time\nprint('up', flush=True)\ntime.sleep(30)"
COLLECTS = "import gc, jax\nprint('up', flush=True)\nwhile True: gc.collect()"  # in JAX's callback most of the time


@pytest.mark.parametrize("code", [SLEEPS, COLLECTS], ids=["sleeps", "collects"])
def test_ctrl_c_ends_at_once_with_a_line(code):
    process = start(code)
    assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=10)
    assert (process.returncode, stderr) == (130, "\ngood night\n")


def test_ctrl_c_in_the_loop_of_steps_is_noticed_and_the_second_ends():
    code = (
        "import time\nfrom unet_jax import signals\nwith signals.noticing() as noticed:\n print('up', flush=True)\n"
        " while not noticed: time.sleep(.01)\n print(noticed, flush=True)\n time.sleep(30)"
    )
    process = start(code)
    assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == f"[{signal.SIGINT!r}]\n"
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=10)
    assert process.returncode == 130
    assert [line for line in stderr.splitlines() if line] == [
        "stopping after this step; Ctrl-C again ends at once",
        "good night",
    ]


def test_sigterm_is_noticed_too_and_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    threads = threading.active_count()
    with signals.ending_at_once(""), signals.noticing() as noticed:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        deadline = time.monotonic() + 10
        while len(noticed) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert sorted(noticed) == [signal.SIGINT, signal.SIGTERM]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    while threading.active_count() > threads and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == threads


@pytest.mark.parametrize("code", ["print('a' * 10**6)", "print('a')", "import sys\nprint('a')\nsys.exit(3)"])
def test_output_that_nobody_reads_ends_it_quietly(code):
    with start(f"import time\ntime.sleep(.1)\n{code}") as process:
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(10) == 141


def test_a_device_that_is_not_there_is_refused_in_a_line():
    _, stderr = (process := start("import jax\njax.devices()", JAX_PLATFORMS="cuda")).communicate(timeout=60)
    assert process.returncode == 2
    assert stderr.startswith("error: JAX has no device for JAX_PLATFORMS=cuda: unset it, or install")
    assert len(stderr.splitlines()) == 1


def test_other_errors_are_no_users_fault():
    _, stderr = (process := start("raise RuntimeError('ours')")).communicate(timeout=60)
    assert process.returncode == 1
    assert "RuntimeError: ours" in stderr


def test_names_that_are_not_utf_8_are_printed():
    stdout, stderr = (process := start("import os\nprint(os.fsdecode(b'caf\\xe9'))")).communicate(timeout=60)
    assert (process.returncode, stdout, stderr) == (0, "caf\\udce9\n", "")
