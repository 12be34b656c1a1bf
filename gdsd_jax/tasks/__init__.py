"""Finds tasks by name: each is data, prompt, reward and metric together."""

from typing import Any

from gdsd_jax.runtime.errors import UserError, did_you_mean
from gdsd_jax.runtime.plugins import is_plugin, load_plugin
from gdsd_jax.tasks import code, countdown, gsm8k, math, sudoku
from gdsd_jax.tasks.task import Task, configure, require_settings

TASKS: dict[str, Task] = {
    task.name: task
    for task in (sudoku.TASK, countdown.TASK, gsm8k.TASK, gsm8k.TASK_XML, math.TASK, math.TASK_XML, code.TASK)
}

__all__ = ["TASKS", "Task", "configure", "require_settings", "resolve"]


def resolve(name: str, *, evaluation: bool = False, grader: str | None = None, **settings: Any) -> Task:
    """Returns a known task by name, or a user's own by "package.module:NAME", with settings applied.

    Args:
      grader: "robust" (the default), or "public", which gives exactly the rewards of the public trainers.
      evaluation: start from the task's evaluation prompt instead of its training prompt.
      settings: template, system, assistant_prefix, answer_template, examples, shots, weights; None leaves the default.

    Raises UserError if there is no such task, module, grader or setting.
    """
    return configure(_find(name), evaluation=evaluation, grader=grader, **settings)


def _find(name: str) -> Task:
    if name in TASKS:
        return TASKS[name]
    if not is_plugin(name):
        names = f"{', '.join(TASKS)}, or a task of your own as package.module:NAME{did_you_mean(name, TASKS)}"
        raise UserError(f"unknown task {name!r}; one of: {names}")
    task = load_plugin(name, "task")
    if not isinstance(task, Task):
        raise UserError(f"{name} is a {type(task).__name__}, not a gdsd_jax.tasks.Task")
    return task
