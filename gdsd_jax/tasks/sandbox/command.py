"""The command lines that start process 1 of a sandbox under each back end."""

import functools
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from gdsd_jax.tasks.sandbox.guest import confine, main, objects

BACKENDS = ("bwrap", "unshare")
UNSAFE = "none"
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "HOME": "/tmp", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}

_UNPRIVILEGED = 64321  # a user and group id that no system gives away
_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")
_MOUNTED = "/mnt"
# Runs SETTINGS NAME SOURCE ...: the sources as modules, of which the last has `main`. Programs do not see the modules.
_START = """
import json, sys, types
settings, *named = sys.argv[1:]
for name, source in zip(named[::2], named[1::2]):
    sys.modules[name] = module = types.ModuleType(name)
    exec(compile(source, name, "exec"), vars(module))
for name in named[::2]:
    del sys.modules[name]
del sys.argv[1:]
module.main(json.loads(settings))
"""


def executables(backend: str) -> list[str]:
    """Executables that a back end needs."""
    return [backend, *(["unshare", "setpriv", "mount"] if os.geteuid() == 0 else [])]


def command(backend: str, settings: Mapping) -> list[str]:
    """The command line that starts `sandbox.guest.main` under a back end."""
    name = Path(sys.executable).resolve().relative_to(Path(sys.base_prefix).resolve())
    base = prefix() if backend != UNSAFE else sys.base_prefix
    sources = [
        text for module in (objects, confine, main) for text in (module.__name__, Path(module.__file__).read_text())
    ]
    python = [f"{base}/{name}", "-I", "-S", "-c", _START, json.dumps(settings), *sources]
    if backend == UNSAFE:
        return python
    if backend == "bwrap":
        inner = ["bwrap", "--unshare-user", "--unshare-pid", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
        inner += ["--uid", "0", "--gid", "0", "--cap-add", "ALL", "--as-pid-1", "--die-with-parent", "--new-session"]
        for path, link in read_only():
            inner += ["--ro-bind", path, path] if link is None else ["--symlink", link, path]
        inner += ["--proc", "/proc", "--dev", "/dev", "--dir", "/tmp", "--remount-ro", "/dev", "--remount-ro", "/"]
    elif backend == "unshare":
        inner = ["unshare", "--user", "--map-root-user", "--mount", "--pid", "--ipc", "--uts", "--cgroup"]
        inner += ["--fork", "--kill-child"]
    else:
        raise ValueError(f"no back end {backend!r}")
    inner += python
    if os.geteuid() != 0:
        return inner
    # The interpreter may live where only root can look: bind it, in a mount namespace, to a place that all can read.
    identity = [f"--reuid={_UNPRIVILEGED}", f"--regid={_UNPRIVILEGED}", "--clear-groups", "--inh-caps=-all"]
    script = 'mount --bind "$0" "$1" && shift && exec setpriv "$@"'
    outer = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, sys.base_prefix, _MOUNTED]
    return [*outer, *identity, *inner]


def prefix() -> str:
    """Where the interpreter is, seen from a sandbox."""
    return _MOUNTED if os.geteuid() == 0 else sys.base_prefix


@functools.cache
def read_only() -> list[tuple[str, str | None]]:
    """(path, target of the link that it is, or None) of what a sandbox shows of this machine."""
    found = [(path, os.readlink(path) if os.path.islink(path) else None) for path in _SYSTEM if os.path.lexists(path)]
    if not prefix().startswith("/usr"):
        found.append((prefix(), None))
    return found
