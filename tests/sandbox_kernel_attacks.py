"""Lists programs that go against process 1, the kernel or uncounted memory, in the form of `sandbox_attacks`."""

import os

from gdsd_jax.tasks.sandbox import Verdict
from gdsd_jax.tasks.sandbox.guest import syscalls

PASSED, FAILED, TIMED_OUT, MEMORY, CRASHED = list(Verdict)[:5]
ENDED = (FAILED, TIMED_OUT, CRASHED)
_HERE = ["x86_64", "aarch64"].index(os.uname().machine)
NUMBERS = {name: numbers[_HERE] for name, numbers in {**syscalls._REFUSED, **syscalls._MISSING}.items()}
NUMBERS |= {"clone": (56, 220)[_HERE], "tgkill": (234, 131)[_HERE], "rt_sigqueueinfo": (129, 138)[_HERE]}
NUMBERS |= {"pidfd_open": 434, "pidfd_send_signal": 424, "pidfd_getfd": 438, "io_uring_setup": 425, "open_tree": 428}
NUMBERS |= {"fsopen": 430, "clone3": 435, "memfd_secret": 447, "mount_setattr": 442, "process_madvise": 440}
NUMBERS |= {"sync": (162, 81)[_HERE], "syncfs": (306, 267)[_HERE], "fadvise64": (221, 223)[_HERE]}
NUMBERS |= {"seccomp": (317, 277)[_HERE]}
NUMBERS |= {"mount": (165, 40)[_HERE], "umount2": (166, 39)[_HERE], "mlockall": (151, 230)[_HERE]}

# `refused(f, ...)`: it raised an OSError or gave -1, as what the kernel refuses does.
_REFUSED = """
import ctypes, fcntl, mmap, os, resource, signal, socket, subprocess, threading, time
_libc = ctypes.CDLL(None, use_errno=True)
def refused(function, *arguments):
    try:
        return function(*arguments) == -1
    except (OSError, ValueError, MemoryError):
        return True
def call(number, *arguments):
    return _libc.syscall(ctypes.c_long(number), *map(ctypes.c_long, arguments))
def others():
    return [n for n in range(1, 64) if n not in (os.getpid(), 1)]
def write(path, text):
    with open(path, "w") as file:
        file.write(text)
"""


def _one(body: str, test: str = "assert f()", wanted: tuple = (PASSED,)) -> tuple[str, str, tuple]:
    """Returns an attack whose `f` has this body."""
    lines = "".join(f"    {line}\n" for line in body.strip().splitlines())
    return f"{_REFUSED}\ndef f():\n{lines}", test, wanted


def _calls(*calls: str) -> tuple[str, str, tuple]:
    """Returns an attack of kernel calls, by name with their arguments; each must be refused."""
    written = [f"refused(call, {NUMBERS[name]}{', ' if rest else ''}{rest})" for name, _, rest in
               (each.partition(" ") for each in calls) if NUMBERS[name] is not None]  # fmt: skip
    return _one(f"return all([{', '.join(written)}])")


_LIMITS = ("FSIZE", "AS", "CPU", "DATA", "STACK", "NOFILE", "NPROC", "CORE", "SIGPENDING", "MEMLOCK")

