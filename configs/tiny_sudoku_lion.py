"""The run of tiny_sudoku.py with Lion: the sign of a momentum as the step, and no second moment.

    python -m gdsd_jax.train --config configs/tiny_sudoku_lion.py --workdir runs/lion

Lion's steps are as large as its learning rate in every number, so that its rate is a third of Adam's or less, and its
decay larger by as much (arXiv 2302.06675). The rate is no result of a search.
"""

import tiny_sudoku


def get_config():
    config = tiny_sudoku.get_config()
    config.optimizer.name = "optax:lion"
    config.optimizer.settings = {"b1": 0.9, "b2": 0.99, "weight_decay": 0.03}
    config.optimizer.learning_rate = 3e-4
    return config
