"""Trains a supervised start by masked-diffusion cross-entropy on reference completions.

    python -m gdsd_jax.sft --config configs/tiny_sudoku.py --workdir runs/sft [--config.sft.steps=500 ...]
    python -m gdsd_jax.sft --config FILE --workdir runs/sft --config.sft.path=chats.jsonl --config.sft.held_out=0.05

The demonstrations are the answers of the config's task, or a file of prompts and completions or of chats
(`gdsd_jax.tasks.chats`). All parameters are trained, or an adapter (`config.sft.adapter`).

The loss is that of `gdsd_jax.training.supervised`. Each row holds one demonstration. The tail of its completion after
the EOS is trained on too, because the model must learn to end. With `config.sft.packed_length`, rows hold several
demonstrations, without tails and with little padding.

The command writes `WORKDIR/merged`, a Hugging Face directory from which reinforcement learning can start. If the
checkpoint is autoregressive and one of our families has its tensors, it is first turned into a masked denoiser with a
new mask token, in `WORKDIR/adapted`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np

from gdsd_jax import hub
from gdsd_jax.config import TrainConfig, default, freeze, greedy_sampler, to_dict
from gdsd_jax.config.flags import launch
from gdsd_jax.denoiser import init_lora
from gdsd_jax.evaluation.completions import evaluate_policy
from gdsd_jax.hub import tiny
from gdsd_jax.runtime import hosts
from gdsd_jax.runtime.errors import UserError
from gdsd_jax.runtime.files import Lock, check_disk, read_object, refuse_existing, write_json
from gdsd_jax.runtime.signals import StopSignal, asked_to_stop, exit_code
from gdsd_jax.runtime.streams import Stream, stream_key, stream_of_seed
from gdsd_jax.runtime.transfer import fetch, put
from gdsd_jax.telemetry.metrics import MetricWriter
from gdsd_jax.telemetry.plots import plot_curves
from gdsd_jax.telemetry.progress import Progress
from gdsd_jax.telemetry.trackers import require_trackers
from gdsd_jax.training.checkpoint import Checkpoints, require_savable
from gdsd_jax.training.cursor import Cursor
from gdsd_jax.training.demonstrations import encoded_demonstrations, of_file, rows_of
from gdsd_jax.training.optimizer import make_optimizer, require_optimizer
from gdsd_jax.training.setup import Setup, encoded_rows, evaluated_task, load_setup, resolve_task, task_rows
from gdsd_jax.training.state import policy, start_state
from gdsd_jax.training.supervised import make_held_out_loss, make_sft_update


def run(config: TrainConfig, workdir: Path, *, log_every: int = 20) -> Path:
    """Trains the base of `config.checkpoint` and exports it to `workdir / "merged"`; returns that directory.

    Until the export, checkpoints are in `workdir / "sft"`. A run that was killed continues from its last checkpoint and
    ends with the same parameters, bit for bit. On SIGTERM or SIGINT it saves a checkpoint and ends the process.

    Args:
      log_every: steps from one written loss to the next.

    Raises:
      UserError: the directory is in use or not empty, the disk is full, or the checkpoint, task or config is not valid.
    """
    # The directory is reserved until its export is complete.
    with hosts.first_only(Lock, workdir):
        if not remove_leftovers(workdir):
            train_and_export(prepared(config, workdir), workdir, log_every)
    return workdir / "merged"


def train_and_export(config: TrainConfig, workdir: Path, log_every: int) -> None:
    """Trains the base of a prepared config, and exports it; see `run`."""
    batch_rows = config.sft.batch_rows
    piece = config.sft.microbatch_rows or batch_rows
    setup = load_setup(config, rows={"config.sft.batch_rows": piece})
    stored = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(setup.base))
    if hosts.first():
        check_disk(workdir, stored, "the trained checkpoint")
    shown, apart = encoded_demonstrations(config, setup)
    order = grain.MapDataset.range(len(shown.tokens)).seed(config.sft.seed).shuffle().repeat()
    optimizer, _ = make_optimizer(config.sft.optimizer, config.sft.steps, "config.sft.optimizer")

    def trained_part(base: Any) -> Any:
        key = stream_key(jax.random.key(config.sft.seed), Stream.ADAPTER)
        return init_lora(setup.model, key, **dataclasses.asdict(config.lora)) if config.sft.adapter else base

    state, places = start_state(setup.model, optimizer, config.sft.seed, trained_part, setup.base)
    update = make_sft_update(setup.model, optimizer, config.model.vocab_chunk, places, piece)
    frozen = setup.base if config.sft.adapter else None
    accuracy = make_accuracy(config, setup) if config.sft.until else None
    held_out_loss = make_held_out_loss(config, setup, apart, piece, frozen) if len(apart.tokens) else None

    data = hashlib.sha256(b"".join(x.tobytes() for x in shown)).hexdigest()[:16]
    checkpoints = Checkpoints(workdir / "sft", own_settings(config), state, data)
    first = checkpoints.latest or 0
    if first:
        state, _ = checkpoints.restore()
    writer = hosts.first_only(MetricWriter, workdir, trackers=config.tracker_names, resume_step=first or -1)
    progress = hosts.first_only(Progress, config.sft.steps, start=first, label="sft")
    # StopSignal is outermost: a signal that arrives while the others close and save must not interrupt them.
    with StopSignal() as stop, writer, checkpoints, progress:
        if first:
            progress.note(checkpoints.note or f"resumed after step {first} of {config.sft.steps}")
        start = time.perf_counter()
        for step in range(first, config.sft.steps):
            if hosts.any_process(stop.requested):
                checkpoints.save(step, state, Cursor(step))
                progress.note(f"stopped after step {step}: start again with the same --workdir to go on")
                raise SystemExit(exit_code())
            if step > first and step % config.sft.save_every == 0:
                checkpoints.save(step, state, Cursor(step))
            chosen = np.asarray([order[step * batch_rows + i] for i in range(batch_rows)])
            state, metrics = update(state, frozen, put(rows_of(shown, chosen)))
            if (step + 1) % log_every == 0 or step + 1 == config.sft.steps:
                values = {name: float(value) for name, value in fetch(metrics).items()}
                writer.write(step + 1, values | {"time/total": time.perf_counter() - start})
                if not np.isfinite(list(values.values())).all():
                    raise UserError(
                        f"the supervised loss is not finite at step {step + 1}, and nothing is exported: lower "
                        "config.sft.optimizer.learning_rate"
                    )
                progress.update(step + 1, loss=values["loss"])
            checked = (step + 1) % config.sft.check_every == 0
            if held_out_loss is not None and (checked or step + 1 == config.sft.steps):
                loss = held_out_loss(state.params)
                writer.write(step + 1, {"eval/loss": loss})
                progress.update(step + 1, held_out=loss)
            if accuracy is not None and checked:
                reached = accuracy(state.params)
                writer.write(step + 1, {f"eval/{setup.task.metrics_named[-1]}": reached})
                if reached >= config.sft.until:
                    name = setup.task.metrics_named[-1]
                    progress.note(f"step {step + 1}: {name} {reached:.3f} on validation rows reaches config.sft.until")
                    break
        else:
            if config.sft.until:
                progress.note(f"config.sft.until {config.sft.until} was not reached in {config.sft.steps} steps")
    if hosts.first():
        plot_curves(workdir)
    base, lora = policy(setup.base, state.params)
    trained = jax.tree.map(lambda x, stored: x.astype(stored.dtype), base, setup.base)
    facts = {"method": "masked-diffusion SFT", "task": config.task.name} | to_dict(config.sft)
    merged = workdir / "merged"
    hub.export_checkpoint(merged, setup.model, trained, lora=lora, source=config.checkpoint, training=facts)
    remove_leftovers(workdir)


def prepared(config: TrainConfig, workdir: Path) -> TrainConfig:
    """Returns the config with which supervised training runs in `workdir`.

    Its checkpoint is a masked denoiser, which is made first if the given one is autoregressive.

    Raises:
      UserError: the directory holds another run, or settings contradict each other.
    """
    refuse_existing(workdir / "merged")
    if (workdir / "run.json").exists():
        raise UserError(f"{workdir} holds a run of gdsd_jax.train: choose another --workdir")
    require_settings(config)
    require_savable(workdir)
    # The export needs the weights as they are stored, not in 8 bits.
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, weights="stored"))
    return adapted(config, workdir / "adapted")


def require_settings(config: TrainConfig) -> None:
    """Raises UserError if settings of supervised training contradict each other or name what is not there."""
    require_trackers(config.tracker_names)
    require_optimizer(config.sft.optimizer, "config.sft.optimizer")
    rows, piece = config.sft.batch_rows, config.sft.microbatch_rows
    if piece and rows % piece:
        raise UserError(f"config.sft.microbatch_rows {piece} does not divide config.sft.batch_rows {rows}")
    if config.sft.adapter and not config.lora.rank:
        raise UserError("config.sft.adapter trains an adapter, but config.lora.rank is 0: change one of them")


def remove_leftovers(workdir: Path) -> bool:
    """Removes the checkpoints of a training that has exported its result; returns whether there were any.

    A run that is killed between its export and its end leaves them behind.
    """
    found = (workdir / "merged" / "config.json").is_file() and (workdir / "sft").is_dir()
    hosts.wait()
    if found and hosts.first():
        with Lock(workdir / "sft"):
            shutil.rmtree(workdir / "sft")
    return found


def make_accuracy(config: TrainConfig, setup: Setup) -> Callable[[Any], float]:
    """Returns a function from trained parameters to the task's last metric on the validation rows."""
    task = evaluated_task(config)
    rows = task_rows(config.task, task, "validation", count=config.evaluation.count)
    prompts = encoded_rows(config, task, setup.tokenizer, rows)
    greedy, key = greedy_sampler(config), stream_of_seed(config.sft.seed, Stream.EVALUATION)

    def accuracy(params: Any) -> float:
        found = evaluate_policy(
            setup.model, *policy(setup.base, params), prompts, greedy, task, setup.tokenizer,
            batch_rows=config.evaluation.batch_rows, key=key,
        )  # fmt: skip
        return found[task.metrics_named[-1]]

    return accuracy


