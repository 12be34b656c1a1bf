"""The sandbox, on every back end that this machine has: attacks, cheats, verdicts, and a pool that goes on."""

import contextlib
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from collections import Counter, deque
from datetime import datetime, timedelta
from decimal import Decimal
from fractions import Fraction

import attack_sandbox
import pytest
from attack_sandbox import LIMITS, SHORT

from gdsd_jax.runtime.errors import UserError
from gdsd_jax.tasks import sandbox, workers
from gdsd_jax.tasks.sandbox import BACKENDS, UNSAFE, Program, Verdict, judge
from gdsd_jax.tasks.sandbox.guest import wire

INSTALLED = [name for name in BACKENDS if shutil.which(name)]
GOOD = Program("def f(x):\n    return x + 1", ("assert f(1) == 2", "assert f(1) == 3"))


# The back end that would be used is in the fast tier.
@pytest.fixture(
    scope="module", params=[pytest.param(n, marks=[] if n == INSTALLED[0] else [pytest.mark.slow]) for n in INSTALLED]
)
def backend(request):
    return request.param


def test_a_back_end_is_installed():
    assert INSTALLED, "install bubblewrap or util-linux: without them nothing here is tested"


@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.slow), 8])
def test_attacks_are_contained_and_cheats_do_not_pass(backend, every):
    found = attack_sandbox.outcomes(backend, every)
    assert len(attack_sandbox.ATTACKS) >= 100 and len(attack_sandbox.CHEATS) >= 60
    assert len(found) * every >= len(attack_sandbox.ATTACKS) + len(attack_sandbox.CHEATS)
    assert [wrong for name, each in found.items() if (wrong := attack_sandbox.not_contained(name, *each))] == []


@pytest.mark.slow
@pytest.mark.skipif(
    os.geteuid() != 0, reason="only root can become another user; the test above ran as an ordinary one"
)
def test_the_same_as_an_ordinary_user(backend):
    done = attack_sandbox.as_user("--backend", backend)
    assert ", 0 wrong" in done.stdout, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount below /usr")
def test_what_is_mounted_below_the_systems_directories_is_read_only(backend):
    script = f"""
from gdsd_jax.tasks.sandbox import Program, judge
source = "import os\\ndef f(): return os.access('/usr/games', os.W_OK) or os.listdir('/usr/games')"
print(judge([Program(source, ("assert f() == ['seen']",))], backend={backend!r}, processes=1))
"""
    mounts = 'mount -t tmpfs x /usr/games && chmod 777 /usr/games && touch /usr/games/seen && exec "$0" -c "$1"'
    command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", mounts, sys.executable, script]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "PASSED" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("victim", ["main", "worker"])
def test_nothing_outlives_the_process_that_asked(backend, victim):
    script = f"""
from gdsd_jax.tasks.sandbox import Limits, Program, judge
print("begin", flush=True)
judge([Program("while True: pass", ("pass",) * 50)], limits=Limits(seconds=60.0), backend={backend!r}, processes=1)
"""
    main = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    main.stdout.readline()
    found, deadline = [], time.monotonic() + 60.0
    while len(found) < 4 and time.monotonic() < deadline:  # a worker, process 1 and what started it, tester, program
        time.sleep(0.1)
        found = _descendants(main.pid)
    os.kill(main.pid if victim == "main" else found[0], 9)
    start = time.monotonic()
    while any(map(_runs, found)) and time.monotonic() - start < 20.0:
        time.sleep(0.05)
    main.kill()
    main.communicate()
    assert len(found) >= 4
    assert time.monotonic() - start < 5.0


def _stat(process: int) -> list[str]:
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()
    except OSError:
        return ["Z", "0"]


def _runs(process: int) -> bool:
    return _stat(process)[0] != "Z"


def _descendants(process: int) -> list[int]:
    children = [int(n) for n in os.listdir("/proc") if n.isdigit() and _stat(int(n))[1] == str(process)]
    return [each for child in children for each in (child, *_descendants(child))]


def test_bytes_that_nobody_vouches_for_are_a_value_or_malformed():
    values = [None, True, 2**70, 0.5, 1j, "\ud800", b"a", [1, "a"], (1.0, 2.0), {1: {2}}, frozenset({3}), int, range(3)]
    values += [Counter("aab"), deque([1], 3), Decimal("1.50"), Fraction(1, 3), datetime(2020, 1, 2), timedelta(1)]
    generator = random.Random(0)
    written = [wire.dump(value, None) for value in values]
    for value, data in zip(values, written, strict=True):
        read = wire.load(data, None)
        assert type(read) is type(value) and read == value
    for _ in range(20000):
        data = bytearray(generator.choice(written))
        for _ in range(generator.randint(1, 4)):
            place = generator.randrange(len(data) + 1)
            data[place : place + generator.randint(0, 2)] = generator.choice([generator.randbytes(2), *written])
        with contextlib.suppress(wire.Malformed):
            wire.load(bytes(data), lambda number: number)


