"""Every method against a naive float64 oracle written from its equation: values, and gradients along random directions.

No denoiser: logits are a table per token plus a fixed response to what is masked, so that a token read in the wrong
view, or by the wrong policy, shows. Oracles loop over rows, views and tokens in NumPy and share nothing with the
package but the table; each is at most 30 lines.
"""

import functools
import inspect
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdsd_jax.diffusion import SamplerConfig
from gdsd_jax.diffusion.trajectory import StepViews, step_reads
from gdsd_jax.methods import METHODS, Batch, build

B, G, P, L, V, M = 6, 3, 2, 6, 5, 2
RNG = np.random.default_rng(7)
RESPONSE = RNG.normal(size=(P + L, L, V))  # of the logits to a masked token
NEW, CHANGE, REF = RNG.normal(size=(3, B, L, V))
OLD = NEW + CHANGE / 4
COMPLETIONS = RNG.integers(0, V, (B, L))
MASKED = np.concatenate([np.zeros((M, B, P), bool), RNG.random((M, B, L)) < 0.5], axis=2)
MASKED[0, 0, P:], MASKED[0, 1, P:], MASKED[1, 4, P:] = True, False, False
PROMPT_TOO = np.concatenate([RNG.random((1, B, P)) < 0.5, np.ones((1, B, L), bool)], axis=2)
ENDS = np.array([6, 4, 1, 6, 3, 5])
REWARDS = np.array([1.0, 0.2, 0.0, 0.4, 0.4, 0.4])
STEPS = 5
COMMITS = RNG.integers(0, STEPS, (B, L))
RECORDED, ENTROPIES = -1.5 * RNG.random((B, L)) - 0.5, RNG.random((B, L))  # of the rollout's tokens
BEFORE = [[COMMITS[i] >= n if n in COMMITS[i] else np.zeros(L, bool) for i in range(B)] for n in range(STEPS)]
BEFORE = np.concatenate([np.zeros((STEPS, B, P), bool), np.array(BEFORE)], axis=2)


def logits(policy, i, view):
    """`[L, V]` of row i in a view `[T]` of booleans."""
    return policy[i] + np.einsum("t,tlv->lv", view, RESPONSE)


def log_prob(policy, i, view, k):
    z = logits(policy, i, view)[k]
    return z[COMPLETIONS[i, k]] - np.log(np.sum(np.exp(z)))


def centred(policy, i, view, k, top=V):
    z = logits(policy, i, view)[k]
    return z[COMPLETIONS[i, k]] - np.mean(np.sort(z)[-top:])


def inverse(view):
    return np.concatenate([view[:P], ~view[P:]])


def pair(view, k):
    """The view of a coupled pair that masks completion token k, and how many it masks."""
    chosen = view if view[P + k] else inverse(view)
    return chosen, chosen[P:].sum()


