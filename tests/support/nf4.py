"""Layers whose weight bitsandbytes has quantised to NF4, judged with what it dequantises to."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from lora_kernels.algebra.operands import Settings
from lora_kernels.autograd.function import mask_of
from lora_kernels.autograd.nf4 import nf4_linear
from lora_kernels.hardware.tiles import Tiles
from lora_kernels.layers.quantised import read_nf4
from lora_kernels.strategies.table import STRATEGIES
from tests.support.oracle import Case, expected, inputs, judge, run


def judge_nf4(case: Case, dtype: torch.dtype, tiles: Tiles, nested: bool = False) -> None:
    """Judge `split` on an NF4 weight against float64 on bitsandbytes' dequantised weight."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    given = inputs(case, dtype)
    packed, state = quantize_4bit(
        given.weight, blocksize=64, quant_type="nf4", compress_statistics=nested
    )
    given.weight = dequantize_4bit(packed, state)
    assert given.weight.dtype is dtype and state.nested == nested
    settings, masks = Settings(case.scale, case.dropout, "split"), []

    def layer(x: Tensor, _: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None) -> Tensor:
        read, weight = partial(read_nf4, state), packed.view(case.N, case.K // 2)
        y = nf4_linear(
            x, weight, read, bias, lora_A, lora_B, settings, (STRATEGIES["split"], tiles)
        )
        masks.append(mask_of(y))
        return y

    torch.manual_seed(0)
    actual = run(given, layer)
    (mask,) = masks
    assert (mask is None) == (case.dropout == 0)
    exact, eager = expected(given, case, None if mask is None else mask[0])
    assert actual.keys() == exact.keys()
    for name in exact:
        judge(f"{name} [{case}]", actual[name], eager[name], exact[name], case.M * case.R)
