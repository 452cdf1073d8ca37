"""The Triton kernels: the only place that imports triton."""

from .dropout import apply_mask, draw_masks
from .fused_gemm import fused_gemm
from .gradients import Gradient, output_gradients, parameter_gradients
from .low_rank_gemm import low_rank_gemm
from .project import project

__all__ = [
    "Gradient", "apply_mask", "draw_masks", "fused_gemm", "low_rank_gemm", "output_gradients",
    "parameter_gradients", "project",
]  # fmt: skip
