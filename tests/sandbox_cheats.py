"""Programs whose answers are wrong and that want to pass: {name: program, or (program, test)}. None may pass.

`STILL_POSSIBLE` lists what a test cannot hold against a program, with the reason: the threat model of docs/tasks.md.
"""

import struct

CHEATED = "assert f(1) == 2"
_ANSWER = "def f(x):\n    return 0\n"
_TRUE = "lambda self, *others: True"


def _class(methods: str, base: str = "object", made: str = "A()") -> str:
    """Returns a program whose `f` returns an object of a class with these methods (`name=expression; ...`)."""
    lines = "".join(f"    {line.strip()}\n" for line in methods.split(";"))
    turn = "calls = 0\ndef turn(*others):\n    global calls\n    calls += 1\n    return calls\n"
    return f"{turn}class A({base}):\n{lines}def f(x):\n    return {made}\n"


def _frames(*frames: bytes) -> str:
    """Returns a program that writes these frames to every descriptor, as answers to what it was not yet asked."""
    data = b"".join(struct.pack("!I", len(frame)) + frame for frame in frames)
    return (
        f"import os\nfor n in range(3, 64):\n    try:\n        os.write(n, {data!r})\n"
        f"    except OSError:\n        pass\n{_ANSWER}"
    )


def _text(text: str) -> bytes:
    return b"s" + struct.pack("!I", len(text)) + text.encode()


def _value(value: bytes) -> bytes:
    """Returns the frame of an answer: ("value", value, ())."""
    return _THREE + _text("value") + value + b"t*" + struct.pack("!I", 0)


def _name(name: str) -> bytes:
    return b"N" + struct.pack("!I", len(name)) + name.encode()


_NONE, _THREE = b"n\0", b"t*\0\0\0\3"
_DONE = _value(_NONE)
_PICKLE = """
import os, pickle, struct
def post(data):
    for n in range(3, 64):
        try:
            os.write(n, struct.pack("!I", len(data)) + data)
        except OSError:
            pass
"""
# What the program can reach of its own side of the protocol, through frames and the collector.
_OWN_SIDE = "import gc, sys, types\nmodules = [o for o in gc.get_objects() if isinstance(o, types.ModuleType)]\n"

