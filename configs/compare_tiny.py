"""Methods compared on the embedded model under GDSD's protocol: 4x4 Sudoku, twenty iterations of 256 completions a run.

    python -m gdsd_jax.compare --config configs/compare_tiny.py --workdir runs/compare --methods gdsd,espo --seeds 3

Hardware and start as in configs/tiny_sudoku.py. Expected: the table of docs/results.md, which describes the protocol.
"""

import tiny_sudoku
from common import COMPARED


def get_config():
    config = tiny_sudoku.get_config()
    # Half the iterations and half the completions of the single run: eighteen of them fit into an hour.
    config.iterations, config.prompts_per_iteration = 20, 32
    config.evaluation.update(every=10, count=256)
    with config.unlocked():
        config.settings.update(COMPARED)
    return config
