"""Defines `Task`: rows of data, a prompt, reward components and evaluation metrics in one value."""

import dataclasses
import json
import logging
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from numbers import Integral, Real
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
from jaxtyping import Float32

from gdsd_jax.runtime import ranges
from gdsd_jax.runtime.errors import UserError, did_you_mean
from gdsd_jax.runtime.ranges import LARGEST_FLOAT, Range
from gdsd_jax.tasks import prompting, workers
from gdsd_jax.tasks.data import Row, draw
from gdsd_jax.tasks.workers import Limits

SPLITS = ("train", "validation", "test")
# The names of the grader that every task has, and of the public trainers' grader.
ROBUST, PUBLIC = "robust", "public"
SETTINGS = ("template", "system", "assistant_prefix", "answer_template", "examples", "shots", "weights")

_TYPES = dict.fromkeys(SETTINGS, str) | {
    "examples": tuple[Mapping[str, Any], ...],
    "shots": int,
    "weights": Mapping[str, Annotated[float, Range(-LARGEST_FLOAT, LARGEST_FLOAT)]],
}

Scores = dict[str, Float32[np.ndarray, "B"]]

_log = logging.getLogger(__name__)


class Grader(NamedTuple):
    """Another reward and metric for a task, with the same components. The fields are as in `Task`."""

    score: Callable[[str, Row], Mapping[str, float]]
    measure: Callable[[str, Row], Mapping[str, float]]
    limits: Limits | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """Data, prompt, reward and metric of one task. A new task is one such value, in any module.

    Attributes:
      name: the task's name in configurations and tables.
      source: (split, count, seed) -> rows, used if no file is given: a generator, or a public data set. Validation
        and test rows must not depend on the seed.
      read: path -> rows of a local file, validated.
      score: (completion, row) -> {component: value}. A pure function; an exception costs only this item.
      measure: (completion, row) -> {metric: value}, the evaluation metric, which is not the reward.
      weights: reward component -> its weight in the sum; every component must be named.
      metrics_named: every key that `measure` returns.
      template: the user's turn, with {fields} of a row.
      system: the system turn; if empty, there is none.
      assistant_prefix: the beginning of the assistant's turn, given to the model as part of the prompt.
      answer_template: the reference completion for supervised training, with {fields} of `reference(row)`.
      reference: row -> the fields that `answer_template` may name.
      careless: (row, rate, generator) -> the row as written by a demonstrator who gets the share `rate` of it wrong, in
        the task's typical way; None if the task has no such function. Supervised training on such rows leaves room for
        reinforcement learning to improve.
      examples: rows shown as solved earlier turns; the first `shots` of them are used.
      evaluation: prompt settings that differ when somebody's checkpoint is evaluated.
      evaluation_rows: the number of test rows that the papers report on, if a file has more; None for all.
      threads: completions scored at once; more than 1 only if scoring waits for other processes.
      limits: if given, `score` and `measure` run in worker processes under these limits. They must then be top-level
        functions of a module that can be imported without JAX, and rows must be picklable.
      graders: further graders by name; `configure(task, grader=name)` replaces `score` and `measure` by one of them.
      grader: the name of the grader in use.
      token_score: `(texts of the tokens through the EOS, row) -> a reward for each of them`, for methods that read
        `batch.token_rewards`; None: the task has no rewards of tokens.
      held_out: row -> whether a row of the training set belongs to its validation share; None if a training set is not
        divided. It uses only the row, so that no order, count or seed moves a row to the other share.
    """

    name: str
    source: Callable[[str, int | None, int], list[Row]]
    read: Callable[[Path], list[Row]]
    score: Callable[[str, Row], Mapping[str, float]]
    measure: Callable[[str, Row], Mapping[str, float]]
    weights: Mapping[str, float]
    metrics_named: tuple[str, ...]
    template: str
    system: str = ""
    assistant_prefix: str = ""
    answer_template: str = "<answer>{answer}</answer>"
    reference: Callable[[Row], Row] = dict
    careless: Callable[[Row, float, random.Random], Row] | None = None
    examples: tuple[Row, ...] = ()
    shots: int = 0
    evaluation: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    evaluation_rows: int | None = None
    threads: int = 1
    limits: Limits | None = None
    graders: Mapping[str, Grader] = dataclasses.field(default_factory=dict)
    grader: str = ROBUST
    held_out: Callable[[Row], bool] | None = None
    token_score: Callable[[list[str], Row], Sequence[float]] | None = None

    def __post_init__(self):
        _require_valid(self)
        own = Grader(self.score, self.measure, self.limits)
        for grader in (own, *self.graders.values()):
            for function in (grader.score, grader.measure) if grader.limits is not None else ():
                workers.check_importable(function)

    def rows(
        self,
        split: str = "train",
        *,
        path: str | Path | None = None,
        divided: bool = False,
        count: int | None = None,
        seed: int = 0,
    ) -> list[Row]:
        """Returns the rows of a split, or of a local file.

        Args:
          split: "train", "validation" or "test"; a file is taken as it is, for whichever split it is given.
          path: a local file or directory that the task reads (the docstring of the task's module says which columns).
          divided: the file is a whole training set, and only the rows that `held_out` gives to the split are taken.
          count: the number of rows. None gives the task's default for generated rows, and all rows of a file. Some of
            the rows of a file are drawn without replacement, and stay in the order of the file.
          seed: of generated training rows and of a draw from a file. Validation and test rows are fixed.

        Raises UserError for an unknown split, an unreadable or invalid file, or more rows than the file has.
        """
        if split not in SPLITS:
            raise UserError(f"unknown split {split!r}; one of: {', '.join(SPLITS)}")
        if count is not None and count < 1:
            raise UserError(f"count must be at least 1, got {count}")
        if path is None:
            return _plain(self.name, _some(self.name, self.source(split, count, seed)))
        rows = _some(self.name, self.read(Path(path)))
        if divided and self.held_out is not None:
            rows = [row for row in rows if self.held_out(row) == (split == "validation")]
            if not rows:
                raise UserError(f"{path} leaves no row for {split}: give other rows as config.task.validation_path")
        return _plain(self.name, draw(rows, count, seed, path))

    def messages(self, row: Row) -> list[dict]:
        """Returns the chat messages of the prompt; `assistant_prefix` follows them when they are rendered."""
        shots = [(prompting.fill(self.template, shot), self.answer(shot)) for shot in self.examples[: self.shots]]
        return prompting.messages(row, template=self.template, system=self.system, examples=shots)

    def answer(self, row: Row) -> str:
        """Returns the reference completion, the target of supervised training."""
        return prompting.fill(self.answer_template, self.reference(row))

    def rewards(self, completions: list[str], rows: list[Row]) -> Scores:
        """Returns the reward components of each completion for its row.

        No text makes this function raise. If `score` raises or leaves a component out, the item is NaN. A text that
        cannot be judged within the limits earns 0. A warning is logged in both cases.
        """
        return self._each(self.score, tuple(self.weights), completions, rows)

    def reward(self, completions: list[str], rows: list[Row]) -> Float32[np.ndarray, "B"]:
        """Returns the weighted sum of the components, in which NaN counts as 0."""
        return weighted_sum(self.rewards(completions, rows), self.weights)

    def metrics(self, completions: list[str], rows: list[Row]) -> Scores:
        """Returns the evaluation metrics of each completion for its row; they are NaN if `measure` raises.

        An answer that cannot be judged within the limits counts 0. A warning is logged in both cases.
        """
        return self._each(self.measure, self.metrics_named, completions, rows)

    def _each(
        self,
        function: Callable[[str, Row], Mapping[str, float]],
        names: tuple[str, ...],
        completions: list[str],
        rows: list[Row],
    ) -> Scores:
        if len(completions) != len(rows):
            raise ValueError(f"{len(completions)} completions for {len(rows)} rows")
        outcomes = self._outcomes(function, completions, rows)
        table = np.full((len(rows), len(names)), np.nan, np.float32)
        failures = []
        for index, outcome in enumerate(outcomes):
            values = outcome.values or {}
            missing = [name for name in names if name not in values]
            if not missing:
                table[index] = [values[name] for name in names]
            elif outcome.lost:
                table[index] = 0.0
            if missing:
                failures.append(outcome.error or f"no {missing[0]}")
        if failures:
            message = "%s: %d of %d completions could not be scored; the first: %s"
            _log.warning(message, self.name, len(failures), len(rows), failures[0])
        return {name: table[:, index] for index, name in enumerate(names)}

    def _outcomes(
        self, function: Callable[[str, Row], Mapping[str, float]], completions: list[str], rows: list[Row]
    ) -> list[workers.Outcome]:
        if self.limits is not None:
            return workers.shared(self.limits).map(function, zip(completions, rows, strict=True))

        def outcome(completion: str, row: Row) -> workers.Outcome:
            try:
                return workers.Outcome({name: float(value) for name, value in function(completion, row).items()})
            except (Exception, SystemExit) as error:  # the batch survives what a user's reward raises
                return workers.Outcome(None, repr(error))

        if self.threads == 1:
            return list(map(outcome, completions, rows))
        with ThreadPoolExecutor(self.threads) as pool:
            return list(pool.map(outcome, completions, rows))


