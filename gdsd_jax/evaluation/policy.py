"""Loads the policy that a command's flags name: a checkpoint, an adapter, or the newest state of a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gdsd_jax import hub
from gdsd_jax.config import TrainConfig, to_dict
from gdsd_jax.config.flags import Option
from gdsd_jax.denoiser import DenoiserConfig, LoRA, init_lora
from gdsd_jax.hub.tokenizer import Tokenizer
from gdsd_jax.runtime import front
from gdsd_jax.runtime.errors import UserError
from gdsd_jax.runtime.ranges import ADAPTER_BASES, require_one_of
from gdsd_jax.runtime.sharding import place
from gdsd_jax.tasks import Task
from gdsd_jax.training.record import read_record
from gdsd_jax.training.setup import load_setup
from gdsd_jax.training.state import parameter_shardings


class Policy(NamedTuple):
    """A model to evaluate, sample from or export: a checkpoint, with or without an adapter, or the state of a run.

    base, lora: parameters of `denoise`; `base` is float32 if a run has trained all parameters.
    source: directory of the checkpoint that the base is from.
    stored: dtypes of that checkpoint, a pytree like `base`.
    iteration: number of finished iterations of the run; None if the policy is not from a run.
    """

    model: DenoiserConfig
    base: Any
    lora: LoRA | None
    tokenizer: Tokenizer
    task: Task
    source: str
    stored: Any
    iteration: int | None


def load_policy(
    config: TrainConfig,
    workdir: Path | None = None,
    *,
    checkpoint: str | None = None,
    adapter: str | None = None,
    best: bool = False,
    merging: bool = False,
) -> Policy:
    """Loads the policy that the flags name: a checkpoint with or without an adapter, or else the state of a run.

    Args:
      config: gives the task, the numerics and, unless `checkpoint` is given, the base.
      workdir: directory of a run of `gdsd_jax.train`; ignored if `checkpoint` or `adapter` is given.
      checkpoint: a Hugging Face directory.
      adapter: a PEFT directory.
      best: whether to load the checkpoint that did best in the run's evaluations instead of the newest one.
      merging: whether the base is read as it is stored, also if the config or the run has it in 8 bits, so that an
        adapter can be merged into it.

    Raises:
      UserError: no model is named; the run trained another base or other adapters; a directory does not load; or
        `best` is set without a run.
    """
    if checkpoint is None and adapter is None and workdir is None:
        raise UserError("no model is named: give --workdir of a run, or --checkpoint, or --adapter")
    for name, path in (("checkpoint", checkpoint), ("adapter", adapter)):
        if path is not None and not path.strip():
            raise UserError(f"--{name} {path!r} names no directory: give one, or leave the flag out")
    if checkpoint is not None:
        config = dataclasses.replace(config, checkpoint=checkpoint)
    from_run = checkpoint is None and adapter is None
    if best and not from_run:
        raise UserError("--best chooses among a run's checkpoints: give --workdir without --checkpoint and --adapter")
    record = _run_record(config, workdir) if from_run else None
    if merging:
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, weights="stored"))
    elif record is not None:
        _note_weights(config, workdir, record)
    model, base, tokenizer, task = load_setup(config)
    stored = jax.tree.map(lambda x: x.dtype, base)
    lora, iteration = None, None
    if adapter is not None:
        lora = hub.load_adapter(adapter, model)
        require_base(adapter, config.checkpoint, config.adapter_base)
        lora = place(lora, parameter_shardings(model, lora))
    elif record is not None:
        # Imported only here, because Orbax takes seconds to import and only runs need it.
        from gdsd_jax.training.checkpoint import load_params

        if config.lora.rank:
            make = lambda key: init_lora(model, key, **dataclasses.asdict(config.lora))  # noqa: E731
            shapes = jax.eval_shape(make, jax.random.key(0))
            lora, iteration = load_params(workdir, shapes, parameter_shardings(model, shapes), best=best)
        else:
            # Only the shapes of the base are kept, so that two whole models are never in memory.
            shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), base)
            places = jax.tree.map(lambda x: x.sharding, base)
            del base
            base, iteration = load_params(workdir, shapes, places, best=best)
    return Policy(model, base, lora, tokenizer, task, config.checkpoint, stored, iteration)


def require_base(adapter: str, checkpoint: str, rule: str, setting: str = "config.adapter_base") -> None:
    """Warns if an adapter belongs to another base, or raises UserError, as the rule says.

    Args:
      adapter: a PEFT directory.
      checkpoint: directory of the base that it is used on.
      rule: a value of `config.adapter_base`.
      setting: name of the setting that holds the rule, for messages.
    """
    require_one_of(rule, ADAPTER_BASES, setting)
    found = hub.another_base(adapter, checkpoint)
    if found is None:
        return
    text, certain = found
    if rule == "strict" or (certain and rule == "fingerprint"):
        raise UserError(f"{text}: name its base as the checkpoint, or set {setting} to any")
    front.say(f"note: {text}")


def _run_record(config: TrainConfig, workdir: Path) -> dict[str, Any]:
    """Returns the record of the run; raises UserError if the run has another adapter or another base than `config`."""
    record = read_record(workdir)
    if record["config"].get("lora") != to_dict(config)["lora"]:
        raise UserError(f"{workdir} belongs to a run with another config.lora: give the --config that it started with")
    if record["base"] != hub.fingerprint(config.checkpoint):
        raise UserError(f"{workdir} was trained from another base than {config.checkpoint}: change config.checkpoint")
    return record


def _note_weights(config: TrainConfig, workdir: Path, record: Mapping[str, Any]) -> None:
    """Says so if the run had its base in 8 bits and `config` does not, or the other way round."""
    trained = record["config"].get("model", {}).get("weights", "stored")
    if trained != config.model.weights:
        front.say(f"note: {workdir} was trained with config.model.weights={trained}, not {config.model.weights}")


# The flags that become arguments of `load_policy`.
POLICY_OPTIONS = {
    "checkpoint": Option(str, None, "Hugging Face directory to use instead of the run's newest checkpoint."),
    "adapter": Option(str, None, "PEFT directory to use on --checkpoint, or else on config.checkpoint."),
    "best": Option(bool, False, "Use the checkpoint that did best in the run's evaluations, not the newest."),
}
