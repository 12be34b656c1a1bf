"""Trains a masked denoiser by reinforcement learning. Start reading here: this file is a run from top to bottom.

    python -m gdsd_jax.train --config configs/tiny_sudoku.py --workdir runs/demo [--config.method=gdsd_tlc ...]

Each iteration draws prompts, samples completions, rewards them, and updates the policy `inner_updates` times. The parts
are in `tasks` (prompts and rewards), `diffusion.sample` (completions), `methods` (the objective) and `training.update`
(the gradient). A run can be killed at any time. Started again with the same workdir, it continues from its last
checkpoint and does what an uninterrupted run would have done, bit for bit.
"""

from __future__ import annotations

import dataclasses
import functools
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np

from gdsd_jax import hub
from gdsd_jax.config import TrainConfig, greedy_sampler
from gdsd_jax.config.flags import launch
from gdsd_jax.diffusion.sampler import check_fits
from gdsd_jax.evaluation.completions import evaluate_policy
from gdsd_jax.runtime import hosts
from gdsd_jax.runtime.files import refuse_existing
from gdsd_jax.runtime.signals import StopSignal, exit_code
from gdsd_jax.runtime.streams import Stream, stream_key, stream_of_seed
from gdsd_jax.runtime.transfer import fetch
from gdsd_jax.sft import embedded_start
from gdsd_jax.tasks.data import rows_digest
from gdsd_jax.telemetry.metrics import MetricWriter
from gdsd_jax.telemetry.planned import beside_plan, planned_sizes, read_plan
from gdsd_jax.telemetry.plots import plot_curves
from gdsd_jax.telemetry.profile import Profile, phase
from gdsd_jax.telemetry.progress import Progress
from gdsd_jax.telemetry.warnings import precursors
from gdsd_jax.training.between import after_iteration
from gdsd_jax.training.checkpoint import Best, Checkpoints, require_savable
from gdsd_jax.training.cursor import Cursor, moved, prompts_ahead, remembering, window
from gdsd_jax.training.divergence import diverged, is_finite
from gdsd_jax.training.dry_run import shrink
from gdsd_jax.training.fit import fitted_to_devices
from gdsd_jax.training.record import with_first_schedule
from gdsd_jax.training.refill import further_prompts, refilled
from gdsd_jax.training.rollout import (
    Rewarded,
    RolloutSpec,
    completion_mask,
    completion_records,
    length_metrics,
    reward_metrics,
    roll_out,
)
from gdsd_jax.training.setup import (
    Setup,
    checked_parts,
    encoded_rows,
    evaluated_task,
    fresh_state,
    known_metric,
    load_setup,
    spread_rows,
    task_rows,
)
from gdsd_jax.training.state import TrainState, policy
from gdsd_jax.training.update import Before, UpdateSpec, make_inner_update


