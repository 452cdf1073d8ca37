"""What `lora-kernels` runs: doctor, tune, compile-report, and what they measure and compile with.

Rule: nothing imports this wing but the command line and the benchmarks; it drives strategies and
Triton's compiler from outside.
"""
