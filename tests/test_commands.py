"""The commands: how they are called and how soon they answer; and what ends one: Ctrl-C, a closed pipe, no device."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from check_faults import heeding_interrupts

import unet_jax
from unet_jax import signals
from unet_jax.__main__ import COMMANDS, main

ROOT = Path(__file__).parent.parent
SCRIPTS = {"train": "run"}  # those in experiments/ that have another name than their command
WITHOUT_JAX = "import sys, runpy\nsys.modules['jax'] = None\n"  # as if it were not installed
START = "from unet_jax.errors import exit_on_input_error\nwith exit_on_input_error('good night'):\n"


def start(code: str, **env: str) -> subprocess.Popen:
    """A command whose body is `code`."""
    body = "".join(f"    {line}\n" for line in code.splitlines())
    with heeding_interrupts():
        return subprocess.Popen(
            [sys.executable, "-c", START + body],
            env={**os.environ, "PYTHONPATH": str(ROOT), **env},
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


@pytest.fixture
def sigint():
    """Python's handler of it, which is not there where a shell's & started the tests."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("sigint")
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


def without_jax(start: str, *argv: str) -> tuple[int, str]:
    """The exit status and all output of a command that is started by `start`."""
    code = f"{WITHOUT_JAX}sys.argv = {['x', *argv]}\n{start}"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True
    )
    return done.returncode, (done.stdout + done.stderr).decode()


@pytest.mark.parametrize("command", COMMANDS)
def test_help_and_a_mistyped_flag_wait_for_no_jax(command):
    package = "runpy.run_module('unet_jax', run_name='__main__')"
    status, output = without_jax(package, command, "--help")
    assert status == 0
    assert f"usage: unet-jax {command} " in output
    assert f"unet-jax {command}" in output.split("\n", 1)[1]  # an example
    script = ROOT / "experiments" / f"{SCRIPTS.get(command, command.replace('-', '_'))}.py"
    status, output = without_jax(f"runpy.run_path({str(script)!r}, run_name='__main__')", "--nonsense", "3")
    assert status == 2
    assert "Traceback" not in output
    assert "nonsense" in output or "Missing" in output  # such as the run's folder


def test_the_list_of_commands(capsys, monkeypatch):
    for argv in ([], ["-h"], ["--help"]):
        monkeypatch.setattr(sys, "argv", ["unet-jax", *argv])
        main()
        output = capsys.readouterr().out
        assert all(f"\n  {name} " in output for name in COMMANDS)
    monkeypatch.setattr(sys, "argv", ["unet-jax", "--version"])
    main()
    assert capsys.readouterr().out == f"{unet_jax.__version__}\n"


@pytest.mark.parametrize(("word", "hint"), [("trian", "did you mean train?"), ("x", "choose from train, evaluate")])
def test_a_command_that_there_is_not_is_refused(capsys, monkeypatch, word, hint):
    monkeypatch.setattr(sys, "argv", ["unet-jax", word])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert f"error: there is no command {word!r}: {hint}" in capsys.readouterr().err