def train(config: TrainConfig, workdir: Path) -> TrainState:
    """Runs (or resumes) the whole training and returns the final state."""

    # ------------------------------------------------------------------------------------------ set-up
    require_savable(workdir)
    config = with_first_schedule(config, workdir)
    method = checked_parts(config)
    config = fitted_to_devices(config, method, planned_sizes(workdir))
    setup = load_setup(config, rows=spread_rows(config))
    model, base, tokenizer, task = setup
    sampler = dataclasses.replace(config.sampler, record=config.sampler.record or method.records)
    check_fits(model, max(config.prompt_buckets), sampler)
    state, places, optimizer, schedule, beside = fresh_state(config, setup, method)
    updates = UpdateSpec.of_run(config, model, method, optimizer, schedule, beside.optimizer)
    update = make_inner_update(updates, places)
    rollouts = RolloutSpec(
        model, sampler, task, tokenizer, config.group_size, config.rollout_rows, verdicts=method.verdicts
    )
    rollout_key = jax.jit(lambda state: stream_key(state.key, Stream.ROLLOUT, state.iteration))
    finish = jax.jit(lambda state: after_iteration(state, config.reference), out_shardings=places)
    # Updates donate the state, so the old policy must be a copy; adding 0 makes one, while an identity would not.
    snapshot = jax.jit(
        lambda before: jax.tree.map(lambda x: x + 0, before), out_shardings=Before(places.params, places.extras)
    )
    lengths = jax.jit(length_metrics)

    count = config.prompts_per_iteration
    most = count + further_prompts(config.refill, count)
    rows = task_rows(config.task, task, "train", count=config.task.train_rows, seed=config.seed)
    prompts = encoded_rows(config, task, tokenizer, rows)
    order = grain.MapDataset.range(len(rows)).seed(config.seed).shuffle().repeat()
    draw = jax.jit(
        lambda state: jax.random.uniform(
            stream_key(state.key, Stream.REVISITS, state.iteration), (window(len(rows), most),)
        )
    )
    evaluate, best_metric = make_evaluation(config, setup)

    checkpoints = Checkpoints(workdir, config, state, rows_digest(rows))
    cursor = Cursor()
    if checkpoints.latest is not None:
        state, cursor = checkpoints.restore()
    cursor = remembering(cursor, len(rows), config.refill)
    first = checkpoints.latest or 0
    best = Best(workdir, first, best_metric)
    plan = read_plan(workdir, config)
    # Without a checkpoint, the metric files start anew; with one, they are cut off after its iteration.
    writer = hosts.first_only(MetricWriter, workdir, trackers=config.tracker_names, resume_step=first or -1)
    progress = hosts.first_only(Progress, config.iterations, start=first, label=config.method)
    profile = hosts.first_only(Profile, workdir, config.profile)
    warned: set[str] = set()
    # StopSignal is outermost: a signal that arrives while the others close and save must not interrupt them.
    with StopSignal() as stop, writer, checkpoints, best, progress, profile, jax.transfer_guard("disallow"):
        if first:
            progress.note(checkpoints.note or f"resumed after iteration {first} of {config.iterations}")
        for iteration in range(first + 1, config.iterations + 1):
            profile.begin(iteration)
            start = time.perf_counter()

            # ---------------------------------------------------------------- prompts, rollout, reward
            draws = fetch(draw(state)) if config.refill.revisit < 1 else None
            ahead = prompts_ahead(cursor, order, most, config.refill, draws)
            asked = prompts.pick(ahead.rows, config.prompt_buckets)
            sample_some = functools.partial(roll_out, rollouts, *policy(base, state.params), rollout_key(state))
            # The update uses `rewarded`; `sampled` also holds the completions that the refill dropped.
            rewarded, sampled, used, worth, refill_metrics = refilled(config.refill, count, asked, sample_some)
            cursor, skipped = moved(cursor, ahead, used, worth)

            # ---------------------------------------------------------------------------------- update
            update_start = time.perf_counter()
            with phase("send update"):
                before = None
                if config.inner_updates > 1 and method.old != "unused":
                    before = snapshot(Before(state.params, state.extras))
                by_component = due(iteration, config.component_norms_every)
                reports = []
                for inner in range(config.inner_updates):
                    old = before if inner else None
                    state, report = update(state, base, old, rewarded.batch, by_component=by_component)
                    reports.append(report)
                state = finish(state)

            # --------------------------------------------------------------------------------- metrics
            # While the devices compute the update, the host logs what it knows already.
            with phase("log completions"):
                metrics = reward_metrics(sampled) | refill_metrics | skipped
                writer.completions(iteration, logged_completions(sampled, tokenizer, config.completions_logged))
            with phase("await update"):
                reports, lengths_now = fetch((reports, lengths(rewarded.batch)))
            now = time.perf_counter()
            seconds = sampled.seconds | {"update": now - update_start, "iteration": now - start}
            metrics |= {name: float(value) for name, value in lengths_now.items()}
            metrics |= update_metrics(reports) | time_metrics(sampled, seconds, model.ends)
            # The plan samples as many rows as an update takes.
            rollout_seconds = seconds["rollout"] * len(rewarded.rewards) / len(sampled.rewards)
            metrics |= beside_plan(plan, rollout=rollout_seconds, update=seconds["update"] / config.inner_updates)
            if iteration == config.iterations or due(iteration, config.evaluation.every):
                with phase("evaluate"):
                    metrics |= {f"eval/{name}": value for name, value in evaluate(state).items()}
            with phase("log metrics"):
                writer.write(iteration, metrics)
            shown = {name.split("/")[1]: metrics[name] for name in metrics if name.startswith("eval/")}
            progress.update(iteration, reward=metrics["reward/mean"], **shown)
            for kind, line in precursors(metrics).items():
                if kind not in warned:
                    warned.add(kind)
                    progress.note(f"iteration {iteration}: {line}")
            if not is_finite(metrics):
                raise diverged(workdir, iteration, rewarded, tokenizer, checkpoints.latest)

            # ------------------------------------------------------------------------------ checkpoint
            with phase("checkpoint"):
                if best_metric in metrics:
                    best.offer(iteration, state.params, metrics[best_metric])
                done = hosts.any_process(stop.requested) or iteration == config.iterations
                if done or iteration % config.save_every == 0:
                    checkpoints.save(iteration, state, cursor)
            if recorded := profile.end():
                progress.note(f"timeline of iteration {iteration}, recorded in {profile.directory}:\n{recorded}")
            if done:
                if iteration < config.iterations:
                    progress.note(f"stopped after iteration {iteration}: start again with the same --workdir to go on")
                break
    if hosts.first():
        plot_curves(workdir)
    return state


