"""`split` on a weight in NF4: y and every gradient, with bitsandbytes' dequantised weight."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from lora_kernels.algebra.operands import Settings
from lora_kernels.autograd.nf4 import nf4_linear
from lora_kernels.hardware.tiles import Tiles, tiles_for
from lora_kernels.layers.quantised import read_nf4
from lora_kernels.strategies.table import STRATEGIES
from tests.support.nf4 import judge_nf4
from tests.support.oracle import DEVICE, Case, inputs

pytest.importorskip("triton")
bnb = pytest.importorskip("bitsandbytes")

HALF, BRAIN, FULL = torch.float16, torch.bfloat16, torch.float32
CASES = [
    Case(37, 45, 128, 3, dropout=0.1),
    Case(130, 96, 64, 8),
    Case(65, 71, 192, 16, dropout=0.5, adapter=FULL, bias=False),
    Case(64, 19, 64, 1, dropout=0.3),
    Case(40, 150, 320, 40, x="transposed", adapter=FULL),
]
# Small tiles, and those shipped.
CARDS = ("cpu", "sm_86") if DEVICE.type == "cpu" else ("sm_86", "sm_90")


def tiles_of(card: str, R: int) -> Tiles:
    """The tiles of a card; what the interpreter multiplies in float32 it does not round to TF32."""
    tiles = tiles_for(card, 2, R, tf32=False, nf4=True)
    return tiles._replace(precision="ieee") if DEVICE.type == "cpu" else tiles


@pytest.mark.parametrize("nested", [False, True], ids=["absmax", "nested"])
@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_y_and_every_gradient(case, card, nested):
    if DEVICE.type != "cpu" and case.N % 64 and case.R == 1:
        pytest.skip("wrong on an H200; a layer of such an N runs `library` on a GPU")
    dtype = (HALF, BRAIN)[CASES.index(case) % 2]
    judge_nf4(case, dtype, tiles_of(card, case.R), nested)


def quantised(case: Case, dtype: torch.dtype = BRAIN):
    given = inputs(case, dtype)
    packed, state = bnb.functional.quantize_4bit(
        given.weight, blocksize=64, quant_type="nf4", compress_statistics=True
    )
    tiles = tiles_of(CARDS[0], case.R)

    def layer(x, lora_A, lora_B, dropout=0.0):
        return nf4_linear(
            x, packed.view(case.N, case.K // 2), partial(read_nf4, state), given.bias,
            lora_A, lora_B, Settings(1.0, dropout, "split"), (STRATEGIES["split"], tiles),
        )  # fmt: skip

    return given, layer, packed


def test_the_weight_is_kept_as_it_is_packed():
    """Besides x, h, the mask and the adapter, only the packed weight: by reference."""
    case = Case(48, 40, 128, 4)
    given, layer, packed = quantised(case)
    y = layer(given.x, given.lora_A, given.lora_B, 0.5)
    kept = [t for t in y.grad_fn.saved_tensors if t is not None]
    assert sorted(t.numel() * t.element_size() for t in kept) == sorted(
        [48 * 128 * 2, 48 * 4 * 2, 48 * 16, packed.numel(), 4 * 128 * 2, 40 * 4 * 2]
    )
    by_reference = {t.data_ptr() for t in (given.x, packed, given.lora_A, given.lora_B)}
    assert by_reference <= {t.data_ptr() for t in kept}
    frozen = given.x.detach()
    y = layer(frozen, given.lora_A, given.lora_B)
    kept = y.grad_fn.saved_tensors
    assert packed.data_ptr() not in {t.data_ptr() for t in kept if t is not None}


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)], ids=str)
def test_the_gradients_that_are_wanted(wanted):
    case = Case(48, 40, 128, 4)
    given, layer, _ = quantised(case)
    leaves = [given.x, given.lora_A, given.lora_B]
    every = torch.autograd.grad(layer(*leaves), leaves, given.dy)
    some = [t if i in wanted else t.detach() for i, t in enumerate(leaves)]
    found = torch.autograd.grad(layer(*some), [some[i] for i in wanted], given.dy)
    for i, gradient in zip(wanted, found, strict=True):
        torch.testing.assert_close(gradient, every[i])


def test_x_of_three_dimensions_and_a_second_derivative():
    case = Case(48, 40, 128, 4)
    given, layer, _ = quantised(case)
    flat = layer(given.x, given.lora_A, given.lora_B)
    y = layer(given.x.view(4, 12, 128), given.lora_A, given.lora_B)
    assert y.shape == (4, 12, 40) and torch.equal(y.view(48, 40), flat)
    for each in (flat, y):
        each.mul_(2)  # which a plain view made inside a Function would refuse
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(y.float().sum(), given.x, create_graph=True)


def test_errors_name_the_values():
    given, layer, _ = quantised(Case(48, 40, 128, 4))
    with pytest.raises(ValueError, match="x has 64 features, but the NF4 weight takes K = 128"):
        layer(given.x[:, :64], given.lora_A, given.lora_B)
    with pytest.raises(ValueError, match=r"share one device: got .*meta"):
        layer(given.x.to("meta"), given.lora_A, given.lora_B)
    with pytest.raises(RuntimeError, match=r"LoRA on an NF4 weight has no rules for torch\.func"):
        torch.func.vmap(lambda x: layer(x, given.lora_A, given.lora_B))(given.x.view(4, 12, 128))
