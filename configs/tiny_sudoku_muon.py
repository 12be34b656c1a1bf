"""`tiny_sudoku` with the optimizer Muon, which orthogonalises the steps of matrices and leaves the rest to Adam.

    python -m gdsd_jax.train --config configs/tiny_sudoku_muon.py --workdir runs/muon

The two factors of each adapter are such matrices (https://kellerjordan.github.io/posts/muon). Before the learning rate,
a step has singular values of 1. The rate was not tuned. Hardware: as `tiny_sudoku`. Expected accuracy: not measured.
"""

import tiny_sudoku


def get_config():
    config = tiny_sudoku.get_config()
    config.optimizer.name = "optax.contrib:muon"
    config.optimizer.settings = {"beta": 0.95}
    config.optimizer.learning_rate = 1e-2
    return config
