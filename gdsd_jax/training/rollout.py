"""From prompts to rewarded completions."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gdsd_jax.denoiser import DenoiserConfig, LoRA
from gdsd_jax.diffusion import SamplerConfig, sample
from gdsd_jax.hub.tokenizer import Tokenizer
from gdsd_jax.methods import Batch
from gdsd_jax.tasks.task import Task, weighted_sum


def fetch(tree: Any) -> Any:
    """The only way from device to host: training and evaluation bring back results through here and nowhere else."""
    return jax.device_get(tree)


def put(tree: Any) -> Any:
    """The only way from host to device."""
    return jax.device_put(tree)


def completion_mask(completions: np.ndarray, eos_token_id: int) -> np.ndarray:
    """`[B, L]` float32, 1 up to and including the first EOS; all ones in a row without one."""
    ends = np.cumsum(completions == eos_token_id, axis=1)
    return ((ends - (completions == eos_token_id)) == 0).astype(np.float32)


class Prompts(NamedTuple):
    """Left-padded prompts `[B, P]`, their mask, and the rows of the task that they come from."""

    tokens: np.ndarray
    mask: np.ndarray
    rows: list[dict]


def encode_prompts(
    task: Task, tokenizer: Tokenizer, rows: Sequence[dict], *, buckets: tuple[int, ...], overlong: str
) -> Prompts:
    """Renders and pads the prompts of task rows."""
    texts = [tokenizer.render(task.messages(row), task.assistant_prefix) for row in rows]
    return Prompts(*tokenizer.prompts(texts, buckets=buckets, overlong=overlong), list(rows))


class Rewarded(NamedTuple):
    """Rewarded completions.

    batch: what the method sees, on the device.
    texts: completions without special tokens.
    rewards, components: `[B]` float32, and per component of the task.
    seconds: of the rollout and of the reward.
    """

    batch: Batch
    texts: list[str]
    rewards: np.ndarray
    components: dict[str, np.ndarray]
    seconds: dict[str, float]


def roll_out(
    config: DenoiserConfig,
    base: Any,
    lora: LoRA | None,
    prompts: Prompts,
    key: jax.Array,
    sampler: SamplerConfig,
    task: Task,
    tokenizer: Tokenizer,
    *,
    group_size: int,
) -> Rewarded:
    """Samples `group_size` completions of each prompt and rewards them. Rows of a group stand together."""
    start = time.perf_counter()
    tokens, mask = put((np.repeat(prompts.tokens, group_size, axis=0), np.repeat(prompts.mask, group_size, axis=0)))
    rollout = sample(config, base, lora, tokens, mask, key, sampler)
    completions = fetch(rollout.tokens)[:, prompts.tokens.shape[1] :]
    sampled = time.perf_counter()
    texts = tokenizer.decode(completions)
    rows = [row for row in prompts.rows for _ in range(group_size)]
    components = task.rewards(texts, rows)
    rewards = weighted_sum(components, task.weights)
    batch = Batch(
        tokens=rollout.tokens,
        prompt_mask=mask,
        completion_mask=put(completion_mask(completions, config.eos_token_id)),
        rewards=put(rewards),
        commit_step=rollout.commit_step,
        confidence=rollout.confidence,
        group_size=group_size,
    )
    seconds = {"rollout": sampled - start, "reward": time.perf_counter() - sampled}
    return Rewarded(batch, texts, rewards, components, seconds)


def reward_metrics(rewarded: Rewarded) -> dict[str, float]:
    """Reward mean and spread, its components, share of groups without spread, lengths, diversity inside groups.

    A reward is NaN where a reward function failed on that completion; NaN counts as 0 in the weighted sum.
    """
    size = rewarded.batch.group_size
    groups = rewarded.rewards.reshape(-1, size)
    distinct = [len(set(rewarded.texts[i : i + size])) for i in range(0, len(rewarded.texts), size)]
    metrics = {
        "reward/mean": float(rewarded.rewards.mean()),
        "reward/std": float(groups.std(axis=1, ddof=1).mean()),
        "reward/zero_spread": float((groups.std(axis=1) < 1e-6).mean()),
        "reward/nan": float(sum(np.isnan(value).sum() for value in rewarded.components.values())),
        "completion/diversity": float((np.mean(distinct) - 1) / (size - 1)),
    }
    for name, value in rewarded.components.items():
        metrics[f"reward/{name}"] = float(np.nan_to_num(value).mean())
    return metrics


def length_metrics(batch: Batch) -> dict[str, jax.Array]:
    """Mean completion length, EOS included, as a device scalar."""
    return {"completion/length": jnp.mean(jnp.sum(batch.completion_mask, axis=1))}
