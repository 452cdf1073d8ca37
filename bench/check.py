"""Whether a provider computes the layer: judged against `algebra.reference` in float64.

The yardstick is eager PyTorch's own error in the case's dtype, as in the library's tests. The RMS
error may be 1.1 times eager's, the largest error twice eager's plus one ulp, both times the
provider's slack.

Each provider draws dropout masks of its own, so they are found first. With a zero weight and a
constant low-rank product, dx is zero exactly where x was dropped; the same seed then draws the same
mask for the real numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lora_kernels.algebra import reference

from .cases import Case
from .providers import ALPHA_PER_RANK, Built, Projection

SEED = 1234
ROWS_AT_ONCE = 1024  # float64 copies of a large layer's activations would not fit a small card


@dataclass(frozen=True)
class Verdict:
    """What is wrong ("": nothing), and the largest RMS error of any output over eager's."""

    wrong: str
    ratio: float


@dataclass
class _Error:
    """The errors of one output, summed up over chunks of rows: the provider's, eager's, rounding's.

    All are against float64. `rounded` is the exact result rounded to the dtype.
    """

    count: int = 0
    squares: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("got", "eager", "rounded"), 0.0)
    )
    largest: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("got", "eager"), 0.0))
    magnitude: float = 0.0
    finite: bool = True
    eps: float = 0.0

    def add(self, got: Tensor, eager: Tensor, exact: Tensor) -> None:
        """Add the errors of one chunk."""
        self.count += exact.numel()
        self.finite &= bool(torch.isfinite(got).all())
        self.magnitude = max(self.magnitude, exact.abs().max().item())
        self.eps = torch.finfo(eager.dtype).eps
        given = {"got": got, "eager": eager, "rounded": exact.to(eager.dtype)}
        for name, tensor in given.items():
            error = tensor.double() - exact
            self.squares[name] += error.square().sum().item()
            if name in self.largest:
                self.largest[name] = max(self.largest[name], error.abs().max().item())

    def judge(self, slack: float) -> tuple[str, float]:
        """(what is wrong or "", RMS error over the yardstick's)."""
        if not self.finite:
            return "not finite", math.inf
        rms = {name: math.sqrt(total / self.count) for name, total in self.squares.items()}
        # Eager may be exact by luck on a few elements, but rounding alone is the least to allow.
        yardstick = max(rms["eager"], rms["rounded"], 1e-300)
        ratio = rms["got"] / yardstick
        if ratio > slack * 1.1 * (1 + 3 / math.sqrt(self.count)):
            return f"RMS error {rms['got']:.2e}, eager {rms['eager']:.2e}", ratio
        limit = slack * (2 * self.largest["eager"] + self.eps * self.magnitude)
        if self.largest["got"] > limit:
            return f"largest error {self.largest['got']:.2e}, allowed {limit:.2e}", ratio
        return "", ratio


@dataclass(frozen=True)
class _Numbers:
    """x, then the tensors and dy of each projection, in the case's dtype."""

    x: Tensor
    projections: tuple[Projection, ...]
    dy: tuple[Tensor, ...]


def check(built: Built, case: Case, device: torch.device, slack: float) -> Verdict:
    """Run a provider once on known numbers; judge y and every gradient."""
    has_lora = built.projections[0].lora_A is not None
    keeps: tuple[Tensor | None, ...] = (None,) * len(built.projections)
    if has_lora and case.dropout:
        keeps = _masks(built, case, device)
        for keep in keeps:
            share, wanted = keep.double().mean().item(), 1 - case.dropout  # type: ignore[union-attr]
            allowed = 1e-3 + 6 * math.sqrt(wanted * case.dropout / (case.M * case.layer.K))
            if abs(share - wanted) > allowed:
                return Verdict(f"keeps {share:.4f} of x, not {wanted:.4f}", math.inf)
    given = _draw(case, device)
    load(built, given.projections)
    torch.manual_seed(SEED)
    x = given.x.clone().requires_grad_()
    ys = built.call(x)
    if [y.shape for y in ys] != [dy.shape for dy in given.dy]:
        return Verdict(f"y has the shapes {[list(y.shape) for y in ys]}", math.inf)
    dx, *others = torch.autograd.grad(ys, [x, *built.trained], given.dy)
    got = {"dx": dx} | {f"y{i}": y.detach() for i, y in enumerate(ys)}
    for i in range(len(ys) if has_lora else 0):
        got[f"dlora_A{i}"], got[f"dlora_B{i}"] = others[2 * i : 2 * i + 2]
    scale = ALPHA_PER_RANK if has_lora else 0.0
    return _judge(got, given, keeps, scale, case.dropout if has_lora else 0.0, slack)


