"""The Triton kernels, with their launchers: one idea a file.

Rule: this wing and `tools` alone import Triton. A launcher checks, allocates and launches; which
kernel runs, and at which tile, is for the caller to say.
"""

from .dropout import apply_mask, draw_masks
from .fused import fused_gemm
from .gain import row_gains, scale_columns, scale_columns_backward
from .gradients import Gradient, output_gradients, parameter_gradients
from .low_rank import low_rank_gemm
from .packs import Packed
from .projection import project

__all__ = [
    "Gradient", "Packed", "apply_mask", "draw_masks", "fused_gemm", "low_rank_gemm",
    "output_gradients", "parameter_gradients", "project", "row_gains", "scale_columns",
    "scale_columns_backward",
]  # fmt: skip
