"""Gives every command odd flags and settings, up to where it would load the model."""

import contextlib
import inspect
import io
import random
from typing import Any
from unittest import mock

import jax
from damage import ODD

from gdsd_jax import compare, demo, evaluate, export, generate, meter, plan, sft, train
from gdsd_jax.config import to_dict
from gdsd_jax.config.flags import launch
from gdsd_jax.evaluation import policy
from gdsd_jax.methods import METHODS
from gdsd_jax.runtime.errors import UserError

REACHED = "reached the model"
COMMANDS = (train, sft, evaluate, generate, export, compare, demo, meter, plan)
NEED_WORKDIR = (train, sft, compare, demo)
FILE = "from gdsd_jax import config as settings\ndef get_config():\n    return settings.default('base')\n"
# Flags with which a command gets as far as the model.
USUAL = {
    compare: ["--methods=gdsd,espo", "--seeds=2"],
    export: ["--output=out", "--checkpoint=base"],
    plan: ["--topology=v5e:2x4"],
}
USUAL |= dict.fromkeys((evaluate, generate, meter), ["--checkpoint=base"])
ODD_TEXTS = (
    *(str(value)[:300].replace("\ud800", "?") for value in ODD),
    "1,2", "0", "-1", "1e9", "1e-400", "gdsd=nan", "²", "(1,)", "(,)", "a=b=c", "sudoku=nowhere", "data=0", "--1",
    "None,", "'", '"', "{", "[1", "0x10", "1_000", " 4 ", "v5e:0x0", "gs://x",
)  # fmt: skip


def _leaves(values: dict[str, Any], prefix: str = "") -> list[str]:
    """Returns the dotted names of all settings, and of a few that are free."""
    names = []
    for name, value in values.items():
        names.append(prefix + name)
        if isinstance(value, dict):
            names += _leaves(value, f"{prefix}{name}.")
    return names


def argv(world: Any, draw: random.Random, command: Any) -> list[str]:
    """Returns a command line with one to three odd flags."""
    flags = ["--config=config.py", *(["--workdir=run"] if command in NEED_WORKDIR else []), *USUAL.get(command, [])]
    if command in (evaluate, meter):
        flags.append("--output=out")
    method = draw.choice(list(METHODS))
    own = [f"settings.{method}.{name}" for name in METHODS[method].settings.__dataclass_fields__]
    names = _leaves(to_dict(world.config)) + own + ["task.settings.shots", "task.settings.weights", "nothing"]
    for _ in range(draw.randint(1, 3)):
        text, options = draw.choice(ODD_TEXTS), list(getattr(command, "OPTIONS", {}))
        kind = draw.random()
        name = f"config.{draw.choice(names)}" if kind < 0.5 or not options else draw.choice(options)
        name = draw.choice(("config", "workdir")) if kind > 0.95 else name
        flags.append(draw.choice((f"--{name}={text}",) * 8 + (f"--{name}", f"--no{name}", f"-{name} {text}", text)))
    return ["command", *flags]


def case(world: Any, draw: random.Random) -> None:
    """Runs a command, which must end with code 2 in one line of error, or reach the model."""
    command = draw.choice(COMMANDS)
    given, reached = argv(world, draw, command), UserError(REACHED)
    (world.directory / "config.py").write_text(FILE)
    text, code = io.StringIO(), 0
    with contextlib.ExitStack() as held:
        for module in (train, sft, policy):
            held.enter_context(mock.patch.object(module, "load_setup", side_effect=reached))
        held.enter_context(mock.patch.object(plan, "report_of", side_effect=reached))
        held.enter_context(mock.patch.object(plan.chips, "devices", side_effect=reached))
        held.enter_context(mock.patch.object(jax.distributed, "initialize", side_effect=RuntimeError("nobody")))
        held.enter_context(contextlib.chdir(world.directory))
        held.enter_context(contextlib.redirect_stderr(text))
        held.enter_context(contextlib.redirect_stdout(io.StringIO()))
        try:
            launch(
                command.main, getattr(command, "OPTIONS", None), needs_workdir=command in NEED_WORKDIR,
                dry_run=command is train, argv=given,
            )  # fmt: skip
        except SystemExit as stop:
            code = stop.code
    lines = [line for line in text.getvalue().splitlines() if line.startswith("error: ")]
    assert code in (0, 2), f"code {code} of {given}: {text.getvalue()[-300:]}"
    assert code == 0 or (len(lines) == 1 and lines[0].strip() != "error:"), f"{given}: {text.getvalue()[-300:]}"
    if code and REACHED not in text.getvalue():
        raise UserError(lines[0])


def lm_eval(world: Any, draw: random.Random) -> None:
    """Gives the model of lm-eval odd arguments."""
    from gdsd_jax.lm_eval import MaskedDiffusion

    names = list(inspect.signature(MaskedDiffusion.__init__).parameters)[1:]
    values = {draw.choice(names): draw.choice(ODD) for _ in range(draw.randint(1, 2))}
    made = MaskedDiffusion(
        **{"checkpoint": str(world.base), "dtype": "float32", "length": 8, "block_length": 4} | values
    )
    made.sampler(8, 0.0)
