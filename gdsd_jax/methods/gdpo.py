"""GDPO, sequence-level policy optimisation on a bound integrated by quadrature (arXiv 2510.08554).

    S_i  = sum_{j,d} v_j / (t_j K) sum_{k masked in view (j,d)} l_ik
    loss = mean_i -min(r_i A_i, clip(r_i) A_i) + beta mean_i k3_i,      r_i = exp((S_theta - S_old)_i / n_i)

over rows i, the nodes `t_j` and weights `v_j` of a rule on [0, 1], and K draws d at each node. A mask covers
`max(1, floor(n t))` of the completion's `n` tokens through the first EOS. The weight has the nominal `t`, not the share
that is masked. Rules are "gauss-1" to "gauss-5" (Legendre), "simpson" at 0.1, 0.5 and 1, and "mc" with K ratios per row
drawn from [1/n, 1]. A completion's tokens alone determine its masks, so that all its scores see the same masks. `A` is
the reward minus its group mean. The KL term, on `S / n`, is our addition; the authors have none.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from gdsd_jax.diffusion import masking
from gdsd_jax.diffusion.scoring import Views
from gdsd_jax.methods import common
from gdsd_jax.methods.method import Batch, Method, Scores
from gdsd_jax.runtime.ranges import Bound, Few


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of `gdpo`.

    Attributes:
      eps_low, eps_high: trust region on the ratio per token of the sequence.
      beta: weight of the KL to the reference.
      rule: "gauss-1" to "gauss-5", "simpson" or "mc".
      draws: masks drawn at each node, K.
    """

    eps_low: Bound = 0.5
    eps_high: Bound = 0.5
    beta: float = 0.0
    rule: str = "gauss-3"
    draws: Few = 1

    def __post_init__(self):
        rules = [*(f"gauss-{n}" for n in range(1, 6)), "simpson", "mc"]
        common.require(self.rule in rules, f"rule {self.rule!r} is not one of {', '.join(rules)}")


def nodes(rule: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the nodes and weights of a rule on [0, 1]."""
    if rule == "simpson":
        return np.array([0.1, 0.5, 1.0]), np.array([1, 4, 1]) / 6
    x, w = np.polynomial.legendre.leggauss(int(rule.removeprefix("gauss-")))
    return (x + 1) / 2, w / 2


def row_keys(batch: Batch) -> jax.Array:
    """Derives a key for each row from its completion alone."""
    words = batch.tokens[:, batch.prompt_length :].astype(jnp.uint32)
    mix = lambda seed, word: (seed * jnp.uint32(31) + word, None)  # noqa: E731
    folded, _ = jax.lax.scan(mix, jnp.zeros_like(words[:, 0]), words.T)
    return jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(0), seed))(folded)


def make(settings: Settings) -> Method:
    def lengths(batch: Batch) -> jax.Array:
        return jnp.maximum(jnp.sum(batch.completion_mask, axis=1), 1.0)

    def times(batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Returns `t` and `v / K` of each view, both `[M, B]`."""
        rows, least = batch.tokens.shape[0], 1 / lengths(batch)
        if settings.rule == "mc":
            draw = lambda key: jax.random.uniform(jax.random.fold_in(key, 1), (settings.draws,))  # noqa: E731
            uniform = jax.vmap(draw)(row_keys(batch))
            return least + (1 - least) * uniform.T, jnp.full((settings.draws, rows), 1 / settings.draws)
        t, v = (jnp.repeat(jnp.asarray(x, jnp.float32), settings.draws)[:, None] for x in nodes(settings.rule))
        return jnp.tile(t, (1, rows)), jnp.tile(v / settings.draws, (1, rows))

    def masks(key: jax.Array, batch: Batch) -> jax.Array:
        t, _ = times(batch)
        counts = jnp.maximum(jnp.floor(lengths(batch) * t), 1)
        shape = (t.shape[0], batch.completion_length)
        noise = jax.vmap(lambda key: jax.random.uniform(key, shape), out_axes=1)(row_keys(batch))
        noise = jnp.where(batch.completion_mask > 0, noise, jnp.inf)
        rank = jnp.argsort(jnp.argsort(noise, axis=-1), axis=-1)
        return masking.behind_prompt(rank < counts[..., None], batch.prompt_length)

    def views(masked: jax.Array, batch: Batch) -> Views:
        t, v = times(batch)
        common.require(len(masked) == len(t), f"rule {settings.rule!r} with draws {settings.draws} has {len(t)} views")
        within = masked[:, :, batch.prompt_length :] * batch.completion_mask
        return common.own_views(masked, batch, within * (v / t)[..., None])

    def score(reads: dict, views: Views) -> Scores:
        total = jnp.sum(common.weighted_sum(reads["log_prob"], views), axis=1)
        return Scores(total, total)

    def prepare(batch: Batch, old: Scores | None, ref: Scores | None) -> dict:
        rows = batch.tokens.shape[0]
        return {
            "advantage": common.advantages(batch, common.centred),
            "old": None if old is None else old.guided,
            "ref": ref.normalised if ref is not None and settings.beta else None,
            "length": lengths(batch),
            "rows": common.per_row(rows, rows),
        }

    def objective(new: Scores, constants: dict) -> tuple[dict, dict]:
        length, rows = constants["length"], constants["rows"]
        log_ratio = (new.guided - common.old_or_new(constants["old"], new.guided)) / length
        policy, clipped = common.ppo(log_ratio, constants["advantage"], settings.eps_low, settings.eps_high)
        metrics = common.ratio_metrics(log_ratio, clipped)
        losses = {"objective": policy / rows}
        if constants["ref"] is not None:
            metrics["kl"] = common.k3(new.normalised / length, constants["ref"] / length)
            losses["kl"] = settings.beta * metrics["kl"] / rows
        return losses, metrics

    return Method(("log_prob",), masks, views, score, prepare, objective, needs_reference=settings.beta > 0)
