"""Reinforcement learning of a masked denoiser. Start reading here: this file is the walk, top to bottom.

    python -m gdsd_jax.train --config configs/tiny_sudoku.py --workdir runs/demo [--config.method=gdsd_tlc ...]

Each iteration: prompts -> completions -> rewards -> `inner_updates` of the policy. The rooms: `tasks` for prompts and
rewards, `diffusion.sample` for completions, `methods` for the objective, `training.update` for the gradient. A run can
be killed at any time; started again with the same workdir it goes on from its last checkpoint, and repeats what an
uninterrupted run would have done, bit for bit.
"""

from __future__ import annotations

import dataclasses
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np

from gdsd_jax import hub
from gdsd_jax.config import TrainConfig, greedy_sampler
from gdsd_jax.config.flags import launch
from gdsd_jax.denoiser import init_lora
from gdsd_jax.diffusion.sampler import check_fits
from gdsd_jax.evaluation.completions import evaluate_policy
from gdsd_jax.methods import build, check
from gdsd_jax.runtime import hosts
from gdsd_jax.runtime.files import refuse_existing
from gdsd_jax.runtime.transfer import fetch, seed_key
from gdsd_jax.sft import embedded_start
from gdsd_jax.telemetry.metrics import MetricWriter
from gdsd_jax.telemetry.planned import beside_plan, read_plan
from gdsd_jax.telemetry.plots import plot_curves
from gdsd_jax.telemetry.profile import Profile, phase
from gdsd_jax.telemetry.progress import Progress
from gdsd_jax.telemetry.warnings import precursors
from gdsd_jax.training.checkpoint import Best, Checkpoints
from gdsd_jax.training.divergence import diverged
from gdsd_jax.training.dry_run import shrink
from gdsd_jax.training.rollout import (
    Prompts,
    Rewarded,
    completion_records,
    encode_prompts,
    length_metrics,
    reward_metrics,
    roll_out,
)
from gdsd_jax.training.setup import Setup, evaluated_task, known_metric, load_setup, task_rows
from gdsd_jax.training.state import TrainState, make_optimizer, policy, start_state
from gdsd_jax.training.update import ROLLOUT_STREAM, make_inner_update, stream_key


def fresh_state(config: TrainConfig, setup: Setup) -> tuple:
    """The state before the first update, where it lies, its optimizer and learning-rate schedule."""
    optimizer, schedule = make_optimizer(config.optimizer, config.iterations * config.inner_updates)

    def trained(base: Any) -> Any:
        if not config.lora.rank:
            return base
        key = jax.random.fold_in(jax.random.key(config.seed), 1)
        return init_lora(setup.model, key, **dataclasses.asdict(config.lora))

    return *start_state(setup.model, optimizer, config.seed, trained, setup.base), optimizer, schedule


