"""Measures one inner update against plain PyTorch, on random weights in float32.

    python -m benchmarks.update [--workloads W1,W2] [--threads 1] [--turns 3] [--json FILE]

The update is GDSD on rank-16 adapters of all seven matrices, with one coupled pair of views, all rows in one
micro-batch, and clipped AdamW; the workloads are those of `benchmarks.sampler`. PyTorch (with PEFT) puts both views
through the head and differentiates whole logits. Ours first selects the view that masks a token, walks the vocabulary
in chunks, and also logs the entropy. PyTorch runs with and without `torch.compile`; ratios are to the one with fewer
CPU seconds. `torch.lean`, which computes the head on the completion alone, is not a reference.

All contestants keep freed memory (`KEPT`). Otherwise XLA would return it after every update and request it again at the
next one, and page faults would take up to a quarter of our time. It needs `requirements-torch.txt`.
"""

from __future__ import annotations

import numpy as np

from benchmarks import measure
from benchmarks.workloads import WORKLOADS, Workload, prompts, weights

RANK, RATE, CLIP = 16, 1e-4, 0.2
KEPT = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}


def batch(shape: Workload) -> tuple[np.ndarray, np.ndarray]:
    """Returns clean tokens `[rows, P+L]` and advantages `[rows]`."""
    draws = np.random.default_rng(2)
    completions = draws.integers(0, shape.mask_id, (shape.rows, shape.completion), dtype=np.int32)
    return np.concatenate([prompts(shape), completions], axis=1), draws.standard_normal(shape.rows, np.float32)


def prepare_reference(job: measure.Job) -> measure.Contest:
    """Returns a contestant in PyTorch."""
    import torch

    from benchmarks import reference
    from gdsd_jax.denoiser import TARGETS

    shape = WORKLOADS[job.workload]
    model = reference.adapted(shape, RANK, TARGETS)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=RATE, betas=(0.9, 0.99))
    if job.variant == "torch.compile":
        model = torch.compile(model)
    tokens, advantages = (torch.tensor(x, device=reference.DEVICE) for x in batch(shape))
    whole = job.variant != "torch.lean"
    return measure.Contest(
        lambda: reference.update(model, optimizer, tokens.long(), advantages, shape, CLIP, whole=whole)
    )


def prepare_ours(job: measure.Job) -> measure.Contest:
    """Returns our contestant."""
    import jax

    from benchmarks import ours
    from gdsd_jax.config import OptimizerConfig
    from gdsd_jax.denoiser import TARGETS, init_lora
    from gdsd_jax.diffusion.scoring import DEFAULT_CHUNK
    from gdsd_jax.methods import Batch, build
    from gdsd_jax.training.optimizer import make_optimizer
    from gdsd_jax.training.state import init_state
    from gdsd_jax.training.update import UpdateSpec, make_inner_update

    shape = WORKLOADS[job.workload]
    config = ours.denoiser(shape)
    optimizer, schedule = make_optimizer(OptimizerConfig(learning_rate=RATE, clip_norm=CLIP), updates=1)
    method = build("gdsd", psi=1.0, beta=0.0, views=1, eps_low=1.0, eps_high=1e9)
    update = make_inner_update(UpdateSpec(config, method, optimizer, schedule, shape.rows, DEFAULT_CHUNK))
    lora = init_lora(config, jax.random.key(0), rank=RANK, alpha=2.0 * RANK, targets=TARGETS)
    tokens, advantages = jax.device_put(batch(shape))
    seen = Batch(
        tokens=tokens, prompt_mask=None, completion_mask=jax.numpy.ones((shape.rows, shape.completion)),
        advantages=advantages, group_size=shape.rows,
    )  # fmt: skip
    base, state = jax.device_put(weights(shape)), init_state(lora, optimizer, seed=0)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)

    def work() -> float:
        nonlocal state
        state, report = update(state, base, None, seen)
        return float(report["loss"])

    temporary = lambda: update.lower(shapes, base, None, seen).compile().memory_analysis().temp_size_in_bytes  # noqa: E731
    return measure.Contest(work, temporary=temporary)


def prepare(job: measure.Job) -> measure.Contest:
    """Returns the contestant of a job."""
    return (prepare_reference if job.variant.startswith("torch") else prepare_ours)(job)


BENCH = measure.Bench(
    "benchmarks.update", __doc__, prepare, references=("torch", "torch.compile"), variants=("torch.lean", "update"),
    environment=KEPT,
)  # fmt: skip

if __name__ == "__main__":
    measure.main(BENCH)
