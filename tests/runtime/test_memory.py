"""Estimates of memory: what certainly does not fit is refused before anything is computed, with the setting's name."""

import dataclasses

import pytest

from gdsd_jax.config import TrainConfig, default, freeze
from gdsd_jax.denoiser import DenoiserConfig
from gdsd_jax.runtime import memory
from gdsd_jax.runtime.errors import UserError
from gdsd_jax.training import setup

MODEL = DenoiserConfig(
    family="llada", vocab_size=64, hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=2, intermediate_size=24,
    max_length=512, rope_theta=1e4, rms_norm_eps=1e-5, tied_head=False, qkv_bias=False, next_token_logits=False,
    mask_token_id=3, eos_token_id=1, pad_token_id=0,
)  # fmt: skip


def config(**changes) -> TrainConfig:
    run = default("base")
    with run.unlocked():
        run.prompt_buckets = (100,)
        run.sampler.completion_length = 256
        run.evaluation.batch_rows = 1
        run.update(**changes)
    return freeze(TrainConfig, run)


def test_the_bound_is_exact():
    memory.require(10**9, 10**9, "it", "a setting")
    with pytest.raises(UserError, match=r"it needs at least 1.5 GB of memory, there are 1 GB: lower a setting"):
        memory.require(1_500_000_000, 10**9, "it", "a setting")
    assert memory.of_devices() >= memory.of_host() > 2**30


@pytest.mark.parametrize("fits", [True, False])
@pytest.mark.parametrize(
    ("setting", "needed"),
    [
        # The residual stream of 7 rows of 356 tokens in bfloat16.
        ("config.rows", 7 * 356 * 16 * 2),
        # A byte for each token of 5 views of 320 rows.
        ("config.settings.gdsd.views", 5 * 320 * 356),
        # An adapter of both layers' query matrix, with its gradient and both moments, in float32.
        ("config.lora.rank", 4 * 4 * 8192 * 2 * (16 + 16)),
    ],
)
def test_each_estimate(setting, needed, fits, monkeypatch):
    rows = {"config.rows": 7} if setting == "config.rows" else {}
    run = config(prompts_per_iteration=1 if rows else 32, group_size=10, microbatch_rows=10)
    settings = {"gdsd": {"views": 5}} if "views" in setting else {"gdsd": {"views": 1}}
    rank = 8192 if "rank" in setting else 1
    run = dataclasses.replace(run, settings=settings, lora=dataclasses.replace(run.lora, rank=rank, targets=("q",)))
    monkeypatch.setattr(setup.memory, "of_devices", lambda: needed if fits else needed - 1)
    if fits:
        setup.require_room(run, MODEL, rows)
    else:
        with pytest.raises(UserError, match=f"lower {setting}"):
            setup.require_room(run, MODEL, rows)
