"""coupled-GRPO (DiffuCoder, arXiv 2506.20639) with its own recipe.

    python -m gdsd_jax.train --config configs/baseline_coupled_grpo.py:dream_code --workdir runs/coupled_grpo_dream_code

After the colon: one of RUNS, MODEL_TASK. Hardware: the papers used 8 devices of 80 GB; not yet run here.
DiffuCoder has the architecture of Dream.
Published: the source of this recipe gives no number.
"""

from common import chosen, recipe

RUNS = ("dream_code",)


def get_config(run="dream_code"):
    _, task = chosen(run, RUNS)
    method = {"eps_low": 0.5, "eps_high": 0.5, "beta": 0.01}
    shape = {"inner_updates": 2, "group": 10, "microbatch_rows": 10}
    return recipe("diffucoder", task, "coupled_grpo", learning_rate=1e-6, **shape, **method)
