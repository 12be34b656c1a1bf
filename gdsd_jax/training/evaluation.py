"""A policy on held-out rows: completions, the task's metrics and the distance from the base."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gdsd_jax.denoiser import DenoiserConfig, LoRA
from gdsd_jax.diffusion import SamplerConfig, masking, sample
from gdsd_jax.diffusion.scoring import read_views
from gdsd_jax.hub.tokenizer import Tokenizer
from gdsd_jax.methods import Batch, common
from gdsd_jax.tasks.task import Task
from gdsd_jax.training.rollout import Prompts, fetch, put

_split = jax.jit(jax.random.split, static_argnums=1)


class Evaluation(NamedTuple):
    """Means of the task's metrics, their standard errors, and one record per item."""

    means: dict[str, float]
    errors: dict[str, float]
    records: list[dict]


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
) -> Evaluation:
    """Samples one completion per prompt and applies the task's metrics; every batch has the same shape.

    With an adapter there is one metric more, "kl": see `reference_kl`.
    """
    texts: list[str] = []
    divergence: list[np.ndarray] = []
    count = len(prompts.rows)
    keys = _split(key, -(-count // batch_rows))
    for batch_key, start in zip(keys, range(0, count, batch_rows), strict=True):
        # The last batch is filled up with its own first rows, whose second completions are dropped.
        chosen = np.arange(start, start + batch_rows)
        chosen = np.where(chosen < count, chosen, start)
        tokens, mask = put((prompts.tokens[chosen], prompts.mask[chosen]))
        rollout = sample(config, base, lora, tokens, mask, batch_key, sampler)
        kl = None if lora is None else reference_kl(config, base, lora, rollout.tokens, mask, batch_key)
        found, kl = fetch((rollout.tokens, kl))
        texts += tokenizer.decode(found[:, tokens.shape[1] :])[: count - start]
        divergence += [] if kl is None else [kl[: count - start]]
    values = dict(task.metrics(texts, prompts.rows))
    if divergence:
        values["kl"] = np.concatenate(divergence)
    means = {name: float(value.mean()) for name, value in values.items()}
    errors = {name: float(value.std(ddof=1) / np.sqrt(count)) if count > 1 else 0.0 for name, value in values.items()}
    records = [
        {**row, "completion": text, **{name: float(value[i]) for name, value in values.items()}}
        for i, (row, text) in enumerate(zip(prompts.rows, texts, strict=True))
    ]
    return Evaluation(means, errors, records)


@functools.partial(jax.jit, static_argnames="config")
def reference_kl(
    config: DenoiserConfig, base: Any, lora: LoRA, tokens: jax.Array, prompt_mask: jax.Array, key: jax.Array
) -> jax.Array:
    """How far the adapter has moved each completion's token log-probabilities from the base: `[B]`, nats per token.

    The mean over tokens of `exp(-d) + d - 1`, `d = l_theta - l_ref`, read in one coupled pair of views of
    `tokens` `[B, P+L]`, P from `prompt_mask`. Zero where the two agree; an estimate of their KL divergence only as
    far as the completions are the policy's own samples.
    """
    rows, length = tokens.shape[0], tokens.shape[1] - prompt_mask.shape[1]
    masked = masking.stratified(key, rows, length, stratum=rows)
    batch = Batch(tokens, prompt_mask, jnp.ones((rows, length)), group_size=rows)
    views = common.coupled_views(masking.behind_prompt(masked, prompt_mask.shape[1])[None], batch, weighted=False)

    def log_prob(lora: LoRA | None) -> jax.Array:
        return read_views(config, base, lora, tokens, views, ("log_prob",), prompt_mask=prompt_mask)["log_prob"][0]

    return jnp.mean(common.k3(log_prob(lora), log_prob(None)), axis=1)
