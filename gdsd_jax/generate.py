"""Prints completions of a prompt, or of rows of the task with their rewards.

    python -m gdsd_jax.generate --config configs/tiny_sudoku.py --workdir runs/demo --rows 3
    python -m gdsd_jax.generate --config ... --checkpoint DIR --prompt "..." --watch

`--prompt` is the user's turn, taken literally; the task's system turn and assistant prefix are added to it. `--watch`
shows how each text appears out of its masks: the sampler runs once, as one compiled program, and its steps are replayed
from the record of when each token was committed. If the output is not a terminal, a few frames are printed as lines.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import rich.live
from rich.text import Text

from gdsd_jax.config import TrainConfig
from gdsd_jax.config.flags import Option, launch
from gdsd_jax.diffusion import Rollout, SamplerConfig
from gdsd_jax.diffusion.blocks import step_limit
from gdsd_jax.diffusion.sampler import replay
from gdsd_jax.evaluation.policy import POLICY_OPTIONS, Policy, load_policy
from gdsd_jax.runtime import hosts, ranges
from gdsd_jax.runtime.console import Console
from gdsd_jax.runtime.errors import UserError
from gdsd_jax.runtime.ranges import Count, Seed
from gdsd_jax.runtime.streams import Stream, stream_of_seed
from gdsd_jax.tasks import Task
from gdsd_jax.training.rollout import Prompts, encode_prompts, sample_in_parts
from gdsd_jax.training.setup import task_rows

MASK, END = "░", "·"
PLAIN_FRAMES = 5
LONGEST_PAUSE = 0.25  # seconds between two frames


class Generated(NamedTuple):
    """Completions, and what is needed to replay them.

    prompts: the users' turns.
    texts: the completions.
    rollout: the rollout, on the host.
    rows: rows of the task; empty for a prompt of the user's own.
    rewards: the reward and the task's metrics by name, `[B]` each; empty without rows.
    """

    prompts: list[str]
    texts: list[str]
    rollout: Rollout
    rows: list[dict]
    rewards: dict[str, np.ndarray]


def run(
    config: TrainConfig,
    policy: Policy,
    *,
    prompt: str | None = None,
    rows: int | None = None,
    temperature: float = 0.0,
    seed: int | None = None,
) -> Generated:
    """Samples one completion of `prompt`, or of each of the first `rows` test rows.

    At most `config.evaluation.batch_rows` completions are sampled at a time, which changes no draw.

    Args:
      seed: seed of the sampler; None: the config's.

    Raises:
      UserError: both or neither of `prompt` and `rows` are given, or a prompt does not fit the model.
    """
    if (prompt is None) == (rows is None):
        raise UserError("give either --prompt TEXT or --rows N")
    ranges.convert(Count | None, rows, "--rows")
    task, tokenizer = policy.task, policy.tokenizer
    fit = {"buckets": config.prompt_buckets, "overlong": config.overlong_prompts}
    if prompt is None:
        chosen = task_rows(config.task, task, "test", count=rows)
        asked = encode_prompts(task, tokenizer, chosen, **fit)
        shown = [task.messages(row)[-1]["content"] for row in chosen]
    else:
        chosen, shown = [], [prompt]
        text = tokenizer.render(prompt_messages(task, prompt), task.assistant_prefix)
        asked = Prompts(*tokenizer.prompts([text], **fit), [])
    sampler = dataclasses.replace(config.sampler, temperature=ranges.convert(float, temperature, "--temperature"))
    key = stream_of_seed(config.seed if seed is None else ranges.convert(Seed, seed, "--seed"), Stream.GENERATION)
    size = min(config.evaluation.batch_rows, len(asked.tokens))
    rollout = sample_in_parts(policy.model, policy.base, policy.lora, asked, key, sampler, part_rows=size)
    texts = tokenizer.decode(rollout.tokens[:, asked.tokens.shape[1] :])
    rewards = {"reward": task.reward(texts, chosen), **task.metrics(texts, chosen)} if chosen else {}
    return Generated(shown, texts, rollout, chosen, rewards)


def prompt_messages(task: Task, prompt: str) -> list[dict]:
    """Returns the chat for a prompt of the user's own: the task's system turn, if it has one, and the user's turn."""
    system = [{"role": "system", "content": task.system}] if task.system else []
    return [*system, {"role": "user", "content": prompt}]


