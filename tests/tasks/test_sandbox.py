"""The sandbox, on every back end that this machine has: attacks, cheats, verdicts, and a pool that goes on."""

import dataclasses
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time

import pytest
import sandbox_attacks as attacks

from gdsd_jax.runtime.errors import UserError
from gdsd_jax.tasks import sandbox, workers
from gdsd_jax.tasks.sandbox import BACKENDS, UNSAFE, Limits, Program, Verdict, judge

INSTALLED = [name for name in BACKENDS if shutil.which(name)]
# Time that a busy machine has enough of; and time for what is meant to use all that it gets.
LIMITS = Limits(seconds=20.0, megabytes=256, total_megabytes=384)
SHORT = dataclasses.replace(LIMITS, seconds=1.0)
GOOD = Program("def f(x):\n    return x + 1", ("assert f(1) == 2", "assert f(1) == 3"))


# The back end that would be used is in the fast tier.
@pytest.fixture(
    scope="module", params=[pytest.param(n, marks=[] if n == INSTALLED[0] else [pytest.mark.slow]) for n in INSTALLED]
)
def backend(request):
    return request.param


@pytest.fixture(scope="module")
def outcomes(backend):
    """{attack: (its verdict, those of an honest program right after it in the same sandbox)}."""
    with socket.create_server(("127.0.0.1", 0)) as server, tempfile.NamedTemporaryFile("w") as secret:
        secret.write("secret")
        secret.flush()
        os.chmod(secret.name, 0o644)
        os.environ["SANDBOX_SECRET"] = "x"
        given = f"SECRET, PORT = {secret.name!r}, {server.getsockname()[1]}\n"
        programs = {name: Program(source, (given + test,)) for name, (source, test, _) in attacks.CONTAINED.items()}
        programs |= {name: Program(source, (attacks.CHEATED,)) for name, source in attacks.CHEATS.items()}
        endless = {name for name, (_, _, wanted) in attacks.CONTAINED.items() if Verdict.TIMED_OUT in wanted}
        found = {}
        for limits, names in ((SHORT, endless), (LIMITS, programs.keys() - endless)):
            queue = [each for name in sorted(names) for each in (programs[name], GOOD)]
            verdicts = judge(queue, limits=limits, backend=backend, processes=1)
            found |= zip(sorted(names), zip(verdicts[::2], verdicts[1::2], strict=True), strict=True)
    return found


def test_a_back_end_is_installed():
    assert INSTALLED, "install bubblewrap or util-linux: without them nothing here is tested"


@pytest.mark.parametrize("name", attacks.CONTAINED)
def test_attack_is_contained(outcomes, name):
    (verdict,), after = outcomes[name]
    assert verdict in attacks.CONTAINED[name][2]
    assert after == [Verdict.PASSED, Verdict.FAILED]


@pytest.mark.parametrize("name", attacks.CHEATS)
def test_cheat_does_not_pass(outcomes, name):
    (verdict,), after = outcomes[name]
    assert verdict not in (Verdict.PASSED, Verdict.REFUSED)
    assert after == [Verdict.PASSED, Verdict.FAILED]


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
    ],
)  # fmt: skip
def test_honest_programs_pass(backend, source, test):
    assert judge([Program(source, (test,))], limits=LIMITS, backend=backend, processes=1) == [[Verdict.PASSED]]


def test_builtins_are_the_tests_own_unless_the_row_names_them(backend):
    tests = ("assert set([1]) == set([2])", "assert set([1]) == {1}")
    one, other = (Program("def set(x): return 0", tests, shadowed) for shadowed in ((), ("set",)))
    found = judge([one, other], limits=LIMITS, backend=backend, processes=1)
    assert found == [[Verdict.FAILED, Verdict.PASSED], [Verdict.PASSED, Verdict.FAILED]]


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
