"""GDSD on the embedded 0.2M-parameter model: 4x4 Sudoku on two CPU cores, from nothing, in a few minutes.

    python -m gdsd_jax.train --config configs/tiny_sudoku.py --workdir runs/tiny [--config.method=gdsd_tlc]
    python -m gdsd_jax.train --config configs/tiny_sudoku.py:sdar --workdir runs/tiny_sdar

Hardware: any two CPU cores, under 4 GB. The first run makes the supervised start in runs/start, in a minute or two.
After the colon: a model family (default: llada), which decides the format of the model and its sampler.
Expected: 34.0 to 35.5 % of the test puzzles, from 17.6 % before (docs/results.md).
"""

from common import embedded_sudoku


def get_config(family="llada"):
    config = embedded_sudoku(family)
    config.iterations, config.save_every, config.seed = 40, 20, 0
    config.prompts_per_iteration, config.group_size = 64, 8
    config.inner_updates, config.microbatch_rows = 1, 128
    config.optimizer.learning_rate = 1e-3
    return config
