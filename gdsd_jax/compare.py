"""Compares methods from one start, with the same prompts, rollout budget and evaluation, over several seeds.

    python -m gdsd_jax.compare --config configs/compare_tiny.py --workdir runs/compare --methods gdsd,espo,spg --seeds 3

Each run is `gdsd_jax.train` in `WORKDIR/METHOD/seedN`, where N counts from `config.seed`, and is evaluated on the test
split. Runs of one seed see the same prompts in the same order, so differences between methods are taken seed by seed.
All runs share one process and its compiled sampler. The first seed of every method is run before the second seed of
any. After each evaluation `table.json`, `table.md` and `curves.png` are written anew, so an interrupted bench leaves a
valid partial result, and the same command continues it. A run that diverges counts as collapsed, and the bench goes on
with the next run.

All methods use the config's learning rate, unless `--rates gdsd=5e-4,espo=2e-3` gives some of them another one.
`--rate_factor 10` multiplies all learning rates, which shows how large a rate each method tolerates. Each such bench
needs a workdir of its own.

Several hosts on one file system can share a bench: `--host_count` is their number, `--host_index` the host's own.
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
from gdsd_jax.methods import build, check
from gdsd_jax.runtime.errors import UserError
from gdsd_jax.sft import embedded_start
from gdsd_jax.telemetry import plots
from gdsd_jax.training.record import record_path, require_same_run
from gdsd_jax.training.setup import known_metric, resolve_task


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
    """Runs (or resumes) this host's share of the bench and returns what `table.json` holds.

    Args:
      methods: names that `config.method` accepts; differences are taken to the first method.
      seeds: number of seeds, counted from `config.seed`.
      metric: one of the task's metrics; None selects the task's last metric.
      rates: learning rates of single methods, `NAME=RATE,...`; all other methods use the config's.
      rate_factor: a factor for all learning rates.

    Raises:
      UserError: an unknown method or metric, a method that does not fit the config, no seeds, or a workdir whose runs
        have another config or start. All of this is checked before the first run.
    """
    require_runnable(config, methods, seeds, host_index, host_count)
    own_rates = parse_rates(rates, methods)
    if not rate_factor > 0:
        raise UserError(f"--rate_factor {rate_factor} must be above 0")
    metric = known_metric(resolve_task(config), metric, "--metric")
    if host_count > 1 and config.tiny.family and not Path(config.checkpoint).exists():
        raise UserError(f"{config.checkpoint} must be there before several hosts start: make it with gdsd_jax.sft")
    embedded_start(config)
    plan = [
        (
            run_config(config, method, seed, rate_factor * own_rates.get(method, config.optimizer.learning_rate)),
            workdir / method / f"seed{seed}",
        )
        for seed in range(config.seed, config.seed + seeds)
        for method in methods
    ]
    require_same(plan, hub.fingerprint(config.checkpoint))
    start = evaluated_start(config, workdir / ("before" if host_index == 0 else f"before{host_index}"))

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
            if state_of(run, directory) == "open":
                print("stopped: the same command goes on from here", flush=True)
                return report()
        else:
            print(f"{title} (done before)", flush=True)
            if state_of(run, directory) == "finished" and not (directory / plots.CURVES).exists():
                plots.plot_curves(directory)  # the run was killed between its last checkpoint and its picture
        if state_of(run, directory) == "finished" and test_result(run, directory) is None:
            evaluate.run(run, directory, lengths=_length(run))
            report()
    return report()


def require_runnable(config: TrainConfig, methods: Sequence[str], seeds: int, host_index: int, host_count: int) -> None:
    """Raises UserError if the bench cannot run with these methods, seeds and numbers of hosts."""
    if not methods:
        raise UserError("no method is named: give --methods NAME,NAME,...")
    if len(set(methods)) < len(methods):
        raise UserError(f"--methods {','.join(methods)} names a method twice")
    if seeds < 1:
        raise UserError(f"--seeds {seeds} must be at least 1")
    if not 0 <= host_index < host_count:
        raise UserError(f"--host_index {host_index} must lie between 0 and --host_count {host_count} less 1")
    for name in methods:
        check(
            build(name, **config.settings.get(name, {})), name=name, prompt_length=max(config.prompt_buckets),
            completion_length=config.sampler.completion_length, group_size=config.group_size, sampler=config.sampler,
        )  # fmt: skip


def parse_rates(text: str | None, methods: Sequence[str]) -> dict[str, float]:
    """Reads `NAME=RATE,...`; raises UserError for another form, a rate not above 0, or a method not compared."""
    found = {}
    for part in text.split(",") if text else []:
        name, _, rate = (piece.strip() for piece in part.partition("="))
        try:
            found[name] = float(rate)
        except ValueError:
            raise UserError(f"--rates {text!r}: {part.strip()!r} is not of the form NAME=RATE") from None
        if name not in methods or not found[name] > 0:
            raise UserError(f"--rates {text!r}: {part.strip()!r} does not give one of --methods a rate above 0")
    return found


def run_config(config: TrainConfig, method: str, seed: int, learning_rate: float | None = None) -> TrainConfig:
    """Returns the config of one run, without other methods' settings, whose changes shall not invalidate the run."""
    settings = {method: dict(config.settings.get(method, {}))}
    rate = config.optimizer.learning_rate if learning_rate is None else learning_rate
    optimizer = dataclasses.replace(config.optimizer, learning_rate=rate)
    return dataclasses.replace(config, method=method, seed=seed, settings=settings, optimizer=optimizer)


def require_same(plan: list[tuple[TrainConfig, Path]], base: str) -> None:
    """Raises UserError if a run that exists already was started with another config or base."""
    for run, directory in plan:
        if record_path(directory).exists():
            # A bench compares runs of equal length.
            require_same_run(directory, run, fixed=("iterations",), base=base)


def evaluated_start(config: TrainConfig, output: Path) -> dict[str, Any]:
    """Returns the metrics of the start on the test split, and evaluates the start on first use."""
    found = read_result(config, output, checkpoint=config.checkpoint)
    if found is None:
        evaluate.run(config, checkpoint=config.checkpoint, lengths=_length(config), output=output)
        found = read_result(config, output)
    return found


def _length(config: TrainConfig) -> tuple[int]:
    """Returns the completion length at which methods are compared: the length at which they were trained."""
    return (config.sampler.completion_length,)


def main(config: TrainConfig, workdir: Path, *, methods: str | None, seeds: int, **flags: Any) -> None:
    names = [name.strip() for name in (methods or "").split(",") if name.strip()]
    table = compare(config, workdir, names, seeds, **flags)
    print(f"\n{markdown(table)}\nwrote {workdir / TABLE_MD}, {TABLE_JSON} and {CURVES}")


OPTIONS = {
    "methods": Option(str, None, "Methods to compare, such as gdsd,espo; differences are to the first."),
    "seeds": Option(int, 3, "Runs of each method."),
    "metric": Option(str, None, "Metric of the task, instead of its last."),
    "rates": Option(str, None, "Learning rates of methods that do not have the config's, such as gdsd=5e-4,espo=2e-3."),
    "rate_factor": Option(float, 1.0, "Multiplies every learning rate."),
    "host_index": Option(int, 0, "Which share of the runs is this host's."),
    "host_count": Option(int, 1, "How many hosts share the runs."),
}

if __name__ == "__main__":
    launch(main, OPTIONS)