def _require_valid(task: Task) -> None:
    """Raises UserError if fields of a task that a user wrote have values with which no run can end."""
    weights = dict(task.weights) if isinstance(task.weights, Mapping) else {}
    if not weights or not all(isinstance(value, Real) and math.isfinite(value) for value in weights.values()):
        given = f"{task.weights!r:.100}"
        raise UserError(f"task {task.name}: weights must give a finite number to each reward, they are {given}")
    if not task.metrics_named or isinstance(task.metrics_named, str):
        raise UserError(f"task {task.name}: metrics_named must name at least one metric, it is {task.metrics_named!r}")
    if not isinstance(task.threads, Integral) or task.threads < 1:
        raise UserError(f"task {task.name}: threads must be at least 1, it is {task.threads!r:.100}")


def _some(name: str, rows: Any) -> list[Row]:
    """Returns what a task gives for its rows; raises UserError unless it is a list of mappings."""
    if isinstance(rows, (list, tuple)):
        others = [type(row).__name__ for row in rows if not isinstance(row, dict)]
        if rows and not others:
            return list(rows)
        kind = f"a {others[0]} as a row" if rows else "no row"
    else:
        kind = f"a {type(rows).__name__}"
    raise UserError(f"task {name} gives {kind}: let its source and read return a list of at least one dict")


