"""Exports the policy of a run as Hugging Face directories: merged weights, a PEFT adapter, or both.

    python -m gdsd_jax.export --config configs/tiny_sudoku.py --workdir runs/demo --output runs/demo/export

`--format both`, the default, writes `OUTPUT/merged` and `OUTPUT/adapter`; `--format merged` and `--format adapter`
write to OUTPUT itself. After a kill the same command starts the export again. With `--adapter DIR` (and
`--checkpoint DIR`) instead of a run, `--format merged` merges that adapter into its base. Merged weights have the
dtypes of the source checkpoint, or the dtype that `--dtype` names. bfloat16 rounds away a part of a small adapter, see
docs/formats.md.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax

from gdsd_jax import hub
from gdsd_jax.config import TrainConfig
from gdsd_jax.config.flags import Option, launch
from gdsd_jax.evaluation.policy import POLICY_OPTIONS, load_policy
from gdsd_jax.runtime import hosts
from gdsd_jax.runtime.errors import UserError
from gdsd_jax.runtime.files import Lock, refuse_existing, require_writable, understood
from gdsd_jax.telemetry.metrics import METRICS, read_metrics
from gdsd_jax.training.record import read_record, record_path

FORMATS = ("merged", "adapter", "both")
UNFINISHED = ".export.part"  # marks the directory of an unfinished export of both kinds
DTYPES = ("float32", "bfloat16")


def run(
    config: TrainConfig,
    workdir: Path | None,
    output: Path,
    *,
    format: str = "both",
    checkpoint: str | None = None,
    adapter: str | None = None,
    best: bool = False,
    dtype: str | None = None,
) -> dict[str, Path]:
    """Exports one policy, and returns the directories that were written, by the names "merged" and "adapter".

    Args:
      workdir, checkpoint, adapter, best: see `load_policy`.
      output: directory of the export; each directory to write must be absent or empty.
      format: one of `FORMATS`.
      dtype: dtype of merged weights, one of `DTYPES`; None: those of the source checkpoint.

    Raises:
      UserError: the format or dtype is unknown, there is no adapter to export, a directory to write is not empty, or
        the disk has no room.
    """
    if format not in FORMATS:
        raise UserError(f"--format {format!r} is not one of {', '.join(FORMATS)}")
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"--dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    if dtype is not None and format == "adapter":
        raise UserError(
            "--dtype applies to merged weights only; an adapter is float32: leave it out, or export merged weights"
        )
    paths = {kind: output / kind for kind in ("merged", "adapter")} if format == "both" else {format: output}
    if not (output / UNFINISHED).exists():
        for path in paths.values():
            refuse_existing(path, "--output")
    require_writable(output, "--output")
    policy = load_policy(config, workdir, checkpoint=checkpoint, adapter=adapter, best=best, merging=True)
    if policy.lora is None and "adapter" in paths:
        raise UserError("there is no adapter to export, because all parameters were trained: use --format merged")
    training = None if policy.iteration is None else training_facts(workdir, policy.iteration)
    with contextlib.ExitStack() as held:
        if format == "both":
            held.enter_context(hosts.first_only(Lock, output, "--output"))
            held.enter_context(hosts.first_only(marked, output, paths.values()))
        if "merged" in paths:
            # Trained parameters are float32 here. Without `dtype` they are rounded to the dtypes of the source.
            base = policy.base
            if dtype is None:
                base = jax.tree.map(lambda x, stored: x.astype(stored), base, policy.stored)
            hub.export_checkpoint(
                paths["merged"], policy.model, base,
                dtype=dtype, lora=policy.lora, source=policy.source, training=training,
            )  # fmt: skip
        if "adapter" in paths:
            hub.export_adapter(paths["adapter"], policy.model, policy.lora, source=policy.source, training=training)
    return paths


@contextlib.contextmanager
def marked(output: Path, paths: Iterable[Path]) -> Iterator[None]:
    """Marks `output` until both of its directories are complete; first removes what a killed export left of them."""
    mark = output / UNFINISHED
    if mark.exists():
        for path in paths:
            shutil.rmtree(path, ignore_errors=True)
    mark.touch()
    try:
        yield
    except BaseException:
        if not any(path.exists() for path in paths):
            mark.unlink()
        raise
    mark.unlink()


def training_facts(workdir: Path, iteration: int) -> dict[str, Any]:
    """Returns facts about a run for the model card: its recorded settings, and its last metrics up to `iteration`."""
    config = read_record(workdir)["config"]
    with understood(record_path(workdir), "restore it"):
        settings = config["settings"].get(config["method"], {})
        facts = {
            "task": config["task"]["name"],
            "method": config["method"],
            "method settings": ", ".join(f"{name}={value}" for name, value in settings.items()) or "defaults",
            "iterations": iteration,
            "completions per iteration": f"{config['prompts_per_iteration']} prompts x {config['group_size']}",
            "inner updates per iteration": config["inner_updates"],
            "learning rate": f"{config['optimizer']['learning_rate']:g}, {config['optimizer']['schedule']}",
            "seed": config["seed"],
        }
    if (workdir / METRICS).is_file():
        last: dict[str, float] = {}
        with understood(workdir / METRICS, "restore it or remove it"):
            for entry in read_metrics(workdir):
                if entry["step"] <= iteration:
                    last |= entry
            for name, value in last.items():
                if (name == "reward/mean" or name.startswith("eval/")) and value is not None:
                    facts[f"last {name}"] = f"{value:.4f}"
    return facts


def main(config: TrainConfig, workdir: Path | None, *, output: str | None, format: str, **flags: Any) -> None:
    if output is None:
        raise UserError("give --output DIRECTORY, for the export")
    written = run(config, workdir, Path(output), format=format, **flags)
    if hosts.first():
        print(*[f"wrote {path}" for path in written.values()], sep="\n")


OPTIONS = POLICY_OPTIONS | {
    "output": Option(str, None, "Directory to write.", written=True),
    "format": Option(str, "both", "merged, adapter or both."),
    "dtype": Option(str, None, "Dtype of merged weights, float32 or bfloat16; by default that of the source."),
}

if __name__ == "__main__":
    launch(main, OPTIONS, needs_workdir=False)
