"""Files that appear whole or not at all, and checks of directories before anything is computed."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from gdsd_jax.runtime.errors import UserError


@contextlib.contextmanager
def replacing(path: Path, *, writer: str = "") -> Iterator[Path]:
    """Yields the path of a draft beside `path`, which takes its name when the block ends without an error.

    A reader sees the old file or the new one, never a part. The draft's name keeps the suffix of `path`.

    Args:
      writer: distinguishes the drafts of several processes that write the same file.
    """
    draft = path.with_name(f".{writer}{path.name}")
    try:
        yield draft
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text file in UTF-8, as a whole or not at all."""
    with replacing(path) as draft:
        draft.write_text(text, encoding="utf-8")


def is_free(path: Path) -> bool:
    """Returns whether `path` is absent or an empty directory."""
    return not path.exists() or (path.is_dir() and not any(path.iterdir()))


def check_disk(directory: Path, needed: int, purpose: str) -> None:
    """Raises UserError if the disk of `directory` has less than `needed` bytes."""
    while not directory.exists():
        directory = directory.absolute().parent
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise UserError(
            f"{directory} has {free / 1e9:.2f} GB free and needs {needed / 1e9:.2f} GB for {purpose}: "
            "free some or change --workdir"
        )


def refuse_existing(directory: Path, flag: str = "--workdir") -> None:
    """Raises UserError if `directory` holds something."""
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise UserError(f"{directory} is not empty: choose another {flag} or remove it")
