"""Measures how near methods come to the optimal policy, in a toy language small enough to enumerate.

The optimum of `max E[psi A] - KL(pi || pi_old)` is `pi* ~ pi_old exp(psi A)`. Here `pi` is the distribution of the
completions that the sampler writes, summed over all orders of its commits. The language has a few hundred completions,
so that `KL(pi_theta || pi*)` is an exact sum. It is recorded along a method's inner updates.

A completion has `LENGTH` tokens of `KINDS` kinds, after a prompt of one token. The denoiser `TOY` is trained on a
random distribution of completions, or left at random weights.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from gdsd_jax.denoiser import DenoiserConfig, init_base
from gdsd_jax.diffusion import Rollout, SamplerConfig, masking, sample, trajectory_log_prob
from gdsd_jax.diffusion.scoring import Views, read_views
from gdsd_jax.methods import Batch, build

LENGTH, KINDS = 4, 4
TOY = DenoiserConfig(
    family="toy", vocab_size=KINDS + 2, hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=2,
    intermediate_size=64, max_length=16, rope_theta=1e4, rms_norm_eps=1e-5, qkv_bias=False, tied_head=False,
    next_token_logits=False, mask_token_id=KINDS + 1, eos_token_id=KINDS, pad_token_id=KINDS, dtype="float32",
    remat="none", layer_unroll=2,
)  # fmt: skip
OPEN = {"eps_low": 1.0, "eps_high": 1e9}  # a trust region without bounds
NO_KL = {"beta": 0.0}


class Toy(NamedTuple):
    """The language and a denoiser for it.

    base: parameters of the denoiser.
    completions: all completions, `[N, L]`.
    reward: their rewards, `[N]`.
    """

    base: Any
    sampler: SamplerConfig
    completions: np.ndarray
    reward: np.ndarray


def methods_of(psi: float) -> dict[str, tuple[str, dict[str, Any], dict[str, Any]]]:
    """Returns, by label, a method's name, settings that make `log pi*` its target, and settings that disable its clip.

    `psi` is that of a whole completion. Plain scores weight each token by 1/2, so their `psi` is halved.
    """
    per_token = psi / LENGTH
    return {
        "gdsd": ("gdsd", {**NO_KL, "psi": per_token / 2}, OPEN),
        "gdsd, elbo": ("gdsd", {**NO_KL, "psi": per_token, "weighting": "elbo"}, OPEN),
        "gdsd_tlc": ("gdsd_tlc", {**NO_KL, "psi": per_token}, OPEN),
        "gdsd_teacher": ("gdsd_teacher", {**NO_KL, "psi": per_token}, {}),
        "espo": ("espo", NO_KL, OPEN),
        "spg": ("spg", {"block_length": LENGTH}, {}),
        "exact_pg": ("exact_pg", {}, OPEN),
    }


def sampler_of(strategy: str) -> SamplerConfig:
    """Returns a sampler of one token per step at temperature 1, without blocks and without EOS."""
    return SamplerConfig(LENGTH, LENGTH, LENGTH, strategy, temperature=1.0, suppress=(TOY.eos_token_id,))


def make_toy(strategy: str, *, trained: bool, seed: int) -> Toy:
    """Makes the language and a denoiser; the reward is the share of tokens with the right kind for their position."""
    completions = np.array(list(itertools.product(range(KINDS), repeat=LENGTH)), np.int32)
    reward = np.mean(completions == np.arange(LENGTH) % KINDS, axis=1)
    base = init_base(TOY, jax.random.key(seed))
    if trained:
        base = pretrain(base, completions, jax.random.key(seed + 1))
    else:
        base = base | {"embedding": 20 * base["embedding"], "head": 20 * base["head"]}
    return Toy(base, sampler_of(strategy), completions, reward)


def with_prompt(completions: Array) -> Array:
    """Puts a prompt of one token before each completion."""
    return jnp.pad(jnp.asarray(completions, jnp.int32), ((0, 0), (1, 0)))


def pretrain(base: Any, completions: np.ndarray, key: Array, *, updates: int = 400, rows: int = 256) -> Any:
    """Fits a random, uneven distribution over the completions, by the weighted cross-entropy of masked diffusion."""
    share = jax.nn.softmax(2.0 * jax.random.normal(jax.random.fold_in(key, 0), (len(completions),)))
    optimizer = optax.adam(3e-3)

    def loss(base: Any, key: Array) -> Array:
        row_key, ratio_key, mask_key = jax.random.split(key, 3)
        chosen = jax.random.choice(row_key, len(completions), (rows,), p=share)
        ratio = jax.random.uniform(ratio_key, (rows, 1), minval=1 / LENGTH)
        masked = masking.bernoulli(mask_key, ratio, rows, LENGTH)
        views = Views(masking.behind_prompt(masked, 1)[None], (masked / ratio)[None], ((0,),))
        tokens = with_prompt(jnp.asarray(completions)[chosen])
        read = read_views(TOY, base, None, tokens, views, ("log_prob",))["log_prob"]
        return -jnp.sum(views.weights * read) / (rows * LENGTH)

    def update(carry: tuple, key: Array) -> tuple:
        base, state = carry
        changes, state = optimizer.update(jax.grad(loss)(base, key), state)
        return (optax.apply_updates(base, changes), state), None

    keys = jax.random.split(jax.random.fold_in(key, 1), updates)
    return jax.jit(lambda base: jax.lax.scan(update, (base, optimizer.init(base)), keys)[0][0])(base)


def log_probs(toy: Toy, base: Any) -> Float[Array, " N"]:
    """Computes the log-probability that the sampler writes each completion; it sums over all orders of its commits."""
    orders = np.array(list(itertools.permutations(range(LENGTH))), np.int32)
    count = len(toy.completions)
    tokens = with_prompt(jnp.tile(jnp.asarray(toy.completions), (len(orders), 1)))
    steps = jnp.repeat(jnp.asarray(orders), count, axis=0)
    rollout = Rollout(tokens, steps, jnp.zeros(steps.shape))
    found = trajectory_log_prob(TOY, base, None, rollout, None, toy.sampler)
    return jax.nn.logsumexp(jnp.sum(found, axis=1).reshape(len(orders), count), axis=0)


def follow(
    toy: Toy,
    method_name: str,
    settings: dict[str, Any],
    *,
    psi: float,
    updates: int,
    rows: int,
    learning_rate: float,
    seed: int,
) -> dict[str, list[float]]:
    """Runs inner updates of a method on one batch of rollouts, and records the KL to the optimum and the mean reward.

    The advantages are exact: the reward minus its expectation under the old policy.

    Returns:
      "update": the numbers of updates after which both are recorded: 0, 1, 2, 4, 8, ... up to `updates`.
      "kl": `KL(pi_theta || pi*)` in nats.
      "reward": the expected reward.
    """
    method = build(method_name, **settings)
    distribution = jax.jit(lambda base: log_probs(toy, base))
    old_log = np.asarray(distribution(toy.base), np.float64)
    expected = float(np.sum(np.exp(old_log) * toy.reward))
    best = old_log + psi * (toy.reward - expected)
    best -= np.log(np.sum(np.exp(best)))
    key = jax.random.key(seed)
    rollout = sample(TOY, toy.base, None, jnp.zeros((rows, 1), jnp.int32), None, key, toy.sampler)
    reward = jnp.mean(rollout.tokens[:, 1:] == jnp.arange(LENGTH) % KINDS, axis=1)
    batch = Batch(
        rollout.tokens, None, jnp.ones((rows, LENGTH)), reward, reward - expected, rollout.commit_step,
        rollout.confidence, group_size=rows, sampler=toy.sampler, eos_token_id=TOY.eos_token_id,
    )  # fmt: skip
    optimizer = optax.adam(learning_rate)

    def scores(base: Any, views: Views) -> Any:
        return method.score(read_views(TOY, base, None, batch.tokens, views, method.reads), views)

    @jax.jit
    def update(base: Any, state: Any, number: Array) -> tuple[Any, Any]:
        views = method.views(method.masks(jax.random.fold_in(key, number), batch), batch)
        old = None if method.old == "unused" else scores(toy.base, views)

        def loss(base: Any) -> Array:
            new = scores(base, views)
            losses, _ = method.objective(new, method.constants(batch, old, None, new))
            return jnp.sum(sum(losses.values()))

        changes, state = optimizer.update(jax.grad(loss)(base), state)
        return optax.apply_updates(base, changes), state

    base, state = toy.base, optimizer.init(toy.base)
    looked_at = [0, *(2**n for n in range(int(math.log2(updates)) + 1))]
    found: dict[str, list[float]] = {"update": [], "kl": [], "reward": []}
    for number in range(updates + 1):
        if number in looked_at:
            log_prob = np.asarray(distribution(base), np.float64)
            probability = np.exp(log_prob)
            found["update"].append(number)
            # Completions of probability 0 add nothing to the KL.
            terms = np.where(probability > 0, probability * (np.maximum(log_prob, -1e3) - best), 0.0)
            found["kl"].append(float(np.sum(terms)))
            found["reward"].append(float(np.sum(probability * toy.reward)))
        base, state = update(base, state, jnp.asarray(number))
    return found


def compare_to_optimum(
    *,
    psi: float = 2.0,
    updates: int = 64,
    rows: int = 512,
    learning_rate: float = 1e-3,
    seed: int = 0,
    report: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """Measures the methods of `methods_of` in two commit orders, with and without clip, on a random and a trained toy.

    Args:
      report: receives a line of text for each measurement.

    Returns:
      One result of `follow` per measurement, with the keys "method", "strategy", "trained" and "clip".
    """
    results = []
    for trained, strategy in itertools.product((False, True), ("random", "low_confidence")):
        toy = make_toy(strategy, trained=trained, seed=seed)
        for label, (name, settings, opened) in methods_of(psi).items():
            for clip in (False, True) if opened else (False,):
                chosen = settings if clip else {**settings, **opened}
                numbers = {"psi": psi, "updates": updates, "rows": rows, "seed": seed}
                curve = follow(toy, name, chosen, learning_rate=learning_rate, **numbers)
                results.append({"method": label, "strategy": strategy, "trained": trained, "clip": clip} | curve)
                kind, kls = "trained" if trained else "random", curve["kl"]
                ends = f"KL {kls[0]:.3f} -> {kls[-1]:.3f}, least {min(kls):.3f}"
                report(f"{kind} toy, {strategy} order, {label}{', own clip' * clip}: {ends}")
    return results
