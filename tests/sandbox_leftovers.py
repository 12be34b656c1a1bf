"""Lists programs that leave something for the next one or the tester, and answers that are costly or lie when asked."""

from sandbox_cheats import _ANSWER, CHEATED, _class
from sandbox_kernel_attacks import CRASHED, ENDED, MEMORY, PASSED, TIMED_OUT, _one

# Whatever the verdict, the honest program that follows must get its own.
ANY = (*ENDED, MEMORY, PASSED)

ATTACKS = {
    # Files where the next program will write
    "pipe in place of a file": _one("os.mkfifo('/tmp/x')\nreturn True"),
    "directory in place of a file": _one("os.mkdir('/tmp/x')\nos.chmod('/tmp/x', 0)\nreturn True"),
    "link in place of a file": _one("os.symlink('/dev/full', '/tmp/x')\nreturn True", wanted=ANY),
    "file held open and deleted": _one(
        "held = [open(f'/tmp/{n}', 'wb') for n in range(8)]\n[file.write(bytes(1 << 20)) for file in held]\n"
        "[os.unlink(f'/tmp/{n}') for n in range(8)]\n[file.flush() for file in held]\n"
        "if os.fork() == 0:\n    os.setsid()\n    time.sleep(99)\nreturn True",
        wanted=ANY,
    ),
    "mapped file deleted": _one(
        "file = open('/tmp/m', 'w+b')\nfile.truncate(1 << 20)\nheld = mmap.mmap(file.fileno(), 0)\n"
        "os.unlink('/tmp/m')\nif os.fork() == 0:\n    time.sleep(99)\nreturn True",
        wanted=ANY,
    ),
    "working directory removed": _one("os.mkdir('/tmp/d')\nos.chdir('/tmp/d')\nos.rmdir('/tmp/d')\nreturn True"),
    "mask of new files": _one("os.umask(0o777)\nopen('/tmp/y', 'w').close()\nreturn True"),
    # Processes that stay
    "daemons that take every place": _one(
        "for _ in range(64):\n    try:\n        if os.fork() == 0:\n            os.setsid(), signal.pause()\n"
        "    except OSError:\n        break\nreturn True",
        wanted=ANY,
    ),
    "chain of children": _one(
        "end = time.time() + 3\nwhile time.time() < end:\n    if os.fork():\n        os._exit(0)\nreturn True",
        wanted=ANY,
    ),
    "child that keeps the line": _one("if os.fork():\n    os._exit(0)\ntime.sleep(99)", wanted=ENDED),
    "stopped children": _one(
        "for _ in range(4):\n    child = os.fork()\n    if child == 0:\n        os.kill(os.getpid(), signal.SIGSTOP)\n"
        "return True",
        wanted=ANY,
    ),
    "children that ignore every signal": _one(
        "if os.fork() == 0:\n    for n in range(1, 65):\n        refused(signal.signal, n, signal.SIG_IGN)\n"
        "    while True:\n        pass\nreturn True",
        wanted=ANY,
    ),
    "real-time scheduling": _one(
        "return refused(os.sched_setscheduler, 0, os.SCHED_FIFO, os.sched_param(50)) and "
        "refused(os.sched_setscheduler, 0, os.SCHED_RR, os.sched_param(50)) and refused(os.nice, -10)"
    ),
    "timers without end": _one(
        "made = 0\nt = ctypes.c_void_p()\nwhile made < 100000 and _libc.timer_create(1, None, ctypes.byref(t)) == 0:\n"
        "    made += 1\nreturn True",
        wanted=ANY,
    ),
    "names of the tester's threads": _one(
        "return all(refused(write, f'/proc/{n}/comm', 'x') for n in [1] + others())", wanted=(*ENDED, PASSED)
    ),
    "sockets of every kind": _one(
        "held = []\ntry:\n    for kind in (1, 2, 5) * 2000:\n        pair = socket.socketpair(1, kind)\n"
        "        pair[0].setblocking(False)\n        held.append(pair)\n        pair[0].send(bytes(1 << 16))\n"
        "except OSError:\n    pass\nreturn True",
        wanted=ANY,
    ),
    "copies between files": _one(
        "source = os.open(os.path.realpath('/proc/self/exe'), 0)\nmade = 0\ntry:\n    for n in range(200):\n"
        "        target = os.open(f'/tmp/c{n}', os.O_CREAT | os.O_WRONLY)\n"
        "        made += os.sendfile(target, source, 0, 1 << 20)\n        os.close(target)\n"
        "except OSError:\n    pass\nreturn made < 64 << 20"
    ),
    # Answers that cost the tester
    "whole number of a huge decimal": _one(
        "import decimal\nreturn decimal.Decimal('1e999999999')", "assert int(f()) == 2", (*ENDED, MEMORY)
    ),
    "fraction of huge numbers": _one(
        "from fractions import Fraction\nreturn Fraction(7 ** 400000, 3 ** 400000)",
        "assert f() + f() == f() * f()",
        (*ENDED, MEMORY),
    ),
    "power of an answer": _one("return 10 ** 9", "assert 2 ** f() == 2", (*ENDED, MEMORY)),
    "text as long as a number": _one("return 10 ** 9", "assert len('x' * f() * 9) == 2", (*ENDED, MEMORY)),
    "numbers that collide": _one(
        "return {n * (2 ** 61 - 1) for n in range(200000)}", "assert f() == 2", (*ENDED, MEMORY)
    ),
    "message without end": _one("raise ValueError('x' * (1 << 27))", "f()", (*ENDED, MEMORY)),
    "exception that asks": _one(
        "class E(Exception):\n    def __str__(self):\n        while True: pass\nraise E", "f()", ENDED
    ),
    "recursion without limit": _one(
        "import sys\nsys.setrecursionlimit(10 ** 9)\ndef g(n): return [*map(g, [n + 1])]\nreturn g(0)",
        "f()",
        (*ENDED, MEMORY),
    ),
    "half characters": _one("return '\\ud800' * 1000", "assert f() == 'x'", ENDED),
    "escapes for a terminal": _one("print('\\x1b]0;owned\\x07\\x1b[2J' * 999)\nreturn True"),
    "callable for ever": _one("return lambda: time.sleep(99)", "f()()", (TIMED_OUT, *ENDED)),
    "descriptors closed": _one("os.closerange(0, 1024)\nreturn True", wanted=(CRASHED, *ENDED)),
    "end in a thread": _one("threading.Thread(target=os._exit, args=(0,)).start()\ntime.sleep(9)", wanted=ENDED),
}

