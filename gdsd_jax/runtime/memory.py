"""Refuses what certainly does not fit into memory, before anything is computed."""

from __future__ import annotations

import os

from gdsd_jax.runtime.errors import UserError


def of_host() -> int:
    """Returns the size of this machine's memory in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def of_devices() -> int:
    """Returns the bytes of all devices' memory together; if no device reports its own, the hosts' memory counts."""
    # Imported only here: processes that score rewards ask for the host's memory, and start faster without JAX.
    import jax

    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    known = sum(one.get("bytes_limit", 0) for one in stats)
    return known * jax.process_count() if known else of_host() * jax.process_count()


def require(needed: int, there: int, purpose: str, setting: str) -> None:
    """Raises UserError if `purpose` needs more bytes than there are.

    Args:
      needed: a lower bound, in bytes, of what is in memory at one time.
      there: bytes of the host's or of the devices' memory.
      setting: the setting that the user can lower.
    """
    if needed > there:
        raise UserError(
            f"{purpose} needs at least {needed / 1e9:.4g} GB of memory, there are {there / 1e9:.4g} GB: lower {setting}"
        )
