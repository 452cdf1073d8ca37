"""loralib's files: converted exactly into our layers, or refused by name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lora_kernels import FusedLoRALinear, load_adapter
from tests.adapters.test_load_save import injected
from tests.support import zoo

loralib = pytest.importorskip("loralib")


class GPT2Attention(nn.Module):
    """The one layer of loralib's GPT-2 that has LoRA: query, key and value in one weight."""

    def __init__(self, c_attn: nn.Module) -> None:
        super().__init__()
        self.c_attn = c_attn


@pytest.mark.parametrize(
    "enabled, given",
    [
        ((True, False, True), (True, False, True)),
        ((False, True, False), (False, True, False)),
        ((True, True, True), None),
        ((True,), None),
    ],
    ids=["q-v", "k", "all-deduced", "plain"],
)
@pytest.mark.parametrize("conv1d", [False, True], ids=["linear", "conv1d"])
def test_a_loralib_merged_linear_is_converted_exactly(enabled, given, conv1d, tmp_path):
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    base = Conv1D(36, 8) if conv1d else nn.Linear(8, 36)
    theirs = loralib.MergedLinear(
        8,
        36,
        r=3,
        lora_alpha=5,
        enable_lora=list(enabled),
        fan_in_fan_out=conv1d,
        merge_weights=False,
    )
    theirs.load_state_dict(base.state_dict(), strict=False)
    zoo.randomise(theirs, "lora_", "bias")
    base.load_state_dict(theirs.state_dict(), strict=False)
    torch.save(loralib.lora_state_dict(GPT2Attention(theirs)), tmp_path / "lora.pt")
    model = GPT2Attention(base).double()
    with pytest.raises(ValueError, match="alpha" if given is None else "enable_lora="):
        load_adapter(model, tmp_path / "lora.pt")
    load_adapter(model, tmp_path / "lora.pt", alpha=5, enable_lora=given)
    assert model.c_attn.rank == 3
    third = 36 // len(enabled)
    adapted = tuple((i * third, (i + 1) * third) for i, on in enumerate(enabled) if on)
    assert model.c_attn.columns == (None if enabled == (True,) else adapted)
    x = torch.randn(5, 8, dtype=torch.float64)
    expected = theirs.double()(x)
    torch.testing.assert_close(model.c_attn(x), expected)
    weight = base.weight if conv1d else base.weight.T
    assert (expected - x @ weight - base.bias).abs().max() > 0.1
    load_adapter(model, tmp_path / "lora.pt", enable_lora=given)
    torch.testing.assert_close(model.c_attn(x), expected)


def test_a_loralib_file_may_hold_whole_heads_but_no_loose_bias(tmp_path):
    source = injected()
    state = {key: value for key, value in source.state_dict().items() if "lora_" in key}
    head = {
        key: value for key, value in source.state_dict().items() if key.startswith("classifier")
    }
    save_file(state | head, tmp_path / "lora.safetensors")
    model = zoo.build("roberta")
    load_adapter(model, tmp_path / "lora.safetensors", alpha=5)
    assert torch.equal(zoo.logits(model), zoo.logits(source))
    save_file(state | {"classifier.dense.bias": torch.zeros(32)}, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match=r"classifier.dense.bias but not classifier.dense.weight"):
        load_adapter(zoo.build("roberta"), tmp_path / "lora.safetensors", alpha=5)
    with pytest.raises(ValueError, match="does not fit enable_lora="):
        load_adapter(
            GPT2Attention(nn.Linear(8, 36)),
            _merged_file(tmp_path),
            alpha=5,
            enable_lora=(True, True),
        )


def test_a_loralib_merged_linear_of_another_model_is_reported(tmp_path):
    with pytest.raises(ValueError, match="c_attn does not exist"):
        load_adapter(nn.ModuleDict({"other": nn.Linear(8, 36)}), _merged_file(tmp_path), alpha=5)


@pytest.mark.parametrize("rank, columns", [(3, ((0, 12), (24, 36))), (6, None)])
def test_a_merged_linear_does_not_fit_a_layer_with_other_columns(rank, columns, tmp_path):
    """The file has LoRA on the first two thirds."""
    layer = FusedLoRALinear.from_linear(nn.Linear(8, 36), rank=rank, columns=columns)
    here = columns or "the whole layer"
    message = f"c_attn has LoRA on columns ((0, 12), (12, 24)) in the file and on {here} in the"
    with pytest.raises(ValueError, match=re.escape(message)):
        load_adapter(GPT2Attention(layer), _merged_file(tmp_path), enable_lora=(True, True, False))


def _merged_file(tmp_path: Path) -> Path:
    tensors = {"c_attn.lora_A": torch.ones(6, 8), "c_attn.lora_B": torch.ones(24, 3)}
    save_file(tensors, tmp_path / "merged.safetensors")
    return tmp_path / "merged.safetensors"
