"""How a test in one process uses the objects of a program in another. Runs inside a sandbox; standard library only.

The program executes in a fresh namespace and then serves what the tester asks of it over a socket: look up a name,
call, iterate, compare. What it returns arrives as plain data and is compared by the tester's own interpreter; an object
of a class of the program's own stays with the program and the tester holds a `Remote`, which equals no plain value that
it does not consist of.
"""

import builtins
import importlib
import io
import operator
import pickle
import struct
import sys

PASSED, FAILED, TIMED_OUT, OUT_OF_MEMORY, CRASHED = range(5)

_MAX_FRAME = 2**26
_PLAIN = {
    "builtins": ("NoneType bool int float complex str bytes bytearray list tuple dict set frozenset range slice "
                 "NotImplementedType ellipsis"),
    "collections": "OrderedDict Counter defaultdict deque",
    "decimal": "Decimal",
    "fractions": "Fraction",
    "datetime": "date datetime time timedelta",
}  # fmt: skip
PLAIN = {(module, name) for module, names in _PLAIN.items() for name in names.split()}
_UPDATE = {
    list: lambda old, new: old.__setitem__(slice(None), new),
    bytearray: lambda old, new: old.__setitem__(slice(None), new),
    dict: lambda old, new: (old.clear(), old.update(new)),
    set: lambda old, new: (old.clear(), old.update(new)),
}


# ----------------------------------------------------------------------------------------------------------------------
# The tester


class Gone(BaseException):
    """The program does not answer any more. No test can catch it by accident."""


class ProgramError(Exception):
    """An exception that is no builtin one, raised by the program."""


def run_test(test, shadowed, connection):
    """The verdict of a test on the program at the other end of the connection."""
    try:
        ask = _Asker(connection)
        ask.reply()  # of the program's execution
        scope = {"__name__": "tests", "__builtins__": _Names(ask)}
        scope.update({name: ask("name", name) for name in shadowed})
        exec(compile(test, "<test>", "exec"), scope)
        return PASSED
    except Gone:
        return CRASHED
    except MemoryError:
        return OUT_OF_MEMORY
    except BaseException:
        return FAILED


class _Names(dict):
    """The builtins of a test; a name that neither test nor builtins have is the program's."""

    def __init__(self, ask):
        super().__init__(vars(builtins))
        self._ask = ask

    def __missing__(self, name):
        return self._ask("name", name)


class _Asker:
    """Asks the program: an operation of `_OPERATIONS` and its arguments; mutable arguments are updated afterwards."""

    def __init__(self, connection):
        self._connection = connection
        self._remotes = {}

    def __call__(self, operation, *arguments, **named):
        buffer = io.BytesIO()
        pickler = pickle.Pickler(buffer, 5)
        pickler.persistent_id = _handle
        pickler.dump((operation, arguments, named))
        send(self._connection, buffer.getvalue())
        result, after = self.reply()
        for old, new in zip([*arguments, *named.values()], after, strict=False):
            if type(old) is type(new) and type(old) in _UPDATE:
                _UPDATE[type(old)](old, new)
        return result

    def reply(self):
        try:
            kind, *values = self._load(receive(self._connection))
        except (OSError, EOFError) as error:
            raise Gone from error
        if kind == "value":
            return values
        name, message = map(str, values)
        error = vars(builtins).get(name)
        if isinstance(error, type) and issubclass(error, Exception):
            raise error(message)
        raise ProgramError(f"{name}: {message}")

    def _load(self, data):
        loader = _Plain(io.BytesIO(data))
        loader.persistent_load = self._persistent
        return loader.load()

    def _persistent(self, identity):
        kind, value = identity
        if kind == "handle":
            return self._remotes.setdefault(value, Remote(self, value))
        if kind == "builtin" and isinstance(vars(builtins).get(value), type):
            return vars(builtins)[value]
        if kind == "module" and value in sys.stdlib_module_names:
            return importlib.import_module(value)
        raise pickle.UnpicklingError(f"{kind} {value}")


class _Plain(pickle.Unpickler):
    def find_class(self, module, name):
        if (module, name) not in PLAIN:
            raise pickle.UnpicklingError(f"{module}.{name} is not plain data")
        return getattr(importlib.import_module(module), name)


class Remote:
    """An object of the program. It compares with plain values as the plain value that it extends, if it does."""

    __slots__ = ("_ask", "_handle")

    def __init__(self, ask, handle):
        object.__setattr__(self, "_ask", ask)
        object.__setattr__(self, "_handle", handle)

    def __eq__(self, other):
        return _compare("eq", self, other)

    def __ne__(self, other):
        equal = _compare("eq", self, other)
        return equal if equal is NotImplemented else not equal

    def __hash__(self):
        return object.__getattribute__(self, "_ask")("hash", self)


