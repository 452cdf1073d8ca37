"""Every tile that `tune` may try, run as compiled (see compiled_code.py): `make run-compiled`."""

from __future__ import annotations

import pytest

from lora_kernels import lora_linear
from lora_kernels.hardware.tiles import KERNELS
from lora_kernels.tools.tune import CANDIDATES
from tests.compiled.compiled_code import ARCH, BRAIN, FULL, on  # noqa: F401
from tests.support.oracle import Case, judge_layer

# A strategy whose step launches the kernel.
STRATEGIES = {
    "project": "split", "low_rank_gemm": "split", "fused_gemm": "fused", "low_rank": "hybrid",
    "output_gradients": "split", "parameter_gradients": "fused",
}  # fmt: skip
TRIALS = [  # a GEMM takes the same tiles for y and for dx
    pytest.param(kernel, tile, id=f"{kernel}-{'x'.join(map(str, tile))}")
    for kernel in STRATEGIES
    for tile in CANDIDATES[kernel]
]


@pytest.mark.parametrize("R", [16, 64])
@pytest.mark.parametrize(("kernel", "tile"), TRIALS)
def test_a_layer_with_this_tile(on, kernel, tile, R):  # noqa: F811
    case = Case(270, 272, 256, R, dropout=0.1, adapter=FULL)
    uses = [use for use in (kernel, f"{kernel}_dx") if use in KERNELS]
    on(ARCH, STRATEGIES[kernel], BRAIN, R, **dict.fromkeys(uses, tile))

    def layer(x, weight, lora_A, lora_B, bias):
        return lora_linear(x, weight, lora_A, lora_B, bias=bias, scale=case.scale, dropout=0.1)

    judge_layer(layer, case, BRAIN)
