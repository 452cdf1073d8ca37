"""Several adapters on one model: each is what it would be alone, whatever the others are."""

from __future__ import annotations

import copy
import pickle

import peft
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import lora_kernels
from lora_kernels import (
    LoRAConfig,
    adapter_rows,
    add_lora,
    add_loras,
    drop_adapter,
    load_adapters,
    save_adapters,
)
from lora_kernels.injection.inject import packed_layers
from lora_kernels.injection.packs import alone
from tests.support import zoo

HEADS = {"roberta": "classifier", "gpt2": "score", "bert": "classifier"}
TARGETS = {
    "roberta": "all-linear",
    "bert": ("query", "value"),
    "gpt2": ("c_attn.q", "c_attn.v", "attn.c_proj", "c_fc"),
}
RANKS = {"a": 1, "b": 3, "c": 8}
ROWS = {"a": 2, "b": 3, "c": 5}


def configs(name: str, dropout: float = 0.0, ranks=RANKS) -> dict[str, LoRAConfig]:
    targets = TARGETS[name]
    return {
        each: LoRAConfig(
            rank=rank,
            alpha=4 + 3 * i,
            dropout=dropout * i / 2,
            targets=targets if isinstance(targets, tuple) else (targets,),
            train=(HEADS[name],),
        )
        for i, (each, rank) in enumerate(ranks.items())
    }


SEEDS = {name: i + 5 for i, name in enumerate(RANKS)}


def plain(name: str) -> nn.Module:
    """A model without dropout of its own, which would draw for all rows together."""
    model = zoo.build(name)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.train()


def packed(name: str, dropout: float = 0.0) -> nn.Module:
    model = plain(name)
    add_loras(model, configs(name, dropout), seeds=SEEDS)
    return model


def batch(model: nn.Module, adapter: str, step: int, rows: int | None = None):
    draw = torch.Generator().manual_seed(100 * SEEDS[adapter] + step)
    rows = ROWS[adapter] if rows is None else rows
    ids = torch.randint(3, model.config.vocab_size, (rows, 7), generator=draw)
    return ids, torch.randint(0, model.config.num_labels, (rows,), generator=draw)


def own_parameters(model: nn.Module, adapter: str) -> list[nn.Parameter]:
    return [p for n, p in model.named_parameters() if adapter in n.split(".") and p.requires_grad]


def train_alone(name: str, adapter: str, steps: int, dropout: float, **options) -> list[float]:
    model = plain(name)
    torch.manual_seed(SEEDS[adapter])
    add_lora(model, configs(name, dropout)[adapter])
    trained = [p for p in model.parameters() if p.requires_grad]
    learning_rate = 1e-3 * SEEDS[adapter]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.1, **options)
    losses = []
    for step in range(steps):
        ids, labels = batch(model, adapter, step)
        loss = cross_entropy(model(input_ids=ids).logits, labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 0.5)
        optimizer.step()
        losses.append(loss.item())
    return losses


def optimizer_of(model: nn.Module, **options) -> torch.optim.AdamW:
    groups = [
        {"params": own_parameters(model, each), "lr": 1e-3 * SEEDS[each]}
        for each in RANKS
        if own_parameters(model, each)
    ]
    return torch.optim.AdamW(groups, weight_decay=0.1, **options)


def step_together(model: nn.Module, step: int, rows=ROWS) -> dict[str, torch.Tensor]:
    """The losses of all adapters, their gradients in place."""
    batches = {each: batch(model, each, step, count) for each, count in rows.items()}
    with adapter_rows(model, rows):
        logits = model(input_ids=torch.cat([ids for ids, _ in batches.values()])).logits
        losses = {
            each: cross_entropy(own, batches[each][1])
            for each, own in zip(rows, logits.split(list(rows.values())), strict=True)
        }
        sum(losses.values()).backward()
    return losses


def train_together(model: nn.Module, steps: int, optimizer, rows=ROWS) -> dict[str, list[float]]:
    losses = {each: [] for each in rows}
    for step in range(steps):
        optimizer.zero_grad()
        for each, loss in step_together(model, step, rows).items():
            losses[each].append(loss.item())
        for each in rows:
            nn.utils.clip_grad_norm_(own_parameters(model, each), 0.5)
        optimizer.step()
    return losses


