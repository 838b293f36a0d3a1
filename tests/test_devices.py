"""Many devices and many processes: the same losses, each process reading its own rows, refusals, memory."""

import dataclasses
import signal
import statistics
import subprocess
import sys
from pathlib import Path

import check_devices
import check_faults
import chex
import jax
import numpy as np
import pytest

from unet_jax import device, experiment, runs, train
from unet_jax.commands import train as command
from unet_jax.config import differences
from unet_jax.errors import InputError

SMALL = check_devices.Options(("strconv_ups_dice",), steps=3, image_size=16, widths=(4, 8), batch_size=8)


@pytest.fixture(scope="module")
def alone() -> check_devices.Seen:
    return check_devices.run_setup(SMALL, "1x1")[0]


def assert_losses_agree(seen: check_devices.Seen, alone: check_devices.Seen) -> None:
    for losses in seen.losses.values():
        assert abs(losses[0] - alone.losses["strconv_ups_dice"][0]) < check_devices.BOUND
        np.testing.assert_allclose(losses, alone.losses["strconv_ups_dice"], rtol=1e-3)


def test_two_devices_give_the_losses_of_one(alone):
    (two,) = check_devices.run_setup(SMALL, "1x2")
    assert_losses_agree(two, alone)


def test_two_processes_give_the_losses_of_one_and_share_the_reading(alone):
    first, second = check_devices.run_setup(dataclasses.replace(SMALL, resident=True), "2x1")
    assert first.losses == second.losses
    assert len(first.losses) == 2
    assert_losses_agree(first, alone)
    assert len(first.rows) == len(second.rows) == 12
    assert first.rows | second.rows == alone.rows == set(range(24))


def pair(home: Path, folder: Path, epochs: int) -> list[subprocess.Popen]:
    """Two processes that make one run."""
    flags = ("--distributed", "--coordinator", f"127.0.0.1:{check_devices.free_port()}", "--processes", 2)
    return [check_faults.start(home, folder, "--epochs", epochs, *flags, "--process-id", i) for i in range(2)]


def test_a_run_moves_from_eight_devices_to_two_processes_to_one_device(tmp_path):
    run, whole = tmp_path / "run", tmp_path / "whole"
    ended = check_faults.finish(check_faults.start(tmp_path, run, "--epochs", 1, devices=8))
    assert ended.status == 0, ended.output

    first, second = pair(tmp_path, run, 4000)
    output = check_faults.wait_for("Test set", first)
    assert "going on from step 5, after 1 epoch" in output
    second.send_signal(signal.SIGTERM)  # one of them alone: the other agrees on the step to stop at
    ended, other = check_faults.finish(first), check_faults.finish(second)
    assert (ended.status, other.status) == (143, 143), output + ended.output + other.output
    assert "is saved" in ended.output
    assert "Test set" not in other.output

    epochs = len((run / "metrics.jsonl").read_text().splitlines()) + 1
    for folder in (run, whole):
        ended = check_faults.finish(check_faults.start(tmp_path, folder, "--epochs", epochs))
        assert ended.status == 0, ended.output
    ours, theirs = (check_faults.result(folder)[1] for folder in (run, whole))
    assert [r["epoch"] for r in ours] == list(range(1, epochs + 1))
    np.testing.assert_allclose([r["train_loss"] for r in ours], [r["train_loss"] for r in theirs], rtol=1e-2)

    with runs.lock(run):
        refused = [check_faults.finish(process) for process in pair(tmp_path, run, epochs + 1)]
    assert [r.status for r in refused] == [2, 2], refused
    assert "another process trains" in refused[0].output
    assert all(r.output.count("error: ") == 1 and "Traceback" not in r.output for r in refused)


def of(devices: int) -> device.Placement:
    return device.placement()._replace(devices=devices)


FAULTS_OF_STEPS = """
import jax, resource, sys
from unet_jax.cpu import memory
if sys.argv[1:]:
    memory.keep_freed_memory()
step = jax.jit(lambda x: abs(jax.numpy.fft.rfft(x)).sum())  # the transform has 64 MB
x = jax.numpy.ones((4096, 4096))
for _ in range(13):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step(x).block_until_ready()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


GIVEN_BACK = """
import jax
import numpy
from unet_jax.cpu import memory

def resident():
    return 4096 * int(open("/proc/self/statm").read().split()[1])

memory.keep_freed_memory()
events = []
jax.monitoring.register_event_duration_secs_listener(lambda event, seconds, **_: events.append(event))
jax.jit(lambda x: x + 1)(1.0)
compiled = next(event for event in events if event.endswith("/backend_compile_duration"))
arrays = [numpy.ones(2**22) for _ in range(8)]
before = resident()
del arrays
print(before - resident())
jax.monitoring.record_event_duration_secs(compiled, 2.0)
print(before - resident())
"""


PEAKS_OF_STEPS = """
import dataclasses, jax, numpy
from unet_jax import device, runs, train
from unet_jax.config import default_config
from unet_jax.data.batches import Batch

