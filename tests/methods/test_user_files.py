"""The files in `examples/` that use what the contract offers to methods and tasks of one's own."""

import dataclasses
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdsd_jax.diffusion.scoring import Views
from gdsd_jax.hub.tokenizer import Tokenizer
from gdsd_jax.methods import Batch, check
from gdsd_jax.runtime.errors import UserError
from gdsd_jax.training.rollout import token_rewards

EXAMPLES = Path(__file__).parents[2] / "examples"
ROWS, GROUP, PROMPT, LENGTH = 4, 2, 3, 5
ARGUMENTS = {"prompt_length": PROMPT, "completion_length": LENGTH, "group_size": GROUP}


def example(name):
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))


def batch(**changes) -> Batch:
    rng = np.random.default_rng(0)
    fields = {
        "tokens": jnp.asarray(rng.integers(0, 9, (ROWS, PROMPT + LENGTH)), jnp.int32),
        "prompt_mask": None,
        "completion_mask": jnp.ones((ROWS, LENGTH)),
        "rewards": jnp.array([0.0, 1.0, 5.0, 5.0]),
        "group_size": GROUP,
    }
    return Batch(**fields | changes)


def test_psi_schedule():
    recipe = example("psi_schedule")["SCHEDULED"]
    method = recipe.make(recipe.settings(psi=2.0, grow_over=10))
    check(method, name="scheduled", **ARGUMENTS)
    found = [method.prepare(batch(iteration=jnp.int32(i)), None, None)["advantage"] for i in (0, 5, 10, 99)]
    np.testing.assert_allclose(np.stack(found)[:, 1], [0.1, 0.55, 1.0, 1.0], rtol=1e-6)


def test_advantages_by_component():
    """The second component's spread is a hundred times the first one's; both count alike, by their weights."""
    recipe = example("component_advantages")["BY_COMPONENT"]
    method = recipe.make(recipe.settings())
    weights = (("solved", 1.0), ("length", 0.5))
    check(method, name="components", component_weights=weights, **ARGUMENTS)
    components = jnp.array([[0.0, 100.0], [1.0, 0.0], [1.0, 0.0], [1.0, 300.0]])
    constants = method.prepare(batch(components=components, component_weights=weights), None, None)
    np.testing.assert_allclose(constants["advantage"], [-0.5, 0.5, -0.5, 0.5], atol=1e-6)


def test_value_head():
    """Advantages are rewards less the value under the rollout's policy, and the value's error moves the head alone."""
    recipe = example("value_head")["CRITIC"]
    method = recipe.make(recipe.settings())
    check(method, name="critic", **ARGUMENTS)
    views = method.views(jnp.ones((1, ROWS, PROMPT + LENGTH), bool), batch())
    draws = np.random.default_rng(1)
    reads = {"log_prob": jnp.asarray(draws.standard_normal((1, ROWS, LENGTH)), jnp.float32)}
    reads["hidden"] = jnp.asarray(draws.standard_normal((1, ROWS, LENGTH, 3)), jnp.float32)
    head = {"w": jnp.array([1.0, -2.0, 0.5]), "b": jnp.float32(0.3)}

    def losses(reads, head):
        new = method.score(reads, views, head)
        constants = method.constants(batch(), method.score(reads, views, head), None, None)
        return constants, {name: jnp.sum(value) for name, value in method.objective(new, constants)[0].items()}

    constants, found = losses(reads, head)
    value = reads["hidden"].mean(axis=(0, 2)) @ head["w"] + 0.3
    np.testing.assert_allclose(constants["advantage"], batch().rewards - value, rtol=1e-5)
    np.testing.assert_allclose(found["value"], 0.5 * jnp.mean((value - batch().rewards) ** 2), rtol=1e-5)
    by_reads, by_head = jax.grad(lambda *x: losses(*x)[1]["value"], argnums=(0, 1))(reads, head)
    assert all(not np.any(x) for x in jax.tree.leaves(by_reads)) and all(np.any(x) for x in jax.tree.leaves(by_head))
    np.testing.assert_allclose(by_head["b"], jnp.mean(value - batch().rewards), rtol=1e-4)


def test_verdicts():
    """The probability of a wrong text is not raised, however large its reward."""
    recipe = example("verdicts")["HONEST"]
    method = recipe.make(recipe.settings())
    check(method, name="honest", verdict_names=("cells", "puzzles"), **ARGUMENTS)
    verdicts = jnp.array([[0.5, 0.0], [1.0, 1.0], [0.9, 0.0], [1.0, 1.0]])
    one = batch(verdicts=verdicts, verdict_names=("cells", "puzzles"), rewards=jnp.array([0.0, 1.0, 1.0, 0.0]))
    np.testing.assert_allclose(method.prepare(one, None, None)["advantage"], [-1, 1, 0, -1])


def test_token_rewards():
    module = example("token_rewards")
    recipe, task = module["TOKENS"], module["TASK"]
    method = recipe.make(recipe.settings())
    check(method, name="tokens", token_rewards=True, **ARGUMENTS)
    with pytest.raises(UserError, match="needs a task with token_score"):
        check(method, name="tokens", **ARGUMENTS)

    class Digits(Tokenizer):
        def __init__(self):
            pass

        def decode_each(self, ids):
            return [str(token) if token else " " for token in ids]

    completions = np.array([[1, 2, 0, 3, 9], [1, 0, 3, 3, 9], [4, 4, 4, 4, 9], [1, 2, 3, 4, 9]])
    seen = np.ones((ROWS, LENGTH), np.float32)
    seen[2, 2:] = 0
    rewards = token_rewards(task, Digits(), completions, seen, [{"solution": "123"}] * ROWS, group_size=GROUP)
    expected = [[1, 1, 0, 1, 0], [1, 0, 0, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 0, 0]]
    np.testing.assert_array_equal(rewards, expected)

    one = batch(token_rewards=jnp.asarray(rewards), completion_mask=jnp.asarray(seen))
    constants = method.prepare(one, None, None)
    np.testing.assert_allclose(constants["advantage"][0], [0, 0.5, 0, 0, 0])
    log_prob = jax.random.normal(jax.random.key(0), (1, ROWS, LENGTH))
    views = Views(jnp.ones((2, ROWS, PROMPT + LENGTH), bool), jnp.ones((1, ROWS, LENGTH)), ((0, 1),))
    loss = lambda x: jnp.sum(method.objective(method.score({"log_prob": x}, views), constants)[0]["objective"])  # noqa: E731
    np.testing.assert_allclose(jax.grad(loss)(log_prob)[0], -constants["advantage"] / (ROWS * LENGTH), atol=1e-7)


def test_token_rewards_of_another_number():
    task = dataclasses.replace(example("token_rewards")["TASK"], token_score=lambda pieces, row: [1.0])

    class Letters(Tokenizer):
        def __init__(self):
            pass

        def decode_each(self, ids):
            return ["a"] * len(ids)

    with pytest.raises(UserError, match="must give a finite reward to each of 5 tokens: it gave 1 values"):
        token_rewards(task, Letters(), np.ones((1, 5), int), np.ones((1, 5), np.float32), [{}], group_size=1)
