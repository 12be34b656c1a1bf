"""Compares methods from one start, with the same prompts, rollout budget and evaluation, over several seeds.

    python -m gdsd_jax.compare --config configs/compare_tiny.py --workdir runs/compare --methods gdsd,espo,spg --seeds 3

Each run is one of `gdsd_jax.train` in `WORKDIR/METHOD/seedN`, where N counts up from `config.seed`. Its final policy is
evaluated on the test split. Runs of one seed see the same prompts in the same order, so methods are compared seed by
seed. All runs share one process and its compiled sampler. The first seed of every method is run before the second seed
of any. After each evaluation the command rewrites `table.json`, `table.md` and `curves.png`, so that an interrupted
comparison leaves a valid partial result; the same command resumes it. A run that diverges counts as collapsed, and the
command continues with the next run.

All methods use the config's learning rate, unless `--rates gdsd=5e-4,espo=2e-3` gives some of them another one.
`--rate_factor 10` multiplies all learning rates, which shows how large a rate each method tolerates. Each factor needs
its own workdir.

Several hosts that share a file system can share a comparison: `--host_count` is their number, `--host_index` the number
of this one, from 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gdsd_jax import evaluate, hub, train
from gdsd_jax.config import TrainConfig
from gdsd_jax.config.flags import Option, launch
from gdsd_jax.evaluation.comparison import (
    CURVES,
    TABLE_JSON,
    TABLE_MD,
    markdown,
    read_result,
    state_of,
    test_result,
    write_report,
)
from gdsd_jax.methods import METHODS
from gdsd_jax.runtime import hosts
from gdsd_jax.runtime.errors import UserError, did_you_mean
from gdsd_jax.runtime.plugins import is_plugin
from gdsd_jax.runtime.signals import asked_to_stop, exit_code
from gdsd_jax.sft import embedded_start
from gdsd_jax.telemetry import plots
from gdsd_jax.training.checkpoint import require_savable
from gdsd_jax.training.record import record_path, require_same_run
from gdsd_jax.training.setup import checked_parts, known_metric, resolve_task

MOST_SEEDS = 10_000


def compare(
    config: TrainConfig,
    workdir: Path,
    methods: Sequence[str],
    seeds: int,
    *,
    metric: str | None = None,
    rates: str | None = None,
    rate_factor: float = 1.0,
    host_index: int = 0,
    host_count: int = 1,
) -> dict[str, Any]:
    """Runs (or resumes) this host's share of the comparison, and returns the content of `table.json`.

    On SIGTERM or SIGINT during a run it ends the process after the run has saved and the table is written.

    Args:
      methods: names that `config.method` accepts; the others are compared with the first.
      seeds: number of seeds, counted up from `config.seed`.
      metric: one of the task's metrics; None: the task's last metric.
      rates: learning rates of single methods, `NAME=RATE,...`; all other methods use the config's.
      rate_factor: a factor for all learning rates.
      host_index, host_count: number of this host, from 0, and of all hosts that share the comparison.

    Raises:
      UserError: a method or metric is unknown, a method does not fit the config, there are no seeds, or a run in the
        workdir has another config or start. All of this is checked before the first run.
    """
    require_savable(workdir)
    require_runnable(config, methods, seeds, host_index, host_count)
    own_rates = parse_rates(rates, methods)
    if not rate_factor > 0:
        raise UserError(f"--rate_factor {rate_factor} must be above 0")
    metric = known_metric(resolve_task(config), metric, "--metric")
    if host_count > 1 and config.tiny.family and not Path(config.checkpoint).exists():
        raise UserError(f"{config.checkpoint} must exist before several hosts start: make it with gdsd_jax.sft")
    embedded_start(config)
    plan = [
        (
            run_config(config, method, seed, rate_factor * own_rates.get(method, config.optimizer.learning_rate)),
            workdir / method / f"seed{seed}",
        )
        for seed in range(config.seed, config.seed + seeds)
        for method in methods
    ]
    base = hub.fingerprint(config.checkpoint)
    require_same(plan, base)
    start = evaluated_start(config, base, workdir / ("before" if host_index == 0 else f"before{host_index}"))

    def report() -> dict[str, Any]:
        return write_report(config, workdir, plan, methods, metric, start, writer=f"{host_index}.")

    mine = plan[host_index::host_count]
    for number, (run, directory) in enumerate(mine, start=1):
        title = f"run {number}/{len(mine)}: {run.method} seed {run.seed}"
        if state_of(run, directory) == "open":
            print(title, flush=True)
            try:
                train.train(run, directory)
            except UserError as error:
                if state_of(run, directory) != "diverged":
                    raise
                print(f"diverged: {error}", flush=True)
            if state_of(run, directory) == "open" or asked_to_stop():
                report()
                print("stopped: the same command resumes here", flush=True)
                raise SystemExit(exit_code())
        else:
            print(f"{title} (done before)", flush=True)
            if state_of(run, directory) == "finished" and not (directory / plots.CURVES).exists():
                plots.plot_curves(directory)  # the run was killed after its last checkpoint, before its picture
        if state_of(run, directory) == "finished" and test_result(run, directory) is None:
            evaluate.run(run, directory, lengths=_length(run))
            report()
    return report()


def require_runnable(config: TrainConfig, methods: Sequence[str], seeds: int, host_index: int, host_count: int) -> None:
    """Raises UserError if the methods, seeds or numbers of hosts are not valid, or a method does not fit the config."""
    if not methods:
        raise UserError("no method is named: give --methods NAME,NAME,...")
    if len(set(methods)) < len(methods):
        raise UserError(f"--methods {','.join(methods)} names a method twice")
    if not 1 <= seeds <= MOST_SEEDS:
        raise UserError(f"--seeds {seeds} must be at least 1 and at most {MOST_SEEDS}")
    if not 0 <= host_index < host_count:
        raise UserError(f"--host_index {host_index} must be at least 0 and below --host_count {host_count}")
    for name in methods:
        if name not in METHODS and not is_plugin(name):
            names = f"{', '.join(METHODS)}, or package.module:NAME{did_you_mean(name, METHODS)}"
            raise UserError(f"--methods names an unknown method {name!r}: choose from {names}")
        checked_parts(run_config(config, name, config.seed))


def parse_rates(text: str | None, methods: Sequence[str]) -> dict[str, float]:
    """Returns the rates in `NAME=RATE,...`; raises UserError for another form or method, or a rate not above 0."""
    found = {}
    for part in text.split(",") if text else []:
        name, _, rate = (piece.strip() for piece in part.partition("="))
        try:
            found[name] = float(rate)
        except ValueError:
            raise UserError(f"--rates: {part.strip()!r} is not of the form NAME=RATE") from None
        if name not in methods or not found[name] > 0:
            raise UserError(f"--rates: {part.strip()!r} does not give one of --methods a rate above 0")
    return found


def run_config(config: TrainConfig, method: str, seed: int, learning_rate: float | None = None) -> TrainConfig:
    """Returns the config of one run, without other methods' settings, so that changing these does not invalidate it."""
    settings = {method: dict(config.settings.get(method, {}))}
    rate = config.optimizer.learning_rate if learning_rate is None else learning_rate
    optimizer = dataclasses.replace(config.optimizer, learning_rate=rate)
    return dataclasses.replace(config, method=method, seed=seed, settings=settings, optimizer=optimizer)


