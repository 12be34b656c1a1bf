"""Parts of a rollout, a reference that moves, an adapted KL, and what a method trains beside the policy."""

import dataclasses
import json
import os
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_run

from gdsd_jax import train as walk
from gdsd_jax.config import ReferenceConfig, TrainConfig, default, freeze
from gdsd_jax.methods import Batch, build
from gdsd_jax.methods.contract import check
from gdsd_jax.runtime.errors import UserError
from gdsd_jax.training.between import adapted_scale, after_iteration, part_of
from gdsd_jax.training.checkpoint import Checkpoints
from gdsd_jax.training.cursor import Cursor
from gdsd_jax.training.state import Beside, TrainState, init_state
from gdsd_jax.training.update import Before, UpdateSpec, make_inner_update

ROOT = Path(__file__).parents[2]
GROUP, LENGTH = 2, 3
# The same machinery, and the same adapter and model, as in the tests of an update.
UPDATE = runpy.run_path(str(Path(__file__).with_name("test_update.py")))


def batch(groups: int) -> Batch:
    rows = groups * GROUP
    tokens = jnp.broadcast_to(jnp.arange(rows)[:, None], (rows, 2 + LENGTH))
    return Batch(tokens, None, jnp.ones((rows, LENGTH)), rewards=jnp.arange(rows, dtype=jnp.float32), group_size=GROUP)


def test_parts_of_a_rollout_are_whole_groups_and_cover_it_once_in_every_pass():
    one, key, parts = batch(6), jax.random.key(0), jax.jit(part_of, static_argnums=(2, 3))

    def rows(iteration, inner):
        numbered = one.replace(iteration=jnp.int32(iteration), inner_update=jnp.int32(inner))
        part = parts(key, numbered, 4, 5)
        np.testing.assert_array_equal(part.tokens[:, 0], part.rewards)
        assert part.inner_update == inner and part.completion_mask.shape == (4, LENGTH)
        return [int(x) for x in part.tokens[:, 0]]

    found = [rows(0, inner) for inner in range(5)]
    for part in found:
        assert [row % GROUP for row in part] == [0, 1, 0, 1] and part[0] // GROUP == part[1] // GROUP
    assert sorted(sum(found[:3], [])) == list(range(12)) and not set(found[3]) & set(found[4])
    first, next_pass, other = found[:3], found[3:], [rows(1, inner) for inner in range(3)]
    assert first != other and first[:2] != next_pass


def test_a_kl_above_its_target_weighs_more():
    settings = ReferenceConfig(kl_target=0.5, kl_rate=0.1)
    found = [float(adapted_scale(jnp.float32(2.0), jnp.float32(kl), settings)) for kl in (0.0, 0.45, 0.5, 0.55, 9.0)]
    np.testing.assert_allclose(found, [1.96, 1.98, 2.0, 2.02, 2.04], rtol=1e-6)


@pytest.mark.parametrize(("every", "decay", "expected"), [(2, 0.0, [0, 2, 2, 4]), (1, 0.5, [0.5, 1.25, 2.125, 3.0625])])
def test_a_reference_moves_every_so_many_iterations(every, decay, expected):
    state = init_state({"w": jnp.zeros(1)}, optax.sgd(1.0), 0, Beside(reference=True))
    found = []
    for iteration in range(1, 5):
        state = after_iteration(
            state.replace(params={"w": jnp.full(1, float(iteration))}), ReferenceConfig(every, decay)
        )
        found.append(float(state.reference["w"][0]))
    np.testing.assert_array_equal(found, expected)
    assert after_iteration(state.replace(reference=None), ReferenceConfig()).reference is None


def test_a_reference_or_a_kl_that_a_method_lacks_is_refused():
    sizes = {"prompt_length": 3, "completion_length": 4, "group_size": 2}
    check(build("gdsd"), name="gdsd", reference=True, kl=True, **sizes)
    with pytest.raises(UserError, match="method 'wd1' uses no reference: set config.reference.every to 0"):
        check(build("wd1"), name="wd1", reference=True, **sizes)
    with pytest.raises(UserError, match="method 'dmpo' has no KL in its loss to adapt: set config.reference.kl_target"):
        check(build("dmpo"), name="dmpo", kl=True, **sizes)


def test_sizes_that_do_not_divide_are_refused():
    def run(**changes):
        config = default("base")
        with config.unlocked():
            config.update({"prompts_per_iteration": 6, "group_size": 4, "microbatch_rows": 4} | changes)
        return freeze(TrainConfig, config)

    assert run(update_rows=8).update_rows == 8
    for rows in (6, 16):
        with pytest.raises(UserError, match=f"config.update_rows {rows} is no multiple of config.group_size 4"):
            run(update_rows=rows)
    with pytest.raises(UserError, match="config.microbatch_rows 8 does not divide the 12 rows of an update"):
        run(update_rows=12, microbatch_rows=8)


# ------------------------------------------------------------------------------------------------------------ saved