def train(config: TrainConfig, workdir: Path) -> TrainState:
    """Runs (or resumes) the whole training and returns the final state."""

    # ------------------------------------------------------------------------------------------ set-up
    method = build(config.method, **config.method_settings)
    check(
        method, name=config.method, prompt_length=max(config.prompt_buckets),
        completion_length=config.sampler.completion_length, group_size=config.group_size, sampler=config.sampler,
    )  # fmt: skip
    sampler = dataclasses.replace(config.sampler, record=config.sampler.record or method.records)
    embedded_start(config)
    spread = {
        "config.prompts_per_iteration x config.group_size": config.prompts_per_iteration * config.group_size,
        "config.microbatch_rows": config.microbatch_rows,
    }
    setup = load_setup(config, rows=spread)
    model, base, tokenizer, task = setup
    check_fits(model, max(config.prompt_buckets), config.sampler)
    state, places, optimizer, schedule = fresh_state(config, setup)
    update = make_inner_update(
        model, method, optimizer, schedule,
        microbatch_rows=config.microbatch_rows, vocab_chunk=config.model.vocab_chunk, shardings=places,
    )  # fmt: skip
    rollout_key = jax.jit(lambda state: stream_key(state.key, ROLLOUT_STREAM, state.iteration))
    finish = jax.jit(lambda state: state.replace(iteration=state.iteration + 1), out_shardings=places)
    snapshot = jax.jit(lambda params: jax.tree.map(lambda x: x + 0, params), out_shardings=places.params)
    lengths = jax.jit(length_metrics)

    encode = lambda task, rows: encode_prompts(  # noqa: E731
        task, tokenizer, rows, buckets=config.prompt_buckets, overlong=config.overlong_prompts
    )
    rows = task_rows(config.task, task, "train", count=config.task.train_rows, seed=config.seed)
    prompts = encode(task, rows)
    order = grain.MapDataset.range(len(rows)).seed(config.seed).shuffle().repeat()
    evaluated, watched = evaluated_task(config), config.evaluation
    held_out = encode(evaluated, task_rows(config.task, evaluated, watched.split, count=watched.count))
    greedy = greedy_sampler(config)
    eval_key = seed_key(config.seed)
    best_metric = "eval/" + known_metric(evaluated, config.evaluation.best, "config.evaluation.best")

    checkpoints = Checkpoints(workdir, config, state)
    first, position = checkpoints.latest, 0
    if first is not None:
        state, position = checkpoints.restore()
    first = first or 0
    best = Best(workdir, first)

    def evaluate(state: TrainState) -> dict[str, float]:
        return evaluate_policy(
            model, *policy(base, state.params), held_out, greedy, evaluated, tokenizer,
            batch_rows=config.evaluation.batch_rows, key=eval_key,
        )  # fmt: skip

    plan = read_plan(workdir, config)
    # Without a checkpoint the files start anew, with one they are cut back to it.
    copies = {"tensorboard": config.tensorboard, "wandb": config.wandb}
    writer = hosts.first_only(MetricWriter, workdir, **copies, resume_step=first or -1)
    progress = hosts.first_only(Progress, config.iterations, start=first, label=config.method)
    profile = hosts.first_only(Profile, workdir, config.profile)
    warned: set[str] = set()
    with writer, checkpoints, best, progress, profile, StopSignal() as stop, jax.transfer_guard("disallow"):
        for iteration in range(first + 1, config.iterations + 1):
            profile.begin(iteration)
            start = time.perf_counter()

            # ---------------------------------------------------------------- prompts, rollout, reward
            chosen = [order[position + i] for i in range(config.prompts_per_iteration)]
            position += config.prompts_per_iteration
            asked = Prompts(prompts.tokens[chosen], prompts.mask[chosen], [rows[i] for i in chosen])
            rewarded = roll_out(
                model, *policy(base, state.params), asked, rollout_key(state), sampler, task, tokenizer,
                group_size=config.group_size,
            )  # fmt: skip

            # ---------------------------------------------------------------------------------- update
            update_start = time.perf_counter()
            with phase("send update"):
                old_params = snapshot(state.params) if config.inner_updates > 1 and method.old != "unused" else None
                by_component = due(iteration, config.component_norms_every)
                reports = []
                for inner in range(config.inner_updates):
                    old = old_params if inner else None
                    state, report = update(state, base, old, rewarded.batch, by_component=by_component)
                    reports.append(report)
                state = finish(state)

            # --------------------------------------------------------------------------------- metrics
            # First what the host knows already, while the devices are at the update.
            with phase("log completions"):
                metrics = reward_metrics(rewarded)
                writer.completions(iteration, logged_completions(rewarded, tokenizer, config.completions_logged))
            with phase("await update"):
                reports, lengths_now = fetch((reports, lengths(rewarded.batch)))
            now = time.perf_counter()
            metrics |= {k: float(v) for k, v in lengths_now.items()}
            metrics |= {name: float(np.mean([r[name] for r in reports])) for name in reports[0]}
            seconds = rewarded.seconds | {"update": now - update_start, "iteration": now - start}
            metrics |= {f"time/{name}": value for name, value in seconds.items()}
            inner_update = seconds["update"] / config.inner_updates
            metrics |= beside_plan(plan, rollout=seconds["rollout"], update=inner_update)
            metrics["time/tokens_per_second"] = rewarded.batch.completion_mask.size / rewarded.seconds["rollout"]
            metrics["time/rewards_per_second"] = len(rewarded.rewards) / rewarded.seconds["reward"]
            if iteration == config.iterations or due(iteration, config.evaluation.every):
                with phase("evaluate"):
                    metrics |= {f"eval/{name}": value for name, value in evaluate(state).items()}
            with phase("log metrics"):
                writer.write(iteration, metrics)
            shown = {name.split("/")[1]: metrics[name] for name in metrics if name.startswith("eval/")}
            progress.update(iteration, reward=metrics["reward/mean"], **shown)
            for line in precursors(metrics):
                kind = line.split()[0]
                if kind not in warned:
                    warned.add(kind)
                    progress.note(f"iteration {iteration}: {line}")
            if not np.isfinite([metrics[name] for name in ("loss", "grad/norm", "update/norm")]).all():
                raise diverged(workdir, iteration, rewarded, tokenizer, checkpoints.latest)

            # ------------------------------------------------------------------------------ checkpoint
            with phase("checkpoint"):
                if best_metric in metrics:
                    best.offer(iteration, state.params, best_metric, metrics[best_metric])
                done = hosts.any_process(stop.requested) or iteration == config.iterations
                if done or iteration % config.save_every == 0:
                    checkpoints.save(iteration, state, position)
            if recorded := profile.end():
                progress.note(f"timeline of iteration {iteration}, recorded in {profile.directory}:\n{recorded}")
            if done:
                break
    if hosts.first():
        plot_curves(workdir)
    return state


def due(iteration: int, every: int) -> bool:
    """Whether what happens every so many iterations (0: never) happens in this one."""
    return every > 0 and iteration % every == 0


def logged_completions(rewarded: Rewarded, tokenizer: hub.Tokenizer, limit: int) -> list[dict]:
    """The first completions with their rewards, and every completion on which a reward failed."""
    failed = np.any([np.isnan(value) for value in rewarded.components.values()], axis=0)
    return completion_records(rewarded, tokenizer, [i for i in range(len(failed)) if i < limit or failed[i]])


class StopSignal:
    """While open, turns SIGTERM and SIGINT into a request to save and leave after the running iteration."""

    def __enter__(self) -> StopSignal:
        self.requested = False
        self._before = {number: signal.signal(number, self._request) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: object) -> None:
        self.requested = True


def main(config: TrainConfig, workdir: Path | None) -> None:
    if not config.dry_run:
        train(config, workdir)
        return
    with tempfile.TemporaryDirectory() as temporary:
        directory = workdir or Path(temporary) / "run"
        refuse_existing(directory)
        train(shrink(config, directory / "start"), directory)
        print(f"dry run of {config.method} on {config.task.name}: one iteration went through")


if __name__ == "__main__":
    launch(main, dry_run=True)
