"""Measures the sampler against plain PyTorch, on random weights in float32.

    python -m benchmarks.sampler [--workloads W1,W2] [--temperatures 0,1] [--threads 1] [--turns 3] [--json FILE]
        [--variants torch.lean,torch.float64,exact,prefix,dual]

The sampler is low-confidence remasking of 64 completion tokens in blocks of 32. Workload W1 has width 256, 6 layers, a
vocabulary of 4096, 64 steps and 8 rows; W2 has 4 layers, a vocabulary of 126464, 32 steps and 4 rows; 8B has one layer
of LLaDA-8B's shape with its whole vocabulary, and takes 5 GB per contestant.

`exact` samples what PyTorch samples (at temperature 0 the same tokens); `prefix` and `dual` are the approximate caches,
refreshed once per block. PyTorch runs with and without `torch.compile`; ratios are to the one with fewer CPU seconds.
Two more variants in PyTorch are not references: `torch.lean` computes the head on the active block alone and has
cheaper noise, and `torch.float64` draws in float64, as the public samplers do. It needs `requirements-torch.txt`.
"""

from __future__ import annotations

import functools

from benchmarks import measure
from benchmarks.workloads import WORKLOADS, prompts, weights

VARIANTS = {"exact": "none", "prefix": "prefix", "dual": "dual"}


def prepare_reference(job: measure.Job) -> measure.Contest:
    """Returns a contestant in PyTorch."""
    import torch

    from benchmarks import reference

    shape = WORKLOADS[job.workload]
    model = reference.build(shape)
    in_float64 = functools.partial(reference.propose, noisy=reference.gumbel_in_float64)
    ways = {"torch.lean": reference.propose_leanly, "torch.float64": in_float64}
    propose = ways.get(job.variant, reference.propose)
    if job.variant == "torch.compile":
        propose = torch.compile(propose)
    tokens = torch.tensor(prompts(shape), dtype=torch.long, device=reference.DEVICE)
    run = functools.partial(reference.sample, model, propose, tokens, shape, job.temperature)
    return measure.Contest(lambda: run().cpu(), warm_up=lambda: run(limit=2).cpu())


def prepare_ours(job: measure.Job) -> measure.Contest:
    """Returns a contestant of ours."""
    import jax

    from benchmarks import ours
    from gdsd_jax.diffusion import SamplerConfig
    from gdsd_jax.diffusion.sampler import compiled_sample

    shape = WORKLOADS[job.workload]
    config = ours.denoiser(shape)
    settings = SamplerConfig(
        completion_length=shape.completion, steps=shape.steps, block_length=shape.block, strategy="low_confidence",
        temperature=job.temperature, cache=VARIANTS[job.variant],
    )  # fmt: skip
    base, tokens = jax.device_put((weights(shape), prompts(shape)))
    arguments = (config, base, None, tokens, None, jax.random.key(0), settings)
    temporary = lambda: compiled_sample.lower(*arguments).compile().memory_analysis().temp_size_in_bytes  # noqa: E731
    return measure.Contest(lambda: jax.device_get(compiled_sample(*arguments).tokens), temporary=temporary)


def prepare(job: measure.Job) -> measure.Contest:
    """Returns the contestant of a job."""
    return (prepare_reference if job.variant.startswith("torch") else prepare_ours)(job)


BENCH = measure.Bench(
    "benchmarks.sampler", __doc__, prepare, references=("torch", "torch.compile"),
    variants=("torch.lean", "torch.float64", *VARIANTS), temperatures=("0", "1"),
)  # fmt: skip

if __name__ == "__main__":
    measure.main(BENCH)