def group(i):
    return range(i // G * G, i // G * G + G)


def leave_one_out(i):
    return REWARDS[i] - np.mean([REWARDS[j] for j in group(i) if j != i])


def centred_advantage(i):
    return REWARDS[i] - np.mean([REWARDS[j] for j in group(i)])


def z_score(i):
    members = [REWARDS[j] for j in group(i)]
    return 0.0 if np.std(members) < 1e-6 else (REWARDS[i] - np.mean(members)) / np.std(members)


def softmax(i, values):
    return np.exp(values[i]) / sum(np.exp(values[j]) for j in group(i))


def ppo_term(ratio, advantage, s):
    return min(ratio * advantage, np.clip(ratio, 1 - s.eps_low, 1 + s.eps_high) * advantage)


def k3(new, ref):
    return np.exp(ref - new) - (ref - new) - 1


def gdsd(new, old, ref, masked, s):
    def score(policy, i, m, read):
        total = 0.0
        for k in range(L):
            view, count = pair(masked[m, i], k)
            weight = (L + 1) / count if s.weighting == "elbo" else 1.0
            total += 0.5 * weight * read(policy, i, view, k)
        return total

    def guided(*arguments):
        if not hasattr(s, "top_k"):
            return log_prob(*arguments)
        return centred(*arguments, top=s.top_k or V)

    loss = 0.0
    for i in range(B):
        for m in range(M):
            delta = score(new, i, m, guided) - score(old, i, m, guided)
            delta = np.clip(delta, np.log(1 - s.eps_low), np.log(1 + s.eps_high))
            loss += (delta / L - s.psi * leave_one_out(i)) ** 2 / B
            loss += s.beta * 0.5 * (score(new, i, m, log_prob) - score(ref, i, m, log_prob)) ** 2 / (B * M * L)
    return loss


def gdsd_teacher(new, old, ref, masked, s):
    def x(policy, i, m, k):
        return centred(policy, i, pair(masked[m, i], k)[0], k)

    errors = []
    for i in range(B):
        for m in range(M):
            gaps = []
            for k in range(L):
                teacher = (1 - s.beta) * x(old, i, m, k) + s.beta * x(ref, i, m, k)
                gaps.append(x(new, i, m, k) - teacher)
            if s.level == "sequence":
                errors.append((0.5 * np.mean(gaps) - s.psi * leave_one_out(i)) ** 2)
            else:
                errors += [(gap - s.psi * leave_one_out(i)) ** 2 for gap in gaps]
    return np.mean(errors)


def espo(new, old, ref, masked, s):
    def score(policy, i):
        total = 0.0
        for m in range(M):
            for k in range(L):
                view, count = pair(masked[m, i], k)
                total += 0.5 * (L + 1) / count * log_prob(policy, i, view, k) / M
        return total

    loss = 0.0
    for i in range(B):
        ratio = np.exp((score(new, i) - score(old, i)) / L)
        loss -= ppo_term(ratio, leave_one_out(i), s) / B
        loss += s.beta * 0.5 * (score(new, i) - score(ref, i)) ** 2 / (B * L)
    return loss


def spg(new, old, ref, masked, s):
    loss = 0.0
    for i in range(B):
        n, elbos, terms = ENDS[i], [], {}
        views = [m for m in range(len(masked)) if masked[m, i, P : P + n].any()]
        for m in views:
            inside = [k for k in range(n) if masked[m, i, P + k]]
            elbos.append(np.mean([log_prob(new, i, masked[m, i], k) for k in inside]))
            for k in inside:
                power = np.exp(log_prob(new, i, masked[m, i], k)) ** s.eubo_beta
                terms.setdefault(k, []).append(power / (len(inside) / n))
        elbo = np.mean(elbos) if elbos else 0.0
        eubo = np.mean([np.log(sum(t) / len(views)) for t in terms.values()]) / s.eubo_beta if terms else 0.0
        mix = s.mix_weight * eubo + (1 - s.mix_weight) * elbo
        negative = {"mix": mix, "eubo": eubo, "elbo": elbo, "zero": 0.0}[s.negative]
        advantage = centred_advantage(i)
        loss -= advantage * (elbo if advantage > 0 else negative) * n / ENDS.sum()
    return loss


def token_ppo(new, old, ref, s, likelihood, advantage, weight):
    """Computes the objective that the GRPO family shares, with the weight `weight(i, k)` of each token."""
    loss = 0.0
    for i in range(B):
        for k in range(L):
            if weight(i, k):
                now, before, base = (likelihood(policy, i, k) for policy in (new, old, ref))
                term = -ppo_term(np.exp(now - before), advantage(i), s) + s.beta * k3(now, base)
                loss += weight(i, k) * term
    return loss


def diffu_grpo(new, old, ref, masked, s):
    def weight(i, k):
        return (k < ENDS[i]) / ENDS.sum()

    return token_ppo(new, old, ref, s, lambda p, i, k: log_prob(p, i, masked[0, i], k), centred_advantage, weight)


def coupled_grpo(new, old, ref, masked, s):
    t = masked[0, :, P:].mean()
    full = np.arange(P + L) >= P

    def likelihood(policy, i, k):
        view, _ = pair(masked[0, i], k)
        share = t if masked[0, i, P + k] else 1 - t
        return 0.5 * (log_prob(policy, i, full, k) + log_prob(policy, i, view, k) / share)

    return token_ppo(new, old, ref, s, likelihood, leave_one_out, lambda i, k: (k < ENDS[i]) / ENDS.sum())


def unigrpo(new, old, ref, masked, s):
    def weight(i, k):
        view = masked[0, i]
        return view[P + k] / view[P:].sum() / B if view[P:].any() else 0.0

    return token_ppo(new, old, ref, s, lambda p, i, k: log_prob(p, i, masked[0, i], k), z_score, weight)


def wd1(new, old, ref, masked, s):
    advantage, loss = np.array([centred_advantage(i) for i in range(B)]), 0.0
    for i in range(B):
        score = sum(log_prob(new, i, masked[0, i], k) for k in range(ENDS[i]))
        loss -= softmax(i, advantage) * score
        if not s.positive_only:
            loss += softmax(i, -advantage) * score
    return loss


def dmpo(new, old, ref, masked, s):
    views = [[view for m in range(M) for view in (masked[m, i], inverse(masked[m, i]))] for i in range(B)]

    def entropy(policy, i, view):
        return -sum(log_prob(policy, i, view, k) for k in range(L) if view[P + k]) / max(view[P:].sum(), 1)

    def score(policy, i):
        return np.mean([-L * entropy(policy, i, view) for view in views[i]])

    gain = np.array([score(ref, i) - score(old, i) for i in range(B)])
    loss = 0.0
    for i in range(B):
        weight = softmax(i, gain + REWARDS / s.alpha) - s.negative_weight * softmax(i, gain - REWARDS / s.alpha)
        loss += weight * sum(entropy(new, i, view) for view in views[i]) / (2 * M)
    return loss


def tracerl(new, old, ref, masked, s):
    loss = 0.0
    for i in range(B):
        steps = sorted(set(COMMITS[i]))
        last = {step: steps[min(n // s.shrink * s.shrink + s.shrink, len(steps)) - 1] for n, step in enumerate(steps)}
        merged = np.array([last[step] for step in COMMITS[i]])
        for step in sorted(set(merged)):
            view = np.concatenate([np.zeros(P, bool), merged >= step])
            own = [k for k in range(L) if merged[k] == step]
            for k in own:
                now, before = log_prob(new, i, view, k), log_prob(old, i, view, k)
                loss -= ppo_term(np.exp(now - before), z_score(i), s) / len(own) / B
                loss += s.beta * k3(now, before) / B
    return loss


def first_step(i, view):
    """Returns the step that a view precedes, or None if it masks nothing."""
    return min((COMMITS[i, k] for k in range(L) if view[P + k]), default=None)


def exact_pg(new, old, ref, masked, s):
    def step_log_prob(policy, i, view, step):
        p = np.exp(logits(policy, i, view))
        p = p / p.sum(axis=1, keepdims=True)
        own = [p[k, COMPLETIONS[i, k]] for k in range(L)]
        chosen = [k for k in range(L) if COMMITS[i, k] == step]
        last = min((own[k], -k) for k in chosen)
        rest = [k for k in range(L) if view[P + k] and k not in chosen]
        behind = [sum(x for x in p[j] if (x, -j) < last) for j in rest]
        return np.log(np.prod([own[k] for k in chosen] + behind))

    loss = 0.0
    for i in range(B):
        for view in masked[:, i]:
            step = first_step(i, view)
            if step is not None:
                with np.errstate(divide="ignore"):
                    now, before, base = (step_log_prob(policy, i, view, step) for policy in (new, old, ref))
                if np.isfinite([now, before]).all():
                    base = base if np.isfinite(base) else now
                    loss -= ppo_term(np.exp(now - before), leave_one_out(i), s) / B
                    loss += (s.beta * k3(now, base) + s.beta_old * k3(now, before)) / B
    return loss


def just_grpo(new, old, ref, masked, s):
    scale = [(REWARDS[i] - np.mean(REWARDS[group(i)])) / (np.std(REWARDS[group(i)], ddof=1) + 1e-4) for i in range(B)]
    moved = np.mean([sum(abs(scale[j]) > 1e-9 for j in group(g * G)) for g in range(B // G)])
    loss = 0.0
    for i in range(B):
        for k in range(L):
            view = np.arange(P + L) >= P + k
            ratio = np.exp(log_prob(new, i, view, k) - log_prob(NEW, i, view, k))
            loss -= ratio * scale[i] / (L * (moved + 1e-5)) / (B // G)
    return loss


def stable_drl(new, old, ref, masked, s):
    def bounds(policy, i):
        n, elbos, terms = ENDS[i], [], {}
        views = [v for v in masked[:, i] if v[P : P + n].any()]
        for v in views:
            inside = [k for k in range(n) if v[P + k]]
            elbos.append(np.mean([log_prob(policy, i, v, k) for k in inside]))
            for k in inside:
                terms.setdefault(k, []).append(np.exp(log_prob(policy, i, v, k)) ** s.eubo_beta * n / len(inside))
        upper = [np.log(sum(t) / len(views)) / s.eubo_beta for t in terms.values()]
        return (np.mean(elbos), np.mean(upper)) if views else (0.0, 0.0)

    gain = np.array([min(bounds(NEW, i)[0] - bounds(old, i)[0], np.log(s.clip)) for i in range(B)])
    loss = 0.0
    for i in range(B):
        lower, upper = bounds(new, i)
        estimate = lower if centred_advantage(i) > 0 else s.mix_weight * upper + (1 - s.mix_weight) * lower
        loss -= softmax(i, gain) * centred_advantage(i) * estimate / (B // G)
    return loss


def agrpo(new, old, ref, masked, s):
    loss = 0.0
    for i in range(B):
        end = 1 + max(COMMITS[i])
        weight = np.array([sum(ENTROPIES[i][COMMITS[i] == step]) + 1e-8 for step in range(end)])
        p = weight / weight.sum() if s.importance else np.full(end, 1 / end)
        for view in masked[:, i]:
            step = first_step(i, view)
            for k in range(L):
                if step is not None and COMMITS[i, k] == step:
                    now, base = log_prob(new, i, view, k), log_prob(ref, i, view, k)
                    ratio = np.exp(now - RECORDED[i, k])
                    term = -ppo_term(ratio, centred_advantage(i), s) + s.beta * k3(now, base) * ratio
                    loss += term / (end * p[step]) / len(masked) / G
    return loss


def egspo(new, old, ref, masked, s):
    loss = 0.0
    for i in range(B):
        for view in masked[:, i]:
            own = [k for k in range(L) if COMMITS[i, k] == first_step(i, view)]
            total = lambda values, own=own: np.mean(values) if s.mean and own else np.sum(values)  # noqa: E731
            now, base = (total([log_prob(policy, i, view, k) for k in own]) for policy in (new, ref))
            term = -ppo_term(np.exp(now - total([RECORDED[i, k] for k in own])), centred_advantage(i), s)
            loss += (term + s.beta * k3(now, base)) / len(masked) / B / (1 if s.mean else L / STEPS)
    return loss


def gdpo(new, old, ref, masked, s):
    node, weight = {"gauss-2": ((0.5 - 12**-0.5, 0.5 + 12**-0.5), (0.5, 0.5))}[s.rule]

    def score(policy, i):
        total = 0.0
        for m in range(M):
            inside = [k for k in range(ENDS[i]) if masked[m, i, P + k]]
            total += weight[m] / node[m] * sum(log_prob(policy, i, masked[m, i], k) for k in inside)
        return total / ENDS[i]

    loss = 0.0
    for i in range(B):
        loss -= ppo_term(np.exp(score(new, i) - score(old, i)), centred_advantage(i), s) / B
        loss += s.beta * k3(score(new, i), score(ref, i)) / B
    return loss


def bound(policy, i, masked):
    """ESPO's score of a row, per token."""
    total = 0.0
    for m in range(M):
        for k in range(L):
            view, count = pair(masked[m, i], k)
            total += 0.5 * (L + 1) / count * log_prob(policy, i, view, k) / M / L
    return total


def rspo(new, old, ref, masked, s):
    errors = [bound(new, i, masked) - bound(ref, i, masked) - leave_one_out(i) / s.tau for i in range(B)]
    return np.mean([error**2 / 2 for error in errors])


def trafl(new, old, ref, masked, s):
    loss = 0.0
    for i in range(B):
        at_start = [REWARDS[j] / s.tau - bound(NEW, j, masked) + bound(ref, j, masked) for j in group(i)]
        loss += (np.mean(at_start) + bound(new, i, masked) - bound(ref, i, masked) - REWARDS[i] / s.tau) ** 2 / B
    return loss


FUNCTIONS = (
    gdsd, gdsd_teacher, espo, spg, diffu_grpo, coupled_grpo, unigrpo, wd1, dmpo, tracerl,
    exact_pg, just_grpo, stable_drl, agrpo, egspo, gdpo, rspo, trafl,
)  # fmt: skip
ORACLES = {"gdsd_tlc": gdsd} | {oracle.__name__: oracle for oracle in FUNCTIONS}
STEPWISE = ("exact_pg", "agrpo", "egspo")
ONE_VIEW, WHOLE = ("coupled_grpo", "unigrpo"), ("diffu_grpo", "wd1")
WIDE = {"eps_low": 0.3, "eps_high": 0.4}
CASES = [
    ("gdsd", {**WIDE, "beta": 0.3}),
    ("gdsd", {"eps_low": 0.9, "eps_high": 3.0, "weighting": "elbo", "psi": 0.1, "beta": 0.0}),
    ("gdsd_tlc", {"eps_low": 0.9, "eps_high": 5.0, "beta": 0.3}),
    ("gdsd_tlc", {"eps_low": 0.9, "eps_high": 5.0, "beta": 0.3, "top_k": 3}),
    ("gdsd_teacher", {"beta": 0.3}),
    ("gdsd_teacher", {"beta": 0.3, "level": "sequence"}),
    ("espo", {"eps_low": 0.05, "eps_high": 0.1, "beta": 0.1}),
    ("spg", {}),
    ("spg", {"negative": "eubo", "eubo_beta": 2.0}),
    ("spg", {"negative": "elbo"}),
    ("spg", {"negative": "zero"}),
    ("diffu_grpo", {**WIDE, "beta": 0.3}),
    ("coupled_grpo", {**WIDE, "beta": 0.3}),
    ("unigrpo", {**WIDE, "beta": 0.3}),
    ("wd1", {}),
    ("wd1", {"positive_only": True}),
    ("dmpo", {"alpha": 0.5, "negative_weight": 0.7}),
    ("tracerl", {**WIDE, "beta": 0.3, "shrink": 2}),
    ("tracerl", {"shrink": 1}),
    ("exact_pg", {**WIDE, "beta": 0.2, "beta_old": 0.1, "at_once": 2}),
    ("just_grpo", {}),
    ("stable_drl", {"clip": 1.05}),
    ("agrpo", {**WIDE, "beta": 0.2}),
    ("agrpo", {"importance": False}),
    ("egspo", {**WIDE, "beta": 0.2}),
    ("egspo", {"mean": True}),
    ("gdpo", {"eps_low": 0.1, "eps_high": 0.3, "rule": "gauss-2", "beta": 0.1}),
    ("rspo", {"tau": 0.5}),
    ("trafl", {"tau": 2.0}),
]


def reads_of(method, views, policy, rows):
    """What the scorer would read: each token in the first of its passes that masks it, in the last if none does."""
    response = jnp.asarray(RESPONSE, jnp.float32)
    z = policy[None] + jnp.einsum("kbt,tlv->kblv", views.masked.astype(jnp.float32), response)
    if isinstance(views, StepViews):
        walk = lambda step, start: step(start, z, jnp.arange(V))  # noqa: E731
        committed, target = (jnp.broadcast_to(x, z.shape[:3]) for x in (
            views.commit_step == views.step[..., None], rows.tokens[:, P:]))  # fmt: skip
        eligible = views.masked[:, :, P:]
        return step_reads(walk, target, committed & eligible, eligible, views.sampler, V, method.reads)
    hidden, chosen = views.masked[:, :, P:], []
    for source in views.sources:
        read = z[source[-1]]
        for index in reversed(source[:-1]):
            read = jnp.where(hidden[index][..., None], z[index], read)
        chosen.append(read)
    z = jnp.stack(chosen)
    target = jnp.take_along_axis(z, rows.tokens[None, :, P:, None], axis=3)[..., 0]
    centre = {"log_prob": lambda: jax.nn.logsumexp(z, axis=3), "centred": lambda: jnp.mean(z, axis=3)}
    largest = lambda k: jnp.mean(jnp.sort(z, axis=3)[..., -k:], axis=3)  # noqa: E731
    return {read: target - (centre[read]() if read in centre else largest(read[1])) for read in method.reads}


def batch():
    tokens = np.concatenate([np.zeros((B, P), int), COMPLETIONS], axis=1)
    return Batch(
        tokens=jnp.asarray(tokens, jnp.int32),
        prompt_mask=None,
        completion_mask=jnp.asarray(np.arange(L) < ENDS[:, None], jnp.float32),
        rewards=jnp.asarray(REWARDS, jnp.float32),
        commit_step=jnp.asarray(COMMITS, jnp.int32),
        confidence=jnp.asarray(np.exp(RECORDED), jnp.float32),
        log_prob=jnp.asarray(RECORDED, jnp.float32),
        entropy=jnp.asarray(ENTROPIES, jnp.float32),
        group_size=G,
        sampler=SamplerConfig(L, STEPS, L, "low_confidence", temperature=1.0),
    )


def masks_for(name):
    if name in STEPWISE:
        return BEFORE
    return PROMPT_TOO if name in WHOLE else MASKED[:1] if name in ONE_VIEW else MASKED


@pytest.mark.parametrize("on_policy", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["moved", "first"])
@pytest.mark.parametrize(("name", "settings"), CASES)
def test_value_and_gradient(name, settings, on_policy):
    method, masked = build(name, **settings), masks_for(name)
    rows = batch()
    views = method.views(jnp.asarray(masked), rows)

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # half the compile time
    def value_and_gradient(new, old, ref):
        def score(policy):
            return method.score(reads_of(method, views, policy, rows), views)

        given = score(old) if not on_policy or method.old in ("always", "own_masks") else None
        constants = method.constants(rows, None if method.old == "unused" else given, score(ref), score(new))

        def loss(policy):
            return jnp.sum(sum(method.objective(score(policy), constants)[0].values()))

        return jax.value_and_grad(loss)(new)

    old = NEW if on_policy else OLD
    value, gradient = value_and_gradient(*(jnp.asarray(x, jnp.float32) for x in (NEW, old, REF)))

    # The oracle's defaults are the settings': it reads them from the same value.
    values = SimpleNamespace(**vars(METHODS[name].settings(**settings)))
    oracle = ORACLES[name]
    np.testing.assert_allclose(value, oracle(NEW, old, REF, masked, values), rtol=2e-5, atol=2e-6)
    for direction in np.random.default_rng(3).normal(size=(3, *NEW.shape)):
        above, below = (oracle(NEW + h * direction, old, REF, masked, values) for h in (1e-5, -1e-5))
        expected = (above - below) / 2e-5
        scale = np.linalg.norm(gradient) * np.linalg.norm(direction)
        found = np.sum(np.asarray(gradient) * direction)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=2e-6 * scale + 1e-7)


def test_every_method_has_an_oracle_of_at_most_thirty_lines():
    assert set(ORACLES) == set(METHODS) == {name for name, _ in CASES}
    for oracle in ORACLES.values():
        assert len(inspect.getsource(oracle).splitlines()) <= 30
