"""The sizes of known models' layers: tuned tables and results are found again by what is here."""

from __future__ import annotations

import json

import pytest
import torch

from lora_kernels.tools.shapes import MODELS, problems_of

CPU = torch.device("cpu")
# Keys of tuned tables, from the count of layers to N and K: a change loses what users measured.
KEYS = {
    "roberta-base": "1x-N768-K768 1x-N3072-K768 1x-N768-K3072 3x-N768-K768 2x-N768-K768",
    "roberta-large": "1x-N1024-K1024 1x-N4096-K1024 1x-N1024-K4096 3x-N1024-K1024 2x-N1024-K1024",
    "gpt2": "1x-N2304-K768 2-of-N2304-K768 1x-N768-K768 1x-N3072-K768 1x-N768-K3072",
    "gpt2-medium": "1x-N3072-K1024 2-of-N3072-K1024 1x-N1024-K1024 1x-N4096-K1024 1x-N1024-K4096",
    "gpt2-large": "1x-N3840-K1280 2-of-N3840-K1280 1x-N1280-K1280 1x-N5120-K1280 1x-N1280-K5120",
    "gpt2-xl": "1x-N4800-K1600 2-of-N4800-K1600 1x-N1600-K1600 1x-N6400-K1600 1x-N1600-K6400",
    "deberta-v3-base": "1x-N768-K768 1x-N3072-K768 1x-N768-K3072 3x-N768-K768 2x-N768-K768",
    "deberta-v2-xlarge": (
        "1x-N1536-K1536 1x-N6144-K1536 1x-N1536-K6144 3x-N1536-K1536 2x-N1536-K1536"
    ),
    "llama-8b": (
        "1x-N4096-K4096 1x-N1024-K4096 1x-N14336-K4096 1x-N4096-K14336 3x-N4096-K4096 "
        "2x-N14336-K4096"
    ),
}


def keys(model: str, *, dropout: bool = True) -> set[str]:
    problems = problems_of(model, 2048, 8, [torch.bfloat16], CPU)
    return {problem.key for problem in problems if problem.dropout == dropout}


@pytest.mark.parametrize("model", MODELS)
def test_the_keys_of_a_model(model):
    sizes = [entry.partition("-N") for entry in KEYS[model].split()]
    expected = {f"{count}-M2048-N{size}-R16-bfloat16" for count, _, size in sizes}
    assert keys(model, dropout=False) == expected
    assert keys(model) == {f"{key}-dropout" for key in expected}


def test_a_directory_with_a_config_is_a_model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_embd": 64}))
    shapes = {(p.N, p.K) for p in problems_of(str(tmp_path), 8, 1, [torch.float32], CPU)}
    assert shapes == {(192, 64), (64, 64), (256, 64), (64, 256)}
    config = {"model_type": "bert", "hidden_size": 768, "intermediate_size": 3072}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert keys(str(tmp_path)) == keys("roberta-base")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="neither hidden_size nor n_embd"):
        problems_of(str(tmp_path), 8, 1, [torch.float32], CPU)
    with pytest.raises(ValueError, match="unknown model 'nothing'"):
        problems_of("nothing", 8, 1, [torch.float32], CPU)
