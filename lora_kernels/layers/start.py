"""How lora_A and lora_B start: by the names, the formulas and the random draws of PEFT.

"pissa" and "olora" take the largest part out of the frozen weight: weight - scale * lora_B lora_A
stays, so the layer starts at the base model with adapters that are not zero.
"""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import Tensor, nn

START = "kaiming"
STARTS = (START, "gaussian", "orthogonal", "pissa", "pissa_niter_<n>", "olora")


def check_start(init: Any, rank: int) -> str:
    """The name of a start; ValueError for another, or an odd rank where it must be even."""
    known = isinstance(init, str) and (
        init in STARTS[:4] or init == "olora" or re.fullmatch(r"pissa_niter_\d+", init)
    )
    if not known:
        raise ValueError(f"init must be one of {', '.join(STARTS)}: got {init!r}")
    if init == "orthogonal" and rank % 2:
        raise ValueError(f"init='orthogonal' needs an even rank: got {rank}")
    return init


def takes_weight(init: str) -> bool:
    """Whether the start takes a part out of the frozen weight."""
    return init.startswith(("pissa", "olora"))


@torch.no_grad()
def drawn(init: str, weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """lora_A [R, K] and lora_B [N, R] in float32 (float64 for a weight in it), for weight [N, K].

    Random ones are drawn on the CPU. Like PEFT, which makes two linear layers before it fills them,
    they draw those layers' values first: the same seed gives PEFT's values.
    """
    N, K = weight.shape
    wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    for sizes in ((K, rank), (rank, N)):
        nn.Linear(*sizes, bias=False, dtype=torch.float32, device="cpu")
    if init == "olora":
        Q, R = torch.linalg.qr(wide)
        return R[:rank].contiguous(), Q[:, :rank].contiguous()
    if init.startswith("pissa"):
        if init == "pissa":
            V, S, U = torch.linalg.svd(wide, full_matrices=False)
        else:
            V, S, Ut = torch.svd_lowrank(wide, rank, niter=int(init.rpartition("_")[2]))
            U = Ut.T
        root = (S[:rank] / scale).sqrt()
        return root[:, None] * U[:rank], V[:, :rank] * root
    if init == "gaussian":
        lora_A = torch.empty(rank, K, dtype=torch.float32).normal_(std=1 / rank)
        return lora_A.to(wide), torch.zeros(N, rank).to(wide)
    orthogonal, _ = torch.linalg.qr(torch.randn(rank, rank, dtype=torch.float32))
    lora_A = torch.randn(K, rank // 2).mm(orthogonal[0::2]).T / 10
    lora_B = torch.randn(rank // 2, N).T.mm(orthogonal[1::2]) / 10
    return lora_A.contiguous().to(wide), lora_B.contiguous().to(wide)


def kaiming(lora_A: Tensor, lora_B: Tensor) -> None:
    """The common start, in place: lora_A as `nn.Linear` draws its weight, lora_B zero."""
    nn.init.kaiming_uniform_(lora_A, a=math.sqrt(5))
    nn.init.zeros_(lora_B)
