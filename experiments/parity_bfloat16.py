"""How far is bfloat16 from float64, ours and PyTorch's autocast? Same weights, same pictures, on the CPU.

    python experiments/parity_bfloat16.py --image-size 64 --batch-size 4 --seeds 0 1 2

Prints the errors of the first training step's logits and gradients (of all parameters as one vector), for the four
variants at full width. The error is the norm of the difference from PyTorch's float64, divided by the norm of the
float64 values. Exit status 1 if our mean over the seeds is more than a tenth above PyTorch's.
"""

import sys
from typing import Any

import jax
import numpy as np
import pytorch_reference
import torch
import tyro
from parity import Run, nhwc, pictures, to_numpy, train_jax, train_pytorch

from unet_jax.config import PUBLISHED, VARIANTS, Variant
from unet_jax.cpu.library import has_bfloat16, has_matrix_units
from unet_jax.device import fast_layers, placement
from unet_jax.from_pytorch import variables_from_state_dict
from unet_jax.model import UNet


def relative(ours: Any, exact: Any) -> float:
    """The norm of ours - exact divided by the norm of exact, with all leaves as one vector."""
    pairs = [(np.float64(a), np.float64(b)) for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(exact), strict=True)]
    return float(np.sqrt(sum(np.square(a - b).sum() for a, b in pairs) / sum(np.square(b).sum() for _, b in pairs)))


def errors(variant: Variant, image_size: int, batch_size: int, seed: int) -> list[float]:
    """The errors in bfloat16 of the logits, ours and PyTorch's, and then of the gradients."""
    images, labels = pictures(image_size, batch_size, seed)
    down, up, loss = variant.downsampling, variant.upsampling, variant.loss
    model = UNet(down, up, dropout_rate=0.0, dtype="bfloat16", layers=fast_layers(placement()))
    torch.manual_seed(seed)
    initial = pytorch_reference.UNet(down, up, dropout_rate=0.0).state_dict()

    def pytorch(dtype: torch.dtype) -> Run:
        network = pytorch_reference.UNet(down, up, dropout_rate=0.0)
        network.load_state_dict(initial)
        return train_pytorch(network.to(dtype), model, images.to(dtype), labels, loss, 1, half=dtype == torch.float32)

    exact, theirs = pytorch(torch.float64), pytorch(torch.float32)
    variables = variables_from_state_dict(to_numpy(initial), model)
    ours, _ = train_jax(model, variables, nhwc(images), labels.numpy().astype(np.int32), loss, 1)
    return [
        relative(getattr(run, name), getattr(exact, name)) for name in ("logits", "gradients") for run in (ours, theirs)
    ]


def main(image_size: int = 64, batch_size: int = 4, seeds: tuple[int, ...] = (0, 1, 2)) -> None:
    """Prints the table of errors."""
    jax.config.update("jax_platforms", "cpu")
    units = "AMX" if has_matrix_units() else "AVX512-BF16"
    print(f"our bfloat16 is computed by {f'the C++ with {units}' if has_bfloat16() else 'XLA'}\n")
    print("| variant | logits, ours | PyTorch | gradients, ours | PyTorch |\n|---|---|---|---|---|")
    missed = []
    for name in PUBLISHED:
        rows = [errors(VARIANTS[name], image_size, batch_size, seed) for seed in seeds]
        logits, their_logits, gradients, their_gradients = means = np.mean(rows, 0)
        print(f"| {name} | " + " | ".join(f"{mean:.4f}" for mean in means) + " |", flush=True)
        missed += [name] * bool(logits > 1.1 * their_logits or gradients > 1.1 * their_gradients)
    if missed:
        sys.exit("ours is less exact than PyTorch's: " + ", ".join(missed))


if __name__ == "__main__":
    tyro.cli(main)
