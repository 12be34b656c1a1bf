"""Makes the runs of a comparison of methods in several processes, and several runs in one compiled program if wanted.

    python -m benchmarks.side_by_side --config configs/compare_stability.py --workdir runs/stability \\
        --arms gdsd=5,espo=5,open:gdsd=5 --rates 1e-4,3e-4,1e-3 --tenfold 2 [--seconds 500] [--worker 0]

It follows the protocol of `configs/compare_stability.py`. An arm is `[RUN:]METHOD=SEEDS`: a method, its number of
seeds, and RUN, the word after the colon of `--config` (default: `own`). Each arm first tries the rates on the config's
own seed, in `WORKDIR/RUN/rate_R/METHOD/seedN`, and chooses the one with the best final metric on the validation rows.
Then come the seeds at that rate, in `WORKDIR/RUN/seeds`, and the first `--tenfold` of them at ten times that rate, in
`WORKDIR/RUN/tenfold`.

A run equals one of `gdsd_jax.train` with the same config within rounding: it has the same prompts, draws and updates.
It leaves the same files, but no completions, and only its last checkpoint, so that `gdsd_jax.evaluate` and
`gdsd_jax.meter` read them. Besides the evaluation of its last policy, a run has `passes`: 16 samples of 64 test rows at
temperature 1. `benchmarks.stability` makes tables and figures of the finished runs.

Processes with the same workdir share the arms. Each begins with the arm of its number, `--worker`, and then helps with
the others. Finished runs are not repeated. Runs that `--seconds` stops keep their metrics; remove `WORKDIR/claims`
before the same command is started again. `--at_once` is the number of runs that share a program: on a GPU, take all of
them; a CPU core is as fast with one.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import arguments
from benchmarks.arguments import number, several
from gdsd_jax.config import TrainConfig, freeze, greedy_sampler, read_config
from gdsd_jax.denoiser import init_lora
from gdsd_jax.diffusion import SamplerConfig
from gdsd_jax.diffusion.sampler import compiled_sample
from gdsd_jax.evaluation import reports
from gdsd_jax.evaluation.comparison import state_of
from gdsd_jax.evaluation.completions import Part, complete
from gdsd_jax.evaluation.run import result
from gdsd_jax.methods import Batch, Method
from gdsd_jax.runtime import ranges
from gdsd_jax.runtime.streams import Stream, stream_key, stream_of_seed
from gdsd_jax.tasks.task import weighted_sum
from gdsd_jax.telemetry.metrics import MetricWriter, read_metrics
from gdsd_jax.train import due, make_evaluation, update_metrics
from gdsd_jax.training.between import after_iteration
from gdsd_jax.training.cursor import Cursor
from gdsd_jax.training.divergence import is_finite
from gdsd_jax.training.optimizer import make_optimizer
from gdsd_jax.training.record import keep_record, with_first_schedule
from gdsd_jax.training.rollout import Prompts, RolloutSpec, completion_mask, judge, make_batch, spread_metrics
from gdsd_jax.training.setup import (
    Setup,
    checked_method,
    encoded_rows,
    evaluated_task,
    known_metric,
    load_setup,
    resolve_task,
    task_rows,
)
from gdsd_jax.training.state import TrainState, init_state, policy
from gdsd_jax.training.update import Before, UpdateSpec, inner_update

SAMPLES, SAMPLED_ROWS, TEST_ROWS = 16, 64, 256
WHOLE = Annotated[int, ranges.Range()]


class Run(NamedTuple):
    """A run: its config, which has its seed and rate, and its directory."""

    config: TrainConfig
    directory: Path


class Programs(NamedTuple):
    """The compiled parts of an iteration; every argument except the base has the runs along its first axis."""

    start: Any
    roll_out: Any
    update: Any


def scaled_by_state(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """Returns an optimizer whose state has a further entry: a factor of all its changes."""

    def init(params: Any) -> tuple:
        return optimizer.init(params), jnp.ones(())

    def update(gradient: Any, state: tuple, params: Any = None) -> tuple:
        changes, inner = optimizer.update(gradient, state[0], params)
        return jax.tree.map(lambda x: state[1] * x, changes), (inner, state[1])

    return optax.GradientTransformation(init, update)


def make_programs(config: TrainConfig, setup: Setup, method: Method, sampler: SamplerConfig) -> Programs:
    """Compiles the parts of an iteration, for runs that differ only in seed and learning rate.

    The optimizer has the config's schedule with a learning rate of 1. Its changes are proportional to the rate, so the
    factor in its state is the run's rate.
    """
    unit = dataclasses.replace(config.optimizer, learning_rate=1.0)
    optimizer, schedule = make_optimizer(unit, config.iterations * config.inner_updates)
    spec = UpdateSpec.of_run(config, setup.model, method, scaled_by_state(optimizer), schedule)
    rows = config.prompts_per_iteration * config.group_size

    def start(seed: jax.Array, rate: jax.Array) -> TrainState:
        key = jax.random.key(seed)
        lora = init_lora(setup.model, stream_key(key, Stream.ADAPTER), **dataclasses.asdict(config.lora))
        state = init_state(lora, spec.optimizer, config.seed)
        return state.replace(opt_state=(state.opt_state[0], rate), key=key)

    def roll_out(base: Any, state: TrainState, prompts: jax.Array, mask: jax.Array) -> Any:
        key = stream_key(state.key, Stream.ROLLOUT, state.iteration)
        weights = policy(base, state.params)
        return compiled_sample(setup.model, *weights, prompts, mask, key, sampler, jnp.arange(rows))

    def update(base: Any, state: TrainState, batch: Batch) -> tuple[TrainState, dict]:
        before = None if method.old == "unused" else Before(state.params, state.extras)
        step = lambda state, _: inner_update(spec, state, base, before, batch, False)  # noqa: E731
        state, reports = jax.lax.scan(step, state, None, length=config.inner_updates)
        return after_iteration(state, config.reference), reports

    return Programs(
        jax.jit(jax.vmap(start)),
        jax.jit(jax.vmap(roll_out, in_axes=(None, 0, 0, 0))),
        jax.jit(jax.vmap(update, in_axes=(None, 0, 0)), donate_argnums=1),
    )


def asked(config: TrainConfig, setup: Setup) -> Prompts:
    """Returns the prompts of all iterations of one run in order, each repeated for its group."""
    rows = task_rows(config.task, setup.task, "train", count=config.task.train_rows, seed=config.seed)
    order = grain.MapDataset.range(len(rows)).seed(config.seed).shuffle().repeat()
    count = config.prompts_per_iteration * config.iterations
    found = encoded_rows(config, setup.task, setup.tokenizer, [rows[order[i]] for i in range(count)])
    repeated = (np.repeat(x, config.group_size, axis=0) for x in (found.tokens, found.mask))
    return Prompts(*repeated, [row for row in found.rows for _ in range(config.group_size)])


class Bench:
    """Makes runs of one method, which share programs and data."""

    def __init__(self, config: TrainConfig, deadline: float) -> None:
        self.config, self.deadline = config, deadline
        self.method = checked_method(config)
        self.setup = load_setup(config)
        sampler = dataclasses.replace(config.sampler, record=config.sampler.record or self.method.records)
        self.rollouts = RolloutSpec(
            self.setup.model, sampler, self.setup.task, self.setup.tokenizer, config.group_size,
            verdicts=self.method.verdicts,
        )  # fmt: skip
        self.programs = make_programs(config, self.setup, self.method, sampler)
        self.prompts: dict[int, Prompts] = {}
        self.evaluations: dict[int, Any] = {}

    def train(self, runs: Sequence[Run]) -> None:
        """Makes the runs side by side, until the deadline."""
        with contextlib.ExitStack() as files:
            for run in runs:
                keep_record(run.directory, with_first_schedule(run.config, run.directory))
            writers = [files.enter_context(MetricWriter(run.directory, resume_step=-1)) for run in runs]
            self._train(runs, writers)

    def _train(self, runs: Sequence[Run], writers: Sequence[MetricWriter]) -> None:
        config, setup = self.config, self.setup
        for seed in {run.config.seed for run in runs}:
            if seed not in self.prompts:
                own = dataclasses.replace(config, seed=seed)
                self.prompts[seed], self.evaluations[seed] = asked(own, setup), make_evaluation(own, setup)[0]
        per_run = [self.prompts[run.config.seed] for run in runs]
        rates = np.array([run.config.optimizer.learning_rate for run in runs], np.float32)
        state = self.programs.start(np.array([run.config.seed for run in runs], np.int32), rates)
        rows = config.prompts_per_iteration * config.group_size
        failed, each = set(), range(config.inner_updates)
        for iteration in range(1, config.iterations + 1):
            begin = time.perf_counter()
            part = slice((iteration - 1) * rows, iteration * rows)
            tokens, mask = (np.stack([getattr(p, name)[part] for p in per_run]) for name in ("tokens", "mask"))
            rollout = self.programs.roll_out(setup.base, state, tokens, mask)
            batch, rewards = self.rewarded(rollout, mask, [p.rows[part] for p in per_run])
            state, found = self.programs.update(setup.base, state, batch)
            found = jax.device_get(found)
            seconds = (time.perf_counter() - begin) / len(runs)
            last = iteration == config.iterations
            for index, run in enumerate(runs):
                if index in failed:
                    continue
                metrics = update_metrics([{k: v[index, n] for k, v in found.items()} for n in each])
                metrics["lr"] *= float(rates[index])
                failing = not is_finite(metrics)
                metrics |= spread_metrics(rewards[index], config.group_size) | {"time/iteration": seconds}
                if last or due(iteration, config.evaluation.every):
                    held_out = self.evaluations[run.config.seed](jax.tree.map(lambda x, i=index: x[i], state))
                    metrics |= {f"eval/{name}": value for name, value in held_out.items()}
                # Six digits keep the files of a hundred runs small.
                writers[index].write(iteration, {name: float(f"{value:.6g}") for name, value in metrics.items()})
                if failing:
                    failed.add(index)
                    (run.directory / "diverged").mkdir()
            if time.time() > self.deadline:
                return
        for index, run in enumerate(runs):
            if index not in failed:
                self.finish(run, jax.tree.map(lambda x, i=index: x[i], state))

    def rewarded(self, rollout: Any, mask: np.ndarray, rows: list[list[dict]]) -> tuple[Batch, np.ndarray]:
        """Returns the batch of every run, stacked, and the rewards `[runs, rows]`."""
        spec = self.rollouts
        completions = np.asarray(rollout.tokens)[:, :, mask.shape[2] :]
        runs, count, length = completions.shape
        together = completions.reshape(-1, length)
        seen = completion_mask(together, spec.config.ends)
        together = np.where(seen, together, spec.config.eos_token_id)
        judged = judge(spec, together, seen, [row for own in rows for row in own])
        rewards = weighted_sum(judged.components, spec.task.weights).reshape(runs, count)
        judged = jax.tree.map(lambda x: x.reshape(runs, count, *x.shape[1:]), judged)
        return make_batch(spec, rollout, mask, seen.reshape(completions.shape), rewards, judged), rewards

    def finish(self, run: Run, state: TrainState) -> None:
        """Saves the last state of a run, and evaluates it on test rows: once greedily, once with several samples."""
        # Imported only here, because Orbax takes seconds to import.
        from gdsd_jax.training.checkpoint import Checkpoints

        config = with_first_schedule(run.config, run.directory)
        whole = state.replace(opt_state=state.opt_state[0])
        with Checkpoints(run.directory, config, whole) as checkpoints:
            checkpoints.save(config.iterations, whole, Cursor(config.iterations * config.prompts_per_iteration))
        greedy, policy_now = greedy_sampler(config), policy(self.setup.base, state.params)
        drawn = dataclasses.replace(greedy, temperature=1.0)
        self.evaluate(run, policy_now, greedy, run.directory / "evaluation", rows=TEST_ROWS, samples=1)
        self.evaluate(run, policy_now, drawn, run.directory / "passes", rows=SAMPLED_ROWS, samples=SAMPLES)

    def evaluate(
        self, run: Run, weights: tuple, sampler: SamplerConfig, output: Path, *, rows: int, samples: int
    ) -> None:
        """Writes the summary that `gdsd_jax.evaluate` would write of the same policy and rows."""
        config, setup = run.config, self.setup
        task = evaluated_task(config)
        items = task_rows(config.task, task, "test", count=rows)
        prompts = encoded_rows(config, task, setup.tokenizer, items)
        repeated = (np.repeat(x, samples, axis=0) for x in (prompts.tokens, prompts.mask))
        part = Part(task, "test", items, Prompts(*repeated, [r for r in items for _ in range(samples)]), sampler)
        batches = list(
            complete(
                setup.model, *weights, part.prompts, sampler, setup.tokenizer,
                batch_rows=min(config.evaluation.batch_rows, rows * samples),
                key=stream_of_seed(config.seed, Stream.EVALUATION), divergence=samples == 1,
            )
        )  # fmt: skip
        entry, _ = result(part, batches, samples, (1, samples) if samples > 1 else ())
        summary = {"checkpoint": config.checkpoint, "iteration": config.iterations, "split": "test", "samples": samples}
        output.mkdir(parents=True, exist_ok=True)
        text = json.dumps(summary | {"temperature": sampler.temperature, "results": [entry]}, indent=1)
        (output / reports.SUMMARY).write_text(text + "\n")


class Arm(NamedTuple):
    """A word after the colon of `--config`, a method, and its number of seeds."""

    run: str
    method: str
    seeds: int

    @classmethod
    def of(cls, text: str) -> Arm:
        """Returns the arm that `[RUN:]METHOD=SEEDS` spells."""
        name, _, seeds = text.partition("=")
        run, colon, method = name.rpartition(":")
        if not (method and seeds.isdecimal()):
            raise argparse.ArgumentTypeError(f"{text!r} is not [RUN:]METHOD=SEEDS, such as gdsd=5")
        return cls(run if colon else "own", method, int(seeds))


class Protocol:
    """Decides which runs the arms need, and makes this process's share of them.

    Args:
      file: the config file.
      rates: learning rates that every arm tries.
      tenfold: number of seeds that are repeated at ten times the best rate.
      deadline: time at which to stop, in seconds since the epoch.
      iterations: iterations of each run; None: the config's.
      at_once: number of runs that share a program.
    """

    def __init__(
        self,
        file: str,
        workdir: Path,
        rates: Sequence[float],
        tenfold: int,
        deadline: float,
        *,
        iterations: int | None,
        at_once: int,
    ) -> None:
        self.file, self.workdir, self.rates, self.tenfold = file, workdir, rates, tenfold
        self.deadline, self.iterations, self.at_once = deadline, iterations, at_once
        self.configs: dict[Arm, TrainConfig] = {}
        self.benches: dict[Arm, Bench] = {}
        self.took: dict[Arm, float] = {}

    def config(self, arm: Arm) -> TrainConfig:
        """Returns the config of an arm, without the settings of other methods."""
        if arm in self.configs:
            return self.configs[arm]
        named = self.file if arm.run == "own" else f"{self.file}:{arm.run}"
        config = freeze(TrainConfig, read_config(named))
        own = {arm.method: dict(config.settings.get(arm.method, {}))}
        iterations = self.iterations or config.iterations
        self.configs[arm] = dataclasses.replace(config, method=arm.method, settings=own, iterations=iterations)
        return self.configs[arm]

    def run(self, arm: Arm, part: str, seed: int, rate: float) -> Run:
        """Returns the run of an arm in one part of the protocol: `rate_R`, `seeds` or `tenfold`."""
        config = self.config(arm)
        optimizer = dataclasses.replace(config.optimizer, learning_rate=rate)
        own = dataclasses.replace(config, seed=seed, optimizer=optimizer)
        return Run(own, self.workdir / arm.run / part / arm.method / f"seed{seed}")

    def tried(self, arm: Arm) -> list[Run]:
        """Returns the runs by which the rate of an arm is chosen."""
        return [self.run(arm, f"rate_{rate:g}", self.config(arm).seed, rate) for rate in self.rates]

    def runs(self, arm: Arm) -> list[Run]:
        """Returns the runs of an arm that can be made now: its rates, or its seeds once all rates have been tried."""
        config, tried = self.config(arm), self.tried(arm)
        if any(state_of(*each) == "open" for each in tried):
            return tried
        rate = chosen_rate(tried, known_metric(resolve_task(config), config.evaluation.best, "config.evaluation.best"))
        if rate is None:
            return []
        later = [self.run(arm, "seeds", config.seed + n, rate) for n in range(arm.seeds)]
        return later + [self.run(arm, "tenfold", config.seed + n, 10 * rate) for n in range(self.tenfold)]

    def claim(self, arm: Arm) -> list[Run]:
        """Claims up to `at_once` runs that no process has made or begun, and returns them."""
        found = []
        for run in self.runs(arm):
            claim = self.place(run)
            if len(found) < self.at_once and state_of(*run) == "open" and not claim.exists():
                claim.parent.mkdir(parents=True, exist_ok=True)
                with contextlib.suppress(FileExistsError):
                    claim.mkdir()
                    found.append(run)
        return found

    def place(self, run: Run) -> Path:
        """Returns the directory that marks a run as begun; `failed` inside it marks a run that an error has ended."""
        return self.workdir / "claims" / "-".join(run.directory.relative_to(self.workdir).parts)

    def settled(self, run: Run) -> bool:
        """Returns whether a run is finished, diverged or failed."""
        return state_of(*run) != "open" or (self.place(run) / "failed").exists()

    def share(self, arms: Sequence[Arm], worker: int) -> None:
        """Makes runs until none is left or the time is up.

        The first arm is the worker's own. Later, arms whose programs this process has compiled come first.
        """
        own = arms[worker % len(arms)]
        while time.time() < self.deadline:
            for arm in (*(arm for arm in arms if arm in self.benches), own, *arms):
                if self.took.get(arm, 0.0) > self.deadline - time.time():
                    continue
                if runs := self.claim(arm):
                    own = arm
                    break
            else:
                if all(self.settled(run) for arm in arms for run in self.runs(arm)):
                    return
                time.sleep(2.0)
                continue
            begin = time.time()
            try:
                if own not in self.benches:
                    self.benches[own] = Bench(self.config(own), self.deadline)
                self.benches[own].train(runs)
            except Exception:
                # On a machine that is available only for minutes, an arm that fails must not end the others.
                traceback.print_exc()
                for run in runs:
                    (self.place(run) / "failed").mkdir()
                continue
            # The first runs of an arm include compilation.
            self.took[own] = min(time.time() - begin, self.took.get(own, math.inf))
            names = ", ".join(str(run.directory.relative_to(self.workdir)) for run in runs)
            print(f"{names}: {state_of(*runs[-1])} after {time.time() - begin:.0f} s", flush=True)


def chosen_rate(runs: Sequence[Run], metric: str) -> float | None:
    """Returns the rate whose run has the highest final metric on the held-out rows, or None if no run is finished."""
    finals = {
        run.config.optimizer.learning_rate: read_metrics(run.directory)[-1][f"eval/{metric}"]
        for run in runs
        if state_of(*run) == "finished"
    }
    return max(finals, key=finals.__getitem__) if finals else None


def parser_of(description: str) -> argparse.ArgumentParser:
    """Returns a parser of the flags that define a comparison, which making and reporting it share."""
    parser = arguments.parser_of(description)
    rates, whole, count = several(number(ranges.Positive)), number(WHOLE), number(ranges.Count)
    parser.add_argument("--config", required=True, help="config file that all runs share")
    parser.add_argument("--workdir", type=Path, required=True, help="directory of all runs and of the report")
    parser.add_argument(
        "--arms", type=several(Arm.of), required=True,
        help="methods to compare, each as [RUN:]METHOD=SEEDS: the word after the config file's colon, the method and "
        "its number of seeds; with commas between",
    )  # fmt: skip
    parser.add_argument("--rates", type=rates, required=True, help="learning rates to try, with commas between")
    parser.add_argument("--tenfold", type=whole, default=2, help="seeds that also run at ten times the chosen rate")
    parser.add_argument("--iterations", type=count, help="iterations of each run, in place of the config's")
    return parser


def main() -> None:
    parser = parser_of(__doc__)
    seconds, count, whole = (number(kind) for kind in (ranges.Positive, ranges.Count, WHOLE))
    parser.add_argument("--seconds", type=seconds, default="1e9", help="time after which unfinished runs stop")
    parser.add_argument("--at_once", type=count, default=1, help="runs that share a program")
    parser.add_argument("--worker", type=whole, default=0, help="number of the arm with which this process begins")
    flags = parser.parse_args()
    deadline = time.time() + flags.seconds
    sizes = {"iterations": flags.iterations, "at_once": flags.at_once}
    arms = flags.arms
    protocol = Protocol(flags.config, flags.workdir, flags.rates, flags.tenfold, deadline, **sizes)
    start = Path(protocol.config(arms[0]).checkpoint)
    if not start.exists():
        parser.error(f"{start} does not exist: python -m gdsd_jax.sft --config {flags.config} --workdir {start.parent}")
    protocol.share(arms, flags.worker)


if __name__ == "__main__":
    main()