def test_every_limit_proves_itself(backend):
    assert sandbox.check(backend) is None


@pytest.mark.parametrize(
    ("source", "test"),
    [
        ("def f(x): x.append(3); return x", "l = [1]\nassert f(l) == [1, 3] and l == [1, 3]"),
        ("def f(x): return {(1, 2): {3}, 'a': [x, None, 1.5, 2j, b'b']}",
         "assert f(1)[(1, 2)] == {3} and f(2)['a'][0] == 2"),
        ("class Node:\n    def __init__(self, v): self.v, self.next = v, None\n"
         "def f(n): return n.v + (f(n.next) if n.next else 0)",
         "a = Node(1)\na.next = Node(2)\nassert f(a) == 3 and isinstance(a, Node) and a.next.v == 2"),
        ("from collections import namedtuple, Counter\nP = namedtuple('P', 'x y')\ndef f(): return P(1, 2)\n"
         "def g(): return Counter('aab')", "assert f() == (1, 2) and f().x == 1 and g() == {'a': 2, 'b': 1}"),
        ("def f():\n    yield from range(3)", "assert list(f()) == [0, 1, 2] and sum(x for x in f()) == 3"),
        ("def f(x): raise ValueError('no')",
         "try:\n    f(1)\nexcept ValueError as e:\n    assert str(e) == 'no'\nelse:\n    assert 0"),
        ("import re, math\ndef f(s): return re.match('a', s)\ndef g(): return 0.1 + 0.2",
         "assert f('a') and not f('b') and math.isclose(g(), 0.3)"),
        ("from fractions import Fraction as F\ndef f(): return F(1, 3)",
         "from fractions import Fraction\nassert f() == Fraction(1, 3)"),
        ("def f(): return 10 ** 5000, int, 'ü\\ud800'", "assert f() == (10 ** 5000, int, 'ü\\ud800')"),
        ("class A:\n    def __init__(self, v): self.v = v\n    def __eq__(self, o): return self.v == o.v\n",
         "assert A(1) == A(1) and A(1) != A(2) and A(1) != 1"),
        ("from dataclasses import dataclass\n@dataclass(frozen=True)\nclass P:\n    x: int\n    y: list\n",
         "assert P(1, [2]) == P(1, [2]) != P(1, [3]) and {P(1, 2): 3}[P(1, 2)] == 3"),
        ("class V:\n    def __init__(self, x): self.x = x\n    def __add__(self, o): return V(self.x + o.x)\n"
         "    def __lt__(self, o): return self.x < o.x\n",
         "assert (V(1) + V(2)).x == 3 and V(1) < V(2) and [v.x for v in sorted([V(2), V(1)])] == [1, 2]"),
        ("from enum import IntEnum\nclass E(IntEnum):\n    A = 1\n"
         "class L(list):\n    def last(self): return self[-1]\n",
         "assert E.A == 1 and E.A + 1 == 2 and isinstance(E.A, int)\nx = L([1])\nx.append(2)\n"
         "assert x == [1, 2] and x.last() == 2 and len(x) == 2"),
        ("def f(g, x): return g(x)",
         "import math\nassert f(len, [1]) == 1 and f(math.sqrt, 4) == 2 and f(str.upper, 'a') == 'A'\n"
         "assert f(sum, (x for x in [1, 2])) == 3"),
        ("class C:\n    def __enter__(self): self.n = 1; return self\n    def __exit__(self, *e): self.n = 2\n",
         "c = C()\nwith c as d:\n    assert d.n == 1\nassert c.n == 2"),
        ("def f(): return float('inf'), -0.0, [float(n) for n in range(9)], 2 ** 64, [2 ** 64, 1]",
         "assert f() == (float('inf'), 0.0, [0, 1, 2, 3, 4, 5, 6, 7, 8], 2 ** 64, [2 ** 64, 1])"),
        ("class D(dict):\n    def __missing__(self, key): return key\n"
         "class L(list):\n    def __getitem__(self, n): return list.__getitem__(self, n % len(self))\n"
         "class S(str):\n    def twice(self): return self * 2\n",
         "d, r, s = D(), L([1, 2]), S('ab')\nd[1] = 2\nassert d[1] == 2 and d[3] == 3 and d.get(3) is None\n"
         "assert r[0] == 1 and r[5] == 2 and r.count(2) == 1 and r.pop() == 2 and r == [1]\n"
         "assert s.twice() == 'abab' and s.upper() == 'AB' and s[1:] == 'b'"),
        ("import math", "assert math.isclose(0.1 + 0.2, 0.3)"),
    ],
)  # fmt: skip
def test_honest_programs_pass(backend, source, test):
    assert judge([Program(source, (test,))], limits=LIMITS, backend=backend, processes=1) == [[Verdict.PASSED]]