device.set_up(None)
placement = device.placement()
config = default_config("mp_tr_ce", "synthetic")
precision = device.fastest_precision(placement)
config = dataclasses.replace(config, model=dataclasses.replace(config.model, precision=precision))
batch = Batch(numpy.zeros((8, 240, 240, 3), numpy.uint8), numpy.zeros((8, 240, 240), numpy.uint8), numpy.ones(8, "f"))
batch = jax.device_put(batch, placement.batch)
state = jax.device_put(runs.fresh_state(config, placement), placement.replicated)
step = train.make_steps(config, placement, 10).train.lower(state, batch).compile()
print(step.memory_analysis().temp_size_in_bytes)
for _ in range(4):
    state, _ = jax.block_until_ready(step(state, batch))
    print(1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def faults_of_a_step(*arguments: str) -> float:
    """The median: now and then the kept memory is in pieces, and a step takes some more."""
    command = [sys.executable, "-c", FAULTS_OF_STEPS, *arguments]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return statistics.median(map(int, printed.split()[1:]))


@pytest.mark.skipif(sys.platform != "linux", reason="malloc of glibc alone is set")
def test_freed_memory_is_kept_for_the_next_step():
    pages = 4096 * 4096 * 4 // 4096
    assert faults_of_a_step("keep") < pages / 10
    assert faults_of_a_step() > pages / 2  # what the setting is for: without it they are taken anew


@pytest.mark.skipif(sys.platform != "linux", reason="malloc of glibc alone is set")
def test_what_compiling_took_is_given_back():
    command = [sys.executable, "-c", GIVEN_BACK]
    kept, given_back = map(int, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
    assert kept < 2**20 < 2**27 < given_back  # of 2**28


@pytest.mark.skipif(sys.platform != "linux", reason="malloc of glibc alone is set")
def test_a_step_of_the_published_widths_takes_the_memory_of_the_one_before():
    printed = subprocess.run([sys.executable, "-c", PEAKS_OF_STEPS], check=True, capture_output=True, text=True).stdout
    temporaries, first, *_, last = map(int, printed.split())
    assert temporaries > 2**28
    assert last - first < temporaries / 4


@pytest.mark.parametrize(
    ("devices", "batch", "examples", "advice"),
    [
        (8, 60, 3680, "choose --batch-size 56 or 64$"),
        (8, 3, 3680, "choose --batch-size 8$"),
        (64, 64, 3680, "the last one of 32: choose --train-examples 3648$"),
        (8, 12, 100, "choose --batch-size 8 or 16 and --train-examples 96$"),
        (8, 4, 4, "4 training pictures are too few for 8 devices"),
    ],
)
def test_a_batch_that_does_not_divide_is_refused_with_sizes_that_do(devices, batch, examples, advice):
    with pytest.raises(InputError, match=advice):
        of(devices).check_batch(batch, examples)


def test_advised_sizes_are_accepted():
    for batch, examples in ((56, 3680), (64, 3680), (8, 96), (16, 96)):
        of(8).check_batch(batch, examples)
    of(64).check_batch(64, 3648)


def test_out_of_memory_names_a_batch_that_divides():
    assert "--batch-size 24 " in str(of(8).out_of_memory(56))
    assert "--image-size" in str(of(8).out_of_memory(8))


def test_running_out_of_memory_ends_in_one_line(tmp_path, monkeypatch):
    def exhausted(state, batch):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes.")

    steps = train.Steps(*[exhausted] * 4)
    monkeypatch.setattr(experiment, "make_steps", lambda *_: steps)
    (options,) = command.parse([*check_faults.FLAGS, "--workdir", str(tmp_path / "run"), "--cache-dir", str(tmp_path)])
    with pytest.raises(InputError, match="try --remat, or --batch-size 4 "):
        command.train_run(options, device.placement())


def test_remat_computes_the_same():
    split = check_devices.pictures(4, 16)
    batch = train.Batch(np.asarray(split.images), split.labels, np.ones(4, np.float32))
    config = check_devices.default_config("strconv_ups_dice", "synthetic")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, widths=(4, 8)))
    results = []
    for remat in (False, True):
        model = dataclasses.replace(config.model, remat=remat)
        with_model = dataclasses.replace(config, model=model)
        state = runs.fresh_state(with_model, device.placement())
        steps = train.make_steps(with_model, device.placement(), 1)
        assert ("optimization_barrier" in steps.train.lower(state, batch).as_text()) == remat
        results.append(steps.train(state, batch))
    chex.assert_trees_all_close(*results, rtol=1e-5, atol=1e-6)
    assert not differences(config, dataclasses.replace(config, model=model))
