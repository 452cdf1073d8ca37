"""Putting LoRA into a model and taking it out again: plain models, and models that PEFT wrapped.

Rule: this wing knows modules and their names, and no file.
"""

from .inject import fused_layers

__all__ = ["fused_layers"]
