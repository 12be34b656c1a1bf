"""Evaluates a policy on held-out rows: completions, the task's metrics and the distance from the base."""

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
from gdsd_jax.tasks.task import Task, regraded
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
    """Samples one completion per prompt and returns means over them.

    The means are those of the task's metrics and, with an adapter, of `reference_kl` (named "kl"). Each batch is judged
    while the devices sample the next.
    """
    found, start = [], 0
    for batch in complete(config, base, lora, prompts, sampler, tokenizer, batch_rows=batch_rows, key=key):
        found.append(judge(task, prompts.rows[start : start + len(batch.texts)], [batch]))
        start += len(batch.texts)
    return {name: float(np.concatenate([values[name] for values in found]).mean()) for name in found[0]}


class Completed(NamedTuple):
    """The texts of one batch and the distance of each from the base (`reference_kl`), or None if it is not measured."""

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
    """Yields one completion per prompt, batch by batch; all batches have one shape, and each has a key of its own.

    The devices receive the next batch before a batch is yielded, so that what the caller does with it costs them no
    time.

    Args:
      skip: number of leading batches to leave out, because they exist already.
      divergence: False leaves `reference_kl` out.
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
    """Computes the metrics of completions, `[B]` each, one completion per row; NaN counts as 0.

    Every process measures rows of its own and receives the results of the other processes.
    """
    texts = [text for batch in batches for text in batch.texts]
    values = {name: np.nan_to_num(value) for name, value in share_out(task.metrics, texts, rows).items()}
    if batches[0].kl is not None:
        values["kl"] = np.concatenate([np.asarray(batch.kl, np.float32) for batch in batches])
    return values


def judge_by_all(task: Task, rows: list[dict], batches: list[Completed]) -> dict[str, np.ndarray]:
    """Returns the result of `judge`, and the metrics under the task's other graders as "METRIC (GRADER)"."""
    values = judge(task, rows, batches)
    distance = {name: values.pop(name) for name in ("kl",) if name in values}
    for name, grader in task.graders.items():
        if grader.measure is not task.measure:
            other = judge(regraded(task, name), rows, batches)
            values |= {f"{metric} ({name})": other[metric] for metric in task.metrics_named}
    return values | distance


@functools.partial(jax.jit, static_argnames="config")
def reference_kl(
    config: DenoiserConfig, base: Any, lora: LoRA, tokens: jax.Array, prompt_mask: jax.Array, key: jax.Array
) -> jax.Array:
    """Measures how far the adapter moved the distributions of each completion's tokens from the base's.

    The result, `[B]` in nats per token, is the mean over tokens of `KL(p_theta || p_ref)`, summed over the vocabulary,
    at the states of one coupled pair of views of `tokens` `[B, P+L]`, P from `prompt_mask`: each token is read in the
    view that masks it.
    """
    rows, length = tokens.shape[0], tokens.shape[1] - prompt_mask.shape[1]
    masked = masking.stratified(key, rows, length, stratum=rows)
    batch = Batch(tokens, prompt_mask, jnp.ones((rows, length)), group_size=rows)
    views = common.coupled_views(masking.behind_prompt(masked, prompt_mask.shape[1])[None], batch, weighted=False)

    def hidden(lora: LoRA | None) -> jax.Array:
        return read_views(config, base, lora, tokens, views, ("hidden",), prompt_mask=prompt_mask)["hidden"]

    return jnp.mean(divergence(config, base, hidden(lora), hidden(None))[0], axis=1)


class Part(NamedTuple):
    """One task at one length. `prompts` repeats each of the `rows` once per sample; repetitions are adjacent."""

    task: Task
    source: str
    rows: list[dict]
    prompts: Prompts
    sampler: SamplerConfig

    @property
    def name(self) -> str:
        return f"{self.task.name} {self.sampler.completion_length}"
