"""The layer as a differentiable function: in eager code a Function, in compiled graphs operators.

Rule: this wing gives strategies their tensors and autograd its gradients. It computes nothing but
few tokens on a CPU (`few`).
"""

from .functional import lora_linear

__all__ = ["lora_linear"]
