"""A frozen weight in the dtype of torch.autocast: cast once and held, instead of at every call.

torch.autocast's own cache keeps copies only of leaves that ask for a gradient, which LoRA's frozen
weights do not, so it casts each of them in every forward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class HeldCast:
    """The copy of one weight; made anew when the weight is another, or has changed in place."""

    def __init__(self) -> None:
        self.copy: Tensor | None = None
        # A tuple, since a Parameter kept by itself in a module would be one of the module's.
        self._of: tuple[Tensor, ...] = ()
        self._state: Any = None

    def of(self, weight: Tensor, x: Tensor) -> Tensor:
        """`weight` in the dtype that a call on x takes: itself unless autocast asks for another."""
        device = x.device.type
        if not torch.is_autocast_enabled(device) or weight.dtype is torch.float64:
            return weight
        dtype = torch.get_autocast_dtype(device)
        if weight.dtype is dtype or weight.requires_grad:  # unfrozen: the cast is in the graph
            return weight
        if self.copy is None or self.copy.dtype is not dtype or self._stale(weight):
            self.copy = weight.detach().to(dtype)
            self._of = (weight,)
            if not torch.compiler.is_compiling():
                self._state = _state(weight)
        return self.copy

    def forget(self) -> None:
        """Let go of the copy: the weight moves, or is loaded, in a way that nothing else tells."""
        self.copy, self._of = None, ()

    def _stale(self, weight: Tensor) -> bool:
        if not self._of or self._of[0] is not weight:
            return True
        # A compiled graph cannot ask for the version; whoever holds this calls `forget`.
        return not torch.compiler.is_compiling() and self._state != _state(weight)

    def __getstate__(self) -> dict[str, Any]:
        # A copy of a model, or a file, holds the weight once.
        return {"copy": None, "_of": (), "_state": None}


def _state(weight: Tensor) -> tuple[int, int]:
    # In-place changes count versions, `weight.data = ...` gives other memory.
    return 0 if weight.is_inference() else weight._version, weight.data_ptr()
