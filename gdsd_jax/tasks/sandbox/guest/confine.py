"""What a process inside a sandbox can see and do: mounts, namespaces and capabilities. Standard library only."""

import ctypes
import os
import struct

_LIBC = ctypes.CDLL(None, use_errno=True)
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_REMOUNT, _MS_BIND, _MS_REC, _MS_PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
_CLONE_NEWNET, _CLONE_NEWIPC = 0x40000000, 0x08000000
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_PR_SET_DUMPABLE, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT = 4, 24, 38, 47


def enter(settings):
    if settings["backend"] != "none":
        if settings["backend"] == "unshare":
            _build_root(settings["read_only"])
        _mount("proc", "/tmp", "proc", _MS_NOSUID | _MS_NODEV)
        with open("/tmp/sys/user/max_user_namespaces", "w") as file:
            file.write("0")  # no capabilities by another user namespace, and so no mounts of a program's own
        _check(_LIBC.unshare(_CLONE_NEWNET), "network namespace")  # one whose loopback is down
        renew(settings)
    _check(_LIBC.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0), "not dumpable")


def renew(settings):
    """An empty /tmp in place of what is mounted there, and no System V segments or message queues."""
    os.chdir("/")
    _check(_LIBC.umount2(b"/tmp", 2), "umount")
    options = f"size={settings['disk_bytes']},nr_inodes={settings['files']},mode=1777"
    _mount("tmpfs", "/tmp", "tmpfs", _MS_NOSUID | _MS_NODEV, options)
    _check(_LIBC.unshare(_CLONE_NEWIPC), "IPC namespace")
    os.chdir("/tmp")


def give_up_privileges():
    _check(_LIBC.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    _check(_LIBC.prctl(_PR_CAP_AMBIENT, 4, 0, 0, 0), "ambient capabilities")
    capability = 0
    while _LIBC.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0) == 0:
        capability += 1
    header, none = struct.pack("Ii", 0x20080522, 0), bytes(24)
    _check(_LIBC.capset(header, none), "capabilities")


def _build_root(read_only):
    """A root of read-only system directories, four devices and /proc, in place of the one that this process has."""
    _mount(None, "/", None, _MS_REC | _MS_PRIVATE)
    _mount("tmpfs", "/tmp", "tmpfs", _MS_NOSUID | _MS_NODEV, "size=1m,mode=755")
    for source, link in read_only:
        target = f"/tmp{source}"
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if link is not None:
            os.symlink(link, target)
            continue
        os.mkdir(target)
        _mount(source, target, None, _MS_BIND | _MS_REC)
        inherited = os.statvfs(target).f_flag & 0xC0F
        _mount(None, target, None, _MS_REMOUNT | _MS_BIND | _MS_RDONLY | _MS_NOSUID | _MS_NODEV | inherited)
    for name in ("dev", "proc", "tmp"):
        os.mkdir(f"/tmp/{name}")
    for name in ("null", "zero", "random", "urandom"):
        os.close(os.open(f"/tmp/dev/{name}", os.O_CREAT, 0o644))
        _mount(f"/dev/{name}", f"/tmp/dev/{name}", None, _MS_BIND)
    _mount("proc", "/tmp/proc", "proc", _MS_NOSUID | _MS_NODEV)
    os.chdir("/tmp")
    number = _PIVOT_ROOT[os.uname().machine]
    _check(_LIBC.syscall(number, b".", b"."), "pivot_root")
    _check(_LIBC.umount2(b".", 2), "umount of the old root")
    os.chdir("/")
    _mount(None, "/", None, _MS_REMOUNT | _MS_BIND | _MS_RDONLY | _MS_NOSUID | _MS_NODEV)


def _mount(source, target, kind, flags, options=None):
    encode = [None if text is None else text.encode() for text in (source, target, kind, options)]
    _check(_LIBC.mount(*encode[:3], ctypes.c_ulong(flags), encode[3]), f"mount of {target}")


def _check(result, what):
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
