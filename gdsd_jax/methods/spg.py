"""SPG, sandwiched policy gradient (arXiv 2510.09541).

    ELBO = mean_v mean_{k in v} l_k,        EUBO = 1/b mean_k log mean_v (p_k^b [k in v] / share_v)
    L~   = ELBO where A > 0, else  omega EUBO + (1 - omega) ELBO
    loss = - sum_i A_i L~_i n_i / sum_i n_i

over rows i and views v. "k in v": token k is masked in v and is one of the completion's `n` tokens, through the first
EOS. `share_v` is the share of the `n` tokens that v masks. EUBO averages over the tokens that some view masks. Where
`A > 0`, a lower bound of the log-likelihood is raised; elsewhere an upper bound is lowered. `negative` chooses the
estimate where `A <= 0`: "mix" as above, "eubo", "elbo" or "zero". `A` is the reward minus its group mean. There is no
ratio and no KL.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from gdsd_jax.diffusion import masking
from gdsd_jax.diffusion.scoring import Views
from gdsd_jax.methods import common
from gdsd_jax.methods.method import Batch, Method, Scores
from gdsd_jax.runtime.ranges import Count, Few, Positive, Share


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of `spg`.

    Attributes:
      negative: the estimate where the advantage is not positive: "mix", "eubo", "elbo" or "zero".
      eubo_beta: b; the authors use 1.0 for Sudoku, and 2.0 for Countdown with "eubo".
      mix_weight: omega.
      num_t: views per row and inner update; each draws one of the blocks of the completion as its current block.
      block_length: tokens per block of the sampler.
      prompt_mask_rate: probability that a token before the current block is masked, in prompt and completion.
    """

    negative: str = "mix"
    eubo_beta: Positive = 1.5
    mix_weight: Share = 0.5
    num_t: Few = 2
    block_length: Count = 32
    prompt_mask_rate: Share = 0.15

    def __post_init__(self):
        kinds = ("mix", "eubo", "elbo", "zero")
        common.require(self.negative in kinds, f"negative {self.negative!r} is not one of {', '.join(kinds)}")


@flax.struct.dataclass
class SignedViews(Views):
    """Views with `positive` `[1, B]` bool, whether a row's advantage is positive, which decides between the bounds."""

    positive: Any = None


def semi_autoregressive(key: jax.Array, batch: Batch, settings: Settings) -> jax.Array:
    """Draws masks `[B, T]`: some tokens of the current block, few before it, and all after it or after the EOS."""
    block_key, count_key, order_key, before_key = jax.random.split(key, 4)
    rows, length = batch.completion_mask.shape
    n = jnp.maximum(jnp.sum(batch.completion_mask, axis=1, keepdims=True).astype(jnp.int32), 1)
    block = jax.random.randint(block_key, (rows, 1), 0, -(-n // settings.block_length))
    start = block * settings.block_length
    end = jnp.minimum(start + settings.block_length, n)
    count = jax.random.randint(count_key, (rows, 1), 1, end - start + 1)
    position = jnp.arange(length)
    current = (position >= start) & (position < end)
    noise = jnp.where(current, jax.random.uniform(order_key, (rows, length)), jnp.inf)
    chosen = current & (jnp.argsort(jnp.argsort(noise, axis=1), axis=1) < count)
    before = masking.bernoulli(before_key, settings.prompt_mask_rate, *batch.tokens.shape)
    before &= jnp.arange(batch.tokens.shape[1]) < batch.prompt_length + start
    return before | masking.behind_prompt(chosen | (position >= end), batch.prompt_length)


def make(settings: Settings) -> Method:
    def masks(key: jax.Array, batch: Batch) -> jax.Array:
        return jax.vmap(lambda key: semi_autoregressive(key, batch, settings))(jax.random.split(key, settings.num_t))

    def views(masked: jax.Array, batch: Batch) -> SignedViews:
        """Builds views with weights `[k in v] / share_v`, which sum to n, or to 0 if v masks none of the n tokens."""
        within = masked[:, :, batch.prompt_length :] * batch.completion_mask
        count = jnp.sum(within, axis=2, keepdims=True)
        weights = within * jnp.sum(batch.completion_mask, axis=1)[:, None] / jnp.maximum(count, 1)
        positive = (common.advantages(batch, common.centred) > 0)[None]
        return SignedViews(masked, weights, common.own_views(masked, batch, weights).sources, positive)

    def score(reads: dict, views: SignedViews) -> Scores:
        w, l, b = views.weights, reads["log_prob"], settings.eubo_beta  # noqa: E741
        n = jnp.sum(w, axis=2)
        seen = jnp.maximum(jnp.sum(n > 0, axis=0), 1)
        per_view = jnp.sum(w * l, axis=2) / jnp.maximum(n, 1)
        lower = jnp.sum(per_view, axis=0) / seen

        masked = jnp.any(w > 0, axis=0)
        # Computed from logarithms, as p^b of an unlikely token underflows; empty sums are kept out of the gradient.
        log_terms = jnp.where(w > 0, b * l + jnp.log(jnp.where(w > 0, w, 1)), -jnp.inf)
        log_mean = jax.nn.logsumexp(jnp.where(masked, log_terms, 0.0), axis=0) - jnp.log(seen)[:, None]
        upper = jnp.sum(jnp.where(masked, log_mean, 0.0), axis=1) / jnp.maximum(jnp.sum(masked, axis=1), 1) / b

        omega = {"mix": settings.mix_weight, "eubo": 1.0, "elbo": 0.0, "zero": 0.0}[settings.negative]
        negative = 0.0 if settings.negative == "zero" else omega * upper + (1 - omega) * lower
        estimate = jnp.where(views.positive[0], lower, negative)
        return Scores(estimate, lower, {"gap": upper - lower, "spread": common.spread(per_view.T)})

    def prepare(batch: Batch, old: Scores | None, ref: Scores | None) -> dict:
        n = jnp.sum(batch.completion_mask, axis=1)
        return {"weight": common.advantages(batch, common.centred) * n / jnp.maximum(jnp.sum(n), 1)}

    def objective(new: Scores, constants: dict) -> tuple[dict, dict]:
        metrics = {"eubo_elbo_gap": new.extra["gap"], "score_spread": new.extra["spread"], "log_prob": new.normalised}
        return {"objective": -constants["weight"] * new.guided}, metrics

    return Method(("log_prob",), masks, views, score, prepare, objective, needs_reference=False, old="unused")
