"""Tests each limit of a sandbox by a program that tries to break it. A back end is used only if all limits hold."""

from pathlib import Path

from gdsd_jax.tasks.sandbox import command
from gdsd_jax.tasks.sandbox.programs import Limits, Verdict

PROBE = """
import ctypes, errno, os, socket, time

def connects(family, address):
    try:
        with socket.socket(family) as client:
            client.settimeout(0.3)
            return client.connect_ex(address) == 0
    except OSError:
        return False

def exists(path):
    return os.path.exists(path)

def written(paths):
    found = []
    for path in paths:
        try:
            with open(path + "/probe", "w") as file:
                file.write("x")
            found.append(path)
        except OSError:
            continue
    return found

def fork(count, megabytes=0):
    made = 0
    for _ in range(count):
        try:
            process = os.fork()
        except OSError:
            return made
        if process == 0:
            held = b"x" * (megabytes << 20)
            time.sleep(60)
        made += 1
    if megabytes:
        time.sleep(60)
    return made

def fill(files, size):
    try:
        for number in range(files):
            with open(f"/tmp/{number}", "wb") as file:
                file.write(bytes(size))
    except OSError as error:
        return errno.errorcode[error.errno]

def allocate(megabytes):
    return len(bytearray(megabytes << 20))

def spin():
    while True:
        pass

def environment():
    return sorted(os.environ)

def privileges():
    with open("/proc/self/status") as file:
        status = dict(line.split(":", 1) for line in file)
    return [int(status[name], 16) for name in ("CapEff", "CapPrm", "CapBnd", "NoNewPrivs")]

def namespaces():
    return ctypes.CDLL(None).unshare(0x10000000)

def refuses(call, *arguments):
    try:
        return call(*arguments) in (-1, None)
    except (OSError, ValueError):
        return True

def kill_parent():
    refuses(os.kill, os.getppid(), 9)
    return os.getppid()

def harm_parent():
    import resource
    held = [
        refuses(resource.prlimit, 1, resource.RLIMIT_FSIZE, (0, 0)),
        refuses(lambda: open("/proc/1/oom_score_adj", "w").write("1000")),
        refuses(lambda: open("/proc/sys/kernel/pid_max", "w").write("400")),
        refuses(os.setpriority, os.PRIO_PROCESS, 1, 19),
    ]
    refuses(os.kill, 1, 2)
    return all(held)

def kernel():
    call = ctypes.CDLL(None).syscall
    held = [refuses(socket.socket, family) for family in (2, 10, 16, 17, 38, 40)]
    held += [refuses(lambda: call({"x86_64": 250, "aarch64": 219}[os.uname().machine], 0, -3, 1))]
    held += [refuses(os.memfd_create, "held"), refuses(__import__("fcntl").flock, os.open("/usr/bin", 0), 1)]
    return all(held)
"""


def probes(port: int, secret: str, limits: Limits) -> dict[str, tuple[str, Verdict]]:
    """Returns {limit: (test on `PROBE`, the verdict if the limit holds)}."""
    passed = Verdict.PASSED
    hidden = [secret, str(Path(__file__).resolve()), str(Path.home() / ".bashrc"), "/etc/passwd"]
    read_only = ["/", "/usr", "/dev", "/dev/shm", "/proc", "/etc", command.prefix()]
    environment = sorted({*command.ENVIRONMENT, "LC_CTYPE", "PWD"})
    return {
        "network": (f"assert not connects(2, ('127.0.0.1', {port}))", passed),
        "files that are seen": (f"assert not any(map(exists, {hidden!r}))", passed),
        "files that are written": (f"assert written({read_only!r}) == [] and written(['/tmp']) == ['/tmp']", passed),
        "environment": (f"assert set(environment()) <= set({environment!r})", passed),
        "processes": (f"assert fork({4 * limits.processes}) < {limits.processes}", passed),
        "memory of a process": (f"allocate({2 * limits.megabytes})", Verdict.OUT_OF_MEMORY),
        "memory of all processes": (f"fork(5, {limits.total_megabytes // 4})", Verdict.OUT_OF_MEMORY),
        "file size": (f"assert fill(1, {2 * limits.file_megabytes} << 20) == 'EFBIG'", passed),
        "disk": (f"assert fill(2 * {limits.disk_megabytes}, 1 << 20) == 'ENOSPC'", passed),
        "number of files": (f"assert fill(2 * {limits.files}, 0) == 'ENOSPC'", passed),
        "time": ("spin()", Verdict.TIMED_OUT),
        "privileges": ("assert privileges() == [0, 0, 0, 1] and namespaces() != 0", passed),
        "process 1": ("assert kill_parent() == 1 and harm_parent()", passed),
        "calls of the kernel": ("assert kernel()", passed),
    }
