"""What a training loop takes: a step that replays from a CUDA graph.

Rule: it drives any model through its parameters and its call, and knows no layer of ours.
"""
