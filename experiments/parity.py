"""Does the JAX U-Net compute what the PyTorch one does? Same weights, same pictures, no dropout, on the CPU.

    python experiments/parity.py --image-size 64 --batch-size 4 --seed 0

Prints two tables of the four variants: at full width in float32, and at a quarter of it in float64 too (XLA has no fast
float64 convolution on the CPU). Exit status 1 if a bound is missed. All columns are largest differences:

- logits: of the first step's batch, which batch norm normalizes by its own statistics.
- gradients: of the first step, within a tensor, divided by its largest entry; the worst tensor is named.
- kinks: how many ReLUs and 2x2 windows JAX's rounding puts on the other side than PyTorch's float64 does. One is enough
  to move a tensor's gradient by some per cent, in PyTorch's float32 as in ours. Hence "same side": the gradient in
  float32 against PyTorch's in float64, which is made to take JAX's side of every ReLU and window. It has the bound.
- losses: of Adam's first 5 (float64: 20) steps at 1e-3 on the one batch. At first Adam follows the signs of gradients,
  which magnifies rounding. "PyTorch's own" is the difference between its float32 and its float64.
- evaluation: of the logits with running statistics, from PyTorch's variables after float64 training, in float32.

The bounds are for 64x64 or more. At 32x32 the deepest batch norms see 4 values a picture, and float32 alone can move a
gradient by more than 1e-4, PyTorch's as well as ours.
"""

import contextlib
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytorch_reference
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from unet_jax.config import PUBLISHED, VARIANTS, Variant
from unet_jax.device import compiler_options, fast_layers, placement
from unet_jax.from_pytorch import variables_from_state_dict
from unet_jax.layers import BatchNorm, Conv
from unet_jax.losses import LOSSES
from unet_jax.model import DoubleConv, UNet

WIDTHS = (32, 64, 128, 256, 512)
LOGITS_BOUND, GRADIENT_BOUND, LOSS_BOUND = 1e-4, 1e-4, 1e-3


class Run(NamedTuple):
    """A few training steps of either framework."""

    logits: np.ndarray  # [N, H, W, C], of the first step
    gradients: Any  # of the first step, in the tree of the JAX model's params
    losses: np.ndarray


def to_numpy(tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: tensor.detach().numpy() for name, tensor in tensors.items()}


def nhwc(x: Tensor) -> np.ndarray:
    return x.detach().permute(0, 2, 3, 1).numpy()


def nchw(x: np.ndarray) -> Tensor:
    return torch.tensor(x).permute(0, 3, 1, 2)