def _judge(
    got: dict[str, Tensor], given: _Numbers, keeps: Sequence[Tensor | None], scale: float,
    dropout: float, slack: float,
) -> Verdict:  # fmt: skip
    M = given.x.shape[0]
    eager = _reference(given, keeps, slice(0, M), scale, dropout, given.x.dtype)
    errors = {name: _Error() for name in got}
    sums: dict[str, Tensor] = {}
    for start in range(0, M, ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        exact = _reference(given, keeps, rows, scale, dropout, torch.float64)
        for name in got:
            if name.startswith("dlora"):  # a sum over rows
                sums[name] = sums[name] + exact[name] if name in sums else exact[name]
            else:
                errors[name].add(got[name][rows], eager[name][rows], exact[name])
    for name, total in sums.items():
        errors[name].add(got[name], eager[name], total)
    worst = 0.0
    for name, error in errors.items():
        wrong, ratio = error.judge(slack)
        if wrong:
            return Verdict(f"{name}: {wrong}", ratio)
        worst = max(worst, ratio)
    return Verdict("", worst)


def _reference(
    given: _Numbers, keeps: Sequence[Tensor | None], rows: slice, scale: float, dropout: float,
    dtype: torch.dtype,
) -> dict[str, Tensor]:  # fmt: skip
    """Every output for some rows of x; dlora_A and dlora_B are the share of those rows."""
    found: dict[str, Tensor] = {}
    x = given.x[rows].to(dtype)
    for i, (p, dy, keep) in enumerate(zip(given.projections, given.dy, keeps, strict=True)):
        weight, lora_A, lora_B = (t.to(dtype) for t in (p.weight, p.lora_A, p.lora_B))  # type: ignore[union-attr]
        how: dict[str, Any] = {"scale": scale, "dropout": dropout}
        how["keep"] = None if keep is None else keep[rows]
        bias = None if p.bias is None else p.bias.to(dtype)
        found[f"y{i}"] = reference.forward(x, weight, lora_A, lora_B, bias=bias, **how)
        gradients = reference.backward(dy[rows].to(dtype), x, weight, lora_A, lora_B, **how)
        found["dx"] = found["dx"] + gradients.dx if i else gradients.dx
        found[f"dlora_A{i}"], found[f"dlora_B{i}"] = gradients.dlora_A, gradients.dlora_B
    return found


def _masks(built: Built, case: Case, device: torch.device) -> tuple[Tensor, ...]:
    """The mask [M, K] that each projection draws after `manual_seed(SEED)`."""
    probe = []
    for p in built.projections:
        constant = {"lora_A": 2.0**-3, "lora_B": 2.0**-6}  # so that dx fits float16 at any shape
        values = {name: torch.full_like(getattr(p, name), v) for name, v in constant.items()}
        bias = None if p.bias is None else torch.zeros_like(p.bias)
        probe.append(Projection(torch.zeros_like(p.weight), bias, **values))
    load(built, probe)
    x = torch.ones(case.M, case.layer.K, device=device, dtype=case.torch_dtype).requires_grad_()
    keeps = []
    for i in range(len(probe)):
        torch.manual_seed(SEED)
        y = built.call(x)[i]
        (dx,) = torch.autograd.grad(y, [x], torch.ones_like(y))
        keeps.append(dx != 0)
    return tuple(keeps)


@torch.no_grad()
def load(built: Built, numbers: Sequence[Projection]) -> None:
    """Copy numbers into a provider's own tensors, whatever their layout."""
    for own, given in zip(built.projections, numbers, strict=True):
        for name in ("weight", "bias", "lora_A", "lora_B"):
            target = getattr(own, name)
            if target is not None:
                target.copy_(getattr(given, name))


def _draw(case: Case, device: torch.device) -> _Numbers:
    """Random numbers, the same for every provider; both terms of y have the same size."""
    draw = torch.Generator(device).manual_seed(SEED)
    dtype, M, K, R = case.torch_dtype, case.M, case.layer.K, case.R

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=draw, device=device) * std).to(dtype)

    projections = tuple(
        Projection(
            weight=normal(N, K, std=K**-0.5),
            bias=normal(N) if case.layer.bias else None,
            lora_A=normal(R, K, std=K**-0.5),
            lora_B=normal(N, R, std=R**-0.5 / ALPHA_PER_RANK),
        )
        for N in case.layer.N
    )
    return _Numbers(normal(M, K), projections, tuple(normal(M, N) for N in case.layer.N))
