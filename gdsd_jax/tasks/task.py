"""A task: rows of data, a prompt, reward components and evaluation metrics in one value."""

import dataclasses
import logging
import random
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
from jaxtyping import Float32

from gdsd_jax.runtime import ranges
from gdsd_jax.runtime.errors import UserError
from gdsd_jax.runtime.ranges import LARGEST_FLOAT, Range
from gdsd_jax.tasks import prompting, workers
from gdsd_jax.tasks.data import Row, draw
from gdsd_jax.tasks.workers import Limits

SPLITS = ("train", "validation", "test")
# The grader that every task has, and the one of the public trainers.
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
    """Another reward and metric for a task's completions, with the same components: see `Task.score` and below."""

    score: Callable[[str, Row], Mapping[str, float]]
    measure: Callable[[str, Row], Mapping[str, float]]
    limits: Limits | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """Data, prompt, reward and metric of one task. A new task is one such value, in any module.

    Attributes:
      name: what the task is called in configurations and tables.
      source: (split, count, seed) -> rows, where no file is given: a generator, or a public data set. It fixes the
        validation and test rows, whatever the seed.
      read: path -> rows of a local file, validated.
      score: (completion, row) -> {component: value}. Pure; an exception costs this item, not the batch.
      measure: (completion, row) -> {metric: value}, the evaluation metric, which is not the reward.
      weights: reward component -> weight in the sum; names every component.
      metrics_named: every key that `measure` returns.
      template: the user's turn, with {fields} of a row.
      system: the system turn; none where empty.
      assistant_prefix: how the assistant's turn opens, given to the model as part of the prompt.
      answer_template: the reference completion for supervised training, with {fields} of `reference(row)`.
      reference: row -> the fields that `answer_template` may name.
      careless: (row, rate, generator) -> the row as a demonstrator writes it who gets `rate` of it wrong in the task's
        typical way; None where a task has none. Supervised training on it leaves reinforcement learning its work.
      examples: rows shown as solved earlier turns; the first `shots` of them are used.
      evaluation: prompt settings that differ when somebody's checkpoint is evaluated.
      evaluation_rows: test rows that the papers report on, where a file has more; None: all.
      threads: completions scored at once; above 1 only where scoring waits for other processes.
      limits: where given, `score` and `measure` run in worker processes under these limits. They must be functions at
        the top of a module that can be imported without JAX, and a row must pickle.
      graders: further graders by name; `configure(task, grader=name)` puts one in the place of `score` and `measure`.
      grader: the name of the grader in use.
      token_score: `(texts of the tokens through the EOS, row) -> a reward for each of them`, for methods that read
        `batch.token_rewards`; None: the task has no rewards of tokens.
      held_out: whether a row of the training set belongs to its validation share; None where a training set is not
        divided. It looks at the row alone, so that no order, count or seed moves a row from one to the other.
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
          divided: the file is a whole training set: of its rows take those that `held_out` gives to the split.
          count: rows wanted. Generated rows: the task's default where None. A file: all rows where None, else that
            many drawn without replacement, in the order of the file.
          seed: of generated training rows and of a draw from a file. Validation and test rows are fixed.

        Raises UserError for an unknown split, an unreadable or invalid file, or more rows than the file has.
        """
        if split not in SPLITS:
            raise UserError(f"unknown split {split!r}; one of: {', '.join(SPLITS)}")
        if count is not None and count < 1:
            raise UserError(f"count must be at least 1, got {count}")
        if path is None:
            return self.source(split, count, seed)
        rows = self.read(Path(path))
        if divided and self.held_out is not None:
            rows = [row for row in rows if self.held_out(row) == (split == "validation")]
            if not rows:
                raise UserError(f"{path} leaves no row for {split}: give other rows as config.task.validation_path")
        return draw(rows, count, seed, path)

    def messages(self, row: Row) -> list[dict]:
        """Returns the chat messages of the prompt; `assistant_prefix` follows them when they are rendered."""
        shots = [(prompting.fill(self.template, shot), self.answer(shot)) for shot in self.examples[: self.shots]]
        return prompting.messages(row, template=self.template, system=self.system, examples=shots)

    def answer(self, row: Row) -> str:
        """Returns the reference completion, the target of supervised training."""
        return prompting.fill(self.answer_template, self.reference(row))

    def rewards(self, completions: list[str], rows: list[Row]) -> Scores:
        """Returns reward components of each completion for its row.

        Never raises on account of a text: where `score` raises or leaves a component out, this item is NaN. A text that
        cannot be judged within the limits earns 0. A warning is logged for both.
        """
        return self._each(self.score, tuple(self.weights), completions, rows)

    def reward(self, completions: list[str], rows: list[Row]) -> Float32[np.ndarray, "B"]:
        """Returns the weighted sum of the components; a component that is NaN counts 0."""
        return weighted_sum(self.rewards(completions, rows), self.weights)

    def metrics(self, completions: list[str], rows: list[Row]) -> Scores:
        """Returns evaluation metrics of each completion for its row; NaN where `measure` raises.

        An answer that cannot be judged within the limits is not right: it counts 0. A warning is logged for both.
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
            except Exception as error:  # a user's own reward may raise anything, and the batch must survive it
                return workers.Outcome(None, repr(error))

        if self.threads == 1:
            return list(map(outcome, completions, rows))
        with ThreadPoolExecutor(self.threads) as pool:
            return list(pool.map(outcome, completions, rows))


def weighted_sum(components: Scores, weights: Mapping[str, float]) -> Float32[np.ndarray, "B"]:
    """Returns sum of the components times their weights, NaN counting 0."""
    terms = [weights[name] * np.where(np.isnan(value), 0.0, value) for name, value in components.items()]
    return np.sum(terms, axis=0).astype(np.float32)


def regraded(task: Task, grader: str | None) -> Task:
    """Returns the task under one of its graders; None and "robust" are the task's own `score` and `measure`.

    Raises UserError where the task has no grader of this name.
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


def configure(task: Task, *, evaluation: bool = False, grader: str | None = None, **settings: Any) -> Task:
    """Returns the task with other prompt settings or weights, or another grader.

    Args:
      grader: a name among the task's graders, "public" for the public trainers' rewards and the papers' metrics; None
        is "robust", the task's own.
      evaluation: start from the task's evaluation prompt instead of its training prompt.
      settings: any of `SETTINGS`; None leaves the default. `weights` may name only some components; the others keep
        theirs.

    Raises UserError for an unknown setting or component, or more shots than the task has examples.
    """
    task = regraded(task, grader)
    unknown = sorted(settings.keys() - set(SETTINGS))
    if unknown:
        raise UserError(f"unknown task setting {unknown[0]!r}; one of: {', '.join(SETTINGS)}")
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
