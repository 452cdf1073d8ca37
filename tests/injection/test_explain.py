"""explain: the strategy of a problem, or of every layer of a model, with reason and tiles."""

from __future__ import annotations

import dataclasses

import peft
import pytest
import torch
from torch import nn

from lora_kernels import (
    FusedLoRALinear,
    LoRAConfig,
    add_lora,
    add_loras,
    explain,
    fuse_peft,
    unfuse_peft,
)
from lora_kernels.hardware.tiles import KERNELS
from lora_kernels.injection.report import TYPICAL_TOKENS
from lora_kernels.strategies.choose import choose
from lora_kernels.strategies.problem import FEW_ELEMENTS, Problem
from tests.support import zoo
from tests.support.oracle import DEVICE

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

PROBLEM = Problem(2048, 768, 768, 8, torch.bfloat16, "sm_86")


def roberta(**changes) -> nn.Module:
    model = zoo.build("roberta").train()
    add_lora(model, LoRAConfig(**{"rank": 3, "targets": ("query", "value")} | changes))
    return model


def peft_model(**changes) -> nn.Module:
    config = {"r": 3, "task_type": "SEQ_CLS", "target_modules": ["query", "value"]} | changes
    return peft.get_peft_model(zoo.build("roberta"), peft.LoraConfig(**config))


def answers(explanation) -> dict[str, tuple[Problem, str]]:
    return {name: (problem, choice.strategy) for name, problem, choice in explanation.rows}


def test_a_problem():
    explanation = explain(PROBLEM)
    assert explanation.rows == (("problem", PROBLEM, choose(PROBLEM)),)
    lines = str(explanation).splitlines()
    assert lines[0] == "problem" and lines[1].strip() == str(PROBLEM)
    choice = choose(PROBLEM)
    assert lines[2].strip() == f"{choice.strategy}: {choice.reason}"


def test_the_tiles_printed_are_those_of_the_kernels_that_run():
    seen = set()
    for changes in ({}, {"dropout": True}, {"N": 4096, "K": 4096, "M": 8192}, {"arch": "sm_75"}):
        problem = dataclasses.replace(PROBLEM, **changes)
        choice, text = choose(problem), str(explain(problem))
        printed = [line.split() for line in text.splitlines()[3:]]
        for kernel, tile, *_ in printed:
            assert kernel in KERNELS
            m, n, k, warps, stages = getattr(choice.tiles, kernel)
            assert tile == "x".join(str(size) for size in (m, n, k) if size)
            line = next(line for line in text.splitlines() if line.split()[0] == kernel)
            assert f"{warps} warps, {stages} stages" in line
        assert bool(printed) == (choice.strategy != "library")
        seen.add((choice.strategy, tuple(line[0] for line in printed)))
    assert len({strategy for strategy, _ in seen}) >= 2


def test_every_layer_of_a_model():
    model = roberta(group=False)
    found = answers(explain(model))
    paths = [
        f"roberta.encoder.layer.{i}.attention.self.{name}"
        for i in range(2)
        for name in ("query", "value")
    ]
    assert list(found) == paths
    problem = Problem(TYPICAL_TOKENS, 32, 32, 3, torch.float32, "cpu")
    assert set(found.values()) == {(problem, "library")}


def test_layers_with_one_answer_share_a_line():
    text = str(explain(roberta(targets=("query", "value", "output.dense"), group=False)))
    lines = text.splitlines()
    assert "roberta.encoder.layer.0.attention.self.query and 5 more" in lines
    assert "roberta.encoder.layer.0.output.dense and 1 more" in lines
    assert text.count("library: ") == 2 and "value" not in text
    assert "    M=2048 N=32 K=48 R=3 float32 cpu" in lines
    (alone,) = (line for line in str(explain(FusedLoRALinear(8, 6))).splitlines() if line[0] != " ")
    assert alone == "FusedLoRALinear"


@pytest.mark.usefixtures("many_tokens")
def test_a_group_is_one_problem_of_so_many_layers():
    found = answers(explain(roberta(targets=("query", "key", "value"))))
    assert {problem.segments for problem, _ in found.values()} == {3} and len(found) == 6
    assert "3 layers, M=2048 N=32" in str(explain(roberta(targets=("query", "key", "value"))))
    llama = zoo.build("llama")
    add_lora(llama, LoRAConfig(rank=2, targets=("q_proj", "k_proj", "v_proj")))
    widths = {(problem.segments, problem.N) for problem, _ in answers(explain(llama)).values()}
    assert widths == {(3, 32)}, "the widest of them: k and v are narrower"


def test_dropout_counts_in_training_alone():
    model = roberta(dropout=0.1)
    assert all(problem.dropout for problem, _ in answers(explain(model)).values())
    model.eval()
    assert not any(problem.dropout for problem, _ in answers(explain(model)).values())


