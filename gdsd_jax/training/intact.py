"""Tells intact checkpoints from damaged ones, and both from checkpoints that another version wrote."""

from __future__ import annotations

import errno
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from gdsd_jax.runtime import front, hosts
from gdsd_jax.runtime.errors import UserError
from gdsd_jax.runtime.transfer import checksum, fetch

# Errors of reading that say nothing of what is read, by their numbers and in the words of TensorStore.
_OF_THE_MACHINE = {
    errno.EMFILE, errno.ENFILE, errno.EACCES, errno.EPERM, errno.ESTALE, errno.ETIMEDOUT, errno.EIO, errno.ENOTCONN,
    errno.ECONNRESET,
}  # fmt: skip
_IN_WORDS = (
    "Too many open files", "Permission denied", "Stale file handle", "Input/output error",
    "Transport endpoint is not connected",
)  # fmt: skip


def sealed(values: dict[str, Any]) -> dict[str, Any]:
    """Returns plain values together with their checksum, the "seal"."""
    return values | {"seal": zlib.crc32(json.dumps(values, sort_keys=True).encode())}


def require_intact(values: dict[str, Any], arrays: Any = None) -> None:
    """Raises ValueError if sealed values, or arrays whose checksums they hold, have changed since they were saved."""
    values = dict(values)
    # Runs of earlier versions have no seal.
    if "seal" in values and values.pop("seal") != zlib.crc32(json.dumps(values, sort_keys=True).encode()):
        raise ValueError("its data differ from what was saved")
    if arrays is not None and "checksums" in values:
        found = [int(x) for x in fetch(checksum(arrays))]
        # The parameters are the first arrays of a state, so their checksums come first.
        if found != values["checksums"][: len(found)]:
            raise ValueError("its arrays differ from what was saved")


def structure(arrays: Any) -> dict[str, str]:
    """Returns the shape and dtype of every array of a pytree, by its path."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(arrays)
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")  # noqa: E731
    return {name(path): f"{x.dtype}{list(x.shape)}" for path, x in leaves if hasattr(x, "shape")}


def other_structure(manager: ocp.CheckpointManager, step: int, wanted: Any) -> str | None:
    """Returns a description of how the arrays of a checkpoint differ in shape from `wanted`, or None.

    The result is None if they agree, or if the checkpoint is too damaged to tell. `wanted` may be some of its fields.
    """
    try:
        data = manager.restore(step, args=ocp.args.Composite(data=ocp.args.JsonRestore()))["data"]
        require_intact(data)
        # Earlier versions did not record the structure; Orbax did.
        found = data.get("structure") or structure(manager.item_metadata(step)["state"])
    except Exception:
        return None
    if not isinstance(found, dict):
        return None
    ours, parts = structure(wanted), {path.partition("/")[0] for path in structure(wanted)}
    found = {path: kind for path, kind in found.items() if path.partition("/")[0] in parts}
    for path in sorted(set(ours) | set(found)):
        if ours.get(path) != found.get(path):
            return f"its {path} is {found.get(path, 'absent')} and would be {ours.get(path, 'absent')}"
    return None


def require_readable(error: Exception, checkpoint: Path) -> None:
    """Raises UserError if an error says nothing of a checkpoint, only of the machine that reads it.

    Such a checkpoint may be intact, and must be neither passed over nor moved away.
    """
    for cause in front.causes(error):
        number = cause.errno if isinstance(cause, OSError) else None
        if number in _OF_THE_MACHINE or any(words in str(cause) for words in _IN_WORDS):
            reason = front.first_line(cause)
            raise UserError(f"{checkpoint} cannot be read now ({reason}): fix that and start again") from error


def newest_intact(
    manager: ocp.CheckpointManager, read: Callable[[int], Any], wanted: Any, directory: Path
) -> tuple[Any, int]:
    """Reads the newest intact checkpoint, and reports newer ones that are damaged.

    Args:
      read: reads the checkpoint of an iteration; raises an error if it is damaged.
      wanted: arrays, or their shapes, with the paths that they have in a checkpoint.

    Returns:
      The result of `read`, and the iteration of the checkpoint.

    Raises:
      UserError: no checkpoint is intact, or the newest intact one has other arrays.
    """
    reason = "there is none"
    for step in sorted(manager.all_steps(), reverse=True):
        found, problem = None, None
        try:
            found = read(step)
        except Exception as error:  # a damaged file can make the libraries that read it raise anything
            require_readable(error, directory / str(step))
            problem = front.first_line(error)
        if not hosts.any_process(problem is not None):
            return found, step
        other = other_structure(manager, step, wanted)
        if other is not None:
            raise UserError(
                f"{directory / str(step)} was written by another version of gdsd_jax or of an optimizer, {other}: "
                "continue with that version, or choose another --workdir"
            )
        reason = problem or "another process cannot read it"
        front.say(f"note: the checkpoint {directory / str(step)} is damaged ({reason}): the one before it is used")
    raise UserError(f"{directory} holds no intact checkpoint ({reason}): restore one, or choose another --workdir")
