"""A trained network to share: config.json and weights.msgpack, which are small and hold no optimizer state."""

import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import serialization

from unet_jax.errors import InputError
from unet_jax.train import TrainState, variables

FILE = "weights.msgpack"
PETS = Path(__file__).parent / "pets"  # a trained network that comes with the package: weights, config and card


def find(run: str | Path) -> Path:
    """The folder of a run. `pets` is PETS, unless there is a run in a folder of this name."""
    folder = Path(run)
    return PETS if str(run) == "pets" and not (folder / "config.json").exists() else folder


def to_bytes(state: TrainState) -> bytes:
    """An inference state as bytes: kernels rounded to bfloat16 (two bytes each), statistics and biases in float32."""
    small = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.ndim > 1 else x, variables(state))
    return serialization.msgpack_serialize(jax.device_get({"step": state.step, **small}))


def read(folder: Path, abstract: TrainState) -> TrainState:
    """The inference state in a folder, as float32 again. `abstract` is a state of the same network.

    Raises:
      InputError: the file cannot be read, is not the one that model.json describes, or belongs to another network than
        config.json's.
    """
    target: Any = {"step": abstract.step, **variables(abstract)}
    try:
        data = (folder / FILE).read_bytes()
        if (folder / "model.json").exists():
            described = json.loads((folder / "model.json").read_text())["artifact"]["sha256"]
            if hashlib.sha256(data).hexdigest() != described:
                raise ValueError("its bytes are not those that model.json describes")
        content = serialization.msgpack_restore(data)
        arrays = jax.tree.map(_as, content, target)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).split("\n")[0][:150]
        raise InputError(f"{folder}/{FILE} cannot be used with its config.json ({reason})") from None
    return TrainState(opt_state=None, **arrays)


def _as(array: Any, like: jax.ShapeDtypeStruct) -> jax.Array:
    if jnp.shape(array) != like.shape:
        raise ValueError(f"an array of {jnp.shape(array)} where {like.shape} belongs")
    return jnp.asarray(array, like.dtype)