ATTACKS = {
    # Limits and priorities of process 1, for all who come after
    **{
        f"limit {name} of process 1": _one(f"return refused(resource.prlimit, 1, resource.RLIMIT_{name}, (0, 0))")
        for name in _LIMITS
    },
    "core files": _one(
        "return refused(resource.setrlimit, resource.RLIMIT_CORE, (0, 0)) and [\n"
        "    line.split()[4] for line in open('/proc/self/limits') if 'core file' in line] in (['1'], ['0'])"
    ),
    "owner of a socket": _one(
        "a, b = socket.socketpair()\nreturn refused(fcntl.ioctl, a, 0x8901, bytes([1, 0, 0, 0]))"
    ),
    "name of the machine": _one("return os.uname().nodename == 'sandbox'"),
    "limits of the tester": _one(
        "return all(refused(resource.prlimit, n, resource.RLIMIT_CPU, (0, 0)) for n in others())"
    ),
    "priority of process 1": _one("return refused(os.setpriority, os.PRIO_PROCESS, 1, 19)"),
    "priority of the user": _one("return refused(os.setpriority, os.PRIO_USER, 0, 19)"),
    "priority of a group": _one("return refused(os.setpriority, os.PRIO_PGRP, 1, 19)"),
    "cores of process 1": _one("return refused(os.sched_setaffinity, 1, {0})"),
    "scheduling of process 1": _one("return refused(os.sched_setscheduler, 1, os.SCHED_IDLE, os.sched_param(0))"),
    "disk priority of process 1": _calls("ioprio_set 1, 1, 3 << 13"),
    "out-of-memory score of process 1": _one("return refused(write, '/proc/1/oom_score_adj', '1000')"),
    "autogroup of process 1": _one("return refused(write, '/proc/1/autogroup', '19')"),
    "largest process number": _one("return refused(write, '/proc/sys/kernel/pid_max', '400')"),
    "kernel settings": _one(
        "paths = ('kernel/core_pattern', 'kernel/ns_last_pid', 'user/max_user_namespaces', 'kernel/threads-max',\n"
        "         'fs/mqueue/queues_max', 'net/core/wmem_default', 'kernel/shmmax', 'vm/overcommit_memory')\n"
        "return all(refused(write, '/proc/sys/' + path, '1') for path in paths)"
    ),
    "sysrq": _one("return refused(write, '/proc/sysrq-trigger', 'b')"),
    # Signals
    "interrupt of process 1": _one("refused(os.kill, 1, signal.SIGINT)\nreturn os.getppid() == 1"),
    "every signal to process 1": _one(
        "for number in range(1, 65):\n    refused(os.kill, 1, number)\nreturn os.getppid() == 1"
    ),
    "signal to a thread of process 1": _one(
        f"for number in (2, 15, 19, 34):\n    refused(call, {NUMBERS['tgkill']}, 1, 1, number)\n"
        "return os.getppid() == 1"
    ),
    "queued signal to process 1": _one(
        f"info = ctypes.create_string_buffer(128)\nfor number in (2, 34, 64):\n"
        f"    refused(call, {NUMBERS['rt_sigqueueinfo']}, 1, number, ctypes.addressof(info))\n"
        "return os.getppid() == 1"
    ),
    "process descriptors": _calls("pidfd_open 1, 0", "pidfd_getfd 3, 0, 0", "pidfd_send_signal 3, 9, 0, 0"),
    "signal through a file": _one(
        "a, b = socket.socketpair()\n"
        "return refused(fcntl.fcntl, a, fcntl.F_SETOWN, 1) and refused(fcntl.fcntl, a, 10, signal.SIGKILL)"
    ),
    "every signal to the tester": _one(
        "for process in others():\n    for number in range(1, 65):\n        refused(os.kill, process, number)\n"
        "return False",
        wanted=ENDED,
    ),
    "kill before its own end": _one("refused(os.kill, -1, 19)\nos.kill(os.getpid(), 9)", wanted=ENDED),
    # Keys
    "session keyring": _calls("keyctl 11, -3, 0, 0", "keyctl 0, -3, 0"),
    "key left behind": _calls("add_key 0, 0, 0, 0, -4", "keyctl 1, 0"),
    "key of the user": _calls("keyctl 0, -4, 1", "keyctl 0, -5, 1", "request_key 0, 0, 0, -4"),
    "names of keys": _one(
        "with open('/proc/keys') as file:\n    return not any('user' in line.split()[7:8] for line in file)"
    ),
    # Sockets
    **{
        f"sockets of family {name}": _one(f"return refused(socket.socket, {number}, {kind})")
        for name, number, kind in (
            ("VSOCK", 40, 1),
            ("ALG", 38, 5),
            ("NETLINK", 16, 3),
            ("PACKET", 17, 3),
            ("INET raw", 2, 3),
            ("BLUETOOTH", 31, 3),
            ("CAN", 29, 3),
            ("TIPC", 30, 1),
            ("XDP", 44, 3),
            ("UNIX datagram", 1, 2),
        )
    },
    "socket options": _one("a, b = socket.socketpair()\nreturn refused(a.setsockopt, 1, 7, 1 << 28)"),
    "names of the machine's sockets": _one(
        "with open('/proc/net/unix') as file:\n    return not any('/' in line or '@' in line for line in file)"
    ),
    # Memory that no process is charged for
    "memory files": _calls("memfd_create 0, 0", "memfd_secret 0"),
    "System V memory": _calls("shmget 0, 1 << 28, 0o1600", "semget 0, 32000, 0o1600", "msgget 0, 0o1600"),
    "message queues": _calls("mq_open 0, 0, 0, 0"),
    "shared memory without a file": _one("return refused(mmap.mmap, -1, 1 << 20)"),
    "shared memory of a device": _one("return refused(os.open, '/dev/zero', os.O_RDWR)"),
    "huge pages": _one("return refused(mmap.mmap, -1, 1 << 21, 0x40022)"),
    "pages given to a pipe": _calls("vmsplice 1, 0, 0, 0", "remap_file_pages 0, 0, 0, 0, 0"),
    "larger pipes": _one("a, b = os.pipe()\nreturn refused(fcntl.fcntl, a, fcntl.F_SETPIPE_SZ, 1 << 20)"),
    "queues of sockets": _one(
        "for _ in range(12):\n    if os.fork() == 0:\n        kept = []\n        try:\n            while True:\n"
        "                kept += [socket.socketpair()]\n                for end in kept[-1]:\n"
        "                    end.setblocking(False)\n                    try:\n                        while True:\n"
        "                            end.send(bytes(200000))\n                    except BlockingIOError:\n"
        "                        pass\n        except OSError:\n            time.sleep(60)\ntime.sleep(3)\nreturn True",
        wanted=(PASSED, MEMORY),
    ),
    "queues of pipes": _one(
        "for _ in range(12):\n    if os.fork() == 0:\n        try:\n            while True:\n"
        "                a, b = os.pipe()\n                os.set_blocking(b, False)\n                try:\n"
        "                    while True:\n                        os.write(b, bytes(4096))\n"
        "                except BlockingIOError:\n                    pass\n        except OSError:\n"
        "            time.sleep(60)\ntime.sleep(1)\nreturn True",
        wanted=(PASSED, MEMORY),
    ),
    "descriptors on their way": _one(
        "try:\n    for _ in range(20000):\n        a, b = socket.socketpair()\n"
        "        socket.send_fds(a, [b'x'], [a.fileno(), b.fileno()])\n"
        "        a.close(), b.close()\nexcept OSError:\n    pass\nreturn True",
        wanted=(PASSED, MEMORY),
    ),
    "locked memory": _calls("mlockall 3"),
    "kernel rings": _calls("io_uring_setup 8, 0", "io_setup 8, 0"),
    # Files of the machine
    "watch on its programs": _calls("inotify_init1 0", "inotify_add_watch 3, 0, 1", "fanotify_init 0, 0"),
    "lock on its programs": _one("return refused(fcntl.flock, os.open('/usr/bin', 0), fcntl.LOCK_SH)"),
    "record lock on its programs": _one(
        "with open(os.path.realpath('/bin/sh'), 'rb') as file:\n    return refused(fcntl.lockf, file, fcntl.LOCK_SH)"
    ),
    "lease on its programs": _one(
        "with open(os.path.realpath('/bin/sh'), 'rb') as file:\n"
        "    return refused(fcntl.fcntl, file, 1024, fcntl.F_RDLCK)"
    ),
    "notices of its directories": _one("return refused(fcntl.fcntl, os.open('/usr', 0), fcntl.F_NOTIFY, 1)"),
    "hard link to its programs": _one("return refused(os.link, os.path.realpath('/bin/sh'), '/tmp/sh')"),
    "mode of its programs": _one("return refused(os.chmod, '/usr/bin', 0o777) and refused(os.utime, '/usr')"),
    "interpreter overwritten": _one("return refused(write, os.path.realpath('/proc/self/exe'), 'x')"),
    "handles of files": _calls("name_to_handle_at -100, 0, 0, 0, 0", "open_by_handle_at 3, 0, 0"),
    "terminals": _one("return refused(os.open, '/dev/ptmx', 2) and refused(os.open, '/dev/tty', 2)"),
    "typing into a terminal": _one("return refused(fcntl.ioctl, 0, 0x5412, b'x') and refused(fcntl.ioctl, 0, 0x541C)"),
    "sizes of sparse files": _one("with open('/tmp/x', 'wb') as file:\n    return refused(file.truncate, 1 << 40)"),
    "attributes of files": _one(
        "try:\n    for n in range(100000):\n        os.setxattr('/tmp', f'user.{n}', bytes(1000))\n"
        "except OSError:\n    return True"
    ),
    "tmp closed to others": _one("refused(os.chmod, '/tmp', 0)\nreturn True", wanted=(PASSED, FAILED)),
    "deep directories": _one(
        "try:\n    for _ in range(3000):\n        os.mkdir('d')\n        os.chdir('d')\nexcept OSError:\n    pass\n"
        "return True"
    ),
    "state of the kernel": _one(
        "return all(refused(open, path, 'rb') for path in ('/proc/kcore', '/proc/kmsg', '/dev/kmsg', '/dev/mem',\n"
        "    '/sys/kernel', '/sys/fs/cgroup/cgroup.procs', '/proc/1/maps', '/proc/1/mem', '/proc/1/fd/0'))"
    ),
    "sockets of daemons": _one(
        "return not any(map(os.path.exists, ('/run', '/var', '/var/run/docker.sock', '/root', '/home', '/etc')))"
    ),
    # The kernel
    "namespaces by clone": _one(
        f"return all(refused(call, {NUMBERS['clone']}, flag | 17, 0, 0, 0, 0)\n"
        "           for flag in (0x10000000, 0x20000, 0x40000000, 0x20000000, 0x2000000))"
    ),
    "namespaces of others": _calls("setns 0, 0", "unshare 0x10000000", "clone3 0, 0", "chroot 0", "pivot_root 0, 0"),
    "mounts": _calls("mount 0, 0, 0, 0, 0", "umount2 0, 2", "fsopen 0, 0", "open_tree 0, 0, 0", "mount_setattr 0, 0"),
    "memory of others": _calls(
        "process_vm_readv 1, 0, 0, 0, 0, 0",
        "process_vm_writev 1, 0, 0, 0, 0, 0",
        "ptrace 16, 1, 0, 0",
        "process_madvise 3, 0, 0, 20, 0",
        "kcmp 1, 1, 0, 0, 0",
        "move_pages 1, 0, 0, 0, 0, 0",
    ),
    "programs in the kernel": _calls("bpf 0, 0, 0", "perf_event_open 0, 0, -1, -1, 0", "userfaultfd 1"),
    "kernel log": _calls("syslog 3, 0, 0"),
    "modules": _calls("init_module 0, 0, 0", "finit_module 0, 0, 0", "delete_module 0, 0", "kexec_load 0, 0, 0, 0"),
    "clocks": _calls("settimeofday 0, 0", "clock_settime 0, 0", "adjtimex 0", "clock_adjtime 0, 0"),
    "names and power": _calls("sethostname 0, 0", "setdomainname 0, 0", "reboot 0, 0, 0, 0", "vhangup", "acct 0"),
    "swap and quotas": _calls("swapon 0, 0", "swapoff 0", "quotactl 0, 0, 0, 0", "sysfs 3", "uselib 0", "ustat 0, 0"),
    "old machinery": _calls("modify_ldt 0, 0, 0", "personality -1", "iopl 3", "ioperm 0, 1, 1", "_sysctl 0"),
    "calls of the 32-bit kernel": _one(
        "if os.uname().machine != 'x86_64':\n    os.kill(os.getpid(), 9)\n"
        "code = mmap.mmap(-1, 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, 7)\n"
        "code.write(bytes.fromhex('b814000000cd80c3'))  # getpid by int 0x80\n"
        "ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(code)))()\nreturn True",
        wanted=(CRASHED,),
    ),
    "calls of the x32 kernel": _one("return refused(call, 0x40000000 | 39)"),
    "calls yet unknown": _one("return all(refused(call, number) for number in range(445, 600))"),
    "identity": _one(
        "users = [os.getuid()] + [refused(os.setresuid, n, n, n) for n in (0, 1, 1001) if n != os.getuid()]\n"
        "return all(users[1:]) and refused(os.setgroups, [0])"
    ),
    "capabilities again": _one(
        "header, wanted = (ctypes.c_uint * 2)(0x20080522, 0), (ctypes.c_uint * 6)(*[0xFFFFFFFF] * 6)\n"
        "return _libc.capset(header, wanted) == -1 and _libc.prctl(38, 0, 0, 0, 0) == -1\n"
    ),
    "preloaded library of a setuid program": _one(
        "done = subprocess.run(['/bin/su', '-c', 'id'], env={'LD_PRELOAD': '/tmp/x.so'}, capture_output=True)\n"
        "return b'uid=0' not in done.stdout",
        wanted=(PASSED, FAILED),
    ),
    # Disks, caches and files of the machine
    "disks waited for": _one(
        "file = os.open('/usr/bin/env', os.O_RDONLY)\n"
        f"return refused(call, {NUMBERS['sync']}) and refused(call, {NUMBERS['syncfs']}, file)"
    ),
    "its programs dropped from memory": _one(
        f"return refused(call, {NUMBERS['fadvise64']}, os.open('/usr/bin/env', os.O_RDONLY), 0, 0, 4)"
    ),
    "hints kept with its programs": _one(
        "file, hint = os.open('/usr/bin/env', os.O_RDONLY), bytes([2] + [0] * 7)\n"
        "return refused(fcntl.fcntl, file, 1036, hint) and refused(fcntl.fcntl, file, 1038, hint)"
    ),
    "flags of its programs": _one(
        "file = os.open('/usr/bin/env', os.O_RDONLY)\n"
        "return all(refused(fcntl.ioctl, file, number, bytes(64)) for number in (0x40086602, 0x401C5820, 0x40049409))"
    ),
    "times of its programs": _one("return refused(os.utime, '/usr/bin/env', (1, 1))"),
    "attributes without end": _one(
        "kept = 0\ntry:\n    for number in range(100000):\n        if number % 100 == 0:\n"
        "            open(f'/tmp/{number}', 'w').close()\n"
        "        os.setxattr(f'/tmp/{number - number % 100}', f'user.{number}', bytes(60000))\n        kept += 60000\n"
        "except OSError:\n    pass\nreturn kept < 1 << 28",
        wanted=(PASSED, MEMORY),
    ),
    "memory through locks of threads": _one(
        "kept = []\ntry:\n    for _ in range(100):\n        thread = threading.Thread(target=time.sleep, args=(30,))\n"
        "        thread.daemon = True\n        thread.start()\n        kept.append(thread)\nexcept RuntimeError:\n"
        "    pass\nreturn len(kept) < 32"
    ),
    "children adopted": _one(
        "_libc.prctl(36, 1, 0, 0, 0)\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n"
        "        time.sleep(600)\n    os._exit(0)\nreturn True"
    ),
    "calls answered by itself": _one(
        "class Code(ctypes.Structure):\n    _fields_ = [('length', ctypes.c_ushort), ('lines', ctypes.c_char_p)]\n"
        "lines = bytes.fromhex('06000000' '0000c07f')\n"
        f"call({NUMBERS['seccomp']}, 1, 8, ctypes.addressof(Code(1, lines)))\nos.getpid()\nreturn True",
        wanted=(*ENDED, PASSED),
    ),
    "group and terminal of process 1": _one(
        "return all(refused(f, *a) for f, a in ((os.setpgid, (1, 0)), (os.tcsetpgrp, (0, 1)), (os.getpgid, (99999,))))"
    ),
    "cgroups": _one("return refused(os.listdir, '/sys/fs/cgroup') and refused(os.mkdir, '/sys')"),
    "filter of its own": _one("_libc.prctl(22, 1, 0, 0, 0)\nreturn os.getpid()", wanted=(*ENDED, PASSED)),
    # Time
    "shell fork bomb": _one("subprocess.run(['sh', '-c', 'f() { f | f & }; f; sleep 9'])", "f()\nassert 0", ENDED),
    "catastrophic pattern": _one("import re\nreturn re.match('(a+)+$', 'a' * 99 + 'b')", wanted=(TIMED_OUT,)),
    "tower of powers": _one("return 10 ** 10 ** 10", wanted=(TIMED_OUT, MEMORY)),
    "stack overflow": _one(
        "import sys\nsys.setrecursionlimit(1 << 30)\ng = lambda x: repr(x) + g([x])\nreturn g(1)",
        wanted=(*ENDED, MEMORY),
    ),
    "zombies": _one(
        "for _ in range(500):\n    try:\n        if os.fork() == 0:\n            os._exit(0)\n    except OSError:\n"
        "        break\nreturn True"
    ),
    "descriptors": _one(
        "kept = []\ntry:\n    while True:\n        kept.append(os.open('/tmp', 0))\nexcept OSError:\n"
        "    return len(kept) < 64"
    ),
    "timers": _one("signal.setitimer(signal.ITIMER_REAL, 0.2)\ntime.sleep(60)", wanted=ENDED),
    "endless answer": _one("while True:\n    yield 1", "assert sum(f())", (TIMED_OUT,)),
    "answer beyond the frame": _one("return 'x' * (1 << 27)", "assert f() == 'x'", (*ENDED, MEMORY)),
    "answer of a million lists": _one("return [[] for _ in range(1 << 20)]", "assert f() == 0", (*ENDED, MEMORY)),
    "answer nested without end": _one("x = []\nx.append(x)\nreturn x", "assert f() == 0", ENDED),
}