def own_settings(config: TrainConfig) -> TrainConfig:
    """Returns the config with defaults for the settings that supervised training does not use.

    These settings may therefore differ when a killed run continues.
    """
    used = (
        "task", "model", "lora", "sampler", "evaluation", "sft", "tiny", "mesh", "hosts", "eos_token_id",
        "prompt_buckets", "overlong_prompts", "keep", "dry_run",
    )  # fmt: skip
    bare = freeze(TrainConfig, default(config.checkpoint))
    return dataclasses.replace(bare, **{name: getattr(config, name) for name in used})


def adapted(config: TrainConfig, directory: Path) -> TrainConfig:
    """Makes a masked denoiser in `directory` if the checkpoint is autoregressive; returns the config that names it.

    A config whose checkpoint is a masked denoiser is returned unchanged.
    """
    if hub.family_for(config.checkpoint) is None:
        return config
    if hosts.first() and not directory.exists():
        hub.adapt(config.checkpoint, directory)
    hosts.wait()
    return dataclasses.replace(config, checkpoint=str(directory))


def embedded_start(config: TrainConfig, *, alone: bool = False) -> None:
    """Makes the checkpoint of a config that embeds a tiny model, unless it exists; does nothing for other configs.

    Args:
      alone: no run follows, so that rows which only a run needs are not looked at.

    Raises:
      UserError: the checkpoint is not named "merged", the name that `run` gives it, or its path cannot hold
        checkpoints; it was made with other settings; or the settings, the demonstrations or the rows are not valid.
    """
    checkpoint = Path(config.checkpoint)
    if not config.tiny.family:
        return
    record = checkpoint.parent / "start.json"
    if record.is_file() and begun(checkpoint.parent):
        require_same_start(config, record)
    if checkpoint.exists():
        remove_leftovers(checkpoint.parent)
        return
    if checkpoint.name != "merged":
        raise UserError(
            f"config.checkpoint {checkpoint} must end in /merged: the embedded model is written there on first use"
        )
    require_savable(checkpoint.parent, "--workdir" if alone else "config.checkpoint")
    require_settings(config)
    require_rows(config, alone)
    init = checkpoint.parent / "init"
    with hosts.first_only(Lock, checkpoint.parent):
        if hosts.first() and record.is_file() and not begun(checkpoint.parent):
            # An attempt that trained nothing binds nobody to its settings.
            for path in (init, checkpoint.parent / "sft"):
                shutil.rmtree(path, ignore_errors=True)
            record.unlink()
        if hosts.first() and not init.exists():
            write_json(record, start_settings(config))
            tiny.build(init, seed=config.sft.seed, **dataclasses.asdict(config.tiny))
    hosts.wait()
    if record.is_file():
        require_same_start(config, record)  # another command may have made the model anew in the meantime
    run(dataclasses.replace(config, checkpoint=str(init)), checkpoint.parent)
    if hosts.any_process(asked_to_stop()):
        raise SystemExit(exit_code())


