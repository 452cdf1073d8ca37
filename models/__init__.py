"""Fine-tuning with fused LoRA layers, run from a checkout: ``python -m models.train``."""
