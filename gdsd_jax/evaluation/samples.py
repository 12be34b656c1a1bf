"""Judges the answers in the samples files of lm-evaluation-harness by the metrics of a task."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from gdsd_jax.evaluation.statistics import mean_and_error
from gdsd_jax.runtime.errors import UserError
from gdsd_jax.runtime.files import read_objects, understood
from gdsd_jax.tasks import Task


def judge(path: Path, task: Task) -> dict[str, Any]:
    """Measures the answers in a samples file by the task's metrics, with standard errors over its documents.

    Args:
      path: a JSONL file that lm-eval's `--log_samples` wrote.
      task: reads the documents of the file as rows.

    Raises:
      UserError: `path` is not such a file, or the task cannot read a document.
    """
    advice = "name a samples file of lm-eval, which --log_samples writes"
    samples = read_objects(path, advice)
    if not samples:
        raise UserError(f"{path} is empty: {advice}")
    with understood(path, advice):
        documents = [sample["doc"] for sample in samples]
        answers = [_texts(sample["filtered_resps"]) for sample in samples]
        if not all(answers):
            raise ValueError("a document has no answer")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "documents.jsonl"
        file.write_text("".join(json.dumps(document) + "\n" for document in documents), encoding="utf-8")
        rows = task.read(file)
    repeated = [row for row, texts in zip(rows, answers, strict=True) for _ in texts]
    values = task.metrics([text for texts in answers for text in texts], repeated)
    ends = np.cumsum([len(texts) for texts in answers])[:-1]
    by_document = {name: [np.mean(part) for part in np.split(value, ends)] for name, value in values.items()}
    metrics = {name: mean_and_error(np.array(value)) for name, value in by_document.items()}
    counts = {"documents": len(rows), "answers": len(repeated)}
    return {"samples": path.name, "task": task.name, **counts, "metrics": metrics}


def _texts(answers: Any) -> list[str]:
    """Returns the texts in nested lists of any depth, which is how filters return answers."""
    if not isinstance(answers, (str, list)):
        raise TypeError(f"an answer is {answers!r:.60}")
    return [answers] if isinstance(answers, str) else [text for part in answers for text in _texts(part)]
