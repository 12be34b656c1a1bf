"""Compares the likelihoods that methods estimate for rollouts with the exact likelihood of the sampler's choices.

Letters of shapes: B rows, D draws of masks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from gdsd_jax.denoiser import DenoiserConfig
from gdsd_jax.diffusion import Rollout, trajectory_log_prob
from gdsd_jax.diffusion.scoring import read_views
from gdsd_jax.methods import Batch, Method, Scores, build
from gdsd_jax.runtime.errors import UserError
from gdsd_jax.training.state import policy

NO_KL = {"beta": 0.0}
NEAR = 2e-3  # nats; a log-ratio far above rounding, but small enough that few ranks swap
FEWEST = 8  # rows, with fewer of which the error of a log-ratio says nothing
# Method and settings of each row of the table. There is no KL, so that a gradient is that of the objective alone.
SUBJECTS: dict[str, tuple[str, dict[str, Any]]] = {
    "exact_pg": ("exact_pg", {}),
    "gdsd": ("gdsd", NO_KL),
    "gdsd, rollout order": ("gdsd", {**NO_KL, "masking": "rollout_order"}),
    "gdsd, elbo": ("gdsd", {**NO_KL, "weighting": "elbo"}),
    "gdsd_tlc": ("gdsd_tlc", NO_KL),
    "gdsd_tlc, top 8": ("gdsd_tlc", {**NO_KL, "top_k": 8}),
    "gdsd_teacher": ("gdsd_teacher", NO_KL),
    "espo": ("espo", NO_KL),
    "spg": ("spg", {}),
    "diffu_grpo": ("diffu_grpo", NO_KL),
    "coupled_grpo": ("coupled_grpo", NO_KL),
    "gdpo": ("gdpo", {}),
    "tracerl": ("tracerl", {**NO_KL, "shrink": 1}),
    "just_grpo": ("just_grpo", {}),
}


class Probe(NamedTuple):
    """A method with its compiled functions, of the trained parameters, a batch and masks.

    nats: returns the method's estimate of each completion's log-probability, `[B]`.
    gradient: returns the gradient of its loss, where old and new policy are equal, as one vector.
    """

    method: Method
    nats: Callable[[Any, Batch, Array], Array]
    gradient: Callable[[Any, Batch, Array], Array]


def probe(subject: str, config: DenoiserConfig, base: Any, *, block_length: int, chunk: int) -> Probe:
    """Builds the functions of one of `SUBJECTS`; `chunk` vocabulary entries are read at a time."""
    name, settings = SUBJECTS[subject]
    if name == "spg" or "masking" in settings:
        settings = settings | {"block_length": block_length}
    method = build(name, **settings)

    def scores(params: Any, batch: Batch, masked: Array) -> Scores:
        views = method.views(masked, batch)
        options = {"prompt_mask": batch.prompt_mask, "chunk": chunk}
        reads = read_views(config, *policy(base, params), batch.tokens, views, method.reads, **options)
        return method.score(reads, views)

    @jax.jit
    def nats(params: Any, batch: Batch, masked: Array) -> Array:
        return in_nats(name, settings, scores(params, batch, masked), batch)

    @jax.jit
    def gradient(params: Any, batch: Batch, masked: Array) -> Array:
        def loss(params: Any) -> Array:
            new = scores(params, batch, masked)
            old = new if method.old in ("always", "own_masks") else None
            losses, _ = method.objective(new, method.constants(batch, old, None, new))
            return jnp.sum(sum(losses.values()))

        return ravel_pytree(jax.grad(loss)(params))[0]

    return Probe(method, nats, gradient)


def in_nats(name: str, settings: dict[str, Any], scores: Scores, batch: Batch) -> Float[Array, " B"]:
    """Converts a method's scores to an estimate of each completion's log-probability in nats.

    For methods that score centred logits, it is the sum of these.
    """
    if name == "spg":
        # `normalised` is the bound that does not depend on the advantage, as a mean per token.
        return scores.normalised * jnp.sum(batch.completion_mask, axis=1)
    guided = scores.guided
    if name == "exact_pg":
        return jnp.sum(guided, axis=1)
    if name == "gdsd_teacher":
        return jnp.mean(jnp.sum(guided, axis=2), axis=1)
    if name in ("gdsd", "gdsd_tlc"):
        halved = settings.get("weighting", "plain" if name == "gdsd" else "elbo") == "plain"
        return jnp.mean(guided, axis=1) * (2 if halved else 1)
    return guided if guided.ndim == 1 else jnp.sum(guided, axis=1)


def exact(config: DenoiserConfig, base: Any, params: Any, batch: Batch, chunk: int) -> Float[Array, " B"]:
    """Computes the exact log-probability of each rollout; it is -inf if the policy cannot have made the rollout."""
    rollout = Rollout(batch.tokens, batch.commit_step, batch.confidence)
    given = (rollout, batch.prompt_mask, batch.sampler)
    return jnp.sum(trajectory_log_prob(config, *policy(base, params), *given, chunk=chunk), axis=1)


def rank_correlation(estimate: np.ndarray, truth: np.ndarray, group_size: int) -> float:
    """Computes Spearman's rank correlation inside groups, averaged over the groups in which both arrays vary.

    Both arrays are `[B]`. The result is NaN if there is no such group.
    """
    found = []
    for x, y in zip(estimate.reshape(-1, group_size), truth.reshape(-1, group_size), strict=True):
        ranks = [np.unique(v, return_inverse=True, return_counts=True) for v in (x, y)]
        # Equal values share the mean of their ranks.
        ranks = [(np.cumsum(count) - (count - 1) / 2)[index] for _, index, count in ranks]
        if min(r.std() for r in ranks) > 0:
            found.append(np.corrcoef(*ranks)[0, 1])
    return float(np.mean(found)) if found else float("nan")


class Line(NamedTuple):
    """A straight line in parameter space, from a policy's parameters along the exact policy gradient.

    at: returns the parameters at a length along the line.
    slope: derivative of each exact log-probability with respect to the length at the start, `[B]`; NaN if not finite.
    """

    at: Callable[[float], Any]
    slope: np.ndarray

    def length(self, distance: float) -> float:
        """Returns the length at which the median size of the log-ratios, without their jumps, is `distance`."""
        return distance / float(np.nanmedian(np.abs(self.slope)))

    def smooth(self, distance: float, ratio: np.ndarray) -> np.ndarray:
        """Returns which log-ratios `[B]` at a distance are near their tangent; the others have jumped on the way."""
        return np.abs(ratio - self.slope * self.length(distance)) <= distance / 2


def line_along(direction: Any, params: Any, log_ratio: Callable[[Any], np.ndarray]) -> Line:
    """Returns the line from `params` along `direction`.

    The exact log-probability jumps where two candidates swap ranks or a token crosses the threshold. On a trained
    policy, jumps make up most of the log-ratio long before its smooth part is 0.1. How far a policy has moved is
    therefore measured by the slopes at the start, not by a mean or median of log-ratios. The slopes are finite
    differences, over a length at which the median size of the log-ratios is `NEAR`.

    Args:
      direction: a vector as long as all parameters together.
      log_ratio: returns the exact log-ratios `[B]` of given parameters to `params`.
    """
    flat, unravel = ravel_pytree(params)
    unit = direction / jnp.linalg.norm(direction)
    at = lambda length: unravel(flat + length * unit)  # noqa: E731
    finite = lambda ratio: np.where(np.isfinite(ratio), ratio, np.nan)  # noqa: E731
    length = 1e-5 * float(jnp.linalg.norm(flat))
    for _ in range(2):
        ratio = finite(log_ratio(at(length)))
        slope, length = ratio / length, length * NEAR / max(float(np.nanmedian(np.abs(ratio))), 1e-9)
    return Line(at, slope)


def agreement(estimate: np.ndarray, exact: np.ndarray, valid: np.ndarray) -> dict[str, float | None]:
    """Compares estimated log-ratios `[D, B]` with exact ones `[B]`, over the valid rows.

    Returns:
      "error": median size of the differences, divided by the median size of the exact log-ratios.
      "correlation": correlation of estimated and exact log-ratios over rows, averaged over the draws.
      Both are None if fewer than `FEWEST` rows are valid.
    """
    if valid.sum() < FEWEST:
        return {"error": None, "correlation": None}
    estimate, exact = estimate[:, valid], exact[valid]
    error = np.median(np.abs(estimate - exact)) / np.median(np.abs(exact))
    with np.errstate(invalid="ignore"):
        found = [np.corrcoef(draw, exact)[0, 1] for draw in estimate]
    return {"error": float(error), "correlation": float(np.mean(found))}


def median_size(ratio: np.ndarray) -> float:
    """Returns the median size of the finite log-ratios."""
    return float(np.median(np.abs(ratio[np.isfinite(ratio)])))


def cosine(x: Array, y: Array) -> float:
    """Computes the cosine of the angle between two gradients."""
    return float(jnp.vdot(x, y) / jnp.maximum(jnp.linalg.norm(x) * jnp.linalg.norm(y), 1e-30))


def measure(
    config: DenoiserConfig,
    base: Any,
    params: Any,
    batch: Batch,
    key: Array,
    subjects: list[str],
    *,
    draws: int,
    distances: tuple[float, ...],
    chunk: int,
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measures methods on one batch of rewarded rollouts; `gdsd_jax.meter` describes the figures.

    Every method is measured on the same rollouts and on the same moved policies. For each of `distances`, a policy is
    moved along the exact policy gradient until the smooth part of its log-ratios has that median size over rows.
    Methods are then compared on the rows whose log-ratio has not jumped.

    Args:
      params: the parameters in which gradients are taken.
      key: draws the masks.
      subjects: keys of `SUBJECTS`.
      draws: number of draws of masks.
      distances: median log-ratios in nats.
      chunk: vocabulary entries that are read at a time.
      report: receives lines of text as the measurement proceeds.

    Raises:
      UserError: rounding keeps every rollout from being replayed, so that no exact likelihood is finite.
    """
    truth_of = lambda params: np.asarray(exact(config, base, params, batch, chunk), np.float64)  # noqa: E731
    truth = truth_of(params)
    fine = np.isfinite(truth)
    if not fine.any():
        raise UserError(
            f"none of the {len(truth)} rollouts can be replayed, because rounding changes which tokens are committed: "
            "set config.model.dtype to float32"
        )
    make = functools.partial(probe, config=config, base=base, block_length=batch.sampler.block_length, chunk=chunk)
    reference = make("exact_pg")
    trajectory = jax.jit(reference.method.masks)(key, batch)
    ascent = -reference.gradient(params, batch, trajectory)
    if not np.any(ascent):
        raise UserError(
            "the exact gradient is 0, because the rewards in each group are equal: raise --prompts, or give a "
            "checkpoint that solves some of the prompts"
        )
    report("exact gradient")
    line = line_along(ascent, params, lambda p: truth_of(p) - truth)
    moved = {d: line.at(line.length(d)) for d in distances}
    ratios = {d: truth_of(there) - truth for d, there in moved.items()}
    smooth = {d: fine & line.smooth(d, ratio) for d, ratio in ratios.items()}
    jumped = {str(d): float(1 - smooth[d][fine].mean()) for d in distances}
    shown = ", ".join(f"{100 * share:.0f} % at {d}" for d, share in jumped.items())
    report(f"moved policies; log-ratios that jumped: {shown}")
    rows = {}
    for subject in subjects:
        here = make(subject)
        masks = [jax.jit(here.method.masks)(jax.random.fold_in(key, n), batch) for n in range(draws)]
        at = lambda p, masks=masks, here=here: np.stack([here.nats(p, batch, m) for m in masks]).astype(np.float64)  # noqa: E731
        start = at(params)
        mean = start.mean(axis=0)
        difference = (mean - truth)[fine]
        gradients = [here.gradient(params, batch, m) for m in masks]
        row = {
            "bias": float(difference.mean()),
            "spread": float(difference.std()),
            "noise": float(start.std(axis=0)[fine].mean()),
            "rank_correlation": rank_correlation(mean, np.where(fine, truth, truth[fine].min()), batch.group_size),
            "cosine": float(np.mean([cosine(-g, ascent) for g in gradients])),
            "cosine_of_mean": cosine(-sum(gradients), ascent),
            "log_ratio": {str(d): agreement(at(moved[d]) - start, ratios[d], smooth[d]) for d in distances},
        }
        rows[subject] = row
        report(f"{subject}: " + ", ".join(f"{name} {row[name]:.3f}" for name in ("bias", "spread", "cosine")))
    return {
        "rows": int(len(truth)),
        "impossible": float(1 - fine.mean()),
        "log_prob": float(truth[fine].mean()),
        "distances": list(distances),
        "jumped": jumped,
        "log_ratio": {str(d): median_size(ratios[d]) for d in distances},
        "draws": draws,
        "methods": rows,
    }
