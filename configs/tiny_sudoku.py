"""GDSD on the embedded 0.2M-parameter model: 4x4 Sudoku on two CPU cores, from nothing, in a few minutes.

    python -m gdsd_jax.train --config configs/tiny_sudoku.py --workdir runs/tiny [--config.method=gdsd_tlc]
    python -m gdsd_jax.train --config configs/tiny_sudoku.py:sdar --workdir runs/tiny_sdar

Hardware: any two CPU cores, under 4 GB. The first run makes the supervised start in runs/start_biased, in two to five
minutes. After the colon: a model family (default: llada), which decides the format of the model and its sampler.
Expected: 50 to 65 % of the test puzzles, from 12 to 21 % before, in LLaDA's format (docs/results.md).
"""

from common import embedded_sudoku


def get_config(family="llada"):
    config = protocol(family)
    if family == "llada":
        # A start that knows more of Sudoku and has a worse habit: four in ten empty cells of its demonstrations hold a
        # 1. The rules are learnt from the other cells, and the reward corrects the habit. The rate falls to 0 over all
        # steps; at a constant rate the accuracy jumps by ten points within fifty steps, so that where training stops
        # depends on rounding. The starts of the other families are those that docs/results.md has figures of.
        config.checkpoint = "runs/start_biased/merged"
        config.sft.update(careless=0.4, until=0.0)
        config.sft.optimizer.schedule = "cosine"
    return config


def protocol(family="llada"):
    """Returns the settings of GDSD on the start of `embedded_sudoku`, on which comparisons build."""
    config = embedded_sudoku(family)
    config.iterations, config.save_every, config.seed = 40, 20, 0
    config.prompts_per_iteration, config.group_size = 64, 8
    config.inner_updates, config.microbatch_rows = 1, 128
    config.optimizer.learning_rate = 1e-3
    return config