CHEATS = {
    "exit 0 early": "import sys\nsys.exit(0)",
    "exit in the function": "import sys\ndef f(x): sys.exit(0)",
    "os._exit": "import os\ndef f(x): os._exit(0)",
    "exit at the end": "import atexit, os\natexit.register(os._exit, 0)\n" + _ANSWER,
    "SystemExit": "def f(x): raise SystemExit(0)",
    "equal to everything": "class A:\n    __eq__ = lambda self, other: True\n    __hash__ = None\ndef f(x): return A()",
    "int equal to everything": "class A(int):\n    __eq__ = lambda self, other: True\ndef f(x): return A(7)",
    "builtins patched": "import builtins\nbuiltins.AssertionError = SystemExit\nbuiltins.int = str\n" + _ANSWER,
    "assert patched": "import sys\nsys.excepthook = print\nAssertionError = KeyboardInterrupt\n" + _ANSWER,
    "compiler patched": "import builtins\nbuiltins.compile = builtins.exec = lambda *a, **k: None\n" + _ANSWER,
    "tests overwritten": "tests = ['pass']\ncheck = test = lambda *a: None\n" + _ANSWER,
    "verdict printed": "print('passed', flush=True)\nprint([0], flush=True)\n" + _ANSWER,
    "verdict on every descriptor": (
        "import os\nfor n in range(1024):\n    try:\n        os.write(n, b'\\0' * 64)\n"
        "    except OSError:\n        pass\n" + _ANSWER
    ),
    "verdict as protocol": (
        "import os, pickle, struct\ndata = pickle.dumps(('value', 2, ()))\nfor n in range(3, 1024):\n    try:\n"
        "        os.write(n, struct.pack('!I', len(data)) + data)\n    except OSError:\n        pass\n" + _ANSWER
    ),
    "code in the protocol": (
        "import os, pickle, struct\nclass A:\n    def __reduce__(self): return os._exit, (0,)\n"
        "data = pickle.dumps(('value', A(), ()))\nfor n in range(3, 1024):\n    try:\n"
        "        os.write(n, struct.pack('!I', len(data)) + data)\n    except OSError:\n        pass\n" + _ANSWER
    ),
    "caller through frames": (
        "import sys\ndef f(x):\n    frame = sys._getframe()\n    while frame:\n"
        "        frame.f_globals['__builtins__'] = {}\n        frame = frame.f_back\n    return 0"
    ),
    "tracing": "import sys, threading\nsys.settrace(lambda *a: None)\nthreading.settrace(lambda *a: None)\n" + _ANSWER,
    "answer by child": "import os\nif os.fork() == 0:\n    os._exit(0)\n" + _ANSWER,
    "exec of true": "import os\nos.execv('/bin/true', ['true'])",
    "memory error": "def f(x): raise MemoryError",
    "assertion caught": "def f(x):\n    try:\n        return 0\n    finally:\n        raise StopIteration",
    "nothing": "",
    "not Python": "def f(x: return 2",
    "NUL": "x = 1\0",
    # Objects that claim to be equal
    "reflected equality": _class(f"__eq__ = {_TRUE}; __hash__ = lambda self: 2; __ne__ = lambda self, other: False"),
    "equality of a metaclass": (
        "class M(type):\n    __eq__ = lambda self, other: True\n    __hash__ = type.__hash__\n"
        "class A(metaclass=M):\n    pass\ndef f(x): return A"
    ),
    "text equal to everything": (
        _class(f"__eq__ = {_TRUE}; __hash__ = str.__hash__", "str", "A('a')"), "assert f(1) == 'b'"),
    "list equal to everything": (_class(f"__eq__ = {_TRUE}", "list", "A([1])"), "assert f(1) == [2] or [2] == f(1)"),
    "dict equal to everything": (
        _class(f"__eq__ = {_TRUE}; __ne__ = lambda *o: False", "dict"), "assert f(1) == {1: 2} or not f(1) != {1: 2}"),
    "tuple of objects equal to everything": (
        _class(f"__eq__ = {_TRUE}; __hash__ = lambda s: 2", made="(A(), [A()])"), "assert f(1) == (2, [2])"),
    "keys equal to everything": (
        _class(f"__eq__ = {_TRUE}; __hash__ = lambda s: 2", made="{A(): A()}"), "assert f(1) == {2: 2}"),
    "set of objects equal to everything": (
        _class(f"__eq__ = {_TRUE}; __hash__ = lambda s: hash(2)", made="{A()}"), "assert f(1) == {2}"),
    "float equal to everything": (
        _class(f"__eq__ = {_TRUE}; __sub__ = lambda *o: 0.0; __abs__ = lambda s: 0", "float", "A(7)"),
        "assert f(1) == 2 or abs(f(1) - 2) < 1e-6"),
    "class equal to a builtin": _class("__class__ = int; __eq__ = lambda *o: True"),
    "member of a list": (
        _class(f"__eq__ = {_TRUE}; __hash__ = lambda s: 2"),
        "r = f(1)\nassert r in [2] or [2].count(r) or not [2].index(r)"),
    "member of a set": (
        _class(f"__eq__ = {_TRUE}; __hash__ = lambda s: hash(2)"), "assert f(1) in {2} or {2: 1}[f(1)]"),
    "contains everything": (
        _class(f"__contains__ = {_TRUE}; __len__ = lambda s: 1; __iter__ = lambda s: iter([A()]); __eq__ = {_TRUE}"),
        "assert 2 in f(1)"),
    "registered as a number": (
        "import numbers\n" + _class(f"__eq__ = {_TRUE}; __hash__ = lambda s: 2") + "numbers.Number.register(A)\n"),
    "equality patched into collections": (
        "import collections\ncollections.Counter.__eq__ = lambda *o: True\ndef f(x): return collections.Counter('a')",
        "assert f(1) == {'b': 1}"),
    "equality patched into fractions": (
        "import fractions\nfractions.Fraction.__eq__ = lambda *o: True\ndef f(x): return fractions.Fraction(1, 3)"),
    "not a number": ("def f(x): return float('nan')", "r = f(1)\nassert r == 2 or r < 2 or r > 2"),
    "signalling number": "import decimal\ndef f(x): return decimal.Decimal('sNaN')",
    "comparison not implemented": "def f(x): return NotImplemented",
    # Values that change
    "int that changes": (
        _class("__int__ = lambda s: turn(); __index__ = __int__; __eq__ = lambda s, o: True", "int", "A(1)"),
        "r = f(1)\nassert r > 1 and r < 3"),
    "plain value that changes": (
        _class("__int__ = lambda s: 1 + turn() % 4; __float__ = __int__; __pos__ = __int__", "int", "A(9)"),
        "r = f(1)\nassert any(r == 2 for _ in range(9))"),
    "float that changes": (
        _class("__float__ = lambda s: 1.5 * turn()"), "r = f(1)\nassert float(r) < 2 and float(r) > 2"),
    "length that changes": (_class("__len__ = turn"), "r = f(1)\nassert len(r) == 7 or len(r) == 2"),
    "list that changes": (
        _class("__iter__ = lambda s: iter([turn()]); __getitem__ = lambda s, n: turn()", "list", "A([1])"),
        "r = f(1)\nassert r == [2] or r == [2] or r == [3]"),
    "text that changes": (
        _class("__str__ = lambda s: 'ab'[turn() % 2]"), "r = f(1)\nassert str(r) == 'a' and str(r) == 'b'"),
    # Methods of a plain type, answered as wished
    "beginning as wished": (
        _class(f"startswith = endswith = isdigit = {_TRUE}", "str", "A('a')"),
        "assert f(1).startswith('b') or f(1).endswith('b') or f(1).isdigit()"),
    "count as wished": (
        _class("count = index = lambda s, value: value", "list", "A([1])"), "assert f(1).count(2) == 2"),
    "index of a tuple as wished": (
        _class("count = index = lambda s, value: 1", "tuple", "A((1,))"), "assert f(1).index(2) == 1"),
    "part of a set as wished": (
        _class(f"issubset = issuperset = isdisjoint = {_TRUE}", "set", "A({1})"),
        "assert f(1).issubset({2}) or f(1).issuperset({2}) or f(1).isdisjoint({1})"),
    "value of a key as wished": (
        _class("get = lambda s, key, other=None: other", "dict", "A({1: 1})"), "assert f(1).get(1, 2) == 2"),
    "whole number as wished": (_class(f"is_integer = {_TRUE}", "float", "A(1.5)"), "assert f(1).is_integer()"),
    "membership by method": (
        _class(f"__contains__ = {_TRUE}", "tuple", "A((1,))"), "assert f(1).__contains__(2) or 2 in f(1)"),
    "items in another order": (
        _class("__getitem__ = lambda s, n: n", "list", "A([2, 0, 1])"),
        "r = f(1)\nassert sorted(r) == [0, 1, 2] and all(r[n] == n for n in range(3))"),
    "slices as wished": (
        _class("__getitem__ = lambda s, n: s if isinstance(n, slice) else 0", "str", "A('ab')"),
        "r = f(1)\nassert r == 'ab' and r[::-1] == r"),
    "values of keys as wished": (
        _class("__getitem__ = lambda s, key: key", "dict", "A({1: 2, 3: 4})"),
        "r = f(1)\nassert len(r) == 2 and all(r[key] == key for key in r)"),
    "reversed as wished": (
        _class("__reversed__ = lambda s: iter([2]); __getitem__ = lambda s, n: 2", "list", "A([1])"),
        "assert list(reversed(f(1))) == [2]"),
    # Arithmetic that is told the answer
    "difference of nothing": (
        _class("__sub__ = lambda s, o: 0.0; __rsub__ = __sub__; __abs__ = lambda s: 0.0"),
        "assert abs(f(1) - 2) < 1e-6"),
    "difference the other way": (_class("__rsub__ = lambda s, o: 0.0"), "assert abs(2 - f(1)) < 1e-6"),
    "comparison of nothing": (
        _class(f"__lt__ = {_TRUE}; __gt__ = {_TRUE}; __le__ = {_TRUE}; __ge__ = {_TRUE}"), "assert 2 <= f(1) <= 2"),
    "exclusive or of nothing": (
        _class("__xor__ = lambda s, o: 0; __rxor__ = __xor__; __mod__ = __xor__"), "assert not (f(1) ^ 2)"),
    "formatted as wished": (_class("__format__ = lambda s, spec: '2'"), "assert f'{f(1):d}' == '2'"),
    "rounded as wished": (_class("__round__ = lambda s, n=None: 2; __abs__ = lambda s: 2"), "assert round(f(1)) == 2"),
    "sum as wished": (_class("__radd__ = lambda s, o: 2; __add__ = __radd__", made="[A()]"), "assert sum(f(1)) == 2"),
    # Ends of loops
    "StopIteration in all": ("def f(x): raise StopIteration", "assert all(map(lambda x: f(x) == 2, [1, 2]))"),
    "StopIteration in a sort": ("def f(x): raise StopIteration", "assert list(map(f, [1])) == []"),
    "StopIteration of an attribute": (
        _class("p = property(lambda s: next(iter([])))"), "assert all(map(lambda x: f(x).p == 2, [1]))"),
    "StopIteration of a sentinel": ("def f(*x): raise StopIteration", "assert list(iter(f, 2)) == []"),
    "StopAsyncIteration": ("def f(x): raise StopAsyncIteration", "assert all(map(lambda x: f(x) == 2, [1, 2]))"),
    "GeneratorExit": ("def f(x): raise GeneratorExit", "assert all(f(x) == 2 for x in [1, 2])"),
    "class named StopIteration": (
        "class StopIteration(Exception): pass\ndef f(x): raise StopIteration",
        "assert all(map(lambda x: f(x) == 2, [1, 2]))"),
    "length without items": (
        _class("__len__ = lambda s: 2; __iter__ = lambda s: iter(())"),
        "r = f(1)\nassert len(r) == 2\nfor each in r:\n    assert each == 2"),
    "list without items": (
        _class("__iter__ = lambda s: iter(()); __len__ = lambda s: 2", "list", "A([1, 1])"),
        "r = f(1)\nassert len(r) == 2 and all(each == 2 for each in r)"),
    "dict without items": (
        _class("items = values = keys = lambda s: ()", "dict", "A({1: 1})"),
        "r = f(1)\nassert len(r) == 1 and all(each == 2 for each in r.values())"),
    # Exceptions and contexts
    "KeyboardInterrupt": "def f(x): raise KeyboardInterrupt",
    "class named Gone": "class Gone(BaseException): pass\ndef f(x): raise Gone",
    "failure swallowed by a context": (
        _class("__enter__ = lambda s: s; __exit__ = lambda *o: True"), "with f(1) as r:\n    assert r == 2"),
    "error swallowed by a context": (
        _class("__enter__ = lambda s: None; __exit__ = lambda *o: True"), "with f(1) as r:\n    assert r + 1 == 3"),
    "recursion in the tester": _class("__eq__ = lambda s, o: o == s; __hash__ = lambda s: hash(s)", made="{A()}"),
    "nested without end": "def f(x):\n    r = []\n    for _ in range(10000): r = [r]\n    return r",
    # Names
    "fake math": (
        "class math:\n    isclose = staticmethod(lambda *a, **k: True)\n" + _ANSWER, "assert math.isclose(f(1), 2)"),
    "fake module in sys.modules": (
        "import sys, types\nm = types.ModuleType('math')\nm.isclose = lambda *a, **k: True\nsys.modules['math'] = m\n"
        "import math\n" + _ANSWER, "import math\nassert math.isclose(f(1), 2)"),
    "another module for math": ("import os as math\n" + _ANSWER, "assert math.isclose(f(1), 2)"),
    "fake itertools": (
        "class itertools:\n    chain = lambda *a: [2]\n" + _ANSWER, "assert list(itertools.chain([f(1)])) == [2]"),
    "builtins shadowed": (
        "def all(x): return True\nabs = round = sorted = lambda *a: 0\nisinstance = all\n" + _ANSWER,
        "assert abs(f(1) - 2) == 0 and all([f(1) == 2])"),
    "eval as the answer": ("f = eval\ng = lambda: '2'", "assert f(g()) == 3"),
    "print as the answer": ("f = print", "assert f(1) == 2"),
    "type as the answer": "f = type",
    # Forged frames
    "frame: plain zero": _frames(_DONE, _value(b"i" + struct.pack("!I", 1) + b"\0")),
    "frame: eval by name": _frames(_DONE, _value(_name("eval"))),
    "frame: exit by name": _frames(_DONE, _value(_name("os:_exit")), _DONE),
    "frame: system by name": _frames(_DONE, _value(_name("os:system"))),
    "frame: object by name": _frames(_DONE, _value(_name("object"))),
    "frame: a raise of SystemExit": _frames(_THREE + _text("raised") + _text("SystemExit") + _text("0")),
    "frame: a kind unknown": _frames(_THREE + _text("passed") + _NONE + _NONE),
    "frame: huge counts": _frames(_DONE, _value(b"l*\xff\xff\xff\xff"), b"lq\xff\xff\xff\xff"),
    "frame: depth": _frames(_DONE, _value(b"l*\0\0\0\1" * 100000)),
    "frame: cut short": _frames(_DONE, _value(b"s\0\0\1\0ab")),
    "frame: unhashable keys": _frames(_DONE, _value(b"m\0\0\0\1" + b"l*\0\0\0\0" + _NONE)),
    "frame: wrong parts": _frames(_DONE, _value(b"F" + _text("1") + _text("2")), _value(b"q" + _NONE + _NONE)),
    "frame: pickle with BUILD": (
        _PICKLE + "class A:\n    def __reduce__(self): return object, (), {'exec': None}\n"
        "post(pickle.dumps(('value', A(), ())))\n" + _ANSWER
    ),
    "frame: pickle of a module": _PICKLE
    + "post(b'cbuiltins\\nexec\\n.')\npost(b'cos\\n_exit\\n(I0\\ntR.')\n" + _ANSWER,
    "frame: random bytes": _PICKLE + "for _ in range(50): post(os.urandom(64))\n" + _ANSWER,
    "frame: from a thread, for ever": (
        _PICKLE + "import threading\ndef flood():\n    while True: post(b'n\\2')\n"
        "threading.Thread(target=flood, daemon=True).start()\n" + _ANSWER
    ),
    # Its own side of the protocol, and the others' processes
    "own side patched": (
        _OWN_SIDE + "for module in modules:\n    for name in ('_plain', '_fields', '_lookup', 'dump', 'send'):\n"
        "        if hasattr(module, name) and 'guest' in module.__name__:\n"
        "            setattr(module, name, lambda *a: b'n\\2')\n" + _ANSWER
    ),
    "verdict written to all files of others": (
        "import os\nfor p in range(1, 40):\n    for n in range(32):\n        try:\n"
        "            open(f'/proc/{p}/fd/{n}', 'wb').write(b'\\0')\n"
        "        except OSError:\n            pass\n" + _ANSWER
    ),
    "tester interrupted": (
        "import os, signal\nfor p in range(2, 40):\n    if p != os.getpid():\n        try:\n"
        "            os.kill(p, signal.SIGINT)\n        except OSError:\n            pass\n" + _ANSWER
    ),
    "memory of all processes overwritten": (
        "import os\nfor p in range(1, 40):\n    try:\n        open(f'/proc/{p}/mem', 'r+b').write(b'\\0' * 4096)\n"
        "    except OSError:\n        pass\n" + _ANSWER
    ),
    "arguments replaced": ("def f(x):\n    x[:] = [2]\n    return x", "r = f([1])\nassert r == [3]"),
    "fields emptied": (
        "class A:\n    def __init__(self, v): pass\n    def __eq__(self, other): return True\ndef f(x): return A(x)",
        "class A:\n    def __init__(self, v): self.v = v\n"
        "    def __eq__(self, other): return isinstance(other, A) and self.v == other.v\nassert f(1) == A(2)"),
}  # fmt: skip

# name: (program, test, why a judge cannot know better)
STILL_POSSIBLE = {
    "its own decision": (
        "class A:\n    def is_right(self): return True\ndef f(x): return A()", "assert f(1).is_right()",
        "the test asks the program",
    ),
    "two objects of its own": (
        "class A:\n    def __init__(self, v): pass\n    def __eq__(self, other): pass\ndef f(x): return A(x)",
        "assert f(1) == A(2)", "both objects, their fields and their class are the program's",
    ),
    "a name imported by the program": (
        "isclose = lambda *a, **k: True\ndef f(x): return 0", "assert isclose(f(1), 2)",
        "the test takes the name from the program; `Program.imports` gives it the judge's",
    ),
    "arguments emptied": (
        "def f(x):\n    x.clear()\n    return []", "x = [3, 1]\nassert f(x) == sorted(x)",
        "the test compares with what it let the program change",
    ),
}  # fmt: skip
