"""Builds the command lines that start process 1 of a sandbox under each back end."""

import functools
import json
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from gdsd_jax.tasks.sandbox import launch
from gdsd_jax.tasks.sandbox.guest import confine, main, program, syscalls, tester, wire

BACKENDS = ("bwrap", "unshare")
UNSAFE = "none"
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "HOME": "/tmp", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}

_FIRST_USER = 64321  # the first of three user and group ids that no system assigns
_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")
_MOUNTED = "/mnt"
_DEVICES = ["--tmpfs", "/dev", "--symlink", "/proc/self/fd", "/dev/fd"]
_DEVICES += [word for name in ("null", "random", "urandom") for word in ("--dev-bind", f"/dev/{name}", f"/dev/{name}")]
# Runs SETTINGS NAME SOURCE ...: loads the sources as modules, the last of which has `main`. Programs cannot see them.
_START = """
import json, sys, types
settings, *named = sys.argv[1:]
package = types.ModuleType(named[0].rpartition(".")[0])
sys.modules[package.__name__] = package
for name, source in zip(named[::2], named[1::2]):
    sys.modules[name] = module = types.ModuleType(name)
    exec(compile(source, name, "exec"), vars(module))
    setattr(package, name.rpartition(".")[2], module)
for name in (package.__name__, *named[::2]):
    del sys.modules[name]
del sys.argv[1:]
module.main(json.loads(settings))
"""


def executables(backend: str) -> list[str]:
    """Returns the executables that a back end needs."""
    return [backend]


def command(backend: str, settings: Mapping) -> list[str]:
    """Returns the command line that starts `sandbox.guest.main` under a back end."""
    name = Path(sys.executable).resolve().relative_to(Path(sys.base_prefix).resolve())
    base = prefix() if backend != UNSAFE else sys.base_prefix
    sources = [
        text
        for module in (wire, tester, program, syscalls, confine, main)
        for text in (module.__name__, Path(module.__file__).read_text())
    ]
    python = [f"{base}/{name}", "-I", "-S", "-c", _START, json.dumps(settings), *sources]
    if backend == UNSAFE:
        return python
    root = os.geteuid() == 0
    if backend == "bwrap":
        inner = ["bwrap", "--unshare-pid", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try", "--as-pid-1"]
        inner += [] if root else ["--unshare-user", "--uid", "0", "--gid", "0"]
        inner += ["--cap-add", "ALL", "--die-with-parent", "--new-session"]
        for path, link in read_only():
            inner += ["--ro-bind", path, path] if link is None else ["--symlink", link, path]
        inner += ["--proc", "/proc", *_DEVICES, "--dir", "/tmp", "--remount-ro", "/dev", "--remount-ro", "/"]
    elif backend == "unshare":
        inner = ["unshare", *([] if root else ["--user", "--map-root-user"])]
        inner += ["--mount", "--pid", "--ipc", "--uts", "--cgroup", "--fork", "--kill-child"]
    else:
        raise ValueError(f"no back end {backend!r}")
    if root:
        outer = [sys.executable, "-I", "-S", launch.__file__, sys.base_prefix, _MOUNTED, str(_FIRST_USER)]
        return [*outer, shutil.which(inner[0]) or inner[0], *inner[1:], *python]
    return [*inner, *python]


def prefix() -> str:
    """Returns the directory of the interpreter as a sandbox sees it."""
    return _MOUNTED if os.geteuid() == 0 else sys.base_prefix


@functools.cache
def read_only() -> list[tuple[str, str | None]]:
    """Returns (path, target if it is a link, else None) for everything of this machine that a sandbox shows."""
    found = [(path, os.readlink(path) if os.path.islink(path) else None) for path in _SYSTEM if os.path.lexists(path)]
    if not prefix().startswith("/usr"):
        found.append((prefix(), None))
    return found
