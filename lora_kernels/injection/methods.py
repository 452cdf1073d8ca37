"""Methods that a model with LoRA has in place of its own, or besides them.

They stand on the model itself, so no class is patched. Copies and pickles of a model have methods
of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import ref

from torch import nn

# Name -> what is called with the model first. The wing `adapters`, which knows files, adds to it.
METHODS: dict[str, Callable[..., Any]] = {}


class Method:
    """`METHODS[name]` as a method of one model, which it does not keep alive."""

    def __init__(self, name: str, model: nn.Module) -> None:
        self.name, self._model = name, ref(model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return METHODS[self.name](self._model(), *args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {"name": self.name, "model": self._model()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]
