"""Modules by their names before the wings, so that old pickles load: an alias for one release.

A pickle, or a whole model in a file of `torch.save`, names each class by its module. These names
resolve to the classes where they live now.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

# Former module -> the modules that hold its names now.
FORMER = {
    "dispatch": ("strategies.choose", "strategies.problem", "strategies.table"),
    "functional": ("autograd.functional", "algebra.operands"),
    "groups": ("layers.group", "injection.siblings"),
    "held": ("autograd.autocast", "former_names"),
    "modules": ("layers.linear", "layers.config", "layers.base"),
    "peft": ("injection.peft", "former_names"),
    "tuning": ("hardware.tiles", "hardware.tuned"),
}


class HeldCast:
    """What layers kept of their weight under autocast until they kept nothing; old pickles do."""


class FusedForward:
    """What fused layers of PEFT's had as `forward` until they got a class; it runs PEFT's own."""

    layer: Any

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.layer).forward(self.layer, *args, **kwargs)

    def replicate(self) -> Any:
        return type(self.layer)._replicate_for_data_parallel(self.layer)


class _Former(ModuleType):
    def __getattr__(self, name: str) -> Any:
        package, _, former = self.__name__.rpartition(".")
        for module in FORMER[former]:
            found = getattr(import_module(f"{package}.{module}"), name, None)
            if found is not None:
                return found
        raise AttributeError(f"{self.__name__} has moved, and has no {name!r}")


def install() -> None:
    """Let `import lora_kernels.modules` and the like find what has moved."""
    for former in FORMER:
        name = f"{__package__}.{former}"
        sys.modules.setdefault(name, _Former(name, __doc__))
