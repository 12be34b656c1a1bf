"""Measures speed, memory and quality, mostly against plain PyTorch in the same run: `python -m benchmarks.sampler`.

The docstring of each module says what it measures and how to run it.
"""