def _plain(name: str, rows: list[Row]) -> list[Row]:
    """Returns the rows of a task; raises UserError unless JSON can hold them."""
    for row in rows:
        try:
            json.dumps(row, sort_keys=True)
        except (TypeError, ValueError, RecursionError) as error:
            raise UserError(
                f"the rows of task {name} must hold texts, numbers, lists and mappings only, so that files can keep "
                f"them ({error}): change the task's source or read"
            ) from None
    return rows


def require_finite(columns: Scores, task: Task, kind: str) -> None:
    """Raises UserError if a value is infinite; NaN is allowed, where a function failed.

    Args:
      kind: "reward" for values of the task's `score`, "metric" for those of its `measure`.
    """
    function = {"reward": "score", "metric": "measure"}[kind]
    for name, values in columns.items():
        infinite = np.isinf(values)
        if infinite.any():
            raise UserError(
                f"the {kind} {name} of the task {task.name} is {values[infinite][0]} for {infinite.sum()} of "
                f"{len(values)} completions, and must be finite: change the task's {function}"
            )


def weighted_sum(components: Scores, weights: Mapping[str, float]) -> Float32[np.ndarray, "B"]:
    """Returns the sum of the components times their weights; NaN counts as 0."""
    terms = [weights[name] * np.where(np.isnan(value), 0.0, value) for name, value in components.items()]
    return np.sum(terms, axis=0).astype(np.float32)


def regraded(task: Task, grader: str | None) -> Task:
    """Returns the task under one of its graders; None and "robust" are the task's own `score` and `measure`.

    Raises UserError if the task has no grader of this name.
    """
    if grader in (None, task.grader):
        return task
    if grader not in task.graders:
        names = ", ".join([task.grader, *task.graders])
        raise UserError(f"task {task.name} has no grader {grader!r}: set config.task.grader to one of: {names}")
    chosen = task.graders[grader]
    others = {name: other for name, other in task.graders.items() if name != grader}
    others[task.grader] = Grader(task.score, task.measure, task.limits)
    return dataclasses.replace(
        task, score=chosen.score, measure=chosen.measure, limits=chosen.limits, grader=grader, graders=others
    )


def require_settings(names: Iterable[str]) -> None:
    """Raises UserError unless all names are those of task settings."""
    unknown = sorted(set(names) - set(SETTINGS))
    if unknown:
        names = f"{', '.join(SETTINGS)}{did_you_mean(unknown[0], SETTINGS)}"
        raise UserError(f"unknown task setting {unknown[0]!r}; one of: {names}")


def configure(task: Task, *, evaluation: bool = False, grader: str | None = None, **settings: Any) -> Task:
    """Returns the task with other prompt settings or weights, or another grader.

    Args:
      grader: the name of one of the task's graders, such as "public" for the public trainers' rewards and the papers'
        metrics. None means "robust", the task's own grader.
      evaluation: start from the task's evaluation prompt instead of its training prompt.
      settings: any of `SETTINGS`; None leaves the default. `weights` may name only some components; the others keep
        their weights.

    Raises UserError for an unknown setting or component, or more shots than the task has examples.
    """
    task = regraded(task, grader)
    require_settings(settings)
    given = {name: value for name, value in settings.items() if value is not None}
    given = {name: ranges.convert(_TYPES[name], value, f"task.settings.{name}") for name, value in given.items()}
    weights = dict(given.pop("weights", {}))
    if "examples" in given:
        given["examples"] = tuple(map(dict, given["examples"]))
    unknown = sorted(weights.keys() - set(task.weights))
    if unknown:
        raise UserError(f"task {task.name} has no reward component {unknown[0]!r}; one of: {', '.join(task.weights)}")
    changes = {**(task.evaluation if evaluation else {}), **given, "weights": {**task.weights, **weights}}
    configured = dataclasses.replace(task, **changes)
    if not 0 <= configured.shots <= len(configured.examples):
        raise UserError(f"task {task.name} has {len(configured.examples)} examples, shots={configured.shots} asked")
    return configured