CHEATS = {
    "text as wished": (_class("__str__ = lambda s: '2'; __repr__ = __str__", "int", "A(0)"), "assert str(f(1)) == '2'"),
    "written as wished": (_class("__repr__ = lambda s: '2'", "int", "A(0)"), "assert '%r' % (f(1),) == '2'"),
    "in a sentence as wished": (_class("__repr__ = lambda s: '2'", "int", "A(0)"), "assert f'{f(1)!r}' == '2'"),
    "number of a text as wished": (_class("__int__ = lambda s: 2", "str", "A('0')"), "assert int(f(1)) == 2"),
    "float of a number as wished": (_class("__float__ = lambda s: 2.0", "float", "A(0)"), "assert float(f(1)) == 2"),
    "index as wished": (_class("__index__ = lambda s: 2", "int", "A(0)"), "assert [7, 8, 9][f(1)] == 9"),
    "range as wished": (_class("__index__ = lambda s: 2", "int", "A(0)"), "assert list(range(f(1))) == [0, 1]"),
    "truth as wished": (_class("__bool__ = lambda s: True", "list", "A()"), "assert f(1)"),
    "truth of a number as wished": (_class("__bool__ = lambda s: True", "int", "A(0)"), "assert f(1)"),
    "floor as wished": (
        _class("__floor__ = lambda s: 2", "float", "A(0)"),
        "import math\nassert math.floor(f(1)) == 2",
    ),
    "rest as wished": (_class("__mod__ = lambda s, o: 2; __divmod__ = __mod__", "int", "A(0)"), "assert f(1) % 5 == 2"),
    "negative as wished": (_class("__neg__ = lambda s: -2; __pos__ = __neg__", "int", "A(0)"), "assert -f(1) == -2"),
    "larger as wished": (_class("__gt__ = lambda s, o: True; __ge__ = __gt__", "int", "A(0)"), "assert f(1) > 1"),
    "order as wished": (
        _class("__lt__ = lambda s, o: False", "int", "A(3)"),
        "assert sorted([f(1), 2])[0] == 3 or max(2, f(1)) == 2",
    ),
    "same object": ("def f(x): return 0", "assert f(1) is 2 or f(1) is True"),
    "instance as wished": (_class("__class__ = property(lambda s: bool)"), "assert isinstance(f(1), bool)"),
    "type by name": ("class int: pass\ndef f(x): return int()", "assert type(f(1)) is int and f(1) == 2"),
    "joined as wished": (
        _class("join = lambda s, o: 'ab'; __iter__ = lambda s: iter('ab')", "str", "A('')"),
        "assert ''.join(f(1)) == 'ab'",
    ),
    "upper case as wished": (
        _class("upper = lambda s: 'AB'; strip = upper", "str", "A('x')"),
        "assert f(1).upper() == 'AB'",
    ),
    "split as wished": (_class("split = lambda s, *o: ['a']", "str", "A('x y')"), "assert f(1).split() == ['a']"),
    "unpacked as wished": (
        _class("__iter__ = lambda s: iter((1, 2))", "tuple", "A((0, 0))"),
        "a, b = f(1)\nassert b == 2",
    ),
    "keys unpacked as wished": (
        _class("keys = lambda s: ['a']; __getitem__ = lambda s, k: 2", "dict"),
        "assert {**f(1)} == {'a': 2}",
    ),
    "missing keys as wished": (_class("__missing__ = lambda s, k: 2", "dict"), "assert f(1)['a'] == 2 and 'a' in f(1)"),
    "sorted by itself": (
        _class("sort = lambda s, **k: None", "list", "A([2, 1])"),
        "r = f(1)\nr.sort()\nassert r == [1, 2]",
    ),
    "enumeration of another value": (
        "import enum\nclass E(enum.IntEnum):\n    A = 0\n    def __eq__(s, o): return True\n    __hash__ = None\n"
        "def f(x): return E.A",
        CHEATED,
    ),
    "named tuple of others": (
        "import collections\nclass N(collections.namedtuple('N', 'a b')):\n    __eq__ = lambda s, o: True\n"
        "def f(x): return N(0, 0)",
        "assert f(1) == (1, 2)",
    ),
    "date as wished": (
        _class("__eq__ = lambda s, o: True; __hash__ = None; year = 2", "__import__('datetime').date", "A(1, 1, 1)"),
        "import datetime\nassert f(1) == datetime.date(2, 2, 2)",
    ),
    "bytes as wished": (
        _class("__eq__ = lambda s, o: True; __hash__ = None", "bytes", "A(b'')"),
        "assert f(1) == b'2'",
    ),
    "complex as wished": (_class("__eq__ = lambda s, o: True; real = 2", "complex", "A(0)"), "assert f(1) == 2 + 0j"),
    "hash as wished": (
        _class("__hash__ = lambda s: hash(2); __eq__ = lambda s, o: True", "int", "A(0)"),
        "assert f(1) in {2: 0}",
    ),
    "matrix product as wished": (
        _class("__matmul__ = lambda s, o: 2", "list", "A([0])"),
        "assert (f(1) @ [1]) == 2 and f(1) == [2]",
    ),
    "called once": (_ANSWER + "n = 0\ndef f(x):\n    global n\n    n += 1\n    return 2 if n > 1 else 0", CHEATED),
    "annotations": ("def f(x) -> 2: ...\nf.__eq__ = lambda o: True", CHEATED),
    "decorated": ("import functools\n@functools.lru_cache\ndef f(x): return 0", CHEATED),
    "coroutine": ("async def f(x): return 2", CHEATED),
    "generator of the answer": ("def f(x): yield 2", CHEATED),
    "class as a function": (
        "class f(int):\n    def __new__(c, x): return int.__new__(c, 0)\n    __eq__ = lambda s, o: True",
        CHEATED,
    ),
    "instance as a function": (
        "class A:\n    def __call__(s, x): return A()\n    __eq__ = lambda s, o: True\nf = A()",
        CHEATED,
    ),
    "partial function": ("import functools\nf = functools.partial(lambda *a: NotImplemented, 1)", CHEATED),
    "warnings as errors": ("import warnings\nwarnings.simplefilter('error')\n" + _ANSWER, CHEATED),
}
