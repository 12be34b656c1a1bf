"""GDSD on the embedded 0.2M-parameter model: 4x4 Sudoku on two CPU cores, from nothing, in a few minutes.

    python -m gdsd_jax.train --config configs/tiny_sudoku.py --workdir runs/tiny [--config.method=gdsd_tlc]

Hardware: any two CPU cores, under 4 GB. The start is made on first use (SFT, about a minute) in runs/start; its
demonstrations are careless (a quarter of the empty cells hold a 1, whatever belongs there) and it stops at 20 % of the
validation puzzles, which leaves reinforcement learning something to do. Expected: see the results table in the README.
"""

from ml_collections import ConfigDict

from gdsd_jax import config as settings


def get_config() -> ConfigDict:
    config = settings.default(checkpoint="runs/start/merged")
    with config.unlocked():
        config.tiny.family = "llada"
        config.task.update(name="sudoku", train_rows=8192)
        # The tokenizer knows characters, so the puzzle is the whole prompt: 16 cells and two turn markers.
        config.task.settings = {"template": "{puzzle}"}
        config.prompt_buckets = (18,)
        config.overlong_prompts = "error"
        config.model.update(dtype="float32", remat="none", layer_unroll=3)
        config.sft.update(steps=2000, batch_rows=64, careless=0.25, until=0.2)
        config.sft.optimizer.update(learning_rate=2e-3, clip_norm=1.0, warmup_updates=50, schedule="constant")

        config.iterations = 40
        config.prompts_per_iteration = 64
        config.group_size = 8
        config.inner_updates = 1
        config.microbatch_rows = 128
        # One token a step, but what is beyond doubt at once: the same completions in half the passes.
        config.sampler.update(completion_length=20, steps=20, block_length=20, temperature=1.0, threshold=0.9)
        config.lora.update(rank=16, alpha=32.0, dropout=0.0)
        config.optimizer.update(
            learning_rate=1e-3, clip_norm=0.02, weight_decay=0.0, warmup_updates=5, schedule="linear"
        )
        # One update per rollout: old and new policy are equal, so a trust region has nothing to clip.
        guidance = {"psi": 1.0, "beta": 0.0, "eps_low": 1.0, "eps_high": 1e9, "views": 1, "weighting": "plain"}
        # Of the 128 tokens few ever compete for a cell: centring by the 8 largest logits.
        config.settings = {"gdsd": guidance, "gdsd_tlc": {**guidance, "top_k": 8}}
        # Its own prompt and length, one token a step.
        config.evaluation.update(every=10, steps=20, batch_rows=128, evaluation_prompt=False, lengths=(20,))
        config.save_every = 20
        config.seed = 0
    return config
