"""Nested values made into dataclasses, with the type of each field checked."""

import functools
import operator
import os
import types
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import dacite

from unet_jax.errors import InputError

T = TypeVar("T")


def build(kind: type[T], values: Mapping[str, Any]) -> T:
    """The dataclass of these values. Paths become text, lists tuples, and NumPy's numbers and arrays Python's.

    Raises:
      InputError: an unknown field, or a value of another type; the message names the field and what it takes.
    """
    plain = _plain(values)
    try:
        return dacite.from_dict(kind, plain, dacite.Config(strict=True))
    except dacite.WrongTypeError as error:
        given = functools.reduce(operator.getitem, str(error.field_path).split("."), plain)  # error.value is altered
        raise InputError(f"{error.field_path} is {given!r}: {_taken(error.field_type)}") from None
    except dacite.DaciteError as error:
        raise InputError(str(error)) from None


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):
        value = value.tolist()
    return tuple(map(_plain, value)) if isinstance(value, (list, tuple)) else value


def _taken(kind: Any) -> str:
    kinds = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    choices = [choice for one in kinds if get_origin(one) is Literal for choice in get_args(one)]
    if choices:
        return f"choose from {', '.join(choices)}"
    names = [one.__name__ if get_origin(one) is None else str(one) for one in kinds]
    return f"it must be {' or '.join(names)}".replace("NoneType", "None")