@pytest.mark.parametrize("fused", [None, True], ids=["foreach", "fused"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("name", ["roberta", "gpt2"])
def test_each_adapter_trains_as_it_does_alone(name, dropout, fused):
    model = packed(name, dropout)
    losses = train_together(model, 50, optimizer_of(model, fused=fused))
    for each in RANKS:
        expected = train_alone(name, each, 50, dropout, fused=fused)
        torch.testing.assert_close(losses[each], expected, rtol=1e-6, atol=0)
        assert expected[-1] != expected[0]


def test_parameters_have_the_adapter_in_their_path_and_lie_side_by_side():
    model = packed("roberta")
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    query = "roberta.encoder.layer.0.attention.self.query"
    assert {f"{query}.lora_A.b", f"{query}.lora_B.b", "classifier.b.dense.weight"} <= named.keys()
    assert named[f"{query}.lora_A.b"].shape == (3, 32)
    layer = packed_layers(model)[query]
    for parameters in (layer.lora_A, layer.lora_B):
        assert len({p.untyped_storage().data_ptr() for p in parameters.values()}) == 1
        assert all(p.is_leaf and p.is_contiguous() for p in parameters.values())


def test_an_adapter_without_rows_stays_as_it_is():
    model = packed("roberta")
    before = copy.deepcopy(own_parameters(model, "b"))
    losses = step_together(model, 0, {"c": 4, "a": 2})
    assert all(loss.isfinite() for loss in losses.values())
    for layer in packed_layers(model).values():
        assert not layer.lora_A["b"].grad.any() and not layer.lora_B["b"].grad.any()
        assert layer.lora_B["c"].grad.any()
    assert all(map(torch.equal, before, own_parameters(model, "b")))


def test_blocks_are_equal_unless_rows_are_given():
    model = packed("roberta").eval()
    ids = torch.cat([batch(model, each, 0, 2)[0] for each in RANKS])
    logits = model(input_ids=ids).logits
    with adapter_rows(model, dict.fromkeys(RANKS, 2)):
        assert torch.equal(model(input_ids=ids).logits, logits)
    with adapter_rows(model, {"c": 2, "b": 2, "a": 2}):
        other = model(input_ids=ids.view(3, 2, -1).flip(0).flatten(0, 1)).logits
    torch.testing.assert_close(other.view(3, 2, -1).flip(0).flatten(0, 1), logits)
    with pytest.raises(ValueError, match="7 examples are no equal blocks for 3 adapters"):
        model(input_ids=ids[[0, *range(6)]])
    with (
        pytest.raises(ValueError, match="adapter_rows gives 5 rows"),
        adapter_rows(model, {"a": 5}),
    ):
        model(input_ids=ids)
    with pytest.raises(ValueError, match="no adapter 'd'"), adapter_rows(model, {"d": 6}):
        pass
    with pytest.raises(ValueError, match=r"rows\['a'\]"), adapter_rows(model, {"a": -1}):
        pass
    with pytest.raises(ValueError, match="cannot tell whose rows"):
        model.roberta.encoder.layer[0].attention.self.query(torch.randn(6))


def test_an_adapter_that_goes_leaves_the_others_as_they_were():
    model, other = packed("roberta", 0.1), packed("roberta", 0.1)
    optimizers = optimizer_of(model), optimizer_of(other)
    for each, optimizer in zip((model, other), optimizers, strict=True):
        torch.manual_seed(0)
        train_together(each, 3, optimizer)
    drop_adapter(model, "b")
    assert not own_parameters(model, "b")
    rows = {"a": 2, "c": 5}
    losses = []
    for each, optimizer in zip((model, other), optimizers, strict=True):
        torch.manual_seed(0)
        losses.append(train_together(each, 3, optimizer, rows))
    assert losses[0] == losses[1]
    for each in rows:
        assert all(map(torch.equal, own_parameters(model, each), own_parameters(other, each)))
    with pytest.raises(ValueError, match="no adapter 'b'"):
        drop_adapter(model, "b")
    drop_adapter(model, "a")
    with pytest.raises(ValueError, match="'c' is the last adapter"):
        drop_adapter(model, "c")


@pytest.mark.parametrize("name", ["roberta", "gpt2"])
def test_files_are_those_of_an_adapter_alone_and_peft_loads_them(name, tmp_path):
    model = packed(name)
    train_together(model, 3, optimizer_of(model))
    save_adapters(model, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]
    model.eval()
    again = plain(name).eval()
    report = load_adapters(again, tmp_path)
    assert report is not None and set(report.counts) >= {"a", "b", "c"}
    into = packed(name).eval()
    assert load_adapters(into, tmp_path) is None
    for each in RANKS:
        ids, _ = batch(model, each, 0)
        with adapter_rows(model, {each: len(ids)}):
            expected = model(input_ids=ids).logits
        theirs = peft.PeftModel.from_pretrained(plain(name), tmp_path / each).eval()
        torch.testing.assert_close(theirs(input_ids=ids).logits, expected)
        torch.testing.assert_close(alone(model, each)(input_ids=ids).logits, expected)
        for other in (again, into):
            with adapter_rows(other, {each: len(ids)}):
                assert torch.equal(other(input_ids=ids).logits, expected)
    with pytest.raises(FileNotFoundError, match="no directories of adapters"):
        load_adapters(plain(name), tmp_path / "a")
    (tmp_path / "b").rename(tmp_path / "d")
    with pytest.raises(FileNotFoundError, match="no adapter 'b'"):
        load_adapters(into, tmp_path)


def test_a_model_alone_shares_its_parameters():
    model = packed("roberta")
    one = alone(model, "b")
    assert {id(p) for p in one.parameters()} <= {id(p) for p in model.parameters()}
    assert not packed_layers(one)
    state = torch.get_rng_state()
    alone(model, "a")
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_recomputes_the_same_rows_and_masks(reentrant):
    model = packed("roberta", 0.2)
    torch.manual_seed(0)
    step_together(model, 0)
    expected = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    other = packed("roberta", 0.2)
    other.enable_input_require_grads()
    other.gradient_checkpointing_enable({"use_reentrant": reentrant})
    torch.manual_seed(0)
    step_together(other, 0)
    actual = [p.grad for p in other.parameters() if p.requires_grad]
    torch.testing.assert_close(actual, expected)
    ids = torch.cat([batch(other, each, 0)[0] for each in RANKS])
    with adapter_rows(other, ROWS):
        logits = other(input_ids=ids).logits
    with pytest.raises(RuntimeError, match="call backward inside"):
        logits.sum().backward()


def test_under_autocast_and_torch_compile():
    model, ids = packed("roberta"), torch.cat([batch(packed("roberta"), e, 0)[0] for e in RANKS])
    with adapter_rows(model, ROWS):
        expected = model(input_ids=ids).logits
        with torch.autocast("cpu", torch.bfloat16):
            half = model(input_ids=ids).logits
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager")(input_ids=ids).logits
    torch.testing.assert_close(compiled, expected)
    torch.testing.assert_close(half.float(), expected, rtol=0.1, atol=0.05)
    assert half.dtype is torch.bfloat16


def test_adapters_may_differ_in_their_targets():
    model = plain("bert")
    of = {"a": ("query",), "b": ("value", "key"), "c": ("query", "key", "value")}
    given = {each: LoRAConfig(rank=2, targets=of[each], train=("classifier",)) for each in RANKS}
    add_loras(model, given, seeds=SEEDS)
    ids, _ = batch(model, "b", 0)
    for layer in packed_layers(model).values():
        for parameter in layer.lora_B.values():
            nn.init.normal_(parameter, std=0.3)
    with adapter_rows(model, {"a": 3, "b": 3, "c": 3}):
        together = model(input_ids=ids.repeat(3, 1)).logits
    for each, logits in zip(RANKS, together.split(3), strict=True):
        torch.testing.assert_close(alone(model, each)(input_ids=ids).logits, logits)
    assert not torch.allclose(together[:3], together[3:6])


def test_what_is_known_of_a_model_is_said(recwarn):
    model = plain("roberta").bfloat16()
    report = add_loras(model, configs("roberta"))
    assert any("small updates vanish" in note for note in report.notes)
    assert any("small updates vanish" in str(each.message) for each in recwarn)

    class Bypassing(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            # Hidden from the reader of code: the weight is taken through getattr.
            return self.a(x) @ getattr(self, "b").__getattr__("weight").T  # noqa: B009

    model = Bypassing()
    add_loras(model, {"one": LoRAConfig(targets=("a", "b")), "two": LoRAConfig(targets=("a",))})
    with pytest.warns(UserWarning, match=r"no effect on 1 layers \(b\)"):
        model(torch.randn(2, 3, 8))


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_train_their_own_parameters(how):
    model = packed("roberta", 0.2)
    twin = how(model)
    losses = []
    for each in (twin, model):
        torch.manual_seed(0)
        losses.append({name: loss.item() for name, loss in step_together(each, 0).items()})
        if each is twin:
            assert all(p.grad is None for p in model.parameters())
    assert losses[0] == losses[1]


def test_the_public_names_are_there():
    for name in ("add_loras", "adapter_rows", "save_adapters", "load_adapters", "drop_adapter"):
        assert name in lora_kernels.__all__