def frames(policy: Policy, sampler: SamplerConfig, rollout: Rollout, row: int) -> list[tuple[int, Text]]:
    """Returns `(steps taken, text)` before the first step and after each step that committed a token of this row."""
    single = Rollout(*(None if value is None else np.asarray(value)[row : row + 1] for value in rollout))
    length, limit = single.commit_step.shape[1], step_limit(policy.model, sampler)
    steps = [-1, *np.unique(single.commit_step[single.commit_step < limit]).tolist()]
    pictures = []
    before = np.full(length, policy.model.mask_token_id)
    for step in steps:
        # The last frame is the final completion, with the tokens that `stop_at_eos` filled in.
        until = limit if step == steps[-1] else step
        after = np.asarray(replay(single, policy.model, until))[0, -length:]
        pictures.append((step + 1, _picture(policy, before, after)))
        before = after
    return pictures


def _picture(policy: Policy, before: np.ndarray, after: np.ndarray) -> Text:
    """Returns a completion `[L]` as text: masks and ends are dim, tokens committed since `before` are highlighted."""
    text = Text()
    mask, ends = policy.model.mask_token_id, policy.model.ends
    kinds = [
        "mask" if new == mask else "end" if new in ends else "new" if old != new else "old"
        for old, new in zip(before.tolist(), after.tolist(), strict=True)
    ]
    for kind, group in itertools.groupby(range(len(kinds)), kinds.__getitem__):
        ids = after[list(group)]
        if kind in ("mask", "end"):
            text.append((MASK if kind == "mask" else END) * len(ids), "dim")
        else:
            text.append(policy.tokenizer.decode_one(ids, special=False), "bold green" if kind == "new" else "")
    return text


def show(
    console: Console,
    policy: Policy,
    sampler: SamplerConfig,
    generated: Generated,
    *,
    watch: bool = False,
    seconds: float = 5.0,
) -> None:
    """Prints prompts, completions and rewards; with `watch`, each completion appears within about `seconds`."""
    for row, (prompt, text) in enumerate(zip(generated.prompts, generated.texts, strict=True)):
        console.rule(style="dim")
        console.print(Text(prompt, "cyan"))
        if watch:
            _watch(console, frames(policy, sampler, generated.rollout, row), seconds)
        if not (watch and console.is_terminal):
            console.print(Text(text))
        if generated.rewards:
            values = (f"{name} {value[row]:.3f}" for name, value in generated.rewards.items())
            console.print(Text("  ".join(values), "dim"))


def _watch(console: Console, pictures: list[tuple[int, Text]], seconds: float) -> None:
    """Replays the frames on a terminal, or prints a few of them as lines elsewhere."""
    if not console.is_terminal:
        some = np.unique(np.linspace(0, len(pictures) - 1, PLAIN_FRAMES).round().astype(int))
        for taken, picture in (pictures[i] for i in some):
            line = picture.plain.replace("\n", "⏎")
            console.print(Text(f"step {taken:>4}  {line}"), soft_wrap=True)
        return
    with rich.live.Live(console=console, auto_refresh=False) as live:
        for _, picture in pictures:
            live.update(picture, refresh=True)
            time.sleep(min(seconds / len(pictures), LONGEST_PAUSE))


def main(
    config: TrainConfig,
    workdir: Path | None,
    *,
    checkpoint: str | None,
    adapter: str | None,
    best: bool,
    watch: bool,
    seconds: float,
    prompt: str | None,
    rows: int | None,
    **flags: Any,
) -> None:
    if not 0 <= seconds < math.inf:
        raise UserError(f"--seconds {seconds} must be at least 0 and finite")
    if prompt is None and rows is None:
        rows = 1
    policy = load_policy(config, workdir, checkpoint=checkpoint, adapter=adapter, best=best)
    generated = run(config, policy, prompt=prompt, rows=rows, **flags)
    if hosts.first():
        show(Console(), policy, config.sampler, generated, watch=watch, seconds=seconds)


OPTIONS = POLICY_OPTIONS | {
    "prompt": Option(str, None, "The user's turn."),
    "rows": Option(int, None, "Number of test rows of the task to complete, instead of a prompt."),
    "temperature": Option(float, 0.0, "Temperature of the sampler; 0 takes the most probable token."),
    "seed": Option(int, None, "Seed of the sampler, instead of the config's."),
    "watch": Option(bool, False, "Show how the text appears out of its masks."),
    "seconds": Option(float, 5.0, "Time that --watch takes for one completion."),
}

if __name__ == "__main__":
    launch(main, OPTIONS, needs_workdir=False)