def test_tokens_and_dtype_are_those_of_the_call():
    model = roberta(group=False)
    for problem, _ in answers(explain(model, tokens=7, dtype=torch.bfloat16)).values():
        assert problem == Problem(7, 32, 32, 3, torch.bfloat16, "cpu")
    model.half()
    assert {p.dtype for p, _ in answers(explain(model)).values()} == {torch.float16}
    fused = peft_model()
    fuse_peft(fused, group=False)
    for problem, _ in answers(explain(fused, tokens=7, dtype=torch.bfloat16)).values():
        assert problem == Problem(7, 32, 32, 3, torch.bfloat16, "cpu")


def test_the_strategy_is_the_one_that_a_layer_was_given():
    layer = FusedLoRALinear(8, 6, rank=2, strategy="split")
    ((name, problem, choice),) = explain(layer).rows
    assert name == "FusedLoRALinear" and choice == choose(problem, "split")
    assert choice.reason == "named by the caller" or "split was asked for" in choice.reason
    sliced = FusedLoRALinear.from_linear(
        torch.nn.Linear(8, 6), rank=2, strategy="fused", columns=[(0, 3)]
    )
    assert "fused was asked for, but: columns" in str(explain(sliced))


@pytest.mark.parametrize("tokens", [-3, 2.5, None])
def test_a_count_of_tokens_that_is_none_is_refused(tokens):
    with pytest.raises(ValueError, match=f"tokens must be an integer of at least 0: got {tokens}"):
        explain(FusedLoRALinear(8, 6, rank=2), tokens=tokens)


def test_what_is_explained_is_what_runs():
    for strategy in ("auto", "split", "hybrid"):
        layer = FusedLoRALinear(8, 6, rank=2, strategy=strategy)
        tokens = FEW_ELEMENTS if strategy == "auto" else 5  # tests/autograd/test_few.py has the few
        ((_, _, choice),) = explain(layer, tokens=tokens).rows
        y = layer(torch.randn(tokens, 8))
        assert y.grad_fn.call.strategy.name == choice.strategy
        assert y.grad_fn.call.tiles == choice.tiles


@pytest.mark.usefixtures("many_tokens")
def test_a_peft_model_that_was_fused():
    model = peft_model(lora_dropout=0.1, r=5).train()
    fuse_peft(model)
    found = answers(explain(model))
    assert len(found) == 4 and all(name.startswith("base_model.model.") for name in found)
    problem = Problem(TYPICAL_TOKENS, 32, 32, 5, torch.float32, "cpu", dropout=True, segments=2)
    assert set(found.values()) == {(problem, "library")}
    model.eval()
    assert not any(problem.dropout for problem, _ in answers(explain(model)).values())
    first = next(m for m in model.modules() if hasattr(m, "lora_A") and len(m.lora_A))
    first.merge()
    assert len(answers(explain(model))) == 3, "what runs PEFT's own forward is not ours to explain"
    first.unmerge()
    assert len(answers(explain(model))) == 4


def test_a_model_without_lora_layers_is_one_clear_error():
    with pytest.raises(ValueError, match="Linear has no LoRA layers: call add_lora, add_loras or"):
        explain(nn.Linear(3, 3))
    model = peft_model()
    with pytest.raises(ValueError, match="has no LoRA layers"):
        explain(model)
    fuse_peft(model)
    assert explain(model).rows
    with pytest.raises(ValueError, match="has no LoRA layers"):
        explain(unfuse_peft(model))


def test_explaining_changes_nothing():
    model = roberta(dropout=0.1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    first, second = explain(model), explain(model)
    assert first == second and str(first) == str(second)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_model_with_several_adapters():
    model = zoo.build("roberta").train()
    ranks = {"a": 3, "b": 8, "c": 1}
    add_loras(
        model,
        {name: LoRAConfig(rank=r, targets=("query", "value")) for name, r in ranks.items()},
    )
    explanation = explain(model, tokens=48)
    paths = {name for name, _ in model.named_modules() if name.endswith(("query", "value"))}
    assert {name for name, _, _ in explanation.rows} == paths
    assert all(problem.M == 48 and problem.R == 8 for _, problem, _ in explanation.rows)
    assert "3 adapters, one frozen product for all, then small products of each" in str(explanation)


def test_several_adapters_in_kernels_share_each_launch():
    model = zoo.build("roberta").to(DEVICE).train()
    configs = {name: LoRAConfig(rank=3, strategy="split", targets="query") for name in "ab"}
    add_loras(model, configs)
    text = str(explain(model))
    assert "split: 2 adapters, all in each launch; " in text and "tiles" in text
