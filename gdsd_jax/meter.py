"""Measures how far a method's likelihood is from the sampler's: bias, log-ratios, gradients, and the resulting policy.

    python -m gdsd_jax.meter --config configs/tiny_sudoku.py --checkpoint runs/start_biased/merged --output runs/meter
    python -m gdsd_jax.meter --config ... --workdir runs/tiny [--best] [--methods gdsd,espo] [--noenumerated]

The meter samples rollouts of the policy with the config's sampler. Each method estimates their likelihoods, and
`gdsd_jax.diffusion.trajectory_log_prob` computes the exact ones: of each completion together with the order of its
commits. The table has for each method:

    bias, spread  mean and standard deviation over completions of the difference between its estimate, averaged over
                  `--draws` draws of masks, and the exact log-probability, in nats
    noise         standard deviation of its estimate over draws of masks, in nats
    rank          Spearman's correlation of estimated and exact log-probability among the completions of a prompt
    error at d    relative error of its log-ratio, with one draw of masks, after the policy has been moved along the
                  exact policy gradient until the smooth part of the exact log-ratio is d; medians over completions.
                  The exact log-ratio also jumps, where candidates swap ranks or cross a threshold; completions whose
                  log-ratio has jumped are counted and left out
    corr. at d    correlation of estimated and exact log-ratio over the same completions
    cosine        cosine of the angle between its gradient before any update and the exact policy gradient, with one
                  draw of masks
    of mean       the same cosine, with the mean gradient of all draws

Some methods share an estimate: `wd1` has that of `diffu_grpo`, `stable_drl` that of `spg`, `rspo` and `trafl` that of
`espo`. Finally every method makes 64 inner updates on one batch in a toy language whose completions can be enumerated,
and the meter records the distance `KL(pi_theta || pi*)` to the optimum `pi* ~ pi_old exp(psi A)`.

It writes `meter.json`, `meter.md` and `meter.png` to `--output`, by default `WORKDIR/meter`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import jax
import numpy as np

from gdsd_jax.config import TrainConfig
from gdsd_jax.config.flags import Option, launch
from gdsd_jax.denoiser import init_lora
from gdsd_jax.diffusion.trajectory import check_defined
from gdsd_jax.evaluation import meter_report
from gdsd_jax.evaluation.enumerated import compare_to_optimum
from gdsd_jax.evaluation.policy import POLICY_OPTIONS, load_policy
from gdsd_jax.evaluation.probe import SUBJECTS, measure
from gdsd_jax.runtime import memory
from gdsd_jax.runtime.console import Console
from gdsd_jax.runtime.errors import UserError
from gdsd_jax.runtime.files import require_writable
from gdsd_jax.runtime.ranges import Count, Range, convert
from gdsd_jax.runtime.streams import Stream, stream_of_seed
from gdsd_jax.training.rollout import RolloutSpec, roll_out
from gdsd_jax.training.setup import encoded_rows, task_rows

# More draws than these change no digit of the table, and take hours.
Draws = Annotated[int, Range(1, 10_000)]
FARTHEST = 100.0  # nats


def main(
    config: TrainConfig,
    workdir: Path | None,
    *,
    methods: str | None,
    prompts: int,
    draws: int,
    distances: str,
    enumerated: bool,
    output: str | None,
    **flags: object,
) -> None:
    if output is None and workdir is None:
        raise UserError("give --output DIRECTORY for the results, or --workdir of a run")
    directory = Path(output) if output is not None else workdir / "meter"
    chosen, lengths = checked(methods, prompts, draws, distances)
    check_defined(config.sampler)
    require_writable(directory, "--output")
    console = Console()
    policy = load_policy(config, workdir, **flags)
    rows = task_rows(config.task, policy.task, "train", count=config.task.train_rows, seed=config.seed)[:prompts]
    asked = encoded_rows(config, policy.task, policy.tokenizer, rows)
    key = stream_of_seed(config.seed, Stream.ROLLOUT)
    params = policy.lora
    if params is None:
        params = policy.base
        if config.lora.rank:
            # As in the first update of a run, only the second factor of a fresh adapter has a gradient.
            settings = {"rank": config.lora.rank, "alpha": config.lora.alpha, "targets": config.lora.targets}
            params = init_lora(policy.model, jax.random.key(config.seed), **settings)
    size = sum(x.size for x in jax.tree.leaves(params))
    memory.require(4 * size * draws, memory.of_devices(), f"{draws} gradients of {size} parameters", "--draws")
    spec = RolloutSpec(policy.model, config.sampler, policy.task, policy.tokenizer, config.group_size)
    rewarded = roll_out(spec, policy.base, policy.lora, key, asked)
    table = measure(
        policy.model, policy.base, params, rewarded.batch, key, chosen,
        draws=draws, distances=lengths, chunk=config.model.vocab_chunk, report=console.text,
    )  # fmt: skip
    table |= {"source": policy.source, "reward": float(np.mean(rewarded.rewards))}
    if enumerated:
        table["enumerated"] = compare_to_optimum(report=console.text)
    meter_report.write(directory, table)
    console.text(meter_report.markdown(table, console.width if console.is_terminal else None))
    console.text(f"wrote {directory}")


def checked(methods: str | None, prompts: int, draws: int, distances: str) -> tuple[list[str], tuple[float, ...]]:
    """Returns the labels of the table's rows and the distances; raises UserError if the flags are not valid."""
    names = [part.strip() for part in (",".join(NAMES) if methods is None else methods).split(",")]
    unknown = sorted(set(names) - set(NAMES))
    if unknown:
        raise UserError(f"--methods: {unknown[0]!r} is not one of {', '.join(NAMES)}")
    convert(Count, prompts, "--prompts")
    convert(Draws, draws, "--draws")
    try:
        lengths = tuple(float(part) for part in distances.split(","))
    except ValueError:
        lengths = ()
    if not lengths or not all(0 < length <= FARTHEST for length in lengths):
        raise UserError(
            f"--distances {distances!r} is not a list of numbers above 0 and at most {FARTHEST:g} like 0.02,0.1,0.5"
        )
    return [label for label in SUBJECTS if name_of(label) in names], lengths


def name_of(label: str) -> str:
    """Returns the name of the method in a row of the table."""
    return SUBJECTS[label][0]


NAMES = tuple(dict.fromkeys(map(name_of, SUBJECTS)))
OPTIONS = POLICY_OPTIONS | {
    "methods": Option(str, None, "Methods to measure, separated by commas; by default all that estimate a likelihood."),
    "prompts": Option(int, 32, "Prompts; each has config.group_size completions."),
    "draws": Option(int, 8, "Draws of masks for each method."),
    "distances": Option(
        str, "0.02,0.1,0.5", "Smooth parts of the log-ratio, in nats, at which log-ratios are compared."
    ),
    "enumerated": Option(bool, True, "Whether to measure the distance to the optimum in a toy language too."),
    "output": Option(str, None, "Directory for the results.", written=True),
}

if __name__ == "__main__":
    launch(main, OPTIONS, needs_workdir=False)
