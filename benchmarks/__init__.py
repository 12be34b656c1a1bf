"""Speed of our code beside a plain PyTorch counterpart, measured in one run: `python -m benchmarks.sampler`."""
