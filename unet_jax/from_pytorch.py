"""Makes our variables of the PyTorch network's weights (experiments/pytorch_reference.py), without importing PyTorch.

    state_dict = {name: tensor.numpy() for name, tensor in torch.load(path, map_location="cpu").items()}
    variables = variables_from_state_dict(state_dict, UNet())

For five widths the names are cblock1-5 and ublock6-9 (each conv1, bn1, conv2, bn2, transition_layer), conv10, conv11.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unet_jax.errors import InputError
from unet_jax.model import UNet

FIRST = "cblock1.conv1.weight"  # every network of ours has it


def variables_from_state_dict(state_dict: Mapping[str, np.ndarray], model: UNet) -> dict[str, Any]:
    """The variables {"params", "batch_stats"} of `model.init`, as float32 copies, from a PyTorch state dict.

    Three things are ignored: the prefixes of DataParallel and torch.compile, batch norm's num_batches_tracked, and the
    unused conv in the last encoder block of the strided models.

    Raises:
      InputError: names are missing or not the model's, shapes differ from the model's, or a value is NaN or infinite.
    """
    levels = len(model.widths)
    arrays = {re.sub(r"^(module\.|_orig_mod\.)+", "", name): array for name, array in state_dict.items()}
    images = jnp.zeros((1, 2 ** (levels - 1), 2 ** (levels - 1), 3))
    leaves, tree = jax.tree.flatten_with_path(jax.eval_shape(model.init, jax.random.key(0), images))
    layers = _torch_layers(model)
    tensors = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
    shapes = {}  # in PyTorch's names and order of axes, in the order of our leaves
    for (_, *layer, tensor), leaf in leaves:
        name = f"{layers['.'.join(key.key for key in layer)]}.{tensors[tensor.key]}"
        shapes[name] = tuple(leaf.shape[axis] for axis in ((3, 2, 0, 1) if leaf.ndim == 4 else range(leaf.ndim)))

    ignored = r".*\.num_batches_tracked"
    if model.downsampling == "strided_conv":
        ignored += rf"|cblock{levels}\.transition_layer\.(weight|bias)"
    faults = {
        "missing": [name for name in shapes if name not in arrays],
        "unexpected": [name for name in arrays if name not in shapes and not re.fullmatch(ignored, name)],
        "of another shape": [
            f"{name} {np.shape(arrays[name])} instead of {shape}"
            for name, shape in shapes.items()
            if name in arrays and np.shape(arrays[name]) != shape
        ],
        "not finite": [name for name in shapes if name in arrays and not np.isfinite(arrays[name]).all()],
    }
    if any(faults.values()):
        listed = "; ".join(
            f"{len(names)} {fault} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
            for fault, names in faults.items()
            if names
        )
        raise InputError(f"the state dict does not fit the model: {listed}; {_advice(arrays, model)}")

    def convert(array: np.ndarray) -> np.ndarray:
        # OIHW to HWIO; the same permutation takes a transposed conv's [I, O, h, w] to [h, w, O, I]. A copy, since jax
        # may otherwise share memory with a PyTorch model that goes on training.
        return np.array(np.transpose(array, (2, 3, 1, 0)) if np.ndim(array) == 4 else array, np.float32, order="C")

    return jax.tree.unflatten(tree, [convert(arrays[name]) for name in shapes])


def find_state_dict(content: Any) -> tuple[dict[str, Any], list[str]]:
    """The network's state dict in what torch.load gave, with names from "cblock1" on, and lines on what is left out.

    It may be inside a dictionary with other things, hold entries that are not tensors, and have a prefix on all its
    names. Anything with a shape counts as a tensor.

    Raises:
      InputError: there is none, or more than one.
    """
    found = _state_dicts(content, "")
    if len(found) != 1:
        inside = f"{_some(content)}" if isinstance(content, Mapping) else type(content).__name__
        many = f"holds {len(found)} state dicts ({_some(found)}): save the one that you mean"
        raise InputError(many if found else f"holds no state dict, but {inside}: save network.state_dict()")
    ((where, entries),) = found.items()
    tensors = {str(name): value for name, value in entries.items() if hasattr(value, "shape")}
    notes = [f"the weights are its entry {where!r}, other entries are left out"] if where else []
    if len(tensors) < len(entries):
        notes.append(f"entries that are no tensors are left out: {_some([n for n in entries if n not in tensors])}")
    prefix = next((name.removesuffix(FIRST) for name in tensors if name.endswith(FIRST)), "")
    inner = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    if prefix:
        notes.append(f"names without their prefix {prefix!r}")
    if len(inner) < len(tensors):
        notes.append(f"left out, without that prefix: {_some([n for n in tensors if not n.startswith(prefix)])}")
    return inner, notes


def _state_dicts(content: Any, where: str) -> dict[str, Mapping[Any, Any]]:
    """Dotted path to dictionary, for each dictionary in `content` with a tensor whose name ends in ".weight"."""
    if not isinstance(content, Mapping):
        return {}
    if any(str(name).endswith(".weight") and hasattr(value, "shape") for name, value in content.items()):
        return {where: content}
    inner = [_state_dicts(value, f"{where}.{name}".lstrip(".")) for name, value in content.items()]
    return {path: found for part in inner for path, found in part.items()}


def _some(names: Iterable[Any]) -> str:
    names = list(map(str, names))
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def _torch_layers(model: UNet) -> dict[str, str]:
    """{"encoder1.conv1": "cblock1.conv1", ...}: PyTorch's name of every layer that the model may have."""
    levels = len(model.widths)
    layers = {"head": f"conv{2 * levels}", "logits": f"conv{2 * levels + 1}"}
    for i in range(1, levels + 1):
        # PyTorch counts on from the encoder: of five levels, ublock6 is decoder4 and ublock9 decoder1.
        for ours, theirs in ((f"encoder{i}", f"cblock{i}"), (f"decoder{i}", f"ublock{2 * levels - i}")):
            for j in (1, 2):
                layers |= {f"{ours}.conv{j}": f"{theirs}.conv{j}", f"{ours}.norm{j}": f"{theirs}.bn{j}"}
        layers[f"down{i}"] = f"cblock{i}.transition_layer"
        up = f"ublock{2 * levels - i}.transition_layer"
        resize = model.upsampling == "resize"  # there a Sequential of resize, conv, norm and ReLU
        layers |= {f"up{i}.conv": f"{up}.1" if resize else up, f"up{i}.norm": f"{up}.2"}
    return layers


