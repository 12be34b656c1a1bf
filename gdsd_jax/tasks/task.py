"""A task: rows of data, a prompt, reward components and evaluation metrics in one value."""

import dataclasses
import gzip
import json
import logging
import random
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from gdsd_jax.errors import UserError
from gdsd_jax.tasks import prompting

SPLITS = ("train", "validation", "test")
SETTINGS = ("template", "system", "assistant_prefix", "answer_template", "examples", "shots", "weights")

Row = dict[str, Any]
Scores = dict[str, Float32[np.ndarray, "B"]]

_log = logging.getLogger(__name__)


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
      threads: completions scored at once; above 1 only where scoring waits for other processes.
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
    threads: int = 1

    def rows(
        self, split: str = "train", *, path: str | Path | None = None, count: int | None = None, seed: int = 0
    ) -> list[Row]:
        """The rows of a split, or of a local file.

        Args:
          split: "train", "validation" or "test"; a file is taken as it is, for whichever split it is given.
          path: a local file in the task's own format (the docstring of the task's module says which).
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
        if count is None:
            return rows
        if count > len(rows):
            raise UserError(f"{path} has {len(rows)} rows, {count} were asked for: lower the count")
        return [rows[index] for index in sorted(random.Random(seed).sample(range(len(rows)), count))]

    def messages(self, row: Row) -> list[dict]:
        """The chat messages of the prompt; `assistant_prefix` follows them when they are rendered."""
        shots = [(prompting.fill(self.template, shot), self.answer(shot)) for shot in self.examples[: self.shots]]
        return prompting.messages(row, template=self.template, system=self.system, examples=shots)

    def answer(self, row: Row) -> str:
        """The reference completion, the target of supervised training."""
        return prompting.fill(self.answer_template, self.reference(row))

    def rewards(self, completions: list[str], rows: list[Row]) -> Scores:
        """Reward components of each completion for its row.

        Never raises on account of a text: where `score` raises or leaves a component out, this item is NaN and a
        warning is logged.
        """
        return self._each(self.score, tuple(self.weights), completions, rows)

    def reward(self, completions: list[str], rows: list[Row]) -> Float32[np.ndarray, "B"]:
        """The weighted sum of the components; a component that is NaN counts 0."""
        return weighted_sum(self.rewards(completions, rows), self.weights)

    def metrics(self, completions: list[str], rows: list[Row]) -> Scores:
        """Evaluation metrics of each completion for its row; NaN where `measure` raises."""
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
        failures: list[Exception] = []

        def values(completion: str, row: Row) -> list[float]:
            try:
                scored = function(completion, row)
                return [float(scored[name]) for name in names]
            except Exception as error:  # a user's own reward may raise anything, and the batch must survive it
                failures.append(error)
                return [np.nan] * len(names)

        if self.threads > 1:
            with ThreadPoolExecutor(self.threads) as pool:
                table = list(pool.map(values, completions, rows))
        else:
            table = list(map(values, completions, rows))
        if failures:
            message = "%s: %d of %d completions could not be scored and are NaN; the first error: %r"
            _log.warning(message, self.name, len(failures), len(rows), failures[0])
        columns = np.asarray(table, np.float32).reshape(len(rows), len(names))
        return {name: columns[:, index] for index, name in enumerate(names)}


def weighted_sum(components: Scores, weights: Mapping[str, float]) -> Float32[np.ndarray, "B"]:
    """Sum of the components times their weights, NaN counting 0."""
    terms = [weights[name] * np.where(np.isnan(value), 0.0, value) for name, value in components.items()]
    return np.sum(terms, axis=0).astype(np.float32)


def configure(task: Task, *, evaluation: bool = False, **settings: Any) -> Task:
    """The task with other prompt settings or weights.

    Args:
      evaluation: start from the task's evaluation prompt instead of its training prompt.
      settings: any of `SETTINGS`; None leaves the default. `weights` may name only some components; the others keep
        theirs.

    Raises UserError for an unknown setting or component, or more shots than the task has examples.
    """
    unknown = sorted(settings.keys() - set(SETTINGS))
    if unknown:
        raise UserError(f"unknown task setting {unknown[0]!r}; one of: {', '.join(SETTINGS)}")
    given = {name: value for name, value in settings.items() if value is not None}
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


def read_text(path: Path) -> str:
    """The text of a local UTF-8 file, unpacked where its name ends in `.gz`; UserError where it cannot be read."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        return data.decode("utf-8-sig")
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text") from None


def read_jsonl(path: Path) -> list[tuple[str, Row]]:
    """(place, object) for each line that is not blank; the place, "file, line n", is for messages.

    Raises UserError where the file cannot be read, a line is not a JSON object, or nothing is left.
    """
    found = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{place}: not JSON ({error})") from None
        if not isinstance(record, dict):
            raise UserError(f"{place}: a JSON object is needed")
        found.append((place, record))
    if not found:
        raise UserError(f"{path} has no rows")
    return found
