"""A frozen weight in the dtype of torch.autocast: cast once and held, instead of at every call.

torch.autocast's own cache keeps copies only of leaves that ask for a gradient, which LoRA's frozen
weights do not, so it casts each of them in every forward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..autograd.autocast import autocast_dtype


class HeldCast:
    """The copy of one weight; made anew when the weight is another, or has changed in place."""

    def __init__(self) -> None:
        # (copy, the weight, its state): one attribute, since the replicas of nn.DataParallel share
        # this and call it from threads.
        self._made: tuple[Tensor, Tensor, Any] | None = None

    @property
    def copy(self) -> Tensor | None:
        """The copy that is held, if any."""
        return self._made[0] if self._made else None

    def of(self, weight: Tensor, x: Tensor) -> Tensor:
        """`weight` in the dtype that a call on x takes: itself unless autocast asks for another."""
        dtype = autocast_dtype(x.device)
        if dtype is None or weight.dtype in (dtype, torch.float64) or weight.requires_grad:
            return weight  # an unfrozen one's cast must be in the graph
        made = self._made
        # A compiled graph cannot ask for the state; whoever holds this calls `forget`. It takes a
        # copy that an eager call made.
        compiling = torch.compiler.is_compiling()
        if (
            made is not None
            and made[0].dtype is dtype
            and made[1] is weight
            and (compiling or made[2] == _state(weight))
        ):
            return made[0]
        if compiling or (weight.is_cuda and torch.cuda.is_current_stream_capturing()):
            # Not held: what a graph makes lies in the graph's memory, which is written when it is
            # replayed, not before, and which other graphs may use.
            return weight.detach().to(dtype)
        with torch.inference_mode(False):  # training may be next
            copy = weight.detach().to(dtype)
        # As torch._dynamo.mark_static_address says it, whose import takes a second: CUDA graphs
        # need not copy this at each replay.
        copy._dynamo_static_input_type = "unguarded"  # type: ignore[attr-defined]
        self._made = copy, weight, _state(weight)
        return copy

    def forget(self) -> None:
        """Let go of the copy: the weight moves, or is loaded, in a way that nothing else tells."""
        self._made = None

    def __getstate__(self) -> dict[str, Any]:
        # A copy of a model, or a file, holds the weight once.
        return {"_made": None}


def _state(weight: Tensor) -> tuple[int, int]:
    # In-place changes count versions, `weight.data = ...` gives other memory.
    return 0 if weight.is_inference() else weight._version, weight.data_ptr()
