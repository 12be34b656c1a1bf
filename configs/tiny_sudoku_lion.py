"""`tiny_sudoku` with the optimizer Lion, whose step is the sign of a momentum, without a second moment.

    python -m gdsd_jax.train --config configs/tiny_sudoku_lion.py --workdir runs/lion

Lion moves every parameter by the whole learning rate, so its rate is a third of Adam's or less, and its decay larger by
the same factor (arXiv 2302.06675). The rate was not tuned. Hardware: as `tiny_sudoku`. Expected accuracy: not measured.
"""

import tiny_sudoku


def get_config():
    config = tiny_sudoku.get_config()
    config.optimizer.name = "optax:lion"
    config.optimizer.settings = {"b1": 0.9, "b2": 0.99, "weight_decay": 0.03}
    config.optimizer.learning_rate = 3e-4
    return config
