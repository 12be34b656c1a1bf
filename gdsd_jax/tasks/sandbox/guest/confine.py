"""Restricts what processes inside a sandbox see and can do: mounts, namespaces, keys, users. Standard library only."""

import ctypes
import os
import resource
import signal
import struct

from gdsd_jax.tasks.sandbox.guest import syscalls

_LIBC = ctypes.CDLL(None, use_errno=True)
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_REMOUNT, _MS_BIND, _MS_REC, _MS_PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
_MS_NOEXEC = 8
_CLONE_NEWNET = 0x40000000
_PIVOT_ROOT, _KEYCTL = {"x86_64": 155, "aarch64": 41}, {"x86_64": 250, "aarch64": 219}
_JOIN_SESSION_KEYRING = 1
_made = None  # the time of change of /tmp right after it was mounted, which any later write alters
_PR_SET_DUMPABLE, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT = 4, 24, 38, 47


def enter(settings):
    """Separates process 1 from the machine that it came from, and protects it from signals."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a signal that process 1 does not handle cannot be sent from inside
    lower("RLIMIT_CORE", 1)  # with 0, the kernel still starts a handler where it has one
    if settings["backend"] != "none":
        if settings["backend"] == "unshare":
            _build_root(settings["read_only"])
        _mount("proc", "/proc", "proc", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC, "hidepid=2")
        with open("/proc/sys/user/max_user_namespaces", "w") as file:
            file.write("0")  # a program cannot gain capabilities in a new user namespace, and so cannot mount anything
        _read_only("/proc")
        _check(_LIBC.unshare(_CLONE_NEWNET), "network namespace")  # in the new namespace even the loopback is down
        _check(_LIBC.sethostname(b"sandbox", 7), "name of the host")
        # The session keyring has the keys of whoever started the sandbox, so process 1 joins a new one. A kernel
        # without keys refuses the call, which does no harm.
        _LIBC.syscall(_KEYCTL[os.uname().machine], _JOIN_SESSION_KEYRING, None)
        _mount_tmp(settings)
        _give_up_for_all()
    _check(_LIBC.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0), "not dumpable")


def renew(settings):
    """Replaces /tmp by an empty one if something was written to it."""
    global _made
    if os.stat("/tmp").st_ctime_ns == _made:
        return
    os.chdir("/")
    _check(_LIBC.umount2(b"/tmp", 2), "umount")
    _mount_tmp(settings)


def _mount_tmp(settings):
    global _made
    options = f"size={settings['disk_bytes']},nr_inodes={settings['files']},mode=1777"
    _mount("tmpfs", "/tmp", "tmpfs", _MS_NOSUID | _MS_NODEV, options)
    os.chdir("/tmp")
    _made = os.stat("/tmp").st_ctime_ns


def _give_up_for_all():
    """Gives up capabilities, new privileges and many system calls, for process 1 and all processes that it starts."""
    capability = 0
    while _LIBC.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0) == 0:
        capability += 1
    _check(_LIBC.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    syscalls.install(syscalls.assemble())


def lower(name, value):
    """Sets a resource limit of this process for good: to the value, or to the present hard limit if that is lower."""
    number = getattr(resource, name)
    _, hard = resource.getrlimit(number)
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(number, (value, value))


def give_up_privileges(user, seen):
    """Changes this process to another user (None keeps the present one) and drops all capabilities.

    Its memory and descriptors stay out of reach of other processes unless `seen` is true.
    """
    if user is not None:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    _check(_LIBC.prctl(_PR_CAP_AMBIENT, 4, 0, 0, 0), "ambient capabilities")
    _check(_LIBC.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    header, none = struct.pack("Ii", 0x20080522, 0), bytes(24)
    _check(_LIBC.capset(header, none), "capabilities")
    _check(_LIBC.prctl(_PR_SET_DUMPABLE, int(seen), 0, 0, 0), "dumpable")


def _build_root(read_only):
    """Replaces the root by one that has only read-only system directories, three devices and /proc."""
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
        for each in _mounted(target):
            _read_only(each)
    for name in ("dev", "proc", "tmp"):
        os.mkdir(f"/tmp/{name}")
    for name in ("null", "random", "urandom"):
        os.close(os.open(f"/tmp/dev/{name}", os.O_CREAT, 0o644))
        _mount(f"/dev/{name}", f"/tmp/dev/{name}", None, _MS_BIND)
    os.symlink("/proc/self/fd", "/tmp/dev/fd")
    _mount("proc", "/tmp/proc", "proc", _MS_NOSUID | _MS_NODEV)
    os.chdir("/tmp")
    number = _PIVOT_ROOT[os.uname().machine]
    _check(_LIBC.syscall(number, b".", b"."), "pivot_root")
    _check(_LIBC.umount2(b".", 2), "umount of the old root")
    os.chdir("/")
    _read_only("/")


def _mounted(top):
    """Returns the mount points at a path and below it."""
    with open("/proc/self/mountinfo") as file:
        paths = [line.split()[4].encode().decode("unicode_escape").encode("latin-1").decode() for line in file]
    return [path for path in dict.fromkeys(paths) if path == top or path.startswith(f"{top}/")]


def _read_only(path):
    inherited = os.statvfs(path).f_flag & 0xC0F
    _mount(None, path, None, _MS_REMOUNT | _MS_BIND | _MS_RDONLY | _MS_NOSUID | _MS_NODEV | inherited)


def _mount(source, target, kind, flags, options=None):
    encode = [None if text is None else text.encode() for text in (source, target, kind, options)]
    _check(_LIBC.mount(*encode[:3], ctypes.c_ulong(flags), encode[3]), f"mount of {target}")


def _check(result, what):
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
