"""Evaluates a policy on tasks at several completion lengths, and resumes an evaluation that was killed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gdsd_jax import hub
from gdsd_jax.config import TaskConfig, TrainConfig, greedy_sampler
from gdsd_jax.diffusion import SamplerConfig
from gdsd_jax.diffusion.sampler import check_fits
from gdsd_jax.evaluation import decoding, reports
from gdsd_jax.evaluation.completions import Completed, Part, complete, judge_by_all
from gdsd_jax.evaluation.policy import Policy, load_policy
from gdsd_jax.evaluation.statistics import mean_and_error, pass_at
from gdsd_jax.runtime import hosts, memory, ranges
from gdsd_jax.runtime.errors import UserError
from gdsd_jax.runtime.files import Lock, replacing, require_regular, understood
from gdsd_jax.runtime.ranges import Count
from gdsd_jax.runtime.streams import Stream, stream_of_seed
from gdsd_jax.runtime.transfer import checksum, fetch
from gdsd_jax.tasks import resolve
from gdsd_jax.tasks.data import rows_digest
from gdsd_jax.telemetry.progress import Progress
from gdsd_jax.training.rollout import Prompts, encode_prompts
from gdsd_jax.training.setup import evaluated_task, task_rows


def run(
    config: TrainConfig,
    workdir: Path | None = None,
    *,
    checkpoint: str | None = None,
    adapter: str | None = None,
    best: bool = False,
    tasks: Sequence[tuple[str, str | None]] = (),
    lengths: Sequence[int] = (),
    steps: int | None = None,
    split: str = "test",
    count: int | None = None,
    samples: int = 1,
    temperature: float = 0.0,
    pass_at: Sequence[int] = (),
    output: Path | None = None,
) -> dict[str, Any]:
    """Evaluates one policy on each task at each length, writes the files and returns the content of `evaluation.json`.

    Its `results` have one entry per task and length: `task`, `rows` (their source), `count`, `items` (a digest of the
    rows), `completion_length`, `steps`, `block_length` and `metrics`: `{metric: {"mean": ..., "error": ...}}`, with the
    standard error of the mean over items.

    Args:
      workdir, checkpoint, adapter, best: see `gdsd_jax.evaluation.policy.load_policy`.
      tasks: names of tasks, each with a file or None; if empty, the config's task.
      lengths: completion lengths; if empty, those of `config.evaluation`.
      steps: denoising steps of every completion; None: those of `config.evaluation`, in proportion to the length.
      split: split that the rows are from, unless the task has a file.
      count: rows of each split or file; None: as many as the papers evaluate.
      samples: completions of each row, at `temperature`.
      pass_at: values of k for pass@k, which is computed from the task's last metric.
      output: directory of the files; None: `workdir / "evaluation"`.

    Raises:
      UserError: the model, a task or its rows cannot be loaded; arguments contradict each other; or the output
        directory holds an unfinished evaluation with other settings.
    """
    output = output_directory(workdir, output)
    require_samples(samples, temperature, pass_at)
    samplers = _samplers(config, lengths, steps, count, temperature)
    policy = load_policy(config, workdir, checkpoint=checkpoint, adapter=adapter, best=best)
    parts = fitting(policy, plan(config, policy, samplers, tasks, split, count, samples))
    # Nobody else may evaluate into the directory before its files are complete.
    with hosts.first_only(Lock, output, "--output"):
        batches = completions(config, policy, parts, output)
        results, records = [], []
        for part in parts:
            found, kept = result(part, batches[part.name], samples, pass_at)
            results.append(found)
            records += kept
        summary = {
            "checkpoint": str(policy.source),
            "base": hub.fingerprint(policy.source),
            "adapter": adapter,
            "workdir": str(workdir) if policy.iteration is not None else None,
            "iteration": policy.iteration,
            "split": split,
            "evaluation_prompt": config.evaluation.evaluation_prompt,
            "strategy": config.sampler.strategy,
            "temperature": temperature,
            "samples": samples,
            "seed": config.seed,
            "grader": config.task.grader,
            "results": results,
        }
        if hosts.first():
            reports.write(output, summary, records)
            (output / reports.UNFINISHED).unlink()
    return summary


def run_decodings(
    config: TrainConfig,
    workdir: Path | None,
    output: Path,
    *,
    checkpoint: str | None,
    adapter: str | None,
    best: bool,
    tasks: Sequence[tuple[str, str | None]],
    lengths: Sequence[int],
    steps: int | None,
    split: str,
    count: int | None,
) -> str:
    """Writes the tables of `gdsd_jax.evaluation.decoding` and returns them; the arguments are those of `run`."""
    samplers = _samplers(config, lengths, steps, count, 0.0)
    policy = load_policy(config, workdir, checkpoint=checkpoint, adapter=adapter, best=best)
    parts = fitting(policy, plan(config, policy, samplers, tasks, split, count, 1))
    with hosts.first_only(Lock, output, "--output"):
        return decoding.run(policy, parts, output, batch_rows=config.evaluation.batch_rows, seed=config.seed)


def _samplers(
    config: TrainConfig, lengths: Sequence[int], steps: int | None, count: int | None, temperature: float
) -> list[SamplerConfig]:
    """Returns the sampler of each length; raises UserError if the number of steps or of rows is out of range."""
    ranges.convert(Count | None, steps, "--steps")
    ranges.convert(Count | None, count, "--count")
    lengths = lengths or config.evaluation.lengths
    return [dataclasses.replace(greedy_sampler(config, n, steps), temperature=temperature) for n in lengths]


def fitting(policy: Policy, parts: Iterable[Part]) -> list[Part]:
    """Returns the parts as a list; raises UserError if two of them are the same or one does not fit the model."""
    parts = list(parts)
    if len({part.name for part in parts}) < len(parts):
        raise UserError("a task or a length is named twice: change --tasks or --lengths")
    for part in parts:
        check_fits(policy.model, part.prompts.tokens.shape[1], part.sampler)
    return parts


def output_directory(workdir: Path | None, output: Path | None) -> Path:
    """Returns the directory for the files; raises UserError if neither argument is given."""
    if output is None and workdir is None:
        raise UserError("nowhere to write: give --output DIRECTORY, or the --workdir of a run")
    return output or workdir / "evaluation"


def require_samples(samples: int, temperature: float, pass_at: Sequence[int]) -> None:
    """Raises UserError if the flags of sampling are out of range or contradict each other."""
    ranges.convert(float, temperature, "--temperature")
    if samples < 1:
        raise UserError(f"--samples {samples} must be at least 1")
    if samples > 1 and not temperature > 0:
        raise UserError(f"--samples {samples} at temperature 0 would all be the same: give --temperature above 0")
    if any(k > samples for k in pass_at):
        raise UserError(f"--pass_at {max(pass_at)} needs as many samples, there are {samples}: raise --samples")


def plan(
    config: TrainConfig,
    policy: Policy,
    samplers: Sequence[SamplerConfig],
    names: Sequence[tuple[str, str | None]],
    split: str,
    count: int | None,
    samples: int,
) -> Iterator[Part]:
    """Yields the parts of an evaluation: every task of `names`, or else the config's, with every sampler."""
    for name, file in names or ((config.task.name, None),):
        own = name == config.task.name
        prompt = config.evaluation.evaluation_prompt
        task = evaluated_task(config) if own else resolve(name, evaluation=prompt, grader=config.task.grader)
        files = config.task if own and not file else TaskConfig(validation_path=file, train_path=file, eval_path=file)
        rows = task_rows(files, task, split, count=count)
        if count is None and task.evaluation_rows is not None and len(rows) > task.evaluation_rows:
            rows = task_rows(files, task, split, count=task.evaluation_rows)
        prompts = encode_prompts(
            task, policy.tokenizer, rows, buckets=config.prompt_buckets, overlong=config.overlong_prompts
        )
        needed = len(rows) * samples * (5 * prompts.tokens.shape[1] + 16)
        memory.require(needed, memory.of_host(), f"{samples} samples of {len(rows)} rows", "--samples")
        repeated = (np.repeat(x, samples, axis=0) for x in (prompts.tokens, prompts.mask))
        prompts = Prompts(*repeated, [row for row in rows for _ in range(samples)])
        for sampler in samplers:
            yield Part(task, files.path(split) or split, rows, prompts, sampler)


