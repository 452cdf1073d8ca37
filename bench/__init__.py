"""Benchmarks: `python -m bench kernels | end_to_end | host | roofline | plots`.

Every provider is checked against `lora_kernels.algebra.reference` before it is timed. Each suite
writes JSON rows to `bench/results/`, one file for each device and suite. Losses and failures stay
in the file.
"""
