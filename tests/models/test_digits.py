"""Images: a tiny random ViT learns scikit-learn's digits by LoRA, and texts are refused by name."""

from __future__ import annotations

import pytest
import torch
import transformers

pytest.importorskip("datasets", reason="the models read their data by it")
from models.arguments import Arguments
from models.data import digits, tasks
from models.train import train


@pytest.fixture
def vit(tmp_path) -> str:
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        image_size=16, patch_size=4, num_channels=1, hidden_size=32, num_hidden_layers=2,
        num_attention_heads=2, intermediate_size=64,
    )  # fmt: skip
    transformers.ViTModel(config).save_pretrained(tmp_path / "vit")
    return str(tmp_path / "vit")


def test_a_vit_learns_digits_by_lora(vit, tmp_path):
    result = train(
        Arguments(
            model=vit, task="digits", rank=8, epochs=4, learning_rate=1e-2, max_train_samples=800,
            train=["embeddings"], output_dir=str(tmp_path / "run"),
        )
    )  # fmt: skip
    assert len(result["fused"]) == 4 and result["parameters"]["head"]["trainable"] == 330
    assert result["metrics"]["test"]["accuracy"] > 0.4 > 3 * result["baseline"]["splits"]["test"]
    assert result["repeated_texts"] == {"validation": 0, "test": 0}


def test_images_are_scaled_and_split_by_class():
    built = digits.build()
    assert sum(map(len, built.splits.values())) == 1797
    for rows in built.splits.values():
        assert len({label for _, label in rows}) == 10
    found = tasks.load(tasks.task_of("digits")).splits
    train_rows, scored, order = digits.encode({"train": found["train"].select(range(5))}, 16, 3)
    values = torch.tensor(train_rows["pixel_values"][:])
    assert values.shape == (5, 3, 16, 16) and values.min() >= -1 and values.max() <= 1
    assert values.min() < -0.9 and values.max() > 0.5 and order["train"] == list(range(5))
    assert scored["train"].column_names == ["labels", "pixel_values"]


def test_a_model_of_texts_is_refused(bert, tmp_path):
    with pytest.raises(ValueError, match="reads no square images"):
        train(Arguments(model=bert, task="digits", output_dir=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()
