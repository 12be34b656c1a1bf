"""The run of tiny_sudoku.py with Muon: every step of a matrix is orthogonalised; vectors and tables are left to Adam.

    python -m gdsd_jax.train --config configs/tiny_sudoku_muon.py --workdir runs/muon

The two factors of an adapter are such matrices, one pair in each layer (https://kellerjordan.github.io/posts/muon). The
learning rate is that of a whole matrix, whose step has singular values of 1 before it; it is no result of a search.
"""

import tiny_sudoku


def get_config():
    config = tiny_sudoku.get_config()
    config.optimizer.name = "optax.contrib:muon"
    config.optimizer.settings = {"beta": 0.95}
    config.optimizer.learning_rate = 1e-2
    return config