def test_builtins_are_the_tests_own_unless_the_row_names_them(backend):
    tests = ("assert set([1]) == set([2])", "assert set([1]) == {1}")
    one, other = (Program("def set(x): return 0", tests, shadowed) for shadowed in ((), ("set",)))
    found = judge([one, other], limits=LIMITS, backend=backend, processes=1)
    assert found == [[Verdict.FAILED, Verdict.PASSED], [Verdict.PASSED, Verdict.FAILED]]


def test_imports_are_the_tests_own(backend):
    fake = Program("isclose = lambda *a: True", ("assert isclose(1, 2)",), imports=("from math import isclose",))
    assert judge([fake], limits=LIMITS, backend=backend, processes=1) == [[Verdict.FAILED]]


def test_each_test_has_a_fresh_program_and_each_program_an_empty_tmp(backend):
    counts = Program("n = 0\ndef f():\n    global n\n    n += 1\n    return n", ("assert f() == 1",) * 2)
    writes = "import os\ndef f():\n    open('/tmp/left', 'w').close()\n    return os.listdir('/tmp')"
    leaves = Program(writes, ("assert f() == ['left']",))
    looks = Program("import os\ndef f(): return os.listdir('/tmp')", ("assert f() == []",))
    found = judge([counts, leaves, looks], limits=LIMITS, backend=backend, processes=1)
    assert {verdict for each in found for verdict in each} == {Verdict.PASSED}


def test_a_sandbox_that_is_killed_is_replaced(backend):
    alone = workers.shared(sandbox._pool_limits(1))
    assert judge([GOOD], limits=LIMITS, backend=backend, processes=1)[0][0] == Verdict.PASSED
    worker = alone._idle.get()
    children = subprocess.run(["pgrep", "-P", str(worker.process.pid)], capture_output=True, text=True).stdout.split()
    assert children
    for child in children:
        os.kill(int(child), 9)
    alone._idle.put(worker)
    time.sleep(0.3)
    assert judge([GOOD], limits=LIMITS, backend=backend, processes=1)[0][0] == Verdict.PASSED


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may change the limits of a sandbox from outside")
def test_a_sandbox_whose_limits_were_changed_is_made_anew(backend):
    alone = workers.shared(sandbox._pool_limits(1))
    wanted = [[Verdict.PASSED, Verdict.FAILED]]
    assert judge([attack_sandbox.HONEST], limits=LIMITS, backend=backend, processes=1) == wanted
    worker = alone._idle.get()
    for process in _descendants(worker.process.pid):
        resource.prlimit(process, resource.RLIMIT_FSIZE, (0, 0))
    alone._idle.put(worker)
    assert judge([attack_sandbox.HONEST], limits=LIMITS, backend=backend, processes=1) == wanted


def test_without_a_sandbox_it_refuses_and_names_the_unsafe_task(monkeypatch):
    monkeypatch.setattr(sandbox, "executables", lambda backend: [f"no-{backend}"])
    with pytest.raises(UserError, match="bwrap: no-bwrap is not installed.*unshare.*apt-get.*code:UNSAFE"):
        sandbox.find.__wrapped__()


def test_a_limit_that_does_not_hold_is_named(monkeypatch, backend):
    probes = {"patience": ("assert True", Verdict.TIMED_OUT)}
    monkeypatch.setattr(sandbox.probes, "probes", lambda *arguments: probes)
    assert sandbox.check(backend) == "the limit on patience does not hold (passed)"


def test_a_sandbox_that_does_not_start_is_refused(monkeypatch):
    assert judge([GOOD], backend="absent", limits=LIMITS, processes=1) == [[Verdict.REFUSED] * 2]


def test_unsafe_runs_under_limits_alone():
    endless = Program("while True:\n    pass", ("pass",))
    found = judge([GOOD, endless, GOOD], limits=SHORT, backend=UNSAFE, processes=1)
    assert found == [[Verdict.PASSED, Verdict.FAILED], [Verdict.TIMED_OUT], [Verdict.PASSED, Verdict.FAILED]]


def test_no_jax_where_programs_are_started():
    script = "import sys, gdsd_jax.tasks.sandbox; print([m for m in sys.modules if m in ('jax', 'jaxlib')])"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout == "[]\n"
