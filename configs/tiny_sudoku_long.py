"""`tiny_sudoku` with a longer supervised start and a longer run, for the accuracy that the model can reach.

    python -m gdsd_jax.train --config configs/tiny_sudoku_long.py --workdir runs/tiny_long

Hardware: two CPU cores, about half an hour. Expected: see docs/results.md.
"""

from common import embedded_sudoku


def get_config():
    config = embedded_sudoku()
    config.checkpoint, config.task.train_rows, config.iterations = "runs/start_long/merged", 32768, 96
    config.sft.update(steps=6000, until=0.0)
    config.sft.optimizer.schedule = "cosine"
    # So close to the optimum the noise of larger steps undoes what they learn.
    config.optimizer.learning_rate = 2.5e-4
    return config
