"""A task that rewards single tokens, and a method that reads these rewards.

    python -m gdsd_jax.train --config configs/tiny_sudoku.py --workdir runs/tokens \
        --config.task.name=examples.token_rewards:TASK --config.method=examples.token_rewards:TOKENS

The task is Sudoku with a reward of 1 for each digit of the grid that is right. The method is a policy gradient on
GDSD's coupled views. Each token has an advantage of its own: its reward minus the mean reward of its position in the
group.

    loss = - sum_{i,k} A_ik l_ik / (B L)
"""

import dataclasses

import jax.numpy as jnp

from gdsd_jax.methods import Method, Recipe, Scores, common
from gdsd_jax.tasks import TASKS


def right_digits(pieces: list[str], row: dict) -> list[float]:
    """Returns 1 for every token that is a digit and equals the next digit of the solution, else 0."""
    values, place, solution = [], 0, row["solution"]
    for piece in pieces:
        digit = piece.strip()
        is_digit = len(digit) == 1 and digit.isdigit()
        values.append(float(is_digit and place < len(solution) and digit == solution[place]))
        place += is_digit
    return values


TASK = dataclasses.replace(TASKS["sudoku"], name="sudoku_tokens", token_score=right_digits)


@dataclasses.dataclass(frozen=True)
class Settings:
    """`views`: masked pairs per row and inner update."""

    views: int = 1


def make(settings: Settings) -> Method:
    def views(masked, batch):
        return common.coupled_views(masked, batch, weighted=False)

    def score(reads, views):
        log_prob = jnp.mean(reads["log_prob"], axis=0)
        return Scores(log_prob, log_prob)

    def prepare(batch, old, ref):
        rewards = batch.token_rewards
        common.require(rewards is not None, "this method needs a task with token_score")
        groups = rewards.reshape(-1, batch.group_size, rewards.shape[1])
        advantage = (groups - groups.mean(axis=1, keepdims=True)).reshape(rewards.shape)
        return {"advantage": advantage * batch.completion_mask, "size": common.per_row(rewards.size, len(rewards))}

    def objective(new, constants):
        loss = -jnp.sum(constants["advantage"] * new.guided, axis=1) / constants["size"]
        return {"objective": loss}, {"advantage": jnp.mean(jnp.abs(constants["advantage"]), axis=1)}

    masks = common.stratified_masks(settings.views)
    return Method(("log_prob",), masks, views, score, prepare, objective, needs_reference=False, old="unused")


TOKENS = Recipe(Settings, make)
