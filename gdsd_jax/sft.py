"""Trains a supervised start by masked-diffusion cross-entropy on reference completions: all parameters or an adapter.

    python -m gdsd_jax.sft --config configs/tiny_sudoku.py --workdir runs/sft [--config.sft.steps=500 ...]
    python -m gdsd_jax.sft --config FILE --workdir runs/sft --config.sft.path=chats.jsonl --config.sft.held_out=0.05

It trains on the answers of the config's task, or on a file of prompts and completions or of chats
(`gdsd_jax.tasks.chats`), one demonstration in each row.

The loss is that of `gdsd_jax.training.supervised`. The tail of a completion after its EOS is trained on too, because
the model must learn to end; `config.sft.packed_length` trades that tail for rows without padding. The command writes
`WORKDIR/merged`, a Hugging Face directory from which reinforcement learning can start. An autoregressive checkpoint
whose tensors are those of one of our families is first turned into a masked denoiser with a mask token of its own, in
`WORKDIR/adapted`.
"""

from __future__ import annotations

import dataclasses
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
from gdsd_jax.runtime.files import Lock, check_disk, refuse_existing
from gdsd_jax.runtime.signals import StopSignal
from gdsd_jax.runtime.streams import Stream, stream_key, stream_of_seed
from gdsd_jax.runtime.transfer import fetch, put
from gdsd_jax.telemetry.metrics import MetricWriter
from gdsd_jax.telemetry.plots import plot_curves
from gdsd_jax.telemetry.progress import Progress
from gdsd_jax.training.checkpoint import Checkpoints
from gdsd_jax.training.demonstrations import encoded_demonstrations, rows_of
from gdsd_jax.training.optimizer import make_optimizer
from gdsd_jax.training.rollout import encode_prompts
from gdsd_jax.training.setup import Setup, evaluated_task, load_setup, task_rows
from gdsd_jax.training.state import policy, start_state
from gdsd_jax.training.supervised import make_held_out_loss, make_sft_update


