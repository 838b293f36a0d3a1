"""Trains PyTorch's network with a run's settings: `python experiments/train_pytorch.py runs/mp_tr_ce --out theirs`.

Pictures, order of batches, loss, optimizer and metrics are as the run's config.json says. Initial weights and dropout
are PyTorch's own, with the config's seed. The folder has the files of a run, for report.py. Needs extra `bench`.
"""

import dataclasses
import time
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import pytorch_reference
import torch
import tyro
from tqdm import tqdm

from unet_jax import environment, runs
from unet_jax.config import RunConfig, TrainConfig, to_dict
from unet_jax.data.batches import shuffled
from unet_jax.data.cache import Split, load_split
from unet_jax.data.datasets import sources
from unet_jax.errors import InputError, exit_on_input_error
from unet_jax.folders import default_cache_dir
from unet_jax.metrics import PictureSums, picture_sums, scores, shown

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OURS_ALONE = ("class_weights", "schedule", "warmup_epochs", "weight_decay", "clip_norm", "ema", "augment", "init_from")


@dataclasses.dataclass(frozen=True)
class Options:
    """Which run is repeated, and where to."""

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of the run. Only its config.json is read."""
    out: Path
    """Folder for config.json, environment.json and metrics.jsonl."""


def forward(network: Any, split: Split, rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Float32 logits [N, C, H, W] and labels int64 [N, H, W] of these pictures."""
    images = torch.from_numpy(split.images[rows]).to(DEVICE).permute(0, 3, 1, 2)  # NHWC in memory: channels_last
    with torch.autocast("cuda", torch.bfloat16, enabled=DEVICE == "cuda"):
        logits = network(images.float() / 255)
    return logits.float(), torch.from_numpy(split.labels[rows]).to(DEVICE).long()


@torch.inference_mode()
def evaluate(config: RunConfig, network: Any, test: Split) -> dict[str, Any]:
    """The metrics of unet_jax.loop.evaluate, by the same code."""
    losses, parts, size = [], [], config.train.batch_size
    for start in range(0, len(test.names), size):
        logits, labels = forward(network, test, np.arange(start, min(start + size, len(test.names))))
        losses.append(getattr(pytorch_reference, config.train.loss)(logits, labels).item())
        nhwc = jnp.asarray(logits.permute(0, 2, 3, 1).cpu().numpy())
        parts.append(jax.device_get(picture_sums(nhwc, labels.cpu().numpy().astype(np.uint8), np.ones(len(nhwc)))))
    sums = PictureSums(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
    return {"test_loss": float(np.mean(losses)), **scores(sums, config.data.class_names)}


def check(options: Options, config: RunConfig) -> None:
    """Raises InputError for a run that the PyTorch side cannot repeat, or a folder that is taken."""
    train = config.train
    if not hasattr(pytorch_reference, train.loss):
        raise InputError(f"{options.run} has the loss {train.loss}, which the PyTorch side lacks")
    changed = [name for name in OURS_ALONE if getattr(train, name) != getattr(TrainConfig, name)]
    if changed or config.data.validation_fraction:
        raise InputError(f"{options.run} has settings that the PyTorch side lacks: a published variant has none")
    if (options.out / "metrics.jsonl").exists():
        raise InputError(f"{options.out} holds a run already: choose another --out")


def train_epoch(config: RunConfig, network: Any, optimizer: torch.optim.Optimizer, train: Split, epoch: int) -> dict:
    """Trains one epoch; returns the part of its record that training fills."""
    start, losses, size = time.perf_counter(), [], config.train.batch_size
    order = shuffled(len(train.names), config.train.seed, epoch)
    batches = [order[first : first + size] for first in range(0, len(order), size)]
    network.train()
    for rows in tqdm(batches, f"epoch {epoch}", unit="step"):
        loss = getattr(pytorch_reference, config.train.loss)(*forward(network, train, rows))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    values = torch.stack(losses).tolist()  # waits for the device
    seconds = time.perf_counter() - start
    return {
        "epoch": epoch,
        "train_loss": float(np.average(values, weights=[len(rows) for rows in batches])),
        "last_batch_loss": values[-1],
        "learning_rate": config.train.learning_rate,
        "seconds": seconds,
        "images_per_second": len(order) / seconds,
    }


def main(options: Options) -> None:
    config = runs.read_config(options.run)
    check(options, config)
    model, data = config.model, dataclasses.replace(config.data, data_dir=runs.data_dir(options.run, config))
    counts = {"train": data.train_examples, "test": data.test_examples}
    found = sources(data, config.train.seed)
    if not found["test"].size:
        raise InputError(f"{options.run} has no test split to compare on: choose another run")
    train, test = (load_split(found[s], data.image_size, n, default_cache_dir()) for s, n in counts.items())
    torch.manual_seed(config.train.seed)
    network: Any = pytorch_reference.UNet(
        model.downsampling, model.upsampling, model.widths, len(data.class_names), model.dropout_rate
    ).to(DEVICE, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(network.parameters(), lr=config.train.learning_rate)
    options.out.mkdir(parents=True, exist_ok=True)
    precision: Any = "bfloat16" if DEVICE == "cuda" else "float32"  # that of `train_epoch`
    made = dataclasses.replace(config, data=data, model=dataclasses.replace(model, precision=precision))
    runs.write_json(options.out / "config.json", to_dict(made))
    framework = {"framework": "pytorch", "torch": torch.__version__, "torch_device": DEVICE}
    runs.write_json(options.out / "environment.json", environment.current() | framework)
    records: list[dict[str, Any]] = []
    for epoch in range(1, config.train.epochs + 1):
        record = train_epoch(config, network, optimizer, train, epoch)
        records.append(record | evaluate(config, network.eval(), test))
        runs.write_records(options.out, records)
        print(f"Test set: average loss {records[-1]['test_loss']:.4f}, mean IoU {shown(records[-1]['mean_iou'])}")


if __name__ == "__main__":
    with exit_on_input_error():
        main(tyro.cli(Options, description=__doc__))
