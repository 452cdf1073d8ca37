"""The cases of the kernel suite: names and sizes stay, since the rows of results go by them."""

from __future__ import annotations

import pytest

from bench import cases, subjects

# K, then the N of each projection.
SIZES = {
    "roberta-base.query": (768, 768),
    "roberta-base.up": (768, 3072),
    "roberta-base.down": (3072, 768),
    "roberta-base.qkv": (768, 768, 768, 768),
    "roberta-large.query": (1024, 1024),
    "roberta-large.up": (1024, 4096),
    "roberta-large.down": (4096, 1024),
    "roberta-large.qkv": (1024, 1024, 1024, 1024),
    "gpt2.c_attn": (768, 2304),
    "gpt2.attn.c_proj": (768, 768),
    "gpt2.c_fc": (768, 3072),
    "gpt2.mlp.c_proj": (3072, 768),
    "gpt2-medium.c_attn": (1024, 3072),
    "gpt2-medium.attn.c_proj": (1024, 1024),
    "gpt2-medium.c_fc": (1024, 4096),
    "gpt2-medium.mlp.c_proj": (4096, 1024),
    "gpt2-large.c_attn": (1280, 3840),
    "gpt2-large.attn.c_proj": (1280, 1280),
    "gpt2-large.c_fc": (1280, 5120),
    "gpt2-large.mlp.c_proj": (5120, 1280),
    "gpt2-xl.c_attn": (1600, 4800),
    "gpt2-xl.attn.c_proj": (1600, 1600),
    "gpt2-xl.c_fc": (1600, 6400),
    "gpt2-xl.mlp.c_proj": (6400, 1600),
    "deberta-v2-xlarge.query_proj": (1536, 1536),
    "deberta-v2-xlarge.up": (1536, 6144),
    "deberta-v2-xlarge.down": (6144, 1536),
    "llama-8b.q_proj": (4096, 4096),
    "llama-8b.k_proj": (4096, 1024),
    "llama-8b.up_proj": (4096, 14336),
    "llama-8b.down_proj": (14336, 4096),
    "llama-8b.qkv": (4096, 4096, 1024, 1024),
}


def test_every_layer_keeps_its_name_its_place_and_its_size():
    found = {name: (layer.K, *layer.N) for name, layer in cases.LAYERS.items()}
    assert list(found.items()) == list(SIZES.items())  # in this order: `--part` counts by it
    for name, layer in cases.LAYERS.items():
        assert layer.name == name and len(layer.children) == len(layer.N)
        assert layer.conv1d == name.startswith("gpt2") and layer.bias != name.startswith("llama")


def test_whole_models_have_the_widths_of_their_layers():
    widths = {
        name: (config.get("hidden_size") or config["n_embd"], config.get("intermediate_size"))
        for name, config in ((row.name, row.config) for row in subjects.MODELS.values())
    }
    assert widths == {
        "roberta-base": (768, 3072), "roberta-large": (1024, 4096), "gpt2": (768, None),
        "gpt2-medium": (1024, None), "deberta-v2-xlarge": (1536, 6144),
        "roberta-base-2-blocks": (768, 3072),
    }  # fmt: skip


def test_parts_cover_every_case_once():
    rows = cases.full()
    parts = [cases.part_of(rows, f"{i}/3") for i in (1, 2, 3)]
    assert sorted(map(str, sum(parts, ()))) == sorted(map(str, rows))
    assert len({str(case) for case in rows}) == len(rows)
    for bad in ("0/3", "4/3", "x", "1-3"):
        with pytest.raises(ValueError, match="2/5"):
            cases.part_of(rows, bad)


def test_quick_covers_every_goal():
    quick = {(case.layer.name, case.M) for case in cases.quick() if case.R == 16}
    assert {(name, M) for goal in cases.GOALS for name in goal.layers for M in goal.tokens} <= quick
