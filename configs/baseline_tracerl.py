"""TraceRL (arXiv 2509.06949), without the value model, with its own recipe.

    python -m gdsd_jax.train --config configs/baseline_tracerl.py:llada_math --workdir runs/tracerl_llada_math

After the colon: one of RUNS, MODEL_TASK. Hardware: the papers used 8 devices of 80 GB; not yet run here.
The source gives no number of inner updates; here it is one. Rows have up to 32 views, so micro-batches are small.
Published: the source of this recipe gives no number for these models.
"""

from common import chosen, recipe

RUNS = ("llada_math", "dream_math")


def get_config(run="llada_math"):
    model, task = chosen(run, RUNS)
    shape, clip = {"inner_updates": 1, "group": 8, "microbatch_rows": 1}, {"eps_low": 0.2, "eps_high": 0.2}
    config = recipe(model, task, "tracerl", learning_rate=1e-6, **shape, **clip, beta=0.01, shrink=8)
    config.sampler.temperature = 0.8
    return config
