"""The algebra of a LoRA layer, in plain PyTorch.

Rule: nothing in this wing imports anything else of ours.
"""