def begun(directory: Path) -> bool:
    """Returns whether the training of a start in `directory` has saved anything."""
    return (directory / "merged").exists() or any(
        path.name.isdigit() for path in (directory / "sft" / "checkpoints").glob("*")
    )


def require_rows(config: TrainConfig, alone: bool) -> None:
    """Raises UserError if demonstrations or rows are not valid, or the task's templates do not fit them.

    The run that follows, unless the start is made `alone`, would find this out only after its start is made.
    """
    shown = config.sft.path is not None
    if shown:
        of_file(config.sft)
    if not shown or not alone:
        task = resolve_task(config)
        row = task_rows(config.task, task, "train", count=config.task.train_rows, seed=config.seed)[0]
        task.messages(row)
        if not shown:
            task.answer(row)
    if not alone:
        task, watched = evaluated_task(config), config.evaluation
        task.messages(task_rows(config.task, task, watched.split, count=watched.count)[0])


def start_settings(config: TrainConfig) -> dict[str, Any]:
    """Returns the settings that decide which start an embedded model gets, except the task's."""
    free = ("save_every", "microbatch_rows")
    sft = {name: value for name, value in to_dict(config.sft).items() if name not in free}
    return {"tiny": to_dict(config.tiny), "sft": sft}


def require_same_start(config: TrainConfig, record: Path) -> None:
    """Raises UserError if the start that `record` describes was made with other settings than the config's."""
    made = read_object(record, "remove the directory and make the start again")
    for group, settings in start_settings(config).items():
        before = made.get(group) if isinstance(made.get(group), dict) else {}
        changed = [name for name, value in settings.items() if name in before and before[name] != value]
        if changed:
            name, value = f"config.{group}.{changed[0]}", before[changed[0]]
            raise UserError(
                f"the start in {record.parent} was made with {name}={value!r:.60}: give the same value, or name "
                "another directory in config.checkpoint, and for gdsd_jax.sft in --workdir"
            )


def main(config: TrainConfig, workdir: Path) -> None:
    """Trains the start of a config in `workdir`; for a config that embeds a tiny model, makes this model first."""
    if config.tiny.family:
        config = dataclasses.replace(config, checkpoint=str(workdir / "merged"))
        embedded_start(config, alone=True)
    else:
        run(config, workdir)
    if hosts.first():
        print(f"wrote {workdir / 'merged'}")


if __name__ == "__main__":
    launch(main)