def make_evaluation(config: TrainConfig, setup: Setup) -> tuple[Callable[[TrainState], dict[str, float]], str]:
    """Returns a function that evaluates a state, and the name of the metric that decides which policy is the best.

    Raises:
      UserError: the task lacks the metric of `config.evaluation.best`.
    """
    task, watched = evaluated_task(config), config.evaluation
    rows = task_rows(config.task, task, watched.split, count=watched.count)
    held_out = encoded_rows(config, task, setup.tokenizer, rows)
    greedy, key = greedy_sampler(config), stream_of_seed(config.seed, Stream.EVALUATION)
    best = "eval/" + known_metric(task, watched.best, "config.evaluation.best")

    def evaluate(state: TrainState) -> dict[str, float]:
        return evaluate_policy(
            setup.model, *policy(setup.base, state.params), held_out, greedy, task, setup.tokenizer,
            batch_rows=watched.batch_rows, key=key,
        )  # fmt: skip

    return evaluate, best


# ----------------------------------------------------------------------------------------------- in each iteration


def update_metrics(reports: list[dict[str, Any]]) -> dict[str, float]:
    """Summarises an iteration's inner updates: the maximum of metrics whose names end in `_max`, the mean of others.

    The first update clips nothing, because it compares the policy with itself. `policy/clipped` is therefore the mean
    over the later updates, and `clipped/update_N` is the clipped share of update N, for N from 2 on.
    """
    of = lambda name: np.max if name.endswith("_max") else np.mean  # noqa: E731
    metrics = {name: float(of(name)([report[name] for report in reports])) for name in reports[0]}
    if "policy/clipped" in metrics and len(reports) > 1:
        later = {f"clipped/update_{n}": float(r["policy/clipped"]) for n, r in enumerate(reports, start=1) if n > 1}
        metrics |= later | {"policy/clipped": float(np.mean(list(later.values())))}
    return metrics


def time_metrics(rewarded: Rewarded, seconds: dict[str, float], ends: Sequence[int]) -> dict[str, float]:
    """Returns the seconds of an iteration's parts, and the tokens and rewards per second.

    Args:
      ends: ids of the tokens that end a completion; they count too.
    """
    tokens = completion_mask(rewarded.completions, ends).sum()
    metrics = {f"time/{name}": value for name, value in seconds.items()}
    metrics["time/tokens_per_second"] = float(tokens) / rewarded.seconds["rollout"]
    metrics["time/rewards_per_second"] = len(rewarded.rewards) / rewarded.seconds["reward"]
    return metrics


def due(iteration: int, every: int) -> bool:
    """Returns whether a periodic action is due at this iteration; 0 disables it."""
    return every > 0 and iteration % every == 0


def logged_completions(rewarded: Rewarded, tokenizer: hub.Tokenizer, limit: int) -> list[dict]:
    """Returns records of the first `limit` completions, and of every completion for which a reward failed."""
    failed = np.any([np.isnan(value) for value in rewarded.components.values()], axis=0)
    return completion_records(rewarded, tokenizer, [i for i in range(len(failed)) if i < limit or failed[i]])


def main(config: TrainConfig, workdir: Path | None) -> None:
    """Makes the start of an embedded model if it is missing, and trains; a dry run makes one small iteration."""
    if not config.dry_run:
        # What does not fit together fails here, before the start is trained.
        require_savable(workdir)
        checked_parts(config)
        embedded_start(config)
        state = train(config, workdir)
        if int(state.iteration) < config.iterations:
            raise SystemExit(exit_code())
        if hosts.first():
            print(f"wrote {workdir}")
        return
    with tempfile.TemporaryDirectory() as temporary:
        directory = workdir or Path(temporary) / "run"
        refuse_existing(directory)
        train(shrink(config, directory / "start"), directory)
        print(f"dry run of {config.method} on {config.task.name}: one iteration went through")


if __name__ == "__main__":
    launch(main, dry_run=True)