def test_what_is_beside_the_policy_is_saved_and_older_checkpoints_load(tmp_path, monkeypatch):
    monkeypatch.setattr("gdsd_jax.training.record.hub.fingerprint", lambda checkpoint: "base")
    config, sgd = freeze(TrainConfig, default("base")), optax.adam(1e-2)
    head = lambda: {"w": jnp.arange(3.0), "b": jnp.float32(2.0)}  # noqa: E731
    full = init_state({"w": jnp.ones(2)}, sgd, 0, Beside(head, sgd, reference=True, kl_scale=True))
    plain = init_state({"w": jnp.ones(2)}, sgd, 0)
    for name, state, memory in (("full", full, np.array([0, 3, 1], np.int32)), ("plain", plain, None)):
        with Checkpoints(tmp_path / name, config, state) as checkpoints:
            checkpoints.save(3, state, Cursor(7, memory))
        with Checkpoints(tmp_path / name, config, state) as checkpoints:
            found, cursor = checkpoints.restore()
        assert cursor.position == 7 and isinstance(found, TrainState)
        np.testing.assert_array_equal(cursor.rejections, memory)
        saved = json.loads((tmp_path / name / "checkpoints/3/data/metadata").read_text())
        # Without a memory a checkpoint is what it was before there was one.
        assert ("rejections" in saved) == (memory is not None)
        assert jax.tree.structure(found) == jax.tree.structure(state)
        raw = lambda state: state.replace(key=jax.random.key_data(state.key))  # noqa: E731
        jax.tree.map(np.testing.assert_array_equal, raw(found), raw(state))


# ----------------------------------------------------------------------------------------------------------- updates


def critic(learning_rate: float = 0.02, **options):
    recipe = runpy.run_path(str(ROOT / "examples/value_head.py"))["CRITIC"]
    method, schedule = recipe.make(recipe.settings()), optax.constant_schedule(0.05)
    spec = UpdateSpec(
        UPDATE["CONFIG"], method, optax.sgd(schedule), schedule, vocab_chunk=16,
        extras_optimizer=optax.sgd(learning_rate), **options,
    )  # fmt: skip
    state = init_state(
        jax.tree.map(jnp.copy, UPDATE["adapter"]()), optax.sgd(schedule), 7,
        Beside(lambda: method.extras(None, UPDATE["CONFIG"]), optax.sgd(learning_rate)),
    )  # fmt: skip
    return make_inner_update(spec), state


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compilation")
def test_a_value_head_learns_beside_the_adapter():
    """The head's error falls at its own rate; micro-batches affect rounding alone; old values are the rollout's."""
    rewards = UPDATE["batch"]()
    update, state = critic(microbatch_rows=8)
    before = jax.tree.map(jnp.copy, Before(state.params, state.extras))
    state, first = update(state, UPDATE["base"](), None, rewards)
    np.testing.assert_allclose(first["policy/value_error"], jnp.mean(jnp.abs(rewards.rewards)), rtol=1e-5)
    pieces_update, pieces = critic(microbatch_rows=2)
    pieces, split = pieces_update(pieces, UPDATE["base"](), None, rewards)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), pieces.extras, state.extras)
    np.testing.assert_allclose(split["grad/extras"], first["grad/extras"], rtol=1e-5)
    errors = [first["policy/value_error"]]
    for _ in range(5):
        state, report = update(state, UPDATE["base"](), before, rewards)
        errors.append(report["policy/value_error"])
        # The head of the rollout's policy is at 0, so that advantages stay the rewards.
        np.testing.assert_allclose(report["policy/advantage"], jnp.mean(rewards.rewards), rtol=1e-5)
    assert errors[-1] < 0.7 * errors[0]


EVERYTHING = {
    "method": "examples.value_head:CRITIC", "inner_updates": 3, "prompts_per_iteration": 4, "update_rows": 4,
    "iterations": 3,
}  # fmt: skip


def lines(workdir: Path) -> list[dict]:
    found = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if not name.startswith("time/")} for line in found]


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("kind", ["extras", "reference"])
def test_a_run_with_all_of_it_resumes_bit_for_bit(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(os.fspath(ROOT))
    run = runpy.run_path(str(tiny_run.build(tmp_path)))["get_config"]()
    with run.unlocked():
        run.update(EVERYTHING)
        # Half of the groups are rejected, and no prompt of theirs is asked again while others are left.
        run.refill.update(rounds=1, prompts=2, revisit=0.0, select="multi_run:above_the_mean")
        if kind == "reference":
            run.method = "gdsd"
            run.settings.gdsd = {"beta": 0.1}
            run.reference.update(every=2, decay=0.5, kl_target=1e-3)
    config = freeze(TrainConfig, run)
    whole = walk.train(config, tmp_path / "whole")
    walk.train(dataclasses.replace(config, iterations=2), tmp_path / "resumed")
    resumed = walk.train(config, tmp_path / "resumed")
    assert lines(tmp_path / "resumed")[0::2] == lines(tmp_path / "whole")[0::2]
    raw = lambda state: jax.device_get(state.replace(key=jax.random.key_data(state.key)))  # noqa: E731
    jax.tree.map(np.testing.assert_array_equal, raw(resumed), raw(whole))
    last = lines(tmp_path / "whole")[-1]
    assert last["refill/prompts_skipped"] > 0
    if kind == "extras":
        assert last["grad/extras"] > 0 and float(np.abs(whole.extras["w"]).max()) > 0
    else:
        assert last["policy/kl_scale"] != 1 and last["policy/kl"] > 0
        moved = jax.tree.map(lambda x, y: float(np.abs(x - y).max()), whole.reference, whole.params)
        assert min(jax.tree.leaves(moved)) > 0
