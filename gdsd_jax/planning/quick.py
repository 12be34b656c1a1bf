"""Compiles a program in a process of its own, which ends as soon as the compiler has assigned its buffers.

The TPU compiler first optimises a program as HLO and gives every array its place in memory; that takes seconds. What
takes minutes comes after it: the machine code of each operation. A plan needs no machine code, so the compiler is asked
to write down what it has (`--xla_dump_to`), and its process is ended when the optimised HLO is there. That HLO is the
one that `Compiled.text` has after a whole compilation.

The memory is not quite that of a whole compilation: the machine code itself (up to 0.1 GiB) is not in it, and the gaps
between temporary arrays count once, where JAX's `memory_analysis` counts them a second time.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax

from gdsd_jax.config import TrainConfig
from gdsd_jax.planning import chips, compiler
from gdsd_jax.planning.chips import Slice
from gdsd_jax.planning.compiler import Compiled
from gdsd_jax.planning.programs import make_plan
from gdsd_jax.runtime.errors import UserError
from gdsd_jax.runtime.sharding import make_mesh

_TASK, _RESULT, _POLL_SECONDS = "task.pickle", "result.json", 0.2
_TEXT, _AGAIN = ".after_optimizations.txt", ".after_optimizations_after_buffer_assignment.txt"
_BUFFERS = ".after_optimizations-buffer-assignment.txt"


def compile_quickly(config: TrainConfig, topology: Slice, name: str, lowered: jax.stages.Lowered) -> Compiled:
    """Compiles the program `name` of a run as far as a plan needs it, or returns the stored result.

    Args:
      config: the run, with sizes in place of those that it leaves to memory.
      lowered: the same program, by which results are stored.

    Raises:
      UserError: the compiler's process ended without a result.
    """
    return compiler.stored(lowered, f"{topology.name} quick", lambda: _compiled(config, topology, name))


def _compiled(config: TrainConfig, topology: Slice, name: str) -> Compiled:
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder)
        (where / _TASK).write_bytes(pickle.dumps((config, topology.name, name)))
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={folder} --xla_dump_hlo_as_text"
        # A method of one's own may lie beside the config file, whose directory only this process has on its path.
        changed = {"XLA_FLAGS": flags, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        with (where / "log").open("wb") as log:
            command = [sys.executable, "-m", "gdsd_jax.planning.quick", folder]
            process = subprocess.Popen(command, env=os.environ | changed, stdout=log, stderr=log)
            try:
                while process.poll() is None and _dumped(where) is None:
                    time.sleep(_POLL_SECONDS)
            finally:
                process.kill()
                process.wait()
        if (where / _RESULT).is_file():
            return Compiled(**json.loads((where / _RESULT).read_text(encoding="utf-8")))
        stem = _dumped(where)
        if stem is None:
            last = (where / "log").read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
            raise UserError(f"the compiler ended without a result ({' '.join(last)[:200]}): leave out --quick")
        return read_dump(Path(f"{stem}{_BUFFERS}").read_text(), Path(f"{stem}{_TEXT}").read_text())


def _dumped(folder: Path) -> str | None:
    """Returns the path that the complete dump of a program begins with, or None if there is none yet.

    The compiler writes the optimised program, then its buffers, then the same program again.
    """
    for again in folder.glob(f"*{_AGAIN}"):
        stem = str(again).removesuffix(_AGAIN)
        if again.stat().st_size == Path(stem + _TEXT).stat().st_size:
            return stem
    return None


def read_dump(buffers: str, text: str) -> Compiled:
    """Returns what a program needs, from the compiler's list of its buffers and its optimised HLO."""
    found = {"arguments": 0, "outputs": 0, "aliased": 0, "temporary": 0}
    for size, kind in re.findall(r"^allocation \d+: size (\d+), (.*)$", buffers, re.MULTILINE):
        # Memory on the core itself has colours; the main memory has none.
        if kind.startswith("color"):
            continue
        is_input, is_output = "parameter" in kind, "maybe-live-out" in kind
        found["arguments"] += is_input * int(size)
        found["outputs"] += is_output * int(size)
        found["aliased"] += (is_input and is_output) * int(size)
        found["temporary"] += (not is_input and not is_output) * int(size)
    peak = found["arguments"] + found["outputs"] - found["aliased"] + found["temporary"]
    return Compiled(True, peak, **found, text=text)


def _compile_here(folder: Path) -> None:
    """Compiles the program that a folder asks for; if it gets to the end, its result is written there."""
    config, topology, name = pickle.loads((folder / _TASK).read_bytes())
    jax.config.update("jax_platforms", "cpu")
    mesh = make_mesh(config.mesh, chips.devices(chips.parse_topology(topology)))
    found = compiler.compiled(make_plan(config, mesh).programs[name].lower())
    draft = folder / "draft"
    draft.write_text(json.dumps(found._asdict()), encoding="utf-8")
    draft.rename(folder / _RESULT)


if __name__ == "__main__":
    _compile_here(Path(sys.argv[1]))
