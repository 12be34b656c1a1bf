"""Makes training runs in a process of their own, on eight forced host devices or a share of them.

    python tests/multi_run.py DEVICES RECORD -- [flags of gdsd_jax.train] [-- flags of the next run ...]

The first process records run i in RECORD_i.npz: the tokens of every rollout and of every greedy evaluation, the trained
adapters, and the shares of base and state that the first device holds. With SIGNAL_SELF=PROCESS:COUNT:NUMBER, process
PROCESS sends itself the signal NUMBER when it has the tokens of its rollout COUNT, in the middle of an iteration.
"""

import os
import sys
from pathlib import Path
from typing import Any

# Unoptimised machine code: the programs run a few times each, and compile in half the time.
FLAGS = "--xla_backend_optimization_level=0 --xla_force_host_platform_device_count={}"

CONFIG = """
from gdsd_jax import config as settings


def get_config():
    config = settings.default(checkpoint={checkpoint!r})
    with config.unlocked():
        config.task.update(name="tiny_run:TASK", train_rows=32)
        config.task.settings = {{"template": "{{puzzle}}"}}
        config.prompt_buckets = (24,)
        config.overlong_prompts = "error"
        config.model.update(dtype="float32", remat="full", vocab_chunk=32)
        # These matrices have all long sides of a block: the model dimension, the heads and the MLP.
        config.lora.update(rank=8, alpha=16.0, dropout=0.1, targets=("q", "o", "down"))
        config.optimizer.learning_rate = 0.01
        config.settings = {{"gdsd": {{"beta": 0.1}}}}
        config.sampler.update(completion_length=8, steps=4, block_length=4, strategy={strategy!r}, temperature=1.0)
        config.evaluation.update(count=8, split="test", batch_rows=8)
        config.update(iterations=1, prompts_per_iteration=4, group_size=4, inner_updates=1, microbatch_rows=8)
        config.update(save_every=1, keep=3, completions_logged=16)
        # Shorter than the time limit of the tests, so that a job that hangs reports where.
        config.hosts.stall_seconds = 600.0
    return config
"""


def above_the_mean(candidates: Any) -> Any:
    """Selects groups (`config.refill.select`) such that some group of every rollout is left out."""
    reward = candidates.rewards.mean(axis=1)
    return reward - reward.mean()


def build(directory: Path, family: str) -> Path:
    """Writes a tiny checkpoint of a family and a config file that trains it, and returns the file."""
    from gdsd_jax.families import FAMILIES
    from gdsd_jax.hub import tiny

    sizes = {"hidden_size": 32, "num_layers": 1, "num_heads": 4, "intermediate_size": 64, "max_length": 64}
    # Fewer key/value heads than the widest tensor axis has devices.
    kv_heads, strategy = {"llada": (4, "low_confidence"), "dream": (2, "entropy")}.get(family, (2, "low_confidence"))
    block = 4 if "block_size" in FAMILIES[family].quirks else None
    tiny.build(directory / "base", family=family, num_kv_heads=kv_heads, block_size=block, **sizes)
    file = directory / "config.py"
    file.write_text(CONFIG.format(checkpoint=str(directory / "base"), strategy=strategy))
    return file


def share(arrays: Any) -> float:
    """Returns the share of a pytree's bytes that the first device holds."""
    import jax

    leaves = jax.tree.leaves(arrays)
    return sum(x.addressable_shards[0].data.nbytes for x in leaves) / sum(x.nbytes for x in leaves)


def record(path: str, flags: list[str]) -> None:
    """Runs `gdsd_jax.train` with these flags, and records the run in the file `path`."""
    import jax
    import numpy as np

    from gdsd_jax import train
    from gdsd_jax.config.flags import launch
    from gdsd_jax.evaluation import completions
    from gdsd_jax.runtime import hosts
    from gdsd_jax.runtime.transfer import fetch

    sampled: dict[str, list] = {"rollouts": [], "greedy": [], "share_of_base": []}
    roll_out, sample, walk = train.roll_out, completions.sample, train.train

    def recording_roll_out(*args, **kwargs):
        rewarded = roll_out(*args, **kwargs)
        sampled["share_of_base"].append(share(args[1]))
        sampled["rollouts"].append(fetch(rewarded.batch.tokens))
        process, count, number = map(int, os.environ.get("SIGNAL_SELF", "-1:0:0").split(":"))
        if (process, count) == (jax.process_index(), len(sampled["rollouts"])):
            os.kill(os.getpid(), number)
        return rewarded

    def recording_sample(*args):
        result = sample(*args)
        sampled["greedy"].append(fetch(result.tokens))
        return result

    def recording_walk(config, workdir):
        state = walk(config, workdir)
        adapters = fetch(jax.tree.leaves(state.params))
        if hosts.first():
            arrays = {f"adapter{i}": array for i, array in enumerate(adapters)}
            arrays["share_of_state"] = share((state.params, state.opt_state))
            np.savez(path, **{name: np.stack(tokens) for name, tokens in sampled.items() if tokens}, **arrays)
        return state

    train.roll_out, completions.sample, train.train = recording_roll_out, recording_sample, recording_walk
    try:
        launch(train.main, argv=["train", *flags])
    finally:
        train.roll_out, completions.sample, train.train = roll_out, sample, walk


if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = FLAGS.format(sys.argv[1])
    runs = " ".join(sys.argv[3:]).split("-- ")[1:]
    for number, run in enumerate(runs):
        record(f"{sys.argv[2]}_{number}.npz", run.split())
