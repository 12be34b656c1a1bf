"""GDSD on the embedded 0.2M-parameter model: 4x4 Sudoku on two CPU cores, from nothing, in a few minutes.

    python -m gdsd_jax.train --config configs/tiny_sudoku.py --workdir runs/tiny [--config.method=gdsd_tlc]
    python -m gdsd_jax.train --config configs/tiny_sudoku.py:sdar --workdir runs/tiny_sdar

Hardware: any two CPU cores, under 4 GB. The start is made on first use (SFT, about a minute) in runs/start. The word
after the colon is the model family, in whose format and with whose sampler the model is made.
Expected: the table of docs/results.md.
"""

from common import embedded_sudoku


def get_config(family="llada"):
    config = embedded_sudoku(family)
    config.iterations, config.save_every, config.seed = 40, 20, 0
    config.prompts_per_iteration, config.group_size = 64, 8
    config.inner_updates, config.microbatch_rows = 1, 128
    config.optimizer.learning_rate = 1e-3
    return config
