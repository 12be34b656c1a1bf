"""Starts a sandbox for root: `python launch.py INTERPRETER MOUNTED FIRST_USER COMMAND ...`. Standard library only.

Gives up being root before the command runs, in a user namespace where process 1, testers and programs are three users
that the machine does not know. Only root can make such a namespace; a sandbox started by an ordinary user has one user.
The interpreter may be where only root can read, so it is bound, for this sandbox only, to a place that all can read.
"""

import ctypes
import os
import sys

USERS = {"process 1": 0, "tester": 1, "program": 2}
_NEWNS, _NEWUSER, _BIND, _REC, _PRIVATE = 0x20000, 0x10000000, 4096, 16384, 1 << 18
_LIBC = ctypes.CDLL(None, use_errno=True)


def main(interpreter: str, mounted: str, first: str, *command: str) -> None:
    _check(_LIBC.unshare(_NEWNS), "mount namespace")
    _check(_LIBC.mount(None, b"/", None, ctypes.c_ulong(_REC | _PRIVATE), None), "private mounts")
    _check(_LIBC.mount(interpreter.encode(), mounted.encode(), None, ctypes.c_ulong(_BIND), None), "bind of Python")
    ready, go = os.pipe()
    helper = os.fork()
    if helper == 0:  # it stays root of the machine and maps the users of its parent's new namespace
        os.close(go)
        os.read(ready, 1)
        for kind in ("uid_map", "gid_map"):
            with open(f"/proc/{os.getppid()}/{kind}", "w") as file:
                file.write(f"0 {first} {len(USERS)}")
        os._exit(0)
    _check(_LIBC.unshare(_NEWUSER), "user namespace")
    os.write(go, b"g")
    _, status = os.waitpid(helper, 0)
    _check(status, "map of users")
    os.setgroups([])
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)
    for descriptor in (ready, go):
        os.close(descriptor)
    os.execv(command[0], command)  # a path, because a search would import modules that can no longer be read


def _check(result: int, what: str) -> None:
    if result != 0:
        sys.exit(f"{what}: {os.strerror(ctypes.get_errno())}")


if __name__ == "__main__":
    main(*sys.argv[1:])
