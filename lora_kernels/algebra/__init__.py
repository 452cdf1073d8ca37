"""The algebra of a LoRA layer, in plain PyTorch.

Rule: nothing in this wing imports anything else of ours.
"""

from .operands import Operands, Parts, Settings, Weights

__all__ = ["Operands", "Parts", "Settings", "Weights"]
