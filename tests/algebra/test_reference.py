"""The oracle agrees with autograd and with the paper's formula; the judge rejects the wrong."""

from __future__ import annotations

import pytest
import torch

from lora_kernels.algebra import masks, reference
from tests.support.oracle import Case, expected, inputs, judge

CASE = Case(M=33, N=20, K=24, R=3, dropout=0.25)


@pytest.fixture
def mask():
    torch.manual_seed(0)
    return masks.draw(torch.tensor([5]), 1, CASE.M, CASE.K, CASE.dropout)[0]


def test_backward_is_the_derivative_of_forward(mask):
    given = inputs(CASE, torch.float64)
    tensors = [t.cpu() for t in (given.x, given.weight, given.lora_A, given.lora_B)]
    call = {"scale": 0.75, "keep": masks.unpack(mask, CASE.K), "dropout": CASE.dropout}
    leaves = [t.detach().requires_grad_() for t in tensors]
    bias = torch.zeros(CASE.N, dtype=torch.float64, requires_grad=True)
    y = reference.forward(*leaves, bias=bias, **call)
    dy = given.dy.cpu()
    by_autograd = torch.autograd.grad(y, (leaves[0], *leaves[2:], bias), dy)
    for written, derived in zip(reference.backward(dy, *tensors, **call), by_autograd, strict=True):
        torch.testing.assert_close(written, derived)


def test_forward_is_a_merged_weight_when_nothing_is_dropped():
    given = inputs(CASE, torch.float64)
    merged = given.weight + 0.75 * given.lora_B @ given.lora_A
    y = reference.forward(
        given.x, given.weight, given.lora_A, given.lora_B, bias=given.bias, scale=0.75
    )
    torch.testing.assert_close(y, torch.nn.functional.linear(given.x, merged, given.bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_judge_rejects_zeros_a_missing_term_and_a_small_error(mask, dtype):
    given = inputs(CASE, dtype)
    exact, eager = expected(given, CASE, mask.to(given.x.device))
    for name in exact:
        judge(name, exact[name].to(dtype), eager[name], exact[name])
        with pytest.raises(AssertionError):
            judge(name, torch.zeros_like(eager[name]), eager[name], exact[name])
        with pytest.raises(AssertionError):  # every element off by four times eager's typical error
            off = exact[name] + 4 * (eager[name].double() - exact[name]).square().mean().sqrt()
            judge(name, off, eager[name], exact[name])
    frozen = torch.nn.functional.linear(given.x, given.weight, given.bias)
    with pytest.raises(AssertionError):
        judge("y", frozen.detach(), eager["y"], exact["y"])
    with pytest.raises(AssertionError):
        judge("dx", given.dy @ given.weight, eager["dx"], exact["dx"])
