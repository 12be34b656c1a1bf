"""Compiles lowered programs for TPUs, and keeps the optimised program's text and its memory, or the compiler's refusal.

Executables for absent chips cannot be loaded again, so JAX's compilation cache does not keep them. The results are
kept beside that cache instead, under a hash of the program and of the versions of JAX and the compiler.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import importlib.metadata
import json
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax

from gdsd_jax.runtime.files import replacing

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class Compiled(NamedTuple):
    """The result of compiling a program, with memory in bytes on one chip.

    fits: whether the program compiled. If not, `peak_bytes` is what the compiler says it would need, and the other
      fields are empty.
    arguments, outputs, temporary: bytes of these buffers.
    aliased: bytes of outputs that reuse the buffers of donated arguments.
    text: the optimised HLO.
    """

    fits: bool
    peak_bytes: int
    arguments: int = 0
    outputs: int = 0
    aliased: int = 0
    temporary: int = 0
    text: str = ""


def compile_program(lowered: jax.stages.Lowered, topology: str) -> Compiled:
    """Compiles a program, or returns the stored result of an earlier compilation."""
    return stored(lowered, topology, lambda: compiled(lowered))


def stored(lowered: jax.stages.Lowered, topology: str, make: Callable[[], Compiled]) -> Compiled:
    """Returns the stored result for a program and a slice, or makes and stores it.

    Args:
      topology: the slice, and how the program is compiled for it.
    """
    cache = jax.config.jax_compilation_cache_dir
    versions = [importlib.metadata.version(name) for name in ("jax", "libtpu")]
    parts = [*versions, topology, lowered.as_text()]
    digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()
    path = Path(cache) / "plan" / f"{digest[:32]}.json.gz" if cache else None
    if path and path.exists():
        # A damaged file is written anew.
        with contextlib.suppress(OSError, ValueError, TypeError, EOFError, zlib.error):
            return Compiled(**json.loads(gzip.decompress(path.read_bytes())))
    found = make()
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as draft:
            draft.write_bytes(gzip.compress(json.dumps(found._asdict()).encode()))
    return found


def compiled(lowered: jax.stages.Lowered) -> Compiled:
    """Compiles a program; if the compiler refuses it for its memory, returns what it says the program would need."""
    try:
        executable = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        needed = needed_bytes(str(error))
        if needed is None:
            raise
        return Compiled(fits=False, peak_bytes=needed)
    memory = executable.memory_analysis()
    arguments, outputs = memory.argument_size_in_bytes, memory.output_size_in_bytes
    aliased, temporary = memory.alias_size_in_bytes, memory.temp_size_in_bytes
    peak = arguments + outputs - aliased + temporary + memory.generated_code_size_in_bytes
    return Compiled(True, peak, arguments, outputs, aliased, temporary, executable.as_text())


def needed_bytes(message: str) -> int | None:
    """Returns the bytes that a program needs, as the compiler's refusal gives them; None for any other message."""
    size = r"([\d.]+)([KMGT]?)"
    found = re.search(rf"Used {size} of .* hbm", message) or re.search(
        rf"memory required .*\({size}\) exceeds", message
    )
    return found and int(float(found[1]) * _UNITS[found[2]])