def run(config: TrainConfig, workdir: Path, *, log_every: int = 20) -> Path:
    """Trains the base of `config.checkpoint` and exports it to `workdir / "merged"`; returns that directory.

    Until the export, checkpoints are in `workdir / "sft"`. A run that was killed continues from its last checkpoint and
    ends with the same parameters, bit for bit. SIGTERM and SIGINT save a checkpoint and end the process.

    Raises:
      UserError: the directory is in use or not empty, the disk is full, or the checkpoint, task or config is not valid.
    """
    merged = workdir / "merged"
    if ended(workdir):
        return merged
    refuse_existing(merged)
    if (workdir / "run.json").exists():
        raise UserError(f"{workdir} holds a run of gdsd_jax.train: choose another --workdir")
    # The result is exported, onto the weights as they are stored.
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, weights="stored"))
    config = adapted(config, workdir / "adapted")
    piece = config.sft.microbatch_rows or config.sft.batch_rows
    if config.sft.batch_rows % piece:
        raise UserError(f"config.sft.microbatch_rows {piece} does not divide config.sft.batch_rows")
    if config.sft.adapter and not config.lora.rank:
        raise UserError("config.sft.adapter trains an adapter and config.lora.rank is 0: change one of them")
    setup = load_setup(config, rows={"config.sft.batch_rows": piece})
    stored = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(setup.base))
    if hosts.first():
        check_disk(workdir, stored, "the trained checkpoint")
    shown, apart = encoded_demonstrations(config, setup)
    order = grain.MapDataset.range(len(shown.tokens)).seed(config.sft.seed).shuffle().repeat()

    batch_rows = config.sft.batch_rows
    optimizer, _ = make_optimizer(config.sft.optimizer, config.sft.steps)

    def trained_part(base: Any) -> Any:
        key = stream_key(jax.random.key(config.sft.seed), Stream.ADAPTER)
        return init_lora(setup.model, key, **dataclasses.asdict(config.lora)) if config.sft.adapter else base

    state, places = start_state(setup.model, optimizer, config.sft.seed, trained_part, setup.base)
    update = make_sft_update(setup.model, optimizer, config.model.vocab_chunk, places, piece)
    frozen = frozen_base(config, setup)
    accuracy = make_accuracy(config, setup) if config.sft.until else None
    held_out_loss = make_held_out_loss(config, setup, apart, piece, frozen) if len(apart.tokens) else None

    checkpoints = Checkpoints(workdir / "sft", own_settings(config), state)
    first = checkpoints.latest or 0
    if first:
        state, _ = checkpoints.restore()
    writer = hosts.first_only(MetricWriter, workdir, trackers=config.tracker_names, resume_step=first or -1)
    progress = hosts.first_only(Progress, config.sft.steps, start=first, label="sft")
    with writer, checkpoints, StopSignal() as stop, progress:
        if checkpoints.note and first:
            progress.note(checkpoints.note)
        start = time.perf_counter()
        for step in range(first, config.sft.steps):
            if hosts.any_process(stop.requested):
                checkpoints.save(step, state, step)
                progress.note(f"stopped after step {step}: start again with the same --workdir to go on")
                raise SystemExit(0)
            if step > first and step % config.sft.save_every == 0:
                checkpoints.save(step, state, step)
            chosen = np.asarray([order[step * batch_rows + i] for i in range(batch_rows)])
            state, metrics = update(state, frozen, put(rows_of(shown, chosen)))
            if (step + 1) % log_every == 0 or step + 1 == config.sft.steps:
                values = {name: float(value) for name, value in fetch(metrics).items()}
                writer.write(step + 1, values | {"time/total": time.perf_counter() - start})
                if not np.isfinite(list(values.values())).all():
                    raise UserError(
                        f"supervised training diverged by step {step + 1}, nothing is exported: lower "
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
                    progress.note(f"step {step + 1}: {reached:.1%} on the validation rows is enough")
                    break
    if hosts.first():
        plot_curves(workdir)
    base, lora = policy(setup.base, state.params)
    trained = jax.tree.map(lambda x, stored: x.astype(stored.dtype), base, setup.base)
    facts = {"method": "masked-diffusion SFT", "task": config.task.name} | to_dict(config.sft)
    hub.export_checkpoint(merged, setup.model, trained, lora=lora, source=config.checkpoint, training=facts)
    ended(workdir)
    return merged


def ended(workdir: Path) -> bool:
    """Returns whether the training in `workdir` has exported its result, and removes the checkpoints it then has left.

    A run that is killed between its export and its end leaves both behind.
    """
    found = (workdir / "merged" / "config.json").is_file() and (workdir / "sft").is_dir()
    hosts.wait()
    if found and hosts.first():
        with Lock(workdir / "sft"):
            shutil.rmtree(workdir / "sft")
    return found


def make_accuracy(config: TrainConfig, setup: Setup) -> Callable[[Any], float]:
    """Returns `trained parameters -> the task's last metric on the validation rows`."""
    task = evaluated_task(config)
    rows = task_rows(config.task, task, "validation", count=config.evaluation.count)
    prompts = encode_prompts(
        task, setup.tokenizer, rows, buckets=config.prompt_buckets, overlong=config.overlong_prompts
    )
    greedy, key = greedy_sampler(config), stream_of_seed(config.sft.seed, Stream.EVALUATION)

    def accuracy(params: Any) -> float:
        found = evaluate_policy(
            setup.model, *policy(setup.base, params), prompts, greedy, task, setup.tokenizer,
            batch_rows=config.evaluation.batch_rows, key=key,
        )  # fmt: skip
        return found[task.metrics_named[-1]]

    return accuracy


def frozen_base(config: TrainConfig, setup: Setup) -> Any:
    """Returns the base beside an adapter, or None where the base itself is trained, which needs no second copy."""
    return setup.base if config.sft.adapter else None


def own_settings(config: TrainConfig) -> TrainConfig:
    """Returns the config with defaults for what supervised training ignores, which may thus change during a start."""
    used = (
        "task", "model", "lora", "sampler", "evaluation", "sft", "tiny", "mesh", "hosts", "eos_token_id",
        "prompt_buckets", "overlong_prompts", "keep", "dry_run",
    )  # fmt: skip
    bare = freeze(TrainConfig, default(config.checkpoint))
    return dataclasses.replace(bare, **{name: getattr(config, name) for name in used})


def adapted(config: TrainConfig, directory: Path) -> TrainConfig:
    """Returns the config with an autoregressive checkpoint replaced by a masked denoiser made of it in `directory`."""
    if hub.family_for(config.checkpoint) is None:
        return config
    if hosts.first() and not directory.exists():
        hub.adapt(config.checkpoint, directory)
    hosts.wait()
    return dataclasses.replace(config, checkpoint=str(directory))


def embedded_start(config: TrainConfig) -> None:
    """Makes the checkpoint of a config that embeds a tiny model, unless it exists; does nothing for other configs.

    Raises:
      UserError: the checkpoint is not called "merged", which is what `run` writes.
    """
    checkpoint = Path(config.checkpoint)
    if not config.tiny.family:
        return
    if checkpoint.exists():
        ended(checkpoint.parent)
        return
    if checkpoint.name != "merged":
        raise UserError(f"config.checkpoint {checkpoint} of an embedded model must be a directory named merged")
    init = checkpoint.parent / "init"
    if hosts.first() and not init.exists():
        tiny.build(init, seed=config.sft.seed, **dataclasses.asdict(config.tiny))
    hosts.wait()
    run(dataclasses.replace(config, checkpoint=str(init)), checkpoint.parent)
    hosts.wait()


def main(config: TrainConfig, workdir: Path) -> None:
    if config.tiny.family:
        config = dataclasses.replace(config, checkpoint=str(workdir / "merged"))
        embedded_start(config)
    else:
        run(config, workdir)
    print(f"wrote {workdir / 'merged'}")


if __name__ == "__main__":
    launch(main)
