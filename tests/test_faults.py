"""A kill, Ctrl-C, what a kill leaves behind and a disk that takes no more, each survived to the bit.

check_faults.py has many more.
"""

import check_faults
import jax
import numpy as np
import pytest

from unet_jax import checkpoint, device
from unet_jax.errors import InputError
from unet_jax.train import TrainState


def test_killed_stopped_damaged_and_refused_full_width_runs_end_as_the_undisturbed_one():
    others = ("file size limit", "metrics.jsonl torn", "a checkpoint half written")
    tried, survived = check_faults.try_faults(
        check_faults.Options(kills=1, terms=0, interrupts=1, epochs=2, others=others)
    )
    assert tried == survived
    faults = ["kill -9", "Ctrl-C", "Ctrl-C: status 130", "file size limit: one line, status 2", *others[1:]]
    assert [tried[fault] for fault in faults] == [1] * len(faults)


def test_a_flipped_bit_of_an_array_is_noticed(tmp_path):
    placement = device.placement()
    kernel = np.random.default_rng(0).normal(size=(3, 3, 64, 128)).astype(np.float32)
    state = jax.device_put(TrainState(np.int32(1), {"kernel": kernel}, {}, {}), placement.replicated)
    with checkpoint.manager(tmp_path, 0) as checkpoints:
        checkpoint.save(checkpoints, state, checkpoint.Progress([], []))
    np.testing.assert_array_equal(
        checkpoint.restore(tmp_path, state, placement.replicated).state.params["kernel"], kernel
    )
    check_faults.flip_bit(max(tmp_path.rglob("d/*"), key=lambda p: p.stat().st_size))
    with pytest.raises(InputError, match="values have changed since it was written"):
        checkpoint.restore(tmp_path, state, placement.replicated)