def require_same(plan: list[tuple[TrainConfig, Path]], base: str) -> None:
    """Raises UserError if a run that exists already was started with another config or base."""
    for run, directory in plan:
        if record_path(directory).exists():
            # The number of iterations is fixed too, because runs of equal length are compared.
            require_same_run(directory, run, fixed=("iterations",), base=base)


def evaluated_start(config: TrainConfig, base: str, output: Path) -> dict[str, Any]:
    """Returns the metrics of the start on the test split; evaluates it unless `output` holds its evaluation.

    Args:
      base: fingerprint of the start.
    """
    found = read_result(config, output, base=base, iteration=None)
    if found is None:
        evaluate.run(config, checkpoint=config.checkpoint, lengths=_length(config), output=output)
        found = read_result(config, output)
    if found is None:
        raise UserError(
            f"task {config.task.name} has other test rows at each reading: let its source depend only on its arguments"
        )
    return found


def _length(config: TrainConfig) -> tuple[int]:
    """Returns the completion length at which methods are evaluated: the one at which they are trained."""
    return (config.sampler.completion_length,)


def main(config: TrainConfig, workdir: Path, *, methods: str | None, seeds: int, **flags: Any) -> None:
    names = [name.strip() for name in (methods or "").split(",") if name.strip()]
    table = compare(config, workdir, names, seeds, **flags)
    written = ", ".join([str(workdir / TABLE_MD), TABLE_JSON, *[CURVES] * (table["runs_in"] > 0)])
    if hosts.first():
        print(f"\n{markdown(table)}\nwrote {written}")


OPTIONS = {
    "methods": Option(str, None, "Methods to compare with the first of them, such as gdsd,espo."),
    "seeds": Option(int, 3, "Runs of each method."),
    "metric": Option(str, None, "Metric of the task to compare, instead of its last one."),
    "rates": Option(str, None, "Learning rates of methods that do not use the config's, such as gdsd=5e-4,espo=2e-3."),
    "rate_factor": Option(float, 1.0, "Factor of every learning rate."),
    "host_index": Option(int, 0, "Number of this host, from 0."),
    "host_count": Option(int, 1, "Number of hosts that share the runs."),
}

if __name__ == "__main__":
    launch(main, OPTIONS)
