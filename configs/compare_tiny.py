"""Methods compared on the embedded model: 4x4 Sudoku on two CPU cores, twenty iterations a run.

    python -m gdsd_jax.compare --config configs/compare_tiny.py --workdir runs/compare --methods gdsd,espo --seeds 3

Hardware and start as in configs/tiny_sudoku.py. One protocol holds for all, that of GDSD there: the same start,
prompts, 256 completions an iteration, one update on each, the same optimizer and learning rate, no KL to the reference
(DMPO alone needs the reference, for its weights), one view or pair of views of each completion where a method lets one
choose (SPG keeps its two, TraceRL replays the trajectory). What remains is each method's own recipe. The learning rate
was chosen for GDSD, so the table compares objectives under GDSD's protocol, not tuned methods with each other.
Expected: see the results table in the README.
"""

import importlib.util
from pathlib import Path

from ml_collections import ConfigDict

_spec = importlib.util.spec_from_file_location("tiny_sudoku", Path(__file__).with_name("tiny_sudoku.py"))
_single = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_single)


def get_config() -> ConfigDict:
    config = _single.get_config()
    with config.unlocked():
        # Half the iterations and half the completions of the single run: eighteen of them fit into an hour.
        config.iterations, config.prompts_per_iteration = 20, 32
        config.evaluation.update(every=10, count=256)
        config.settings.update(
            gdsd_teacher={"psi": 1.0, "beta": 0.0, "views": 1},
            espo={"beta": 0.0, "views": 1},
            # The bound's exponent is SPG's own for Sudoku, the block the sampler's.
            spg={"eubo_beta": 1.0, "num_t": 2, "block_length": 20},
            diffu_grpo={"beta": 0.0},
            wd1={},
            coupled_grpo={"beta": 0.0},
            unigrpo={"beta": 0.0},
            dmpo={"pairs": 1},
            tracerl={"beta": 0.0},
        )
    return config
