"""What callers pass. Each check gives the value back, or raises one error that names both.

The first argument is the name under which the caller passed it. A value is refused by ValueError, a
tensor or a module that is none by TypeError. Numbers may be NumPy's; a bool is no number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from numbers import Integral, Real
from operator import index
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

LARGEST = 1e30


def finite(name: str, value: Any) -> float:
    """A number that is neither infinite nor NaN, with room for products in float32."""
    if not _is_number(value) or not abs(value) <= LARGEST:
        raise ValueError(f"{name} must be a finite number: got {_short(value)}")
    return value


def probability(name: str, value: Any) -> float:
    """A number of at least 0 and below 1."""
    if not _is_number(value) or not 0 <= value < 1:
        raise ValueError(f"{name} must lie in [0, 1): got {_short(value)}")
    return value


def integer(name: str, value: Any, least: int) -> int:
    """An integer of at least `least`."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}: got {_short(value)}")
    return int(value)


def indices(name: str, value: Any) -> tuple[int, ...]:
    """One integer of at least 0, or several; not none of them."""
    several = (value,) if isinstance(value, Integral) else _several(value, Integral)
    if not several:
        raise ValueError(f"{name} must be an integer or several: got {_short(value)}")
    return tuple(integer(name, each, least=0) for each in several)


def flag(name: str, value: Any) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False: got {_short(value)}")
    return value


def names(name: str, value: Any) -> tuple[str, ...]:
    """One name, or several; none is empty."""
    several = _several((value,) if isinstance(value, str) else value, str)
    if several is None or "" in several:
        raise ValueError(f"{name} must be a name or several: got {_short(value)}")
    return several


def flags(name: str, value: Any) -> tuple[bool, ...]:
    """Several of True and False."""
    several = _several(value, bool)
    if several is None:
        raise ValueError(f"{name} must be several of True and False: got {_short(value)}")
    return several


def ranges(name: str, value: Any) -> tuple[tuple[int, int], ...]:
    """Pairs of integers, each (start, stop)."""
    try:
        return tuple([(index(start), index(stop)) for start, stop in value])
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be pairs (start, stop): got {_short(value)}") from None


def path(name: str, value: Any) -> Path:
    """A path of the file system, which is not empty."""
    if not isinstance(value, (str, PathLike)) or not str(value):
        raise ValueError(f"{name} must be a path: got {_short(value)}")
    return Path(value)


def floating(name: str, value: Any) -> torch.dtype:
    """A floating dtype."""
    if not isinstance(value, torch.dtype) or not value.is_floating_point:
        raise ValueError(f"{name} must be a floating dtype of torch: got {_short(value)}")
    return value


def tensor(name: str, value: Any) -> Tensor:
    """A tensor."""
    return _instance(name, value, Tensor, "a tensor")


def mapping(name: str, value: Any) -> Mapping[str, Any]:
    """A mapping, such as a state dict."""
    return _instance(name, value, Mapping, "a mapping")


def module(name: str, value: Any) -> nn.Module:
    """A module, such as a model."""
    return _instance(name, value, nn.Module, "an nn.Module")


def function(name: str, value: Any) -> Callable[..., Any]:
    """What can be called."""
    if not callable(value):
        raise TypeError(f"{name} must be callable: got {_short(value)}")
    return value  # type: ignore[no-any-return]


def _instance(name: str, value: Any, cls: type, words: str) -> Any:
    if not isinstance(value, cls):
        raise TypeError(f"{name} must be {words}: got {_short(value)}")
    return value


def _several(value: Any, cls: type) -> tuple[Any, ...] | None:
    """The values as a tuple; None unless they are several, each of this class."""
    several = tuple(value) if isinstance(value, Iterable) else (None,)
    return several if all(isinstance(each, cls) for each in several) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _short(value: Any) -> str:
    """The value, if it can be told in a line; its class otherwise."""
    text = repr(value)
    if len(text) <= 80 and "\n" not in text:
        return text
    return f"a {type(value).__module__}.{type(value).__qualname__}"