def _handle(value):
    return object.__getattribute__(value, "_handle") if type(value) is Remote else None


def _forwarded(operation):
    def method(self, *arguments, **named):
        return object.__getattribute__(self, "_ask")(operation, self, *arguments, **named)

    return method


_SPECIAL = ("call", "iter", "next", "len", "bool", "str", "repr", "int", "float", "index", "enter", "exit")
for _operation in (*_SPECIAL, "getitem", "setitem", "delitem"):
    setattr(Remote, f"__{_operation}__", _forwarded(_operation))
Remote.__getattr__, Remote.__setattr__, Remote.__delattr__ = map(_forwarded, ("getattr", "setattr", "delattr"))
Remote.__instancecheck__ = lambda self, other: object.__getattribute__(self, "_ask")("instance", other, self)
for _operation in ("lt", "le", "gt", "ge"):
    setattr(Remote, f"__{_operation}__", lambda self, other, name=_operation: _compare(name, self, other))


def _compare(name, left, right):
    """The program's own comparison only between two of its objects; against data of the test, data decides."""
    ask = object.__getattribute__(left, "_ask")
    if type(right) is Remote:
        return ask(name, left, right)
    plain = ask("plain", left)
    return getattr(operator, name)(plain, right) if type(plain) is not Remote else NotImplemented


# ----------------------------------------------------------------------------------------------------------------------
# The program's side


def serve(program, connection):
    """Executes the program, then answers the tester until that is gone."""
    namespace, objects = {"__name__": "program"}, {}

    def identity(value):
        kind = type(value)
        if (kind.__module__, kind.__qualname__) in PLAIN:
            return None
        if isinstance(value, type) and (value.__module__, value.__qualname__) in PLAIN:
            return None
        if kind is type and getattr(builtins, value.__name__, None) is value:
            return "builtin", value.__name__
        if kind is type(sys):
            return "module", value.__name__
        objects[id(value)] = value
        return "handle", id(value)

    def reply(function, *arguments):
        try:
            data = _dump(("value", *function(*arguments)), identity)
        except BaseException as error:
            data = _dump(("raised", type(error).__name__, _text(error)), identity)
        send(connection, data)

    def execute():
        exec(compile(program, "<program>", "exec"), namespace)
        return None, ()

    def answer(request):
        loader = pickle.Unpickler(io.BytesIO(request))
        loader.persistent_load = objects.__getitem__
        operation, arguments, named = loader.load()
        if operation == "name":
            return _lookup(namespace, *arguments), ()
        result = _OPERATIONS[operation](*arguments, **named)
        return result, [*arguments, *named.values()] if operation == "call" else ()

    reply(execute)
    while True:
        reply(answer, receive(connection))


def _lookup(namespace, name):
    if name not in namespace:
        raise NameError(f"name {name!r} is not defined")
    return namespace[name]


def _plain(value):
    """The plain value that an object extends (a named tuple, a string of a class of its own), or the object."""
    for kind in (str, bytes, int, float, tuple, list, set, frozenset, dict):
        if isinstance(value, kind):
            return kind.__new__(kind, value) if kind in (str, bytes, tuple, frozenset) else kind(value)
    return value


def _text(error):
    try:
        return str(error)[:1000]
    except BaseException:
        return ""


def _dump(value, identity):
    buffer = io.BytesIO()
    pickler = pickle.Pickler(buffer, 5)
    pickler.persistent_id = identity
    pickler.dump(value)
    return buffer.getvalue()


_OPERATIONS = {
    "call": lambda function, *arguments, **named: function(*arguments, **named),
    "instance": isinstance,
    "plain": _plain,
    "enter": lambda value: type(value).__enter__(value),
    "exit": lambda value, *error: type(value).__exit__(value, *error),
    **{name: getattr(builtins, name) for name in ("iter", "next", "len", "bool", "str", "repr", "hash")},
    **{name: getattr(builtins, name) for name in ("int", "float", "getattr", "setattr", "delattr")},
    **{name: getattr(operator, name) for name in ("getitem", "setitem", "delitem", "index")},
    **{name: getattr(operator, name) for name in ("eq", "lt", "le", "gt", "ge")},
}


# ----------------------------------------------------------------------------------------------------------------------
# Frames


def send(connection, data):
    connection.sendall(struct.pack("!I", len(data)) + data)


def receive(connection):
    (size,) = struct.unpack("!I", exactly(connection.recv, 4))
    if size > _MAX_FRAME:
        raise EOFError
    return exactly(connection.recv, size)


def exactly(read, count):
    parts = []
    while count:
        part = read(min(count, 2**20))
        if not part:
            raise EOFError
        parts.append(part)
        count -= len(part)
    return b"".join(parts)
