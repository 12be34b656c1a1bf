"""The contract of a method: the batch that it receives, the functions that it consists of, and a check of both.

A method turns a rollout into a loss in five pure steps. Only `prepare` couples rows: group means, denominators and
softmaxes are computed there, from the whole batch and without gradient. `objective` is a sum over rows, so that cutting
it into micro-batches changes only the rounding.

B rows, G completions per group, M views, L completion tokens, T = P + L tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from gdsd_jax.denoiser import DenoiserConfig
from gdsd_jax.diffusion import SamplerConfig
from gdsd_jax.diffusion.scoring import Views
from gdsd_jax.runtime.errors import UserError


@flax.struct.dataclass
class Batch:
    """Rollouts with their rewards, as methods receive them. The rows of a group are adjacent.

    Attributes:
      tokens: `[B, T]` int32, clean prompts and completions.
      prompt_mask: `[B, P]` bool, True on real tokens, or None where every token is attended to.
      completion_mask: `[B, L]` float32, 1 up to and including the first EOS.
      rewards: `[B]` float32, or None where `advantages` is given.
      advantages: `[B]` float32, or None where the method computes its own from the rewards.
      commit_step: `[B, L]` int32, the denoising step at which the sampler committed each token, or None.
      confidence: `[B, L]` float32, the probability of each token at that step, before temperature and cuts, or None.
      log_prob: `[B, L]` float32, the log-probability with which the sampler drew each token, after temperature and the
        cuts top_p and top_k, or None.
      entropy: `[B, L]` float32, the entropy in nats of the distribution from which `confidence` is read, or None.
      step_rewards: `[B, S]` float32, the rewards of S partial completions of each row, or None.
      components: `[B, C]` float32, the task's reward components (0 where one failed), or None.
      token_rewards: `[B, L]` float32, the rewards of the task's `token_score`, 0 after the EOS, or None.
      verdicts: `[B, V]` float32, the values of the task's metrics for each text (0 where one failed), or None if the
        method does not ask for them.
      iteration, inner_update: int32 scalars, counted from 0, or None outside of training.
      group_size: static, G.
      component_weights: static, `(name, weight)` of each component: `rewards` is their weighted sum.
      verdict_names: static, the names of the verdicts.
      eos_token_id: static, the token that ends a completion, or None where it is unknown.
      sampler: static, the settings that the completions were sampled with, or None.
      unwritten: static, the `commit_step` of positions that no step wrote; None: `sampler.step_limit`.
    """

    tokens: Any
    prompt_mask: Any
    completion_mask: Any
    rewards: Any = None
    advantages: Any = None
    commit_step: Any = None
    confidence: Any = None
    log_prob: Any = None
    entropy: Any = None
    step_rewards: Any = None
    components: Any = None
    token_rewards: Any = None
    verdicts: Any = None
    iteration: Any = None
    inner_update: Any = None
    component_weights: tuple[tuple[str, float], ...] = flax.struct.field(pytree_node=False, default=())
    verdict_names: tuple[str, ...] = flax.struct.field(pytree_node=False, default=())
    group_size: int = flax.struct.field(pytree_node=False, default=1)
    eos_token_id: int | None = flax.struct.field(pytree_node=False, default=None)
    sampler: SamplerConfig | None = flax.struct.field(pytree_node=False, default=None)
    unwritten: int | None = flax.struct.field(pytree_node=False, default=None)

    @property
    def step_limit(self) -> int:
        """Returns the largest number of steps of the sampler; it is the `commit_step` of positions that none wrote."""
        if self.unwritten is not None:
            return self.unwritten
        assert self.sampler is not None, "a batch that records steps names its sampler"
        return self.sampler.step_limit

    @property
    def completion_length(self) -> int:
        return self.completion_mask.shape[1]

    @property
    def prompt_length(self) -> int:
        return self.tokens.shape[1] - self.completion_length


class Scores(NamedTuple):
    """The values that an objective compares between policies; all arrays have rows first.

    guided: the quantity that the method moves away from its value under the old policy.
    normalised: the log-probabilities that the KL to the reference compares.
    extra: further values that the objective needs from the views, such as weights of tokens and diagnostics, as a
      dictionary; or None. Only the new policy's are read.
    """

    guided: Any
    normalised: Any
    extra: Any = None


class Method(NamedTuple):
    """An objective as functions. `gdsd_jax.methods.METHODS` lists them; the trainer never asks which one it runs.

    reads: the per-token quantities that the method needs, see `gdsd_jax.diffusion.scoring.read_tokens`.
    masks: `(key, batch) -> masked [M, B, T]`, drawn once per inner update; old, reference and new scores share them.
      Both `masks` and `prepare` may use `batch.iteration` and `batch.inner_update`.
    views: `(masked, batch) -> Views`; adds to the masks what follows from them, such as complements and weights.
    score: `({read: [R, B, L]}, views) -> Scores`; the read "hidden" is `[R, B, L, D]`.
    prepare: `(batch, old Scores | None, ref Scores | None) -> constants`, a pytree of arrays with rows first. With
      `current` it takes a fourth argument, the detached scores of the policy as it is before this inner update.
    objective: `(new Scores, constants) -> ({component: [B]}, {metric: [B]})`. The loss is the sum over components and
      rows; components are named ("objective", "kl"), so that the gradient of each can be measured. Metrics are averaged
      over rows; of names that end in `_max` the largest value is taken, of those in `_std` the standard deviation. If
      the constants hold no old scores, `objective` uses the stop-gradient of the new ones, which is exact at the first
      inner update after a rollout.
    needs_reference: whether `prepare` uses the reference's scores.
    old: "unused" (no old policy), "ratio" (old scores are only compared with new ones, so the first inner update needs
      no forward pass for them), "always" (`prepare` couples rows through them), or "own_masks" (as "always", but the
      old scores are read on masks of their own, drawn once for all inner updates of a rollout).
    current: whether `prepare` couples rows through the scores of the policy that is being updated.
    records: whether the batch must hold the rollout's `log_prob` and `entropy`.
    extras: `(key, DenoiserConfig) -> pytree of arrays`, the initial values of parameters that the method trains beside
      the policy, such as a value head, with `config.extras_optimizer`; None: there are none. `score` takes them as a
      third argument: old scores get those of the rollout's policy, new and reference scores the current ones. Their
      gradient flows through the new scores alone.
    verdicts: whether the batch must hold the task's verdicts.
    """

    reads: tuple
    masks: Callable
    views: Callable
    score: Callable
    prepare: Callable
    objective: Callable
    needs_reference: bool
    old: str = "ratio"
    current: bool = False
    records: bool = False
    extras: Callable | None = None
    verdicts: bool = False

    def scores(self, reads: dict, views: Views, extras: Any = None) -> Scores:
        """Calls `score` with the extras, if the method has any."""
        return self.score(reads, views) if self.extras is None else self.score(reads, views, extras)

    def constants(self, batch: Batch, old: Scores | None, ref: Scores | None, current: Scores | None) -> Any:
        """Calls `prepare` with the scores that it takes; no gradient flows through the result."""
        scores = (old, ref, current) if self.current else (old, ref)
        return jax.lax.stop_gradient(self.prepare(batch, *jax.lax.stop_gradient(scores)))


READS = ("log_prob", "centred", "entropy", ("centred_top_k", "k"), "hidden", "step_log_prob", "proposal_log_prob")
OLD = ("unused", "ratio", "always", "own_masks")

# `check` traces shapes before the real denoiser is known, for which any config will do.
STAND_IN = DenoiserConfig(
    family="", vocab_size=32, hidden_size=24, num_layers=1, num_heads=2, num_kv_heads=2, intermediate_size=16,
    max_length=64, rope_theta=1e4, rms_norm_eps=1e-5, qkv_bias=False, tied_head=False, next_token_logits=False,
    mask_token_id=3, eos_token_id=1, pad_token_id=0,
)  # fmt: skip


def check(
    method: Method,
    *,
    name: str,
    prompt_length: int,
    completion_length: int,
    group_size: int,
    sampler: SamplerConfig | None = None,
    component_weights: tuple[tuple[str, float], ...] = (("reward", 1.0),),
    token_rewards: bool = False,
    verdict_names: tuple[str, ...] = ("right",),
    reference: bool = False,
    kl: bool = False,
) -> None:
    """Traces masks, views, score, prepare and objective on a batch of two groups, without computing anything.

    Args:
      method: the result of `build`.
      name: the method's name, for error messages.
      prompt_length, completion_length, group_size: P, L and G of the run.
      sampler: settings of the rollouts; None means one token per step, without blocks.
      component_weights: name and weight of each reward component of the run's task.
      token_rewards: whether the run's task rewards tokens.
      verdict_names: the names of the verdicts that the run's task gives.
      reference: whether the run has a reference that moves.
      kl: whether the run adapts the weight of the KL.

    Raises:
      UserError: a function does not accept its arguments, or does not return the shapes of the contract.
    """
    rows, total = 2 * group_size, prompt_length + completion_length
    completion = (rows, completion_length)

    def run(function: str, expected: str, *arguments: Any) -> Any:
        try:
            return jax.eval_shape(functions[function], *arguments)
        except UserError:
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            raise UserError(f"method {name!r}: {function}{expected} failed with {reason}") from error

    def expect(condition: bool, function: str, expected: str, found: Any) -> None:
        if not condition:
            raise UserError(f"method {name!r}: {function} must return {expected}, it returned {_shapes(found)}")

    def rows_first(function: str, found: Any, what: str) -> None:
        whole = all(leaf.ndim >= 1 and leaf.shape[0] == rows for leaf in jax.tree.leaves(found))
        expect(whole, function, f"{what} whose arrays all have the {rows} rows first", found)

    if not isinstance(method, Method):
        kind = type(method).__name__
        raise UserError(f"method {name!r}: make(settings) must return a gdsd_jax.methods.Method, not {kind}")
    for read in method.reads:
        known = read in READS or (isinstance(read, tuple) and len(read) == 2 and read[0] == "centred_top_k")
        if not known:
            raise UserError(f"method {name!r}: unknown read {read!r}, reads are {READS}")
    if method.old not in OLD:
        raise UserError(f"method {name!r}: old is {method.old!r}, not one of {', '.join(OLD)}")

    functions = method._asdict()

    def score(values: list, views: Views, *extras: Any) -> Scores:
        return method.score(dict(zip(method.reads, values, strict=True)), views, *extras)

    functions["score"] = score
    batch = Batch(
        tokens=_array((rows, total), jnp.int32),
        prompt_mask=_array((rows, prompt_length), bool),
        completion_mask=_array(completion),
        rewards=_array((rows,)),
        commit_step=_array(completion, jnp.int32),
        confidence=_array(completion),
        log_prob=_array(completion) if method.records else None,
        entropy=_array(completion) if method.records else None,
        components=_array((rows, len(component_weights))),
        token_rewards=_array(completion) if token_rewards else None,
        verdicts=_array((rows, len(verdict_names))) if method.verdicts else None,
        verdict_names=verdict_names if method.verdicts else (),
        iteration=_array((), jnp.int32),
        inner_update=_array((), jnp.int32),
        component_weights=component_weights,
        group_size=group_size,
        sampler=sampler or one_by_one(completion_length),
    )
    masked = run("masks", "(key, batch)", jax.eval_shape(lambda: jax.random.key(0)), batch)
    good = hasattr(masked, "shape") and masked.shape[1:] == (rows, total) and masked.dtype == bool
    expect(good, "masks", f"bool [M, {rows}, {total}]", masked)

    views = run("views", "(masked, batch)", masked, batch)
    expect(isinstance(views, Views), "views", "a gdsd_jax.diffusion.scoring.Views", views)
    good = views.masked.shape[1:] == (rows, total) and views.weights.shape[1:] == completion
    expect(good, "views", f"masked [K, {rows}, {total}] and weights [R, {rows}, {completion_length}]", views)
    good = len(views.sources) == views.weights.shape[0] and max(map(max, views.sources)) < views.masked.shape[0]
    expect(good, "views", f"one source for each read, made of passes below {views.masked.shape[0]}", views.sources)

    # The reads are a list, because JAX sorts the keys of dictionaries, and strings cannot be compared with tuples.
    width = {"hidden": (STAND_IN.hidden_size,)}
    reads = [_array((*views.weights.shape, *width.get(read, ()))) for read in method.reads]
    key, extras = jax.eval_shape(lambda: jax.random.key(0)), []
    if method.extras is not None:
        functions["extras"] = lambda key: method.extras(key, STAND_IN)
        extras = [run("extras", "(key, denoiser config)", key)]
    score_of = "(reads, views, extras)" if extras else "(reads, views)"
    scores = run("score", score_of, reads, views, *extras)
    expect(hasattr(scores, "guided"), "score", "a gdsd_jax.methods.Scores", scores)
    rows_first("score", scores, "Scores")

    # At a first inner update the trainer gives no old scores, unless the method always needs them.
    absent = [] if method.old in ("always", "own_masks") else [None]
    prepare_of = "(batch, old, ref, current)" if method.current else "(batch, old, ref)"
    for old in absent + ([] if method.old == "unused" else [scores]):
        known = (old, scores if method.needs_reference else None, *[scores] * method.current)
        constants = run("prepare", prepare_of, batch, *known)
        rows_first("prepare", constants, "constants")
        returned = run("objective", "(new, constants)", scores, constants)
        pair = isinstance(returned, tuple) and len(returned) == 2 and all(isinstance(x, dict) for x in returned)
        expect(pair and bool(returned[0]), "objective", "({component of the loss: value}, {metric: value})", returned)
        for what, value in [*returned[0].items(), *returned[1].items()]:
            good = getattr(value, "shape", None) == (rows,)
            expect(good, "objective", f"one value per row, [{rows}], as {what!r}", value)
    if reference and not method.needs_reference:
        raise UserError(f"method {name!r} uses no reference: set config.reference.every to 0, or its beta above 0")
    if kl and not ("kl" in returned[0] and "kl" in returned[1]):
        raise UserError(
            f"method {name!r} has no KL in its loss to adapt: set config.reference.kl_target to None, "
            "or its beta above 0"
        )


def one_by_one(completion_length: int) -> SamplerConfig:
    """Returns the simplest sampler: each step commits the most confident token, at temperature 1, without blocks."""
    return SamplerConfig(completion_length, completion_length, completion_length, "low_confidence", temperature=1.0)


def _array(shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _shapes(found: Any) -> str:
    """Describes a pytree in one line, with shapes and dtypes in place of arrays."""
    words = jax.tree.map(lambda x: f"{x.dtype}{list(x.shape)}" if hasattr(x, "shape") else repr(x), found)
    return " ".join(str(words).replace("'", "").split())[:300]
