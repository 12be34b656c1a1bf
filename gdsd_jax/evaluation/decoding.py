"""Compares ways of decoding: what caches, thresholds and factors save over exact decoding, and what they cost.

    python -m gdsd_jax.evaluate --config configs/RECIPE.py --workdir runs/gsm8k --compare-decoding

Each way completes the same rows at temperature 0, in batches of `config.evaluation.batch_rows`. A first batch, which
compiles, is not counted. The table shows the accuracy, the share of completion tokens that equal those of exact
decoding, and the seconds and the passes through the denoiser per batch; a cached pass computes only a window. Blocks
are those of `config.sampler`: if a single block spans the completion, a cache has little to keep.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gdsd_jax.diffusion import SamplerConfig, sample
from gdsd_jax.diffusion.blocks import step_limit
from gdsd_jax.evaluation.completions import Completed, Part, judge
from gdsd_jax.evaluation.policy import Policy
from gdsd_jax.evaluation.reports import markdown
from gdsd_jax.evaluation.statistics import mean_and_error
from gdsd_jax.runtime import hosts
from gdsd_jax.runtime.files import write_json, write_text
from gdsd_jax.runtime.streams import Stream, stream_of_seed
from gdsd_jax.runtime.transfer import fetch, put
from gdsd_jax.training.rollout import Prompts

# The settings in which each way differs from the sampler of evaluations; the first is the one to compare with.
WAYS: dict[str, dict[str, Any]] = {
    "exact": {},
    "stop at EOS": {"stop_at_eos": True},
    "prefix": {"cache": "prefix"},
    "dual": {"cache": "dual"},
    "dual, every 4": {"cache": "dual", "refresh_every": 4},
    "threshold 0.9": {"threshold": 0.9},
    "threshold 0.7": {"threshold": 0.7},
    "threshold 0.5": {"threshold": 0.5},
    "threshold, dual": {"threshold": 0.9, "cache": "dual"},
    "factor 1": {"factor": 1.0},
}
HEADER = ("decoding", "accuracy", "equal %", "passes", "fewer", "seconds", "faster")


class Decoded(NamedTuple):
    """Completions `[N, L]`, and the passes through the denoiser and the seconds of each batch."""

    tokens: np.ndarray
    passes: list[int]
    seconds: list[float]


def decode(policy: Policy, prompts: Prompts, sampler: SamplerConfig, *, batch_rows: int, seed: int) -> Decoded:
    """Completes all prompts, in batches of equal shape: copies of its first row fill up the last one."""
    count, key = len(prompts.rows), stream_of_seed(seed, Stream.GENERATION)
    found, passes, seconds = [], [], []
    for start in [0, *range(0, count, batch_rows)]:
        chosen = np.arange(start, start + batch_rows)
        tokens, mask = put(tuple(x[np.where(chosen < count, chosen, start)] for x in (prompts.tokens, prompts.mask)))
        began = time.perf_counter()
        rollout = sample(policy.model, policy.base, policy.lora, tokens, mask, key, sampler)
        completed, steps = fetch((rollout.tokens[:, tokens.shape[1] :], rollout.commit_step))
        seconds.append(time.perf_counter() - began)
        found.append(completed[: count - start])
        # Every step commits at least one token, so the last commit step gives the number of passes.
        passes.append(int(steps[steps < step_limit(policy.model, sampler)].max()) + 1)
    return Decoded(np.concatenate(found[1:]), passes[1:], seconds[1:])


def compare_ways(policy: Policy, part: Part, *, batch_rows: int, seed: int) -> list[dict[str, Any]]:
    """Returns one row of the table for each of `WAYS`, on one task at one length; see the module's docstring."""
    rows, exact = [], None
    for name, changes in WAYS.items():
        sampler = dataclasses.replace(part.sampler, **changes)
        decoded = decode(policy, part.prompts, sampler, batch_rows=batch_rows, seed=seed)
        exact = decoded if exact is None else exact
        texts = Completed(policy.tokenizer.decode(decoded.tokens), None)
        metric = part.task.metrics_named[-1]
        accuracy = mean_and_error(judge(part.task, part.prompts.rows, [texts])[metric])
        passes, seconds = float(np.mean(decoded.passes)), float(np.median(decoded.seconds))
        row = {
            "task": part.task.name,
            "completion_length": sampler.completion_length,
            "count": len(part.rows),
            "decoding": name,
            "settings": changes,
            "metric": metric,
            "accuracy": accuracy,
            "equal_tokens": float(np.mean(decoded.tokens == exact.tokens)),
            "passes": passes,
            "seconds": seconds,
        }
        first = rows[0] if rows else row
        rows.append(row | {"fewer_passes": first["passes"] / passes, "faster": first["seconds"] / seconds})
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Formats the rows of one task and length in Markdown, at most 80 columns wide."""
    first = rows[0]
    body = [
        [
            row["decoding"],
            f"{100 * row['accuracy']['mean']:.1f} ± {100 * row['accuracy']['error']:.1f}",
            f"{100 * row['equal_tokens']:.1f}",
            f"{row['passes']:.1f}",
            f"{row['fewer_passes']:.2f}x",
            f"{row['seconds']:.3f}",
            f"{row['faster']:.2f}x",
        ]
        for row in rows
    ]
    title = f"{first['task']} {first['completion_length']}, {first['metric']} in %, {first['count']} rows"
    return f"{title}\n\n{markdown(list(HEADER), body, left=1)}\n"


def run(policy: Policy, parts: Sequence[Part], output: Path, *, batch_rows: int, seed: int) -> str:
    """Compares the ways on every part, writes `decoding.json` and `decoding.md` after each, and returns the tables."""
    rows, tables = [], []
    for part in parts:
        found = compare_ways(policy, part, batch_rows=min(batch_rows, len(part.prompts.rows)), seed=seed)
        rows += found
        tables.append(table(found))
        if hosts.first():
            write_json(output / "decoding.json", rows)
            write_text(output / "decoding.md", "\n".join(tables))
    return "\n".join(tables)
