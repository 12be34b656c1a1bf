"""Evaluates a policy on held-out rows: samples completions, measures the task's metrics and the KL to the base."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gdsd_jax.denoiser import DenoiserConfig, LoRA
from gdsd_jax.diffusion import SamplerConfig, masking, sample
from gdsd_jax.diffusion.divergence import divergence
from gdsd_jax.diffusion.scoring import read_views
from gdsd_jax.hub.tokenizer import Tokenizer
from gdsd_jax.methods import Batch, common
from gdsd_jax.runtime.hosts import share_out
from gdsd_jax.runtime.transfer import fetch, put
from gdsd_jax.tasks.task import Task, regraded, require_finite
from gdsd_jax.training.rollout import Prompts

_split = jax.jit(jax.random.split, static_argnums=1)


def evaluate_policy(
    config: DenoiserConfig,
    base: Any,
    lora: LoRA | None,
    prompts: Prompts,
    sampler: SamplerConfig,
    task: Task,
    tokenizer: Tokenizer,
    *,
    batch_rows: int,
    key: jax.Array,
) -> dict[str, float]:
    """Samples one completion per prompt, and returns the mean of each of the task's metrics over them.

    With an adapter, "kl" is the mean of `reference_kl`. Each batch is judged while the devices sample the next one.
    """
    found, start = [], 0
    for batch in complete(config, base, lora, prompts, sampler, tokenizer, batch_rows=batch_rows, key=key):
        found.append(judge(task, prompts.rows[start : start + len(batch.texts)], [batch]))
        start += len(batch.texts)
    return {name: float(np.concatenate([values[name] for values in found]).mean()) for name in found[0]}


class Completed(NamedTuple):
    """The texts of one batch, and the `reference_kl` of each, or None if it was not measured."""

    texts: list[str]
    kl: list[float] | None


def complete(
    config: DenoiserConfig,
    base: Any,
    lora: LoRA | None,
    prompts: Prompts,
    sampler: SamplerConfig,
    tokenizer: Tokenizer,
    *,
    batch_rows: int,
    key: jax.Array,
    skip: int = 0,
    divergence: bool = True,
) -> Iterator[Completed]:
    """Yields one completion per prompt, batch by batch; all batches have the same shape, and each has its own key.

    The devices start on the next batch before a batch is yielded, so they do not wait for the caller's work on it.

    Args:
      skip: number of leading batches that exist already and are left out.
      divergence: whether to measure `reference_kl`, which needs an adapter.
    """
    count = len(prompts.rows)
    measured = divergence and lora is not None

    def launch(start: int, batch_key: jax.Array) -> tuple[int, jax.Array, jax.Array | None]:
        # The last batch is filled up with copies of its first row, whose completions are dropped.
        chosen = np.arange(start, start + batch_rows)
        chosen = np.where(chosen < count, chosen, start)
        tokens, mask = put((prompts.tokens[chosen], prompts.mask[chosen]))
        rollout = sample(config, base, lora, tokens, mask, batch_key, sampler)
        kl = reference_kl(config, base, lora, rollout.tokens, mask, batch_key) if measured else None
        return start, rollout.tokens, kl

    def receive(start: int, tokens: jax.Array, kl: jax.Array | None) -> Completed:
        found, kl = fetch((tokens, kl))
        texts = tokenizer.decode(found[:, prompts.tokens.shape[1] :])[: count - start]
        return Completed(texts, None if kl is None else kl[: count - start].tolist())

    ahead = None
    for index, batch_key in enumerate(_split(key, -(-count // batch_rows))):
        if index < skip:
            continue
        before, ahead = ahead, launch(index * batch_rows, batch_key)
        if before is not None:
            yield receive(*before)
    if ahead is not None:
        yield receive(*ahead)


def judge(task: Task, rows: list[dict], batches: list[Completed]) -> dict[str, np.ndarray]:
    """Returns the metrics of completions, one per row, as arrays `[B]` by name; NaN counts as 0.

    Every process measures a share of the rows and receives the results of the others.

    Raises:
      UserError: a metric is infinite.
    """
    texts = [text for batch in batches for text in batch.texts]
    found = share_out(task.metrics, texts, rows)
    require_finite(found, task, "metric")
    values = {name: np.nan_to_num(value) for name, value in found.items()}
    if batches[0].kl is not None:
        values["kl"] = np.concatenate([np.asarray(batch.kl, np.float32) for batch in batches])
    return values


def judge_by_all(task: Task, rows: list[dict], batches: list[Completed]) -> dict[str, np.ndarray]:
    """Returns the result of `judge` with the metrics under the task's other graders, named "METRIC (GRADER)"."""
    values = judge(task, rows, batches)
    last = {"kl": values.pop("kl")} if "kl" in values else {}
    for name, grader in task.graders.items():
        if grader.measure is not task.measure:
            other = judge(regraded(task, name), rows, batches)
            values |= {f"{metric} ({name})": other[metric] for metric in task.metrics_named}
    return values | last


@functools.partial(jax.jit, static_argnames="config")
def reference_kl(
    config: DenoiserConfig, base: Any, lora: LoRA, tokens: jax.Array, prompt_mask: jax.Array, key: jax.Array
) -> jax.Array:
    """Returns the KL of each completion's token distributions under the adapter to those of the base, `[B]`.

    The result is the mean over tokens of `KL(p_theta || p_ref)` in nats, each summed over the whole vocabulary. One
    coupled pair of masked views is drawn for each row, and every token is read in the view that masks it.

    Args:
      tokens: prompts and completions, `[B, P+L]`.
      prompt_mask: True on real prompt tokens, `[B, P]`.
      key: draws the masks.
    """
    rows, length = tokens.shape[0], tokens.shape[1] - prompt_mask.shape[1]
    masked = masking.stratified(key, rows, length, stratum=rows)
    batch = Batch(tokens, prompt_mask, jnp.ones((rows, length)), group_size=rows)
    views = common.coupled_views(masking.behind_prompt(masked, prompt_mask.shape[1])[None], batch, weighted=False)

    def hidden(lora: LoRA | None) -> jax.Array:
        return read_views(config, base, lora, tokens, views, ("hidden",), prompt_mask=prompt_mask)["hidden"]

    return jnp.mean(divergence(config, base, hidden(lora), hidden(None))[0], axis=1)


class Part(NamedTuple):
    """One task at one completion length.

    source: file or split that the rows are from.
    rows: the evaluated rows.
    prompts: their prompts, each repeated once per sample, with repetitions adjacent.
    """

    task: Task
    source: str
    rows: list[dict]
    prompts: Prompts
    sampler: SamplerConfig

    @property
    def name(self) -> str:
        return f"{self.task.name} {self.sampler.completion_length}"
