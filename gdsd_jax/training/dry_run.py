"""Shrinks a training run to a dry run, which tries a config's method and sampler on a tiny model.

    python -m gdsd_jax.train --config configs/RECIPE.py --config.dry_run [--workdir DIR]

A dry run makes one iteration of the real training code on random weights of the checkpoint's family, with a tokenizer
of characters. It needs neither the checkpoint nor a network, and takes two or three minutes on a CPU. It shows that the
settings fit together and that all steps run; it says nothing about memory, speed or the checkpoint itself.

The method and its settings, the sampler's strategy, schedule and block length, the optimizer, the targets of the
adapter, and the numerics stay. The model, the completion (two blocks, or 64 tokens without blocks), the steps in
proportion, prompts (the last 64 tokens), rows (two prompts of two completions), inner updates (two) and the rank of the
adapter shrink. The rows come from a local file if the config names one, else they are the task's few worked examples.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from gdsd_jax import hub
from gdsd_jax.config import CheckpointOverrides, TrainConfig
from gdsd_jax.hub import tiny
from gdsd_jax.runtime.sharding import MeshConfig

PROMPT, COMPLETION = 64, 64


def shrink(config: TrainConfig, directory: Path) -> TrainConfig:
    """Returns the config of the dry run, and makes its checkpoint in `directory`, which must be absent or empty.

    Raises:
      UserError: the checkpoint does not exist, and its name does not tell its family.
    """
    sampler = config.sampler
    length = min(sampler.completion_length, COMPLETION)
    block = length
    if sampler.block_length < sampler.completion_length:
        block = sampler.block_length
        length = block * min(2, sampler.blocks)
    model = hub.architecture(config.checkpoint, config.overrides)
    sizes = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "intermediate_size": 48}
    tiny.build(directory, family=model.family, block_size=model.block_size, **sizes, max_length=PROMPT + length)
    return dataclasses.replace(
        config,
        checkpoint=str(directory),
        checkpoint_overrides=CheckpointOverrides(),
        tiny=dataclasses.replace(config.tiny, family=""),
        mesh=MeshConfig(),
        prompt_buckets=(PROMPT,),
        overlong_prompts="keep_last",
        sampler=dataclasses.replace(
            sampler,
            completion_length=length,
            block_length=block,
            steps=max(1, sampler.steps * length // sampler.completion_length),
        ),
        lora=dataclasses.replace(config.lora, rank=min(config.lora.rank, 2)),
        evaluation=dataclasses.replace(config.evaluation, count=None, batch_rows=2, steps=None),
        iterations=1,
        prompts_per_iteration=2,
        group_size=2,
        microbatch_rows=2,
        update_rows=config.update_rows and 2,
        inner_updates=min(config.inner_updates, 2),
        refill=dataclasses.replace(config.refill, rounds=min(config.refill.rounds, 1), prompts=None),
        rollout_rows=None,
        trackers=(),
        tensorboard=False,
        wandb=False,
    )
