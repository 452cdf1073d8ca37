"""Putting LoRA into a model and taking it out again: plain models, and models that PEFT wrapped.

Rule: this wing knows modules and their names, and no file.
"""

from .inject import add_lora, fused_layers, merge
from .peft import fuse_peft, unfuse_peft
from .report import Report

__all__ = ["Report", "add_lora", "fuse_peft", "fused_layers", "merge", "unfuse_peft"]
