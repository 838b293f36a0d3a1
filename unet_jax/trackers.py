"""Trackers send the records of a run elsewhere: functions that are called with the record of each epoch."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from unet_jax import runs
from unet_jax.errors import InputError

Tracker = Callable[[Mapping[str, Any]], object]  # takes a line of metrics.jsonl; what it returns is ignored


def chosen(log: Tracker | str | None, folder: str | Path) -> Tracker | None:
    """The tracker that `log` is, or that it names: "tensorboard", for the run in `folder`.

    Raises:
      InputError: it is neither, or what it needs is not installed.
    """
    if log is None or callable(log):
        return log
    if log != "tensorboard":
        raise InputError(f'log is {log!r}: give "tensorboard", or a function that takes a record')
    return tensorboard(folder)


def tensorboard(folder: str | Path) -> Tracker:
    """A tracker for TensorBoard: losses and scores over epochs, and results.png, in the run's folder/tensorboard.

    An epoch that is done again replaces its points: each has a file of its own. Epochs that were trained without a
    tracker are added from metrics.jsonl.

    Raises:
      InputError: tensorboardX is not installed.
    """
    try:
        import tensorboardX  # noqa: F401
    except ImportError:
        raise InputError("logging for TensorBoard needs tensorboardX: pip install 'unet-jax[tensorboard]'") from None
    folder = Path(folder)
    events = folder / "tensorboard"

    def log(record: Mapping[str, Any]) -> None:
        events.mkdir(exist_ok=True)
        for each in runs.read_records(folder):
            file, is_new = events / f"events.out.tfevents.{each['epoch']:06d}", each["epoch"] == record["epoch"]
            if is_new or not file.exists():
                _write_events(file, each, folder / "results.png" if is_new else None)

    return log


def _write_events(file: Path, record: Mapping[str, Any], figure: Path | None) -> None:
    # Not with tensorboardX.SummaryWriter: it writes in a thread, where a full disk would go unnoticed.
    from tensorboardX import RecordWriter
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.proto.summary_pb2 import Summary

    values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars(record).items()]
    if figure:
        with Image.open(figure) as picture:
            width, height = picture.size
        png = Summary.Image(height=height, width=width, colorspace=4, encoded_image_string=figure.read_bytes())
        values.append(Summary.Value(tag="results", image=png))
    writer = RecordWriter(str(file))
    for event in (
        Event(wall_time=time.time(), file_version="brain.Event:2"),
        Event(wall_time=time.time(), step=record["epoch"], summary=Summary(value=values)),
    ):
        writer.write(event.SerializeToString())
    writer.close()


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a record by name, such as "train_loss" and "iou/pet"; those that are None are left out."""
    flat: dict[str, Any] = {}
    for name, value in record.items():
        flat |= {f"{name}/{k}": v for k, v in value.items()} if isinstance(value, Mapping) else {name: value}
    del flat["epoch"]
    # Names that are not UTF-8 have no place in an event.
    return {name.encode(errors="replace").decode(): value for name, value in flat.items() if value is not None}
