"""Samples completions of prompts and rewards them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gdsd_jax.denoiser import DenoiserConfig, LoRA
from gdsd_jax.diffusion import Rollout, SamplerConfig, sample
from gdsd_jax.diffusion.blocks import step_limit
from gdsd_jax.hub.tokenizer import Tokenizer
from gdsd_jax.methods import Batch
from gdsd_jax.runtime import hosts
from gdsd_jax.runtime.errors import UserError
from gdsd_jax.runtime.sharding import constrain
from gdsd_jax.runtime.transfer import fetch, put
from gdsd_jax.tasks.task import Task, require_finite, weighted_sum
from gdsd_jax.telemetry.profile import phase

# Begins the names of those columns of a judgement that are metrics of the task instead of components of its reward.
VERDICT = "verdict: "


def completion_mask(completions: np.ndarray, ends: int | Sequence[int]) -> np.ndarray:
    """Returns `[B, L]` float32: 1 up to and including the first id that ends a completion; without one, all ones."""
    is_end = np.isin(completions, ends)
    return ((np.cumsum(is_end, axis=1) - is_end) == 0).astype(np.float32)


class Prompts(NamedTuple):
    """Left-padded prompts `[B, P]`, their mask (True on real tokens), and the rows of the task that they come from."""

    tokens: np.ndarray
    mask: np.ndarray
    rows: list[dict]

    def pick(self, chosen: Sequence[int], buckets: Sequence[int]) -> Prompts:
        """Returns the chosen prompts, padded to the smallest bucket that holds them."""
        tokens, mask = self.tokens[chosen], self.mask[chosen]
        longest = int(mask.sum(axis=1).max())
        length = min((bucket for bucket in buckets if longest <= bucket <= tokens.shape[1]), default=tokens.shape[1])
        return Prompts(tokens[:, -length:], mask[:, -length:], [self.rows[i] for i in chosen])

    def part(self, start: int, end: int) -> Prompts:
        """Returns the prompts from `start` up to, but excluding, `end`; their padding stays."""
        return Prompts(*(values[start:end] for values in self))


def encode_prompts(
    task: Task, tokenizer: Tokenizer, rows: Sequence[dict], *, buckets: tuple[int, ...], overlong: str
) -> Prompts:
    """Renders the prompts of task rows and pads them to a common length.

    Args:
      buckets: the lengths to choose from.
      overlong: the treatment of prompts that exceed the largest bucket, as `config.overlong_prompts`.
    """
    texts = [tokenizer.render(task.messages(row), task.assistant_prefix) for row in rows]
    return Prompts(*tokenizer.prompts(texts, buckets=buckets, overlong=overlong), list(rows))


class Rewarded(NamedTuple):
    """Rewarded completions.

    batch: the batch for the method, on the devices.
    completions: `[B, L]` ids on the host; all ids after the first one that ends a completion are EOS.
    rewards: `[B]` float32.
    components: the components of the task's reward by name, `[B]` float32 each; NaN where one failed.
    seconds: the durations of "rollout" and "reward".
    """

    batch: Batch
    completions: np.ndarray
    rewards: np.ndarray
    components: dict[str, np.ndarray]
    seconds: dict[str, float]


class RolloutSpec(NamedTuple):
    """The settings by which a run samples and rewards completions.

    config: the denoiser.
    group_size: completions of each prompt; the rows of a group are consecutive.
    part_rows: rows that are sampled together, in whole groups; None: all. A part is rewarded while the devices sample
      the next one. The number of parts does not affect the draws.
    verdicts: whether the batch holds the values of the task's metrics for each text.
    """

    config: DenoiserConfig
    sampler: SamplerConfig
    task: Task
    tokenizer: Tokenizer
    group_size: int
    part_rows: int | None = None
    verdicts: bool = False


class Judged(NamedTuple):
    """The judgements of B completions.

    components: as in `Rewarded`.
    verdicts: the values of the task's metrics by name, `[B]` float32 each; empty if the batch does not hold them.
    token_rewards: `[B, L]` float32, the rewards of the task's `token_score`, or None if the task has none.
    """

    components: dict[str, np.ndarray]
    verdicts: dict[str, np.ndarray]
    token_rewards: np.ndarray | None


def roll_out(
    spec: RolloutSpec, base: Any, lora: LoRA | None, key: jax.Array, prompts: Prompts, first_row: int = 0
) -> Rewarded:
    """Samples a group of completions of each prompt, and rewards them.

    Args:
      first_row: the number of the first row. Rollouts with the same key have different draws if their rows have
        different numbers.

    Raises:
      UserError: a reward is infinite, or `token_score` of the task returns invalid rewards.
    """
    rows = [row for row in prompts.rows for _ in range(spec.group_size)]
    size = spec.part_rows or len(rows)
    starts = range(0, len(rows), size)
    by_row = [np.repeat(array, spec.group_size, axis=0) for array in (prompts.tokens, prompts.mask)]
    by_row.append(np.arange(first_row, first_row + len(rows), dtype=np.int32))

    def launch(first: int) -> tuple[Rollout, jax.Array]:
        tokens, mask, numbers = put(tuple(array[first : first + size] for array in by_row))
        return sample(spec.config, base, lora, tokens, mask, key, spec.sampler, numbers), mask

    parts, found, judged, seconds = [], [], [], {"rollout": 0.0, "reward": 0.0}
    for index, first in enumerate(starts):
        start = time.perf_counter()
        with phase("rollout"):
            # The devices receive the next part before the host waits for this one.
            while len(parts) < min(index + 2, len(starts)):
                parts.append(launch(starts[len(parts)]))
            completions = fetch(parts[index][0].tokens)[:, prompts.tokens.shape[1] :]
        sampled = time.perf_counter()
        with phase("reward"):
            seen = completion_mask(completions, spec.config.ends)
            found.append((np.where(seen, completions, spec.config.eos_token_id), seen))
            judged.append(judge(spec, *found[-1], rows[first : first + size]))
        seconds["rollout"] += sampled - start
        seconds["reward"] += time.perf_counter() - sampled
    completions, seen = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
    judgements = concatenated(judged)
    require_finite(judgements.components, spec.task, "reward")
    rewards = weighted_sum(judgements.components, spec.task.weights)
    rollout, mask = parts[0] if len(parts) == 1 else _joined(parts)
    batch = make_batch(spec, rollout, mask, seen, rewards, judgements)
    return Rewarded(batch, completions, rewards, judgements.components, seconds)


def judge(spec: RolloutSpec, completions: np.ndarray, seen: np.ndarray, rows: list[dict]) -> Judged:
    """Judges completions `[B, L]`; each process judges groups of its own, and receives the judgements of the others.

    Args:
      seen: `[B, L]`, 1 up to and including the EOS.
    """
    task = spec.task

    def columns(completions: np.ndarray, rows: list[dict]) -> dict[str, np.ndarray]:
        texts = spec.tokenizer.decode(completions)
        metrics = task.metrics(texts, rows) if spec.verdicts else {}
        return task.rewards(texts, rows) | {VERDICT + name: value for name, value in metrics.items()}

    found = hosts.share_out(columns, completions, rows, group_size=spec.group_size)
    components = {name: value for name, value in found.items() if not name.startswith(VERDICT)}
    verdicts = {name.removeprefix(VERDICT): value for name, value in found.items() if name.startswith(VERDICT)}
    # All processes have all values here, so that all of them refuse the same.
    require_finite(verdicts, task, "metric")
    by_token = None
    if task.token_score is not None:
        by_token = token_rewards(task, spec.tokenizer, completions, seen, rows, group_size=spec.group_size)
    return Judged(components, verdicts, by_token)


def concatenated(parts: Sequence[Judged]) -> Judged:
    """Concatenates the judgements of the parts of a rollout."""
    by_name = lambda columns: {name: np.concatenate([each[name] for each in columns]) for name in columns[0]}  # noqa: E731
    components, verdicts, by_token = zip(*parts, strict=True)
    return Judged(by_name(components), by_name(verdicts), None if by_token[0] is None else np.concatenate(by_token))


def make_batch(
    spec: RolloutSpec, rollout: Rollout, prompt_mask: Any, seen: np.ndarray, rewards: np.ndarray, judged: Judged
) -> Batch:
    """Makes the batch for the method from a rollout, and sends to the devices what is still on the host.

    Every array has the rows first; it may have another axis before them.
    """
    stacked = lambda columns: put(np.nan_to_num(np.stack(columns, axis=-1)))  # noqa: E731
    return Batch(
        tokens=rollout.tokens,
        prompt_mask=prompt_mask,
        completion_mask=put(seen),
        rewards=put(rewards),
        components=stacked([judged.components[name] for name in spec.task.weights]),
        token_rewards=None if judged.token_rewards is None else put(judged.token_rewards),
        verdicts=stacked(list(judged.verdicts.values())) if judged.verdicts else None,
        verdict_names=tuple(judged.verdicts),
        component_weights=tuple(spec.task.weights.items()),
        commit_step=rollout.commit_step,
        confidence=rollout.confidence,
        log_prob=rollout.log_prob,
        entropy=rollout.entropy,
        group_size=spec.group_size,
        eos_token_id=spec.config.eos_token_id,
        sampler=spec.sampler,
        unwritten=step_limit(spec.config, spec.sampler),
    )


def sample_in_parts(
    config: DenoiserConfig,
    base: Any,
    lora: LoRA | None,
    prompts: Prompts,
    key: jax.Array,
    sampler: SamplerConfig,
    *,
    part_rows: int,
) -> Rollout:
    """Samples one completion of each prompt, `part_rows` at a time; returns the rollout on the host.

    All parts have the same shape: the last is filled up with copies of its first row. The size of the parts does not
    affect the draws.
    """
    count, parts = len(prompts.tokens), []
    for start in range(0, count, part_rows):
        chosen = np.arange(start, start + part_rows, dtype=np.int32)
        chosen = np.where(chosen < count, chosen, np.int32(start))
        tokens, mask, numbers = put((prompts.tokens[chosen], prompts.mask[chosen], chosen))
        parts.append(sample(config, base, lora, tokens, mask, key, sampler, numbers))
    return jax.tree.map(lambda *arrays: np.concatenate(arrays)[:count], *fetch(parts))


@jax.jit
def _joined(parts: list[Any]) -> Any:
    """Concatenates the rows of all parts in their order, and spreads the result over the mesh."""
    return jax.tree.map(lambda *arrays: constrain(jnp.concatenate(arrays), ("rows", "tokens")), *parts)


def token_rewards(
    task: Task, tokenizer: Tokenizer, completions: np.ndarray, seen: np.ndarray, rows: list[dict], *, group_size: int
) -> np.ndarray:
    """Returns the rewards of the tokens by the task's `token_score`, `[B, L]` float32, with 0 after the EOS.

    Args:
      seen: `[B, L]`, 1 up to and including the EOS.

    Raises:
      UserError: `token_score` does not return one finite reward for each token.
    """
    length = completions.shape[1]

    def judge(pairs: np.ndarray, rows: list[dict]) -> dict[str, np.ndarray]:
        table = np.zeros((len(rows), length), np.float32)
        for index, row in enumerate(rows):
            ids = pairs[index, 0, : int(pairs[index, 1].sum())]
            values = np.asarray(task.token_score(tokenizer.decode_each(ids.tolist()), row), np.float32)
            if values.shape != ids.shape or not np.isfinite(values).all():
                raise UserError(
                    f"token_score of task {task.name} must give a finite reward to each of {len(ids)} tokens: "
                    f"it gave {values.size} values, {np.isfinite(values).sum()} of them finite"
                )
            table[index, : len(ids)] = values
        return {str(place): table[:, place] for place in range(length)}

    pairs = np.stack([completions, seen.astype(completions.dtype)], axis=1)
    found = hosts.share_out(judge, pairs, rows, group_size=group_size)
    return np.stack([found[str(place)] for place in range(length)], axis=1)


def reward_metrics(rewarded: Rewarded) -> dict[str, float]:
    """Returns mean and spread of the reward, its components, the share of groups without spread, and the diversity.

    Diversity measures how many completions of a group are distinct, from 0 (all are equal) to 1. A component is NaN if
    its reward function failed for a completion; NaN counts as 0 in the weighted sum.
    """
    size = rewarded.batch.group_size
    by_group = rewarded.completions.reshape(-1, size, rewarded.completions.shape[1])
    distinct = [len(np.unique(group, axis=0)) for group in by_group]
    metrics = spread_metrics(rewarded.rewards, size) | {
        "reward/nan": float(sum(np.isnan(value).sum() for value in rewarded.components.values())),
        "completion/diversity": float((np.mean(distinct) - 1) / (size - 1)),
    }
    for name, value in rewarded.components.items():
        metrics[f"reward/{name}"] = float(np.nan_to_num(value).mean())
    return metrics


def spread_metrics(rewards: np.ndarray, group_size: int) -> dict[str, float]:
    """Returns the mean of `rewards` [B], their mean standard deviation in a group, and the share of flat groups."""
    groups = rewards.reshape(-1, group_size)
    return {
        "reward/mean": float(rewards.mean()),
        "reward/std": float(groups.std(axis=1, ddof=1).mean()),
        "reward/zero_spread": float((groups.std(axis=1) < 1e-6).mean()),
    }


def completion_records(rewarded: Rewarded, tokenizer: Tokenizer, chosen: Sequence[int]) -> list[dict]:
    """Returns text, reward and components of the chosen rows; a component that failed is None."""
    texts = tokenizer.decode(rewarded.completions[list(chosen)])
    return [
        {"completion": text, "reward": float(rewarded.rewards[i])}
        | {name: None if np.isnan(value[i]) else float(value[i]) for name, value in rewarded.components.items()}
        for i, text in zip(chosen, texts, strict=True)
    ]


def length_metrics(batch: Batch) -> dict[str, jax.Array]:
    """Returns the mean completion length in tokens, including the EOS, as a device scalar."""
    return {"completion/length": jnp.mean(jnp.sum(batch.completion_mask, axis=1))}
