"""The modules: a LoRA layer, its configuration, and siblings that run as one problem.

Rule: a layer knows its own tensors and settings, and no model around it.
"""

from .config import LoRAConfig
from .linear import FusedLoRALinear

__all__ = ["FusedLoRALinear", "LoRAConfig"]
