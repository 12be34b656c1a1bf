"""A comparison of methods on the embedded model under GDSD's protocol: 4x4 Sudoku, 20 iterations of 256 completions.

    python -m gdsd_jax.compare --config configs/compare_tiny.py --workdir runs/compare --methods gdsd,espo --seeds 3

Hardware: as `tiny_sudoku`. The first run makes a start of its own, in runs/start. Eighteen runs (six methods, three
seeds) fit into an hour. Expected: the table of docs/results.md, which describes the protocol.
"""

from common import COMPARED, embedded_sudoku


def get_config():
    config = embedded_sudoku()
    # Half the iterations and half the completions of `tiny_sudoku`.
    config.iterations, config.prompts_per_iteration = 20, 32
    config.evaluation.update(every=10, count=256)
    with config.unlocked():
        config.settings.update(COMPARED)
    return config
