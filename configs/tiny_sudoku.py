"""GDSD on the embedded 0.2M-parameter model: 4x4 Sudoku on two CPU cores, from nothing, in minutes.

    python -m gdsd_jax.train --config configs/tiny_sudoku.py --workdir runs/tiny [--config.method=gdsd_tlc]
    python -m gdsd_jax.train --config configs/tiny_sudoku.py:sdar --workdir runs/tiny_sdar

Hardware: any two CPU cores, under 4 GB. The first run makes the supervised start in runs/start_biased and trains on it;
both take six to fifteen minutes. After the colon: a model family (default: llada), for the model's format and sampler.
Expected: 31 to 65 % of the test puzzles, from 7 to 21 % before, in LLaDA's format (docs/results.md).
"""

from common import embedded_sudoku, with_biased_start


def get_config(family="llada"):
    config = embedded_sudoku(family)
    # The starts of the other families are those that docs/results.md has figures of.
    return with_biased_start(config) if family == "llada" else config