def completions(config: TrainConfig, policy: Policy, parts: list[Part], output: Path) -> dict[str, list[Completed]]:
    """Returns the batches of every part, by the part's name.

    Batches that an earlier, killed evaluation left in `output` are read; the others are sampled and written there.
    """
    key = stream_of_seed(config.seed, Stream.EVALUATION)
    rows = {part.name: min(config.evaluation.batch_rows, len(part.prompts.rows)) for part in parts}
    totals = {part.name: -(-len(part.prompts.rows) // rows[part.name]) for part in parts}
    path = output / reports.UNFINISHED
    batches = resumed(path, identity(config, policy, parts, rows))
    for part in parts:
        count, size = len(part.prompts.rows), rows[part.name]
        for index, batch in enumerate(batches.get(part.name, ())):
            expected = min(size, count - index * size)
            if len(batch.texts) != expected or (batch.kl is not None and len(batch.kl) != expected):
                raise UserError(f"{path} has a batch of {len(batch.texts)} texts, not of {expected}: remove it")
    done = sum(map(len, batches.values()))
    label = " ".join(dict.fromkeys(part.task.name for part in parts))
    progress = hosts.first_only(Progress, sum(totals.values()), start=done, label=label)
    with hosts.first_only(path.open, "a", encoding="utf-8") as file, progress:
        for part in parts:
            found = batches.setdefault(part.name, [])
            start, sampled = time.perf_counter(), 0
            for batch in complete(
                policy.model, policy.base, policy.lora, part.prompts, part.sampler, policy.tokenizer,
                batch_rows=rows[part.name], key=key, skip=len(found),
            ):  # fmt: skip
                found.append(batch)
                file.write(json.dumps({"part": part.name, **batch._asdict()}) + "\n")
                file.flush()
                done, sampled = done + 1, sampled + len(batch.texts)
                progress.update(done, length=part.sampler.completion_length)
            if sampled:
                tokens = sampled * part.sampler.completion_length
                seconds = time.perf_counter() - start
                progress.note(f"{part.name}: {sampled} completions in {seconds:.1f} s, {tokens / seconds:.0f} tokens/s")
    return batches


def identity(config: TrainConfig, policy: Policy, parts: list[Part], batch_rows: dict[str, int]) -> dict[str, Any]:
    """Returns everything that determines the completions, as plain values; evaluations that share it may be joined."""
    return {
        "parameters": [int(x) for x in fetch(checksum((policy.base, policy.lora)))],
        "model": dataclasses.asdict(policy.model),
        "seed": config.seed,
        **{
            part.name: {
                "prompts": _digest(part.prompts.tokens.tobytes()),
                "batch_rows": batch_rows[part.name],
                "sampler": dataclasses.asdict(part.sampler),
            }
            for part in parts
        },
    }


def resumed(path: Path, wanted: dict[str, Any]) -> dict[str, list[Completed]]:
    """Returns the batches that an unfinished evaluation left in `path`, and creates the file if it is missing.

    Args:
      wanted: the `identity` of this evaluation.

    Raises:
      UserError: the batches belong to an evaluation of another identity, or cannot be read.
    """
    wanted = json.loads(json.dumps(wanted))
    require_regular(path)
    whole = path.read_bytes().rpartition(b"\n")[0].splitlines() if path.exists() else []
    advice = "remove it, or choose another --output"
    with understood(path, advice):
        lines = [json.loads(line) for line in whole]
        for line in lines[1:]:
            if not (isinstance(line["part"], str) and all(isinstance(text, str) for text in line["texts"])):
                raise TypeError("a batch holds something other than texts")
            if line["kl"] is not None and not np.isfinite(np.asarray(line["kl"], np.float64)).all():
                raise ValueError("a KL is not finite")
        if lines and not isinstance(lines[0], dict):
            raise TypeError("the first line does not identify an evaluation")
    if lines and lines[0] != wanted:
        other = next(name for name in (*wanted, *lines[0]) if lines[0].get(name) != wanted.get(name))
        raise UserError(
            f"{path} is an unfinished evaluation with another {other}: finish it with its own settings, remove it, "
            "or choose another --output"
        )
    # The first process may rewrite the file only after every process has read it.
    hosts.wait()
    if hosts.first():
        path.parent.mkdir(parents=True, exist_ok=True)
        # The rewritten file lacks a last line that a kill cut short.
        with replacing(path) as draft:
            draft.write_bytes(b"".join(line + b"\n" for line in whole or [json.dumps(wanted).encode()]))
    batches: dict[str, list[Completed]] = {}
    for line in lines[1:]:
        batches.setdefault(line["part"], []).append(Completed(line["texts"], line["kl"]))
    return batches


def result(
    part: Part, batches: list[Completed], samples: int, pass_at_k: Sequence[int]
) -> tuple[dict[str, Any], list[dict]]:
    """Returns the entry of one part in `results`, and its records, one for each completion."""
    values = judge_by_all(part.task, part.prompts.rows, batches)
    by_item = {name: value.reshape(-1, samples) for name, value in values.items()}
    metrics = {name: mean_and_error(value.mean(axis=1)) for name, value in by_item.items()}
    solved = part.task.metrics_named[-1]
    correct = (by_item[solved] == 1.0).sum(axis=1)
    metrics |= {f"{solved} pass@{k}": mean_and_error(pass_at(correct, samples, k)) for k in pass_at_k}
    shape = {name: getattr(part.sampler, name) for name in ("completion_length", "steps", "block_length")}
    texts = (text for batch in batches for text in batch.texts)
    records = [
        {
            **row,
            "task": part.task.name,
            "completion_length": part.sampler.completion_length,
            "item": index // samples,
            "completion": text,
            **{name: float(value[index]) for name, value in values.items()},
        }
        for index, (row, text) in enumerate(zip(part.prompts.rows, texts, strict=True))
    ]
    entry = {
        "task": part.task.name,
        "rows": part.source,
        "count": len(part.rows),
        "items": rows_digest(part.rows),
        **shape,
        "metrics": metrics,
    }
    return entry, records


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
