"""Records where others look for them: event files, opened again by TensorBoard's own reader."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
from test_experiment import run, small  # noqa: F401  (run is a fixture)

from unet_jax import experiment, runs, trackers
from unet_jax.errors import InputError

event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


def events_of(folder: Path):
    sizes = {event_accumulator.SCALARS: 0, event_accumulator.IMAGES: 0}  # 0: all of them
    return event_accumulator.EventAccumulator(str(folder / "tensorboard"), sizes).Reload()


def assert_events_are_the_records(folder: Path) -> None:
    records, events = runs.read_records(folder), events_of(folder)
    expected = {name for record in records for name in trackers.scalars(record)}
    assert {*events.Tags()["scalars"]} == expected
    assert {"train_loss", "test_loss", "mean_iou", "iou/pet", "learning_rate"} <= expected
    for name in expected:
        points = [(e.step, e.value) for e in events.Scalars(name)]
        assert points == [
            (r["epoch"], pytest.approx(v)) for r in records if (v := trackers.scalars(r).get(name)) is not None
        ]


def test_events_are_the_records_whatever_happens_to_the_run(run, monkeypatch):  # noqa: F811
    folder = run(small(1))  # without a tracker
    log = trackers.tensorboard(folder)

    # Killed between the log and the checkpoint: the second epoch is logged twice.
    with monkeypatch.context() as patch:
        patch.setattr(experiment.checkpoint, "save", lambda *_: sys.exit("killed"))
        with pytest.raises(SystemExit):
            run(small(3), log=log)
    assert len(runs.read_records(folder)) == 2
    run(small(3), log=log)
    assert_events_are_the_records(folder)
    figures = events_of(folder).Images("results")
    assert [figure.step for figure in figures] == [2, 3]
    assert figures[-1].encoded_image_string.startswith(b"\x89PNG")

    run(small(1, seed=1), overwrite=True, log=log)
    assert_events_are_the_records(folder)


def test_any_function_of_a_record_is_a_tracker(run):  # noqa: F811
    seen: list = []
    config = small(2)
    validated = dataclasses.replace(config, data=dataclasses.replace(config.data, validation_fraction=0.34))
    folder = run(validated, log=seen.append)
    assert [json.dumps(record) for record in seen] == (folder / "metrics.jsonl").read_text().splitlines()


def test_a_tracker_may_be_named_and_what_is_none_is_refused_before_training(run, tmp_path):  # noqa: F811
    for wrong in ("wandb", 3):
        with pytest.raises(InputError, match=f'^log is {wrong!r}: give "tensorboard", or a function'):
            run(small(1), log=wrong)
    assert not (tmp_path / "run").exists()
    assert_events_are_the_records(run(small(1), log="tensorboard"))


def test_scalars_of_a_record():
    record = {"epoch": 3, "train_loss": 0.5, "mean_iou": None, "iou": {"a": 0.25, "b\udcff": None, "c\udcff": 1.0}}
    assert trackers.scalars(record) == {"train_loss": 0.5, "iou/a": 0.25, "iou/c?": 1.0}


def test_without_tensorboardx_it_says_how_to_have_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(InputError, match=r"needs tensorboardX: pip install 'unet-jax\[tensorboard]'"):
        trackers.tensorboard(tmp_path / "run")
    assert not (tmp_path / "run").exists()