def _advice(arrays: Mapping[str, np.ndarray], model: UNet) -> str:
    """What to do about a state dict that does not fit: the flags of the UNet that it looks like, where they differ."""
    blocks = 0
    while f"cblock{blocks + 1}.conv1.bias" in arrays:
        blocks += 1
    if not blocks:
        return f"pass the network's own state dict, with names such as {FIRST}"
    like: dict[str, Any] = {
        "downsampling": "strided_conv" if "cblock1.transition_layer.weight" in arrays else "max_pool",
        "upsampling": "resize" if any(".transition_layer.1." in name for name in arrays) else "transposed_conv",
        "widths": tuple(np.size(arrays[f"cblock{i + 1}.conv1.bias"]) for i in range(blocks)),
    }
    if f"conv{2 * blocks + 1}.bias" in arrays:
        like["num_classes"] = np.size(arrays[f"conv{2 * blocks + 1}.bias"])
    differing = [_flag(field, value) for field, value in like.items() if value != getattr(model, field)]
    if not differing:
        return "its file may be incomplete or from another network"
    return f"it looks like a network of {', '.join(differing)}"


def _flag(field: str, value: Any) -> str:
    if field == "num_classes":
        return f"{value} --class-names"
    return f"--{field} {' '.join(map(str, value)) if field == 'widths' else value}"
