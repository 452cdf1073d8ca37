"""The tensors of a model as a whole, wherever their parts lie: on this process, or on several."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from ..injection.wrappers import bare, is_sharded, without_wrappers


class State:
    """A model's tensors by clean key: its own, gathered ones, or what the caller has gathered.

    Every process of a sharded model makes one. `writes` says whether this process has the tensors,
    and `is_wanted` which of them, by clean key, are asked for.
    """

    def __init__(
        self,
        model: nn.Module,
        given: Mapping[str, Any] | None,
        is_wanted: Callable[[str], bool],
    ) -> None:
        self.shared = given is None and is_sharded(model)
        ranks = dist.is_available() and dist.is_initialized()
        first = not ranks or dist.get_rank() == 0
        wrapped = any("_fsdp_wrapped_module" in module._modules for module in model.modules())
        self.writes = first or not (self.shared or wrapped or given is not None)
        if given is not None:
            state = given
        elif self.shared and wrapped:
            state = _gathered(model, is_wanted)
        else:
            with bare(model) as inner:
                state = inner.state_dict()
        state = {without_wrappers(key): value for key, value in state.items()}
        self._tensors = {
            key: value.full_tensor() if hasattr(value, "full_tensor") else value
            for key, value in state.items()
            if given is not None or is_wanted(key)  # each `full_tensor` is a call among processes
        }
        if all(key.startswith("module.") for key in self._tensors) and not hasattr(model, "module"):
            self._tensors = {k.removeprefix("module."): v for k, v in self._tensors.items()}

    def keys(self, path: str) -> list[str]:
        """The keys at and below the module at `path`."""
        return [key for key in self._tensors if key.startswith(path + ".")]

    def renamed(self, names: Mapping[str, str]) -> dict[str, Tensor]:
        """The tensors of these keys, under other ones."""
        return {new: self._tensors[key] for key, new in names.items()}

    def __getitem__(self, key: str) -> Tensor:
        """A copy on the CPU, whole; ValueError where only a part of it is here."""
        value = self._tensors.get(key)
        if value is None:
            raise ValueError(f"state_dict has no {key}")
        if type(value).__name__ == "ShardedTensor" or value.is_meta or not value.numel():
            what = "on the meta device" if getattr(value, "is_meta", False) else "sharded"
            raise ValueError(f"{key} is {what}: pass a gathered state_dict=")
        return value.detach().to("cpu", copy=True).contiguous()

    def on_first(self, write: Callable[[], None]) -> None:
        """Run `write` where the tensors are; the other processes of a sharded model wait for it.

        They raise where it fails.
        """
        failed: list[str | None] = [None]
        try:
            if self.writes:
                write()
        except Exception as error:
            failed = [str(error)]
            raise
        finally:
            if self.shared:
                dist.broadcast_object_list(failed, src=0)
        if failed[0] is not None:
            raise RuntimeError(f"the first process could not write the adapter: {failed[0]}")


def _gathered(model: nn.Module, is_wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    """Copies of the tensors wanted of a model under FSDP, on its first process alone."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    first = dist.get_rank() == 0
    offload = any(p.device.type != "cpu" for p in model.parameters())
    whole = FullyShardedDataParallel.summon_full_params(
        model, writeback=False, rank0_only=offload, offload_to_cpu=offload
    )
    with whole, bare(model) as inner:
        state = inner.state_dict().items() if first else ()
        return {k: value.detach().to("cpu", copy=True) for k, value in state if is_wanted(k)}
