"""The meter, on policies for which its numbers are known."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdsd_jax import meter
from gdsd_jax.evaluation import enumerated, meter_report, probe
from gdsd_jax.methods import Batch, Scores
from gdsd_jax.runtime.errors import UserError

pytestmark = pytest.mark.usefixtures("quick_compilation")


def test_rank_correlation_counts_groups_that_vary_and_shares_ranks():
    truth = np.array([1.0, 2.0, 3.0, 5.0, 5.0, 5.0, 0.0, 1.0, 1.0])
    estimate = np.array([10.0, 30.0, 20.0, 1.0, 2.0, 3.0, 4.0, 9.0, 9.0])
    assert probe.rank_correlation(estimate, truth, 3) == pytest.approx((0.5 + 1.0) / 2)


def test_scores_become_nats_of_a_completion():
    batch = Batch(None, None, jnp.ones((2, 4)).at[1, 2:].set(0))
    halves = Scores(jnp.array([[-1.0, -2.0], [-3.0, -5.0]]), None)
    np.testing.assert_allclose(probe.in_nats("gdsd", {}, halves, batch), [-3, -8])
    np.testing.assert_allclose(probe.in_nats("gdsd", {"weighting": "elbo"}, halves, batch), [-1.5, -4])
    np.testing.assert_allclose(probe.in_nats("exact_pg", {}, halves, batch), [-3, -8])
    np.testing.assert_allclose(probe.in_nats("spg", {}, Scores(None, jnp.array([-1.0, -2.0])), batch), [-4, -4])


def test_a_policy_is_moved_as_far_as_the_smooth_part_of_its_log_ratio_says():
    params = {"w": jnp.array([1.0, 0.0])}
    slope = np.array([3.0, -3.0, 6.0, -np.inf])

    def log_ratio(p):
        moved = float(p["w"][1])
        # The third row jumps on the way, by far more than it moves.
        return slope * moved + np.array([0.0, 0.0, -50.0, 0.0]) * (moved > 0.01)

    line = probe.line_along(jnp.array([0.0, 2.0]), params, log_ratio)
    np.testing.assert_allclose(line.slope, [3, -3, 6, np.nan], rtol=1e-3)
    length = line.length(0.3)
    np.testing.assert_allclose(line.at(length)["w"], [1.0, 0.1], rtol=1e-3)
    there = log_ratio(line.at(length))
    np.testing.assert_array_equal(line.smooth(0.3, there), [True, True, False, False])


def test_agreement_is_that_of_the_valid_rows():
    exact = np.linspace(-1, 1, 10)
    estimate = np.stack([2 * exact, 2 * exact])
    estimate[:, 0] = 1e3
    valid = np.arange(10) > 0
    found = probe.agreement(estimate, exact, valid)
    assert found == pytest.approx({"error": 1.0, "correlation": 1.0})
    assert probe.agreement(estimate, exact, np.arange(10) < 7) == {"error": None, "correlation": None}


def test_rollouts_of_which_none_can_be_replayed_are_refused(monkeypatch):
    monkeypatch.setattr(probe, "exact", lambda *_: jnp.full(3, -jnp.inf))
    with pytest.raises(UserError, match="none of the 3 rollouts .* config.model.dtype to float32"):
        probe.measure(enumerated.TOY, None, None, Batch(None, None, None), None, [], draws=1, distances=(0.1,), chunk=8)


@pytest.mark.slow
def test_rollouts_that_are_all_rewarded_alike_are_refused(toy):
    rollout = enumerated.sample(
        enumerated.TOY, toy.base, None, jnp.zeros((4, 1), jnp.int32), None, jax.random.key(1), toy.sampler
    )
    batch = Batch(rollout.tokens, None, jnp.ones((4, 4)), jnp.ones(4), None, rollout.commit_step, rollout.confidence,
                  group_size=2, sampler=toy.sampler)  # fmt: skip
    with pytest.raises(UserError, match="the rewards in each group are equal: raise --prompts"):
        probe.measure(
            enumerated.TOY, toy.base, toy.base, batch, jax.random.key(2), ["gdsd"], draws=1, distances=(0.1,), chunk=64
        )


@pytest.fixture(scope="module")
def toy():
    return enumerated.make_toy("low_confidence", trained=False, seed=0)


def test_completions_of_the_toy_language_add_up_to_one(toy):
    found = jax.jit(lambda base: enumerated.log_probs(toy, base))(toy.base)
    assert float(jnp.sum(jnp.exp(found))) == pytest.approx(1, abs=1e-5)


@pytest.mark.slow
def test_the_exact_gradient_and_the_bounds_on_a_toy(toy):
    """The exact method agrees with itself, and the bound of a random order lies below the exact value."""
    loose = enumerated.make_toy("random", trained=False, seed=0)
    rollout = enumerated.sample(
        enumerated.TOY, loose.base, None, jnp.zeros((32, 1), jnp.int32), None, jax.random.key(1), loose.sampler
    )
    reward = jnp.mean(rollout.tokens[:, 1:] == jnp.arange(4) % 4, axis=1)
    batch = Batch(rollout.tokens, None, jnp.ones((32, 4)), reward, None, rollout.commit_step, rollout.confidence,
                  group_size=8, sampler=loose.sampler)  # fmt: skip
    table = probe.measure(
        enumerated.TOY, loose.base, loose.base, batch, jax.random.key(2), ["exact_pg", "espo"],
        draws=4, distances=(0.1,), chunk=64,
    )  # fmt: skip
    same, bound = table["methods"]["exact_pg"], table["methods"]["espo"]
    assert same["bias"] == pytest.approx(0, abs=1e-4) and same["cosine"] == pytest.approx(1, abs=1e-4)
    assert same["log_ratio"]["0.1"]["error"] < 1e-3 and same["rank_correlation"] == pytest.approx(1)
    assert table["impossible"] == 0
    # A bound of the completion alone, which is log 4! = 3.18 nats more likely than with a random order.
    assert -3 < bound["bias"] < 3.2 and bound["log_ratio"]["0.1"]["error"] > 0.02 and 0 < bound["cosine"] < 1


@pytest.mark.slow
def test_the_teacher_of_the_bound_comes_nearer_to_the_optimum_under_a_random_order():
    toy = enumerated.make_toy("random", trained=True, seed=0)
    name, settings, opened = enumerated.methods_of(2.0)["gdsd, elbo"]
    curve = enumerated.follow(
        toy, name, settings | opened, psi=2.0, updates=16, rows=256, learning_rate=1e-3, seed=0
    )  # fmt: skip
    assert curve["update"] == [0, 1, 2, 4, 8, 16]
    assert curve["kl"][-1] < 0.5 * curve["kl"][0] and curve["reward"][-1] > curve["reward"][0]


def test_the_report_is_written_whole(tmp_path):
    row = {"bias": 1.0, "spread": 2.0, "noise": 0.1, "rank_correlation": 0.5, "cosine": 0.3, "cosine_of_mean": 0.4}
    run = {"method": "gdsd", "strategy": "random", "trained": True, "clip": False}
    run |= {"update": [0, 1], "kl": [0.2, 0.1], "reward": [0.3, 0.4]}
    ratio = {"error": 0.25, "correlation": None}
    table = {"rows": 8, "impossible": 0.0, "log_prob": -3.0, "distances": [0.1], "draws": 2, "source": "X"}
    table |= {"reward": 0.5, "methods": {"gdsd": row | {"log_ratio": {"0.1": ratio}}}, "enumerated": [run]}
    table |= {"jumped": {"0.1": 0.5}, "log_ratio": {"0.1": 0.7}}
    meter_report.write(tmp_path, table)
    text = (tmp_path / meter_report.TABLE).read_text()
    assert "| gdsd   | +1.00 | 2.00   | 0.10  | 0.50 | 25 %         | -" in text and "0.200 | 0.100 | 0.100" in text
    assert "50 % of the rollouts has jumped" in text
    assert json.loads((tmp_path / meter_report.JSON).read_text()) == table
    assert (tmp_path / meter_report.FIGURE).stat().st_size > 10_000
    narrow = meter_report.markdown(table, 60)
    assert max(len(line) for line in narrow.split("\n") if line.startswith("|")) <= 60
    rows = lambda text: re.findall(r"^\| gdsd +(\|.*)\|$", text, re.M)  # noqa: E731
    assert len(rows(narrow)) > len(rows(text)) == 1
    assert "".join(rows(narrow)).split() == rows(text)[0].split()


def test_figures_that_are_not_numbers_are_null_and_read_back(tmp_path):
    nan = float("nan")
    row = dict.fromkeys(("bias", "spread", "noise", "rank_correlation", "cosine", "cosine_of_mean"), nan)
    row["log_ratio"] = {"0.1": {"error": nan, "correlation": nan}}
    table = {"rows": 8, "impossible": 0.0, "log_prob": -3.0, "distances": [0.1], "draws": 2, "source": "X"}
    table |= {"reward": 0.5, "methods": {"gdsd": row}, "jumped": {"0.1": 0.5}, "log_ratio": {"0.1": nan}}
    meter_report.write(tmp_path, table)
    written = (tmp_path / meter_report.JSON).read_text()
    assert "NaN" not in written and json.loads(written)["methods"]["gdsd"]["bias"] is None
    text = meter_report.markdown(json.loads(written))
    assert text == meter_report.markdown(table) and "nan" not in text
    assert text == (tmp_path / meter_report.TABLE).read_text()


def test_bad_flags_are_refused_before_a_model_is_loaded():
    flags = {"methods": None, "prompts": 1, "draws": 1, "distances": "0.1"}
    for change, message in (
        ({"methods": "gdsd,dpo"}, "--methods: 'dpo' is not one of exact_pg"),
        ({"draws": 0}, "must be at least 1"),
        ({"distances": "0.1;0.5"}, "--distances '0.1;0.5' is not a list of numbers"),
        ({"distances": "-0.1"}, "not a list of numbers above 0"),
        ({"distances": "0.1,1e300"}, "at most 100"),
        ({"methods": ""}, "--methods: '' is not one of"),
        ({"distances": "0.1,nan"}, "not a list of numbers above 0"),
    ):
        with pytest.raises(UserError, match=message):
            meter.checked(**flags | change)
    assert "gdsd, elbo" in meter.checked(**flags)[0]