def pictures(image_size: int, batch_size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Smooth random images [N, C, H, W] and random labels [N, H, W]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(batch_size, 3, 8, 8, generator=generator)
    images = F.interpolate(coarse, size=(image_size, image_size), mode="bicubic")
    return images, torch.randint(3, (batch_size, image_size, image_size), generator=generator)


def train_pytorch(
    network: torch.nn.Module, model: UNet, images: Tensor, labels: Tensor, loss: str, steps: int, half: bool = False
) -> Run:
    """Trains `network` in place, with autocast to bfloat16 if `half`. `model` is its JAX counterpart."""
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    losses, first = [], None
    for _ in range(steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            logits = network(images)
        logits = logits.float() if half else logits
        value = getattr(pytorch_reference, loss)(logits, labels)
        optimizer.zero_grad()
        value.backward()
        if first is None:
            gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
            first = nhwc(logits), variables_from_state_dict(to_numpy(network.state_dict() | gradients), model)["params"]
        optimizer.step()
        losses.append(value.item())
    assert first is not None
    return Run(*first, np.array(losses))


def train_jax(model: UNet, variables: Any, images: np.ndarray, labels: np.ndarray, loss: str, steps: int) -> tuple:
    """The Run, and the outputs of the layers in its first step as linen's "intermediates"."""
    optimizer = optax.adam(1e-3)

    def objective(params: Any, batch_stats: Any) -> tuple[jax.Array, tuple[jax.Array, Any]]:
        logits, updated = model.apply(
            {"params": params, "batch_stats": batch_stats},
            images,
            train=True,
            mutable=["batch_stats", "intermediates"],
            capture_intermediates=lambda module, _: isinstance(module, Conv | BatchNorm | DoubleConv),
        )
        return LOSSES[loss](logits, labels, None), (logits, updated)

    @partial(jax.jit, compiler_options=compiler_options("cpu"))
    def step(params: Any, batch_stats: Any, opt_state: Any) -> tuple:
        (value, (logits, updated)), grads = jax.value_and_grad(objective, has_aux=True)(params, batch_stats)
        updates, opt_state = optimizer.update(grads, opt_state)
        state = optax.apply_updates(params, updates), updated["batch_stats"], opt_state
        intermediates = jax.tree.map(
            jnp.asarray, updated["intermediates"], is_leaf=lambda x: hasattr(x, "__jax_array__")
        )
        return state, value, (logits, grads, intermediates)

    state: tuple = variables["params"], variables["batch_stats"], optimizer.init(variables["params"])
    losses, first = [], None
    for _ in range(steps):
        state, value, outputs = step(*state)
        first = first or jax.device_get(outputs)
        losses.append(float(value))
    assert first is not None
    logits, gradients, intermediates = first
    return Run(logits, gradients, np.array(losses)), intermediates


@contextlib.contextmanager
def same_side(intermediates: Any, model: UNet) -> Iterator[list[int]]:
    """Makes PyTorch decide each ReLU and 2x2 window as `intermediates` do; yields a list, the count of changes."""
    levels = len(model.widths)
    decided: dict[str, list[Tensor]] = {"relu": [], "pool": []}  # the input of each, in the order of PyTorch's calls
    for name in [f"encoder{i + 1}" for i in range(levels)] + [f"decoder{i}" for i in range(levels - 1, 0, -1)]:
        if name.startswith("decoder") and model.upsampling == "resize":
            decided["relu"].append(nchw(intermediates[name.replace("decoder", "up")]["norm"]["__call__"][0]))
        decided["relu"] += [nchw(intermediates[name][conv]["__call__"][0]) for conv in ("conv1", "conv2")]
        decided["pool"].append(nchw(intermediates[name]["__call__"][0]))
    relus, pools, changed = iter(decided["relu"]), iter(decided["pool"]), [0]

    def relu(x: Tensor, inplace: bool = False) -> Tensor:
        positive = next(relus) > 0
        changed[0] += int((positive != (x > 0)).sum())
        return x * positive

    def max_pool2d(x: Tensor, *_: Any, **__: Any) -> Tensor:
        own, theirs = (F.max_pool2d_with_indices(t, (2, 2))[1] for t in (x, next(pools)))
        changed[0] += int((own != theirs).sum())
        return x.flatten(2).gather(2, theirs.flatten(2)).view(theirs.shape)

    with mock.patch.object(F, "relu", relu), mock.patch.object(F, "max_pool2d", max_pool2d):
        yield changed


def worst_gradient(ours: Any, theirs: Any, model: UNet) -> tuple[float, str]:
    """The largest difference within a tensor, divided by the tensor's largest entry, and the name of that tensor.

    The batch norm after a resize removes any constant. So the biases of the 1x1 conv, and of the batch norm before it,
    have a gradient of rounding alone. Their differences are divided by the largest entry of their layer's weight.
    """
    zero = []
    if model.upsampling == "resize":
        levels = len(model.widths)
        zero = [(f"up{i}", "conv") for i in range(1, levels)] + [(f"decoder{i}", "norm2") for i in range(2, levels)]
        zero.append((f"encoder{levels}", "norm2"))
    errors = []
    for (path, a), b in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        *layer, tensor = keys = [key.key for key in path]
        if tensor == "bias" and tuple(layer) in zero:
            siblings = theirs[layer[0]][layer[1]]
            scale = np.abs(siblings["kernel" if "kernel" in siblings else "scale"]).max()
        else:
            scale = np.abs(b).max()
        errors.append((float(np.abs(a - b).max() / scale), ".".join(keys)))
    return max(errors)


def compare(variant: Variant, widths: tuple[int, ...], images: Tensor, labels: Tensor, seed: int) -> dict[str, Any]:
    """A row of the table; JAX computes in float64 only below full width."""
    down, up, loss = variant.downsampling, variant.upsampling, variant.loss
    model = UNet(down, up, widths, dropout_rate=0.0, layers=fast_layers(placement()))
    torch.manual_seed(seed)
    initial = pytorch_reference.UNet(down, up, widths, dropout_rate=0.0).state_dict()

    def network(dtype: torch.dtype) -> torch.nn.Module:
        copy = pytorch_reference.UNet(down, up, widths, dropout_rate=0.0)
        copy.load_state_dict(initial)
        return copy.to(dtype)

    def largest(difference: np.ndarray) -> float:
        return float(np.abs(difference).max())

    wide = widths == WIDTHS
    trained = network(torch.float64)
    torch32 = train_pytorch(network(torch.float32), model, images, labels, loss, 5)
    torch64 = train_pytorch(trained, model, images.double(), labels, loss, 5 if wide else 20)
    variables = variables_from_state_dict(to_numpy(initial), model)
    x, y = nhwc(images), labels.numpy().astype(np.int32)
    jax32, intermediates = train_jax(model, variables, x, y, loss, 5)
    with same_side(intermediates, model) as changed:
        same = train_pytorch(network(torch.float64), model, images.double(), labels, loss, 1)
    row = {
        "logits": largest(jax32.logits - torch32.logits),
        "gradients": worst_gradient(jax32.gradients, torch32.gradients, model),
        "PyTorch's own gradients": worst_gradient(torch32.gradients, torch64.gradients, model),
        "kinks": changed[0],
        "gradients, same side": worst_gradient(jax32.gradients, same.gradients, model),
        "5 losses": largest(jax32.losses - torch32.losses),
        "PyTorch's own 5 losses": largest(torch32.losses - torch64.losses[:5]),
    }
    if wide:
        return row
    with jax.enable_x64(True):
        variables64 = jax.tree.map(lambda leaf: leaf.astype(np.float64), variables)
        jax64, _ = train_jax(model.clone(dtype=np.float64), variables64, x.astype(np.float64), y, loss, 20)
    evaluated = model.apply(variables_from_state_dict(to_numpy(trained.state_dict()), model), x)
    return row | {
        "float64 gradients": worst_gradient(jax64.gradients, torch64.gradients, model),
        "float64 20 losses": largest(jax64.losses - torch64.losses),
        "evaluation": largest(np.asarray(evaluated) - nhwc(trained.eval()(images.double()))),
    }


def main(image_size: int = 64, batch_size: int = 4, seed: int = 0) -> None:
    """Prints the table of differences between the PyTorch and the JAX network."""
    jax.config.update("jax_platforms", "cpu")  # a GPU's TF32 would hide what is compared
    images, labels = pictures(image_size, batch_size, seed)
    missed = []
    for widths in (WIDTHS, tuple(width // 4 for width in WIDTHS)):
        bounds = {
            "logits": LOGITS_BOUND,
            "gradients, same side": GRADIENT_BOUND,
            "5 losses": LOSS_BOUND,
            "float64 gradients": GRADIENT_BOUND,
            "float64 20 losses": LOSS_BOUND,
            "evaluation": LOGITS_BOUND,
        }
        for i, name in enumerate(PUBLISHED):
            row = compare(VARIANTS[name], widths, images, labels, seed)
            if i == 0:
                header = [column + (f" (< {bounds[column]:.0e})" if column in bounds else "") for column in row]
                print("\n| " + " | ".join([f"{widths[0]}-{widths[-1]} features", *header]) + " |")
                print("|---" * (len(row) + 1) + "|")
            cells = []
            for column, value in row.items():
                number, *where = value if isinstance(value, tuple) else (value,)
                cells.append(" ".join([str(number) if column == "kinks" else f"{number:.1e}", *where]))
                if not number < bounds.get(column, np.inf):  # also true of NaN
                    missed.append(f"{name} {column} at {widths[0]}-{widths[-1]} features")
            print("| " + " | ".join([name, *cells]) + " |", flush=True)
    if missed:
        sys.exit("bound missed: " + "; ".join(missed))


if __name__ == "__main__":
    tyro.cli(main)
