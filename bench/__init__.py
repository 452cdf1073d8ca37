"""Benchmarks: `python -m bench kernels | end_to_end | host | roofline | plots`.

Every provider is checked against `lora_kernels.reference` before it is timed. Each suite writes
JSON rows to `bench/results/`, one file per device and suite; losses and failures stay in the file.
"""
