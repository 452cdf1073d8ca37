"""How a result is judged: against float64, with eager PyTorch's own error in the same dtype as the
yardstick.

No tolerance is picked by hand. For y and every gradient, the RMS error may be 10 % larger than
eager's and the largest error twice eager's plus one ulp (docs/accuracy.md says why).
Eager's error is itself a sample: with n elements two equal RMS errors differ by a factor of 1 + 3 /
sqrt(n) at three sigma, and that is added for small outputs.

Eager code multiplies in the dtype of x. But float16 loses small and large numbers, so float32
adapters (and all others that are not float16) on a float16 x are judged against what PEFT does
there: all of LoRA in float32.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lora_kernels.algebra import masks, reference
from lora_kernels.autograd.function import mask_of

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Case:
    """A problem and how its tensors lie in memory.

    `weight` is "linear" ([N, K]) or "conv1d" ([K, N] seen through .T); `x` is "plain", "strided"
    (every other column of a wider tensor) or "transposed".
    """

    M: int
    N: int
    K: int
    R: int
    dropout: float = 0.0
    bias: bool = True
    weight: str = "linear"
    x: str = "plain"
    adapter: torch.dtype | None = None  # lora_A, lora_B; None: as x
    scale: float = 0.75
    B: float = 1.0  # how large lora_B is; at 1 the low-rank term is as large as the frozen one
    dy: float = 1.0  # how large dy is
    agree: bool = False  # the mean of x is 1 and that of dy as large as dy: sums over tokens grow

    def __str__(self) -> str:
        name = f"M{self.M}-N{self.N}-K{self.K}-R{self.R}"
        name += f"-p{self.dropout}" if self.dropout else ""
        name += "" if self.bias else "-nobias"
        name += "" if self.weight == "linear" else f"-{self.weight}"
        name += "" if self.x == "plain" else f"-{self.x}"
        if self.adapter is not None:
            name += f"-{str(self.adapter).removeprefix('torch.')}-adapter"
        name += "" if self.scale == 0.75 else f"-scale{self.scale:g}"
        name += "" if self.B == 1 else f"-B{self.B:g}"
        name += "" if self.dy == 1 else f"-dy{self.dy:g}"
        return name + ("-agree" if self.agree else "")


@dataclass
class Inputs:
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    lora_A: Tensor
    lora_B: Tensor
    dy: Tensor


def inputs(case: Case, dtype: torch.dtype, seed: int = 0) -> Inputs:
    """Random tensors; by default the low-rank term is as large as the frozen one."""
    draw = torch.Generator().manual_seed(seed)

    def normal(
        *shape: int, std: float = 1.0, dtype: torch.dtype = dtype, mean: float = 0.0
    ) -> Tensor:
        return ((torch.randn(*shape, generator=draw) + mean) * std).to(dtype).to(DEVICE)

    M, N, K, R, mean = case.M, case.N, case.K, case.R, float(case.agree)
    adapter = case.adapter or dtype
    weight = normal(K, N, std=K**-0.5).T if case.weight == "conv1d" else normal(N, K, std=K**-0.5)
    if case.x == "strided":
        x = normal(M, 2 * K, mean=mean)[:, ::2]
    elif case.x == "transposed":
        x = normal(K, M, mean=mean).T
    else:
        x = normal(M, K, mean=mean)
    return Inputs(
        x=x.detach().requires_grad_(),
        weight=weight,
        bias=normal(N).requires_grad_() if case.bias else None,
        lora_A=normal(R, K, std=K**-0.5, dtype=adapter).requires_grad_(),
        lora_B=normal(N, R, std=case.B * R**-0.5, dtype=adapter).requires_grad_(),
        dy=normal(M, N, std=case.dy, mean=mean),
    )


NAMES = ("y", "dx", "dlora_A", "dlora_B", "dbias")


def run(given: Inputs, function, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """y and every gradient of `function(x, weight, lora_A, lora_B, bias)`, computed in `dtype`."""

    def leaf(tensor: Tensor | None) -> Tensor | None:
        if tensor is None or dtype is None:
            return tensor
        return tensor.detach().to(dtype).requires_grad_(tensor.requires_grad)

    leaves = [leaf(t) for t in (given.x, given.weight, given.lora_A, given.lora_B, given.bias)]
    y = function(*leaves)
    wanted = [t for t in (leaves[0], *leaves[2:]) if t is not None]
    gradients = torch.autograd.grad(y, wanted, given.dy if dtype is None else given.dy.to(dtype))
    return dict(zip(NAMES, (y.detach(), *gradients), strict=False))


def expected(given: Inputs, case: Case, mask: Tensor | None) -> tuple[dict, dict]:
    """(float64, eager) results of the reference under the mask that was drawn."""
    keep = None if mask is None else masks.unpack(mask, case.K)

    def reference_layer(x, weight, lora_A, lora_B, bias):
        return reference.forward(
            x, weight, lora_A, lora_B, bias=bias, scale=case.scale, keep=keep, dropout=case.dropout
        )

    exact = run(given, reference_layer, torch.float64)
    if given.x.dtype is torch.float16 is not given.lora_A.dtype:
        eager = run(given, partial(peft_layer, case=case, keep=keep))
        if MATRIX_INSTRUCTIONS:
            tf32 = in_tf32(given, case, keep)
            eager |= {name: coarser(eager[name], t, exact[name]) for name, t in tf32.items()}
        return exact, eager
    eager = run(given, reference_layer, given.x.dtype)
    others = []
    if DEVICE.type != "cpu" and given.x.dtype is torch.float32:
        with PlainSums():
            others.append(run(given, reference_layer, given.x.dtype))
    if DEVICE.type != "cpu":
        keep = None if keep is None else keep.cpu()
        here = Inputs(*map(on_cpu, vars(given).values()))
        others.append(run(here, reference_layer, given.x.dtype))
    for other in others:
        eager = {name: coarser(eager[name], other[name], exact[name]) for name in exact}
    return exact, eager


# Whether the kernels are compiled: then tensor cores multiply float32 adapters as TF32.
MATRIX_INSTRUCTIONS = os.environ.get("TRITON_INTERPRET", "0") == "0"


def peft_layer(x, weight, lora_A, lora_B, bias, *, case: Case, keep: Tensor | None) -> Tensor:
    """What PEFT computes of a float16 x and float32 adapters; y is float16."""
    h = reference.dropped(x.float(), keep, case.dropout) @ lora_A.float().T
    y = torch.nn.functional.linear(x, weight, bias)
    return (y + (h @ lora_B.float().T) * case.scale).to(x.dtype)


def in_tf32(given: Inputs, case: Case, keep: Tensor | None) -> dict[str, Tensor]:
    """The same with the operands of every product of rank R rounded to TF32."""

    def rounded(t: Tensor) -> Tensor:
        bits = t.detach().float().contiguous().view(torch.int32)
        return ((bits + 0x1000) & -0x2000).view(torch.float32)

    x, dy, A, B = map(rounded, (given.x, given.dy, given.lora_A, given.lora_B))  # x, dy exact
    dropped_x = reference.dropped(x, keep, case.dropout)
    h, dh = rounded(dropped_x @ A.T), rounded(case.scale * (dy @ B))
    frozen_y = torch.nn.functional.linear(given.x, given.weight, given.bias).detach()
    low_rank_dx = reference.dropped(dh @ A, keep, case.dropout)
    return {
        "y": (frozen_y + case.scale * (h @ B.T)).to(given.x.dtype),
        "dx": (given.dy @ given.weight + low_rank_dx).to(given.x.dtype),
        "dlora_A": dh.T @ dropped_x,
        "dlora_B": case.scale * (dy.T @ h),
    }


YARDSTICKS = 1 if DEVICE.type == "cpu" else 2


class PlainSums(TorchDispatchMode):
    """Products as sums from the first term to the last.

    Eager PyTorch's error is that of the vendor's kernel for a shape, which may cut a sum in slices
    and add these up: that rounds half as much as a plain sum. On a GPU a CPU's product and a plain
    sum are yardsticks too.
    """

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket is not torch.ops.aten.mm:
            return function(*args, **(kwargs or {}))
        a, b = args
        total = a.new_zeros(a.shape[0], b.shape[1])
        for k in range(a.shape[1]):
            total.addcmul_(a[:, k, None], b[None, k])
        return total


def on_cpu(tensor: Tensor | None) -> Tensor | None:
    """A copy there, a leaf that asks for a gradient as the tensor does."""
    return None if tensor is None else tensor.detach().cpu().requires_grad_(tensor.requires_grad)


def coarser(eager: Tensor, other: Tensor, exact: Tensor) -> Tensor:
    """Of two eager results the one with the larger error."""
    other = other.to(exact.device)
    first, second = (_rms(each.double() - exact) for each in (eager, other))
    return eager if not first < second else other


def judge(
    name: str, actual: Tensor, eager: Tensor, exact: Tensor, independent: int | None = None
) -> None:
    """AssertionError if `actual` is further from `exact` than the contract allows.

    `independent` is how many errors are independent, where one error (of an element of h) shows
    in many elements; by default all are.
    """
    assert actual.shape == exact.shape, f"{name}: {list(actual.shape)}, not {list(exact.shape)}"
    if exact.numel() == 0:
        return
    assert torch.isfinite(actual).all(), f"{name}: not finite"
    error, yardstick = (actual.double() - exact).abs(), (eager.double() - exact).abs()
    # Eager may be exact by luck on a few elements; nothing is better than the exact one
    # rounded.
    rounded = (exact.to(eager.dtype).double() - exact).abs()
    rms = max(_rms(yardstick), _rms(rounded))
    allowed = 1.1 * rms * (1 + 3 / math.sqrt(min(independent or math.inf, exact.numel())))
    assert _rms(error) <= allowed, f"{name}: RMS error {_rms(error):.3e}, allowed {allowed:.3e}"
    ulp = torch.finfo(eager.dtype).eps * exact.abs().max().item()
    largest, limit = error.max().item(), 2 * yardstick.max().item() + ulp
    assert largest <= limit, f"{name}: largest error {largest:.3e}, allowed {limit:.3e}"


def _rms(error: Tensor) -> float:
    return error.square().mean().sqrt().item()


def judge_layer(layer, case: Case, dtype: torch.dtype) -> None:
    """Judge `layer(x, weight, lora_A, lora_B, bias)`; it must be one lora_linear, whose node holds
    the mask.

    With one row the errors of h make three numbers, too few for an RMS: runs are pooled up to 64
    rows.
    """
    runs = []
    for seed in range(-(-64 // case.M)):
        given = inputs(case, dtype, seed)
        torch.manual_seed(seed)
        masks_seen = []

        def remembered(*arguments, masks_seen=masks_seen):
            y = layer(*arguments)
            masks_seen.append(mask_of(y))  # before backward frees them
            return y

        actual = run(given, remembered)
        mask = None if masks_seen[0] is None else masks_seen[0][0]
        assert (mask is None) == (case.dropout == 0)
        runs.append((actual, *expected(given, case, mask)))
    for name in runs[0][1]:
        actual, exact, eager = (torch.cat([r[i][name] for r in runs]) for i in range(3))
        judge(f"{name} [{case}]", actual, eager, exact, len(runs) * case.M * case.R)
