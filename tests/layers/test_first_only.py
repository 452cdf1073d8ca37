"""Groups that share the first x of a call alone: DeBERTa's query and key read two tensors."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from lora_kernels import FusedLoRALinear
from lora_kernels.injection.siblings import group_siblings
from tests.support.oracle import DEVICE
from tests.support.small_layers import nodes_of

pytestmark = pytest.mark.usefixtures("many_tokens")


@pytest.fixture
def x():
    torch.manual_seed(0)
    return torch.randn(2, 5, 24, device=DEVICE, requires_grad=True)


class Disentangled(nn.Module):
    """DeBERTa's attention: query and key project the hidden states, then the table of positions."""

    def __init__(self, dropout=0.0) -> None:
        super().__init__()
        for name in ("query_proj", "key_proj", "value_proj"):
            layer = FusedLoRALinear(24, 24, rank=4, dropout=dropout, device=DEVICE)
            nn.init.normal_(layer.lora_B)
            setattr(self, name, layer)

    def forward(self, hidden, table):
        content = self.query_proj(hidden) * 2 + self.key_proj(hidden) * 3 - self.value_proj(hidden)
        return content.sum(1, keepdim=True) + self.query_proj(table) + 4 * self.key_proj(table)


def test_only_the_first_x_of_a_call_is_shared_where_others_read_a_second(x):
    # In float64: grouped, the same terms are added in another order.
    model, table = Disentangled().double(), torch.randn(1, 7, 24, device=DEVICE).double()
    x = x.detach().double().requires_grad_()
    leaves = [x, *(p for p in model.parameters() if p.requires_grad)]
    alone = model(x, table)
    gradients = torch.autograd.grad(alone.square().sum(), leaves)
    assert len(nodes_of(alone)) == 5
    assert group_siblings(model) == (("query_proj", "key_proj", "value_proj"),)
    for call in (model, model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        y = call(x, table)
        assert len(nodes_of(y)) == 3, "the value does not read the table"
        torch.testing.assert_close(y, alone)
    for a, b in zip(
        torch.autograd.grad(model(x, table).square().sum(), leaves), gradients, strict=True
    ):
        torch.testing.assert_close(a, b)
        assert b.abs().sum() > 0
    torch.testing.assert_close(model.query_proj(x), copy.deepcopy(model.query_proj)(x))


def test_checkpointing_a_parent_with_two_inputs_recomputes_the_same_step(x):
    model, table = Disentangled(dropout=0.5), torch.randn(1, 7, 24, device=DEVICE)
    group_siblings(model)
    wanted = [x, model.query_proj.lora_A, model.value_proj.lora_B]
    torch.manual_seed(2)
    plain = torch.autograd.grad(model(x, table).square().sum(), wanted)
    torch.manual_seed(2)
    y = torch.utils.checkpoint.checkpoint(model, x, table, use_reentrant=False)
    for a, b in zip(torch.autograd.grad(y.square().sum(), wanted), plain, strict=True):
        torch.testing.assert_close(a, b)


def test_a_parent_with_two_inputs_compiles_to_one_graph(x):
    model, table = Disentangled(), torch.randn(1, 7, 24, device=DEVICE)
    group_siblings(model)
    expected = model(x, table)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(x, table), expected)
    assert len(nodes_of(model(x, table))) == 3, "and eager calls find the group as it was"


def test_an_interrupted_call_leaves_nothing_to_the_next(x):
    model, table = Disentangled(), torch.randn(1, 7, 24, device=DEVICE)
    expected = model(x, table)
    group_siblings(model)
    with pytest.raises(ValueError, match="features"):
        model(x, table[..., :5])
    torch.testing.assert_close(model(x, table), expected)
    with pytest.raises(ValueError, match="features"):
        model(x[..., :5], table)
    torch.testing.assert_close(model(x, table), expected)
    assert len(nodes_of(model(x, table))) == 3
