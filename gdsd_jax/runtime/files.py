"""Writes files whole or not at all, reads files that may be damaged, and checks directories before work starts."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import json
import math
import os
import re
import shutil
import socket
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gdsd_jax.runtime.errors import UserError

_MISUNDERSTOOD = (
    OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError, re.error
)  # fmt: skip
MOST_BYTES = 1 << 30  # the largest size of a file that is read whole


@contextlib.contextmanager
def replacing(path: Path, *, writer: str = "") -> Iterator[Path]:
    """Yields the path of a draft beside `path`; the draft is renamed to `path` when the block ends without an error.

    A reader sees the old file or the new one, never a part of it. The draft's name keeps the suffix of `path`.

    Args:
      writer: distinguishes the drafts of several processes that write the same file.
    """
    draft = path.with_name(f".{writer}{path.name}")
    try:
        yield draft
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def write_text(path: Path, text: str, *, writer: str = "") -> None:
    """Writes a text file in UTF-8, whole or not at all; half of a surrogate pair becomes a question mark."""
    with replacing(path, writer=writer) as draft:
        draft.write_text(text, encoding="utf-8", errors="replace")


def plain(value: Any) -> Any:
    """Converts a value to one that JSON can hold: NumPy values become Python's, and NaN and infinities become None."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return value


def write_json(path: Path, content: Any, *, writer: str = "") -> None:
    """Writes a value as JSON, whole or not at all; NaN and infinities, which JSON lacks, become null."""
    write_text(path, json.dumps(plain(content), indent=1, allow_nan=False) + "\n", writer=writer)


def write_json_lines(path: Path, rows: Iterable[Any]) -> None:
    """Writes one line of JSON for each row, as `write_json` does."""
    write_text(path, "".join(json.dumps(plain(row), allow_nan=False) + "\n" for row in rows))


@contextlib.contextmanager
def understood(path: object, advice: str) -> Iterator[None]:
    """Turns the errors that can occur while the contents of `path` are parsed into one UserError that gives `advice`.

    It is meant for files that anybody may have written, with wrong types, missing keys, huge numbers or deep nesting.
    """
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: {advice}") from None
    except _MISUNDERSTOOD as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} cannot be used ({type(error).__name__}: {reason}): {advice}") from None


def require_regular(path: Path, most: int = MOST_BYTES) -> None:
    """Raises UserError if `path` exists and is not a regular file, or if it has more than `most` bytes.

    Without this check, the path to be opened may be a pipe, which blocks, or a device, which has no end.
    """
    try:
        found = path.stat()
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    if not stat.S_ISREG(found.st_mode):
        raise UserError(f"{path} is no regular file: put a file there")
    if found.st_size > most:
        raise UserError(f"{path} has {found.st_size} bytes, more than the {most} that are read: shorten it")


def read_text(path: Path) -> str:
    """Returns the text of a regular file in UTF-8."""
    require_regular(path)
    return path.read_text(encoding="utf-8")


def read_object(path: Path, advice: str = "restore it or remove it") -> dict[str, Any]:
    """Returns the object in a JSON file.

    Raises:
      UserError: the file is absent, cannot be parsed, or holds anything but an object; the message gives `advice`.
    """
    with understood(path, advice):
        content = json.loads(read_text(path))
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object: {advice}")
    return content


def read_objects(path: Path, advice: str = "restore it or remove it") -> list[dict[str, Any]]:
    """Returns the objects of a JSONL file, one per line; raises the same errors as `read_object`."""
    with understood(path, advice):
        lines = [json.loads(line) for line in read_text(path).split("\n") if line.strip()]
    if not all(isinstance(line, dict) for line in lines):
        raise UserError(f"{path} has a line that holds no JSON object: {advice}")
    return lines


def is_free(path: Path) -> bool:
    """Returns whether `path` is absent or an empty directory."""
    return not path.exists() or (path.is_dir() and not any(path.iterdir()))


def _open_own(path: Path) -> io.FileIO:
    """Opens a file for reading and writing, which is made if absent.

    Raises:
      UserError: the path is a link, which may lead to a file of somebody else, or is no regular file.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise
        raise UserError(f"{path} is no regular file: remove it") from None
    file = os.fdopen(descriptor, "rb+", buffering=0)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        file.close()
        raise UserError(f"{path} is no regular file: remove it")
    return file


class Lock:
    """Reserves a directory, which is made if absent, for this process, until the lock is closed or the process dies.

    The kernel releases the lock however the process ends; the file `.lock` names the process that holds it.

    Raises:
      UserError: another process holds the directory.
    """

    def __init__(self, directory: Path, flag: str = "--workdir"):
        self._path = directory / ".lock"
        directory.mkdir(parents=True, exist_ok=True)
        while True:
            # When nothing refers to this file object any more, Python closes it, and the directory is free again.
            self._file = _open_own(self._path)
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                # The holder may remove the file at this moment, but not what is open.
                holder = os.pread(self._file.fileno(), 200, 0).decode(errors="replace").strip() or "another process"
                self._file.close()
                raise UserError(f"{directory} is in use by {holder}: wait for it, or choose another {flag}") from None
            except OSError:
                # The file system has no locks, so the run goes on without one.
                break
            # The previous holder may have removed the file in the meantime.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(self._file.fileno()), self._path.stat()):
                    break
            self._file.close()
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Releases the directory."""
        if not self._file.closed:
            self._path.unlink(missing_ok=True)
            self._file.close()


def check_disk(directory: Path, needed: int, purpose: str) -> None:
    """Raises UserError if the disk of `directory` has fewer than `needed` free bytes."""
    while not directory.exists():
        directory = directory.absolute().parent
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise UserError(
            f"{directory} has {free / 1e9:.2f} GB free and needs {needed / 1e9:.2f} GB for {purpose}: "
            "free some or change --workdir"
        )


def require_writable(path: Path, flag: str, *, file: bool = False) -> None:
    """Raises UserError unless files can be written to the directory `path`, or with `file` to the file `path`.

    It makes a directory where the first new one would be and removes it at once, because rights alone do not tell
    whether a file system takes files.

    Args:
      flag: the flag that names the path, for the message.
    """
    place = path.absolute().parent if file else path.absolute()
    try:
        if file and path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        while not place.exists():
            if place.is_symlink():
                raise UserError(f"{path} cannot be written ({place} is a link to nothing): change {flag}")
            place = place.parent
        os.rmdir(tempfile.mkdtemp(prefix=".gdsd_", dir=place))
    except OSError as error:
        raise UserError(f"{path} cannot be written ({place}: {error.strerror}): change {flag}") from None


def refuse_existing(directory: Path, flag: str = "--workdir") -> None:
    """Raises UserError unless `directory` is absent or empty."""
    if not is_free(directory):
        raise UserError(f"{directory} is not empty: choose another {flag} or remove it")
