"""Programs that go against the sandbox or its verdicts: {name: (program, test, verdicts that mean it was contained)}.

`PORT` and `SECRET` in a test stand for a port that listens on the machine and a file that every user can read.
"""

from gdsd_jax.tasks.sandbox import Verdict

PASSED, FAILED, TIMED_OUT, MEMORY, CRASHED = list(Verdict)[:5]
# How a program that was ended can show, by chance of timing.
ENDED = (FAILED, TIMED_OUT, CRASHED)

_EVERYWHERE = """
import os
def readable(path):
    try:
        with open(path, "rb") as file:
            return bool(file.read(1))
    except OSError:
        return False
def names(path):
    try:
        return os.listdir(path)
    except OSError:
        return []
"""
_FORK = """
import os, time
def forks(count):
    made = 0
    for _ in range(count):
        try:
            if os.fork() == 0:
                time.sleep(30)
        except OSError:
            break
        made += 1
    return made
"""
_FILL = """
import errno, os
def fill(directory, count, size):
    try:
        for number in range(count):
            with open(f"{directory}/{number}", "wb") as file:
                file.write(bytes(size))
    except OSError as error:
        return errno.errorcode[error.errno]
"""
_REACH = """
import socket
def reach(family, address):
    try:
        with socket.socket(family) as client:
            client.settimeout(0.3)
            client.connect(address)
        return True
    except OSError:
        return False
def resolve(name):
    try:
        return socket.getaddrinfo(name, 80)
    except OSError:
        return None
def own():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return reach(2, server.getsockname())
"""
CONTAINED = {
    # What it may see
    "home": (_EVERYWHERE, "assert names('/root') == [] and names('/home') == []", (PASSED,)),
    "file of the machine": (_EVERYWHERE, "assert not readable(SECRET)", (PASSED,)),
    "password file": (_EVERYWHERE, "assert not readable('/etc/passwd') and not readable('/etc/shadow')", (PASSED,)),
    "environment": ("import os\ndef f(): return sorted(os.environ)", "assert 'SANDBOX_SECRET' not in f()", (PASSED,)),
    "environment of others": (_EVERYWHERE, "assert not readable('/proc/1/environ')", (PASSED,)),
    "processes of others": (
        _EVERYWHERE, "assert sum(name.isdigit() for name in names('/proc')) < 6", (PASSED,)
    ),
    "root of process 1": (_EVERYWHERE, "assert not readable('/proc/1/root/etc/passwd')", (PASSED,)),
    "memory of the tester": (
        "import os\ndef f():\n"
        "    others = [int(n) for n in os.listdir('/proc') if n.isdigit() and int(n) != os.getpid()]\n"
        "    found = []\n    for each in others:\n        try:\n"
        "            found.append(open(f'/proc/{each}/mem', 'rb'))\n"
        "        except OSError:\n            continue\n    return len(found)",
        "assert f() == 0", (PASSED,),
    ),
    "descriptors of the tester": (
        "import os\ndef f():\n    found = []\n"
        "    for each in [n for n in os.listdir('/proc') if n.isdigit() and int(n) != os.getpid()]:\n"
        "        try:\n            found += [os.readlink(f'/proc/{each}/fd/{n}') for n in range(9)]\n"
        "        except OSError:\n            continue\n    return found",
        "assert f() == []", (PASSED,),
    ),
    "tests in its own memory": (
        "import gc, sys\ndef f(): return [type(o).__name__ for o in gc.get_objects() if isinstance(o, dict) "
        "and any(isinstance(v, str) and 'needle' + '_in_test' in v for v in o.values())]",
        "assert f() == []  # needle_in_test", (PASSED,),
    ),
    "symlink out": (
        _EVERYWHERE + "def f(path):\n    os.symlink(path, '/tmp/link')\n    return readable('/tmp/link')",
        "assert not f(SECRET)", (PASSED,),
    ),
    "parent directories": (_EVERYWHERE, "assert not readable('/tmp/' + '../' * 30 + SECRET.lstrip('/'))", (PASSED,)),
    "modules of the project": (
        "def f():\n    import sys\n    try:\n        import gdsd_jax\n    except ImportError:\n"
        "        return [n for n in sys.modules if 'jax' in n]",
        "assert f() == []", (PASSED,),
    ),
    # What it may write
    "write to the system": (
        "def f(path):\n    try:\n        open(path, 'w').close()\n    except OSError:\n        return False\n"
        "    return True",
        "paths = ['/x', '/usr/x', '/usr/bin/python3', '/dev/x', '/proc/sys/kernel/core_pattern', '/bin/sh']\n"
        "assert not any(map(f, paths))",
        (PASSED,),
    ),
    "shared memory": (_FILL, "assert fill('/dev/shm', 1, 1) in ('EROFS', 'ENOENT')", (PASSED,)),
    "large file": (_FILL, "assert fill('/tmp', 1, 64 << 20) == 'EFBIG'", (PASSED,)),
    "disk filler": (_FILL, "assert fill('/tmp', 64, 1 << 20) == 'ENOSPC'", (PASSED,)),
    "inodes": (_FILL, "assert fill('/tmp', 5000, 0) == 'ENOSPC'", (PASSED,)),
    "device": (
        "import os, stat\ndef f():\n    try:\n        os.mknod('/tmp/d', 0o600 | stat.S_IFBLK, os.makedev(254, 0))\n"
        "    except OSError:\n        return 'refused'",
        "assert f() == 'refused'", (PASSED,),
    ),
    # Network
    "network by name": (_REACH, "assert resolve('example.com') is None", (PASSED,)),
    "network by address": (_REACH, "assert not reach(2, ('1.1.1.1', 53))", (PASSED,)),
    "loopback": (_REACH, "assert not reach(2, ('127.0.0.1', PORT)) and not reach(10, ('::1', PORT))", (PASSED,)),
    "loopback of its own": (_REACH, "assert not own()", (PASSED, FAILED)),
    "cloud metadata": (_REACH, "assert not reach(2, ('169.254.169.254', 80))", (PASSED,)),
    # What it may take
    "fork bomb": ("import os\ndef f():\n    while True:\n        try:\n            os.fork()\n        except OSError:\n"
                  "            pass", "f()", ENDED),
    "processes": (_FORK, "assert 0 < forks(60) < 16", (PASSED,)),
    "threads": (
        "import threading, time\ndef f():\n    n = 0\n    try:\n        while n < 60:\n"
        "            threading.Thread(target=time.sleep, args=(30,), daemon=True).start()\n            n += 1\n"
        "    except RuntimeError:\n        pass\n    return n",
        "assert f() < 16", (PASSED,),
    ),
    "memory bomb": ("def f(): return len(bytearray(1 << 34))", "f()", (MEMORY,)),
    "growing list": ("def f():\n    x = [0]\n    while True:\n        x += x", "f()", (MEMORY,)),
    "memory of many processes": (
        "import os, time\ndef f():\n    for _ in range(6):\n        if os.fork() == 0:\n"
        "            held = b'x' * (100 << 20)\n            time.sleep(30)\n    time.sleep(30)",
        "f()", (MEMORY,),
    ),
    "output flood": ("import sys\ndef f():\n    for _ in range(1000):\n        print('x' * 10000)\n    return 1",
                     "assert f() == 1", (PASSED,)),
    "endless loop": ("def f():\n    while True:\n        pass", "f()", (TIMED_OUT,)),
    "sleep": ("import time\ndef f(): time.sleep(60)", "f()", (TIMED_OUT,)),
    "endless at the top": ("while True:\n    pass", "f()", (TIMED_OUT,)),
    "deaf to signals": (
        "import signal\nfor n in range(1, 65):\n    try:\n        signal.signal(n, signal.SIG_IGN)\n"
        "    except (OSError, ValueError):\n        pass\ndef f():\n    while True:\n        pass",
        "f()", (TIMED_OUT,),
    ),
    "thread that goes on": (
        "import threading\ndef spin():\n    while True:\n        pass\nfor _ in range(3):\n"
        "    threading.Thread(target=spin).start()\ndef f(): return 1",
        "assert f() == 1", (PASSED, TIMED_OUT),
    ),
    "child that outlives": (
        "import os, time\ndef f():\n    if os.fork() == 0:\n        os.setsid()\n        if os.fork() == 0:\n"
        "            time.sleep(600)\n        os._exit(0)\n    return 1",
        "assert f() == 1", (PASSED,),
    ),
    "limits raised again": (
        "import resource\ndef f():\n    try:\n        resource.setrlimit(resource.RLIMIT_AS, (-1, -1))\n"
        "    except (ValueError, OSError):\n        return 'refused'",
        "assert f() == 'refused'", (PASSED,),
    ),
    # Privileges
    "namespaces of its own": (
        "import ctypes\ndef f(): return [ctypes.CDLL(None).unshare(n) for n in (0x10000000, 0x20000, 0x40000000)]",
        "assert f() == [-1, -1, -1]", (PASSED,),
    ),
    "mount": ("import ctypes\ndef f(): return ctypes.CDLL(None).mount(b'x', b'/tmp', b'tmpfs', 0, None)",
              "assert f() == -1", (PASSED,)),
    "setuid binaries": (
        "import subprocess\ndef f():\n    done = subprocess.run(['/usr/bin/su', '-c', 'id'], capture_output=True)\n"
        "    return done.returncode != 0 or b'uid=0' not in done.stdout",
        "assert f()", (PASSED, FAILED),
    ),
    "trace": (
        "import ctypes, os\ndef f(): return [ctypes.CDLL(None).ptrace(16, int(n), 0, 0) for n in os.listdir('/proc') "
        "if n.isdigit() and int(n) != os.getpid()]",
        "assert set(f()) <= {-1}", (PASSED,),
    ),
    "kill of process 1": (
        "import os\ndef f():\n    try:\n        os.kill(1, 9)\n    except OSError:\n        pass\n"
        "    return os.getppid()",
        "assert f() == 1", (PASSED,),
    ),
    "kill of all": ("import os\ndef f(): os.kill(-1, 9)", "f()", (*ENDED, PASSED)),
    "kill of its group": ("import os\ndef f(): os.killpg(0, 9)", "f()", ENDED),
    "stopped tester": (
        "import os\ndef f():\n    for n in os.listdir('/proc'):\n"
        "        if n.isdigit() and int(n) not in (1, os.getpid()):\n"
        "            os.kill(int(n), 19)\n    return 1",
        "f()\nassert False", ENDED,
    ),
    "segmentation fault": ("import ctypes\ndef f(): ctypes.string_at(0)", "f()", (CRASHED,)),
}  # fmt: skip
