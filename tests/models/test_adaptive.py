"""Adaptive ranks: what is kept is what matters, the budget holds, and PEFT reads the result."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

pytest.importorskip("datasets", reason="the models read their data by it")
from lora_kernels import FusedLoRALinear, LoRAConfig, add_lora
from models.arguments import Arguments
from models.model.adaptive import AdaptiveRanks, importance, ranks_of, save_shrunk
from models.train import train
from tests.models.test_resume import KillAt, KilledError, leftovers
from tests.models.test_train import Spy

ADAPTIVE = {"method": "lora_adaptive", "rank": 2, "start_rank": 5, "adapt_every": 2, "epochs": 3}


def two_layers(**changes) -> tuple[nn.Sequential, AdaptiveRanks]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4))
    add_lora(model, LoRAConfig(rank=4, targets=("all-linear",)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    arguments = Arguments(method="lora_adaptive", **{"rank": 2, "start_rank": 4, **changes})
    return model, AdaptiveRanks(model, arguments)


def test_importance_is_weight_times_gradient_by_component():
    layer = FusedLoRALinear(3, 2, rank=2)
    with torch.no_grad():
        layer.lora_A.copy_(torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 1.0]]))
        layer.lora_B.copy_(torch.tensor([[1.0, 0.0], [4.0, 5.0]]))
    layer.lora_A.grad = torch.tensor([[1.0, -1.0, 1.0], [9.0, 9.0, 2.0]])
    layer.lora_B.grad = torch.tensor([[2.0, 7.0], [0.5, -2.0]])
    expected = [(1 + 2 + 3) / 3 + (2 + 2) / 2, 2 / 3 + 10 / 2]
    assert importance(layer).tolist() == pytest.approx(expected)
    layer.lora_A.grad[0, 0] = torch.inf
    assert importance(layer)[0] == 0.0, "an overflow of fp16 is no importance"


def test_the_budget_falls_from_the_start_to_the_rank():
    _, ranks = two_layers(adapt_from=0.25, adapt_until=0.75)
    budgets = [ranks.budget(step, 100) for step in range(101)]
    assert budgets[:26] == [8] * 26 and budgets[75:] == [4] * 26
    assert budgets == sorted(budgets, reverse=True)
    # 90 % of the time is left at step 30, 0.9^3 of the 4 components; half at 50, an eighth.
    assert budgets[30] == 4 + 3 and budgets[50] == 4 + 1


def test_the_components_with_the_highest_scores_stay():
    model, ranks = two_layers()
    ranks.mean = {"0": torch.tensor([1.0, 5.0, 2.0, 0.1]), "1": torch.tensor([3.0, 0.2, 0.3, 4.0])}
    ranks.spread = {"0": torch.tensor([1.0, 1.0, 9.0, 1.0]), "1": torch.ones(4)}
    ranks.choose(3)
    ranks.clear()
    assert ranks_of(model) == {"0": 2, "1": 1}
    zero = (model[0].lora_B == 0).all(dim=0).tolist(), (model[1].lora_B == 0).all(dim=0).tolist()
    assert zero == ([True, False, False, True], [True, True, True, False])


def test_shrinking_leaves_the_layer_s_output(tmp_path):
    for rslora in (False, True):
        model, ranks = two_layers()
        for layer in model:
            layer.rslora = rslora
        ranks.kept = {"0": torch.tensor([True, False, True, True]), "1": torch.zeros(4).bool()}
        ranks.clear()
        x = torch.randn(5, 6)
        before = model(x)
        save_shrunk(model, tmp_path / str(rslora))
        assert [layer.rank for layer in model] == [3, 1]
        torch.testing.assert_close(model(x), before)
        saved = load_file(tmp_path / f"{rslora}/adapter_model.safetensors")
        assert saved["base_model.model.0.lora_A.weight"].shape == (3, 6)


def test_columns_of_a_layer_share_their_components(tmp_path):
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=10, n_positions=16)
    model = transformers.GPT2Model(config)
    add_lora(model, LoRAConfig(rank=4, targets=("c_attn.q", "c_attn.v")))
    layer = model.h[0].attn.c_attn
    with torch.no_grad():
        layer.lora_B.copy_(torch.randn(layer.lora_B.shape))
    layer.lora_A.grad, layer.lora_B.grad = (
        torch.randn(p.shape) for p in (layer.lora_A, layer.lora_B)
    )
    A = (layer.lora_A * layer.lora_A.grad).abs().detach()
    assert importance(layer)[1] == pytest.approx(
        float(
            (A[1].mean() + A[5].mean()) / 2 + (layer.lora_B * layer.lora_B.grad)[:, 1].abs().mean()
        )
    )
    ranks = AdaptiveRanks(model, Arguments(method="lora_adaptive", rank=2))
    ranks.kept = {"h.0.attn.c_attn": torch.tensor([False, True, False, True])}
    ranks.clear()
    ids = torch.arange(6)[None]
    before = model.eval()(ids).last_hidden_state
    save_shrunk(model, tmp_path)
    assert layer.lora_A.shape == (2 * 2, 8)
    torch.testing.assert_close(model(ids).last_hidden_state, before)


def test_a_run_ends_within_its_budget_and_peft_reads_its_ranks(arguments, bert, tokenizer):
    peft = pytest.importorskip("peft")
    made, spy = arguments(**ADAPTIVE, learning_rate=2e-2), Spy()
    shapes = set()

    class Shapes(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            layers = [m for m in model.modules() if isinstance(m, FusedLoRALinear)]
            shapes.update(len(layer.lora_A) for layer in layers)

    result = train(made, callbacks=(spy, Shapes()))
    assert shapes == {5}, "what is masked keeps its shape, so nothing is compiled anew"
    ranks = result["ranks"]
    assert sum(ranks.values()) == 2 * len(ranks) == 8
    assert len(set(ranks.values())) > 1, "all layers ended alike: nothing was chosen"
    assert result["lora_parameters_left"] == sum(rank * (32 + 32) for rank in ranks.values())
    assert (made.directory() / "ranks.png").read_bytes()[:4] == b"\x89PNG"
    base = transformers.AutoModelForSequenceClassification.from_pretrained(bert, num_labels=2)
    config = json.loads((made.directory() / "adapter/adapter_config.json").read_text())
    assert config["rank_pattern"]
    theirs = peft.PeftModel.from_pretrained(base, made.directory() / "adapter").eval()
    loaded = {
        name: len(module.lora_A["default"].weight)
        for name, module in theirs.base_model.model.named_modules()
        if hasattr(module, "lora_A")
    }
    assert loaded == {name: max(1, rank) for name, rank in ranks.items()}
    batch = tokenizer(["word1 row3 word7", "word0 row4"], padding=True, return_tensors="pt")
    ours = spy.model.eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(**batch).logits, ours.to("cpu")(**batch).logits)


def test_a_killed_run_chooses_the_same_ranks(arguments):
    changes = {**ADAPTIVE, "save_steps": 1, "dropout": 0.1}
    whole = train(arguments("whole", **changes))
    made = arguments("killed", **changes)
    for step in (5, 9, 14):
        with pytest.raises(KilledError):
            train(made, callbacks=(KillAt(step),))
    assert train(made)["ranks"] == whole["ranks"]
    assert leftovers(made) == leftovers(arguments("whole", **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"start_rank": 1, "rank": 2}, "start-rank 1 is below --rank 2"),
        ({"adapt_from": 0.6}, "adapt-from 0.6 is not before --adapt-until 0.6"),
        ({"adapt_every": 0}, "adapt-every 0 must be at least 1"),
        ({"method": "lora", "adapt_every": 5}, "lora: leave out --adapt-every"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_schedules_that_cannot_be_are_refused(arguments, changes, message):
    with pytest.raises(ValueError, match=message):
        train(arguments(**{"method": "lora_adaptive", **changes}))
