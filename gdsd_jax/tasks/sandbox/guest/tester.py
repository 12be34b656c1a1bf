"""Runs a test whose names may be objects of a program in another process. Standard library only.

What the program returns arrives as plain data (`guest.wire`), copied once, and is compared by this interpreter with its
own types. Any other object stays with the program, and the test holds a `Remote`: it can be called, asked for its
attributes and handed back. A remote object equals plain data only as the plain value that it extends, copied once while
it cannot change; another remote object only if both are of one class that compares by value, field by field; and
otherwise nothing but itself.
"""

import builtins
import contextlib
import importlib
import operator
import sys
import types

from gdsd_jax.tasks.sandbox.guest import wire

PASSED, FAILED, TIMED_OUT, OUT_OF_MEMORY, CRASHED = range(5)

# Asked again only after something that may have changed the object.
_LASTING = {"plain", "fields", "len", "bool", "str", "repr", "int", "float", "index"}
_ITERATED = ([], (), {}, set(), "", "ü", b"", range(0), {}.values(), {}.items(), reversed([]))
_ITERATORS = (*(type(iter(each)) for each in _ITERATED), map, zip, filter, enumerate, reversed, types.GeneratorType)
# Methods that change nothing, so that a copy answers for the object. No method of a frozen type changes anything.
_READING = {"keys", "items", "values", "get", "count", "index", "copy", "isdisjoint", "issubset", "issuperset"}
_READING |= {"union", "intersection", "difference", "symmetric_difference"}
_SCALARS = (str, bytes, int, float, complex)
_FROZEN = (*_SCALARS, tuple, frozenset)


class Gone(BaseException):
    """Ends a test whose program no longer answers, or answers outside the protocol. No test catches it by accident."""


class ProgramError(Exception):
    """Represents, in the test, an exception of the program that is no builtin exception."""


def run_test(test, shadowed, connection):
    """Returns the verdict of a test on the program at the other end of the connection."""
    try:
        ask = _Asker(connection)
        ask.reply("execute")
        scope = {"__name__": "tests", "__builtins__": _Names(ask, test)}
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
    """Serves as the builtins of a test. A name that neither test nor builtins have is the program's.

    A module of the standard library that the test uses without importing it is never the program's.
    """

    def __init__(self, ask, test):
        super().__init__(vars(builtins))
        self._ask, self._test = ask, test

    def __missing__(self, name):
        if name in sys.stdlib_module_names and (module := _module(name, self._test)) is not None:
            self[name] = module
            return module
        return self._ask("name", name)


def _module(name, test):
    """Returns the module of this name if a test uses the name only as that module's, else None."""
    ast = importlib.import_module("ast")  # few tests need it, and every forked process would carry it
    nodes = list(ast.walk(ast.parse(test)))
    named = [node for node in nodes if isinstance(node, ast.Name) and node.id == name]
    read = [node.attr for node in nodes if isinstance(node, ast.Attribute) and node.value in named]
    if len(read) < len(named):
        return None
    module = importlib.import_module(name)
    return module if all(hasattr(module, each) for each in read) else None


class _Asker:
    """Asks the program for an operation of `guest.program`; mutable arguments of a call are updated afterwards."""

    def __init__(self, connection):
        self._connection = connection
        self._remotes, self._known = {}, {}

    def __call__(self, operation, /, *arguments, **named):
        wire.send(self._connection, wire.dump((operation, arguments, named), _outward))
        result, after = self.reply(operation)
        for old, new in zip([*arguments, *named.values()], after, strict=False):
            if type(old) is type(new) and type(old) in wire.MUTABLE:
                _update(old, new)
        return result

    def of(self, operation, remote, /, *arguments, **named):
        """Returns the answer about one remote object, or the earlier answer if that must still hold."""
        if operation not in _LASTING:
            self._known.clear()
            return self(operation, remote, *arguments, **named)
        key = operation, _handle(remote)
        if key not in self._known:
            self._known[key] = self(operation, remote)
        return self._known[key]

    def reply(self, operation):
        """Returns (result, arguments afterwards), or raises what the program raised."""
        try:
            reply = wire.load(wire.receive(self._connection), self._remote)
            kind, first, second = reply
            if kind == "value":
                return first, list(second)
            name, message = str.__str__(first), str.__str__(second)
        except (OSError, EOFError, wire.Malformed, ValueError, TypeError) as error:
            raise Gone from error
        error = vars(builtins).get(name)
        # Raised by a call, StopIteration would end a loop of the test's own before its count.
        ends_loops = name in ("StopIteration", "StopAsyncIteration") and operation != "next"
        if isinstance(error, type) and issubclass(error, Exception) and not ends_loops:
            raise error(message)
        raise ProgramError(f"{name}: {message}")

    def _remote(self, handle):
        return self._remotes.setdefault(handle, Remote(self, handle))


def _update(old, new):
    old.clear()
    (old.extend if hasattr(old, "extend") else old.update)(new)


def _outward(value):
    """Returns what represents an object that is not plain data to the program; raises TypeError if nothing can."""
    if type(value) is Remote:
        return _handle(value)
    if isinstance(value, _ITERATORS):
        return list(value)
    module, name = getattr(value, "__module__", None) or "builtins", getattr(value, "__qualname__", "")
    if type(getattr(value, "__objclass__", None)) is type:  # a method of a builtin type, as str.upper
        module = value.__objclass__.__module__
    if name and (module == "builtins" or module in sys.stdlib_module_names):
        found = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part, None)
        if found is value:
            return f"{module}:{name}"
    raise TypeError(f"a test cannot hand over a {type(value).__name__} of its own")


# ----------------------------------------------------------------------------------------------------------------------
# Objects of the program


class Remote:
    """Represents an object of the program in a test."""

    __slots__ = ("_ask", "_handle", "_value")

    def __init__(self, ask, handle):
        object.__setattr__(self, "_ask", ask)
        object.__setattr__(self, "_handle", handle)

    def __eq__(self, other):
        left, right = _copied(self), _copied(other)
        if type(left) is Remote and type(right) is Remote:
            return _same(left, right)
        return NotImplemented if Remote in (type(left), type(right)) else left == right

    def __ne__(self, other):
        equal = self.__eq__(other)
        return equal if equal is NotImplemented else not equal

    def __hash__(self):
        value = _copied(self)
        if type(value) is not Remote:
            return hash(value)
        fields = _asker(self).of("fields", self)
        return hash(_handle(self) if fields is None else fields[0])

    @property
    def __class__(self):
        value = _copied(self)
        return type(value) if type(value) is not Remote else _asker(self)("getattr", self, "__class__")

    def __iter__(self):
        value = _copied(self)
        return iter(value) if type(value) is not Remote else _counted(self)

    def __getattr__(self, name):
        value = _copied(self)
        if type(value) is not Remote and (name in _READING or type(value) in _FROZEN) and hasattr(value, name):
            return getattr(value, name)
        return _asker(self).of("getattr", self, name)

    def __getitem__(self, key):
        value = _copied(self)
        if type(value) is not Remote and hasattr(value, "__getitem__"):
            with contextlib.suppress(LookupError, TypeError):
                return value[key]
        return _asker(self).of("getitem", self, key)  # a dict may have `__missing__`, a matrix takes pairs

    def __exit__(self, kind, error, trace):
        """Ends the context. It never suppresses an exception of the test, which may be the test's failure."""
        builtin = kind is None or vars(builtins).get(kind.__name__) is kind
        _asker(self).of("exit", self, kind if builtin else Exception, str(error))


def _asker(remote):
    return object.__getattribute__(remote, "_ask")


def _handle(remote):
    return object.__getattribute__(remote, "_handle")


def _copied(value):
    """Returns the plain value that a remote object extends, asked for once or, if it can change, again after calls."""
    if type(value) is not Remote:
        return value
    try:
        return object.__getattribute__(value, "_value")
    except AttributeError:
        copy = _asker(value).of("plain", value)
    if type(copy) in (Remote, *_SCALARS):
        copy = copy if type(copy) is not Remote else value
        object.__setattr__(value, "_value", copy)
    return copy


def _counted(remote):
    """Yields what an object of the program yields. If the object has a length, it must not stop earlier."""
    try:
        count = len(remote)
    except Exception:
        count = 0
    iterator, seen = _asker(remote).of("iter", remote), 0
    while True:
        try:
            item = next(iterator)
        except StopIteration:
            break
        yield item
        seen += 1
    if seen < count:
        raise ProgramError(f"{seen} of {count} items")


def _same(left, right):
    """Returns True for one and the same object, and for two of a class that compares by value with equal fields."""
    if _handle(left) == _handle(right):
        return True
    ours, theirs = (_asker(left).of("fields", each) for each in (left, right))
    return ours is not None and theirs is not None and ours == theirs


def _forwarded(operation):
    return lambda self, /, *arguments, **named: _asker(self).of(operation, self, *arguments, **named)


def _on_copy(name, function, kinds=None):
    """Returns a method that works on the plain value, or asks the program if the object extends none.

    With `kinds`, it asks about values of other types too.
    """

    def method(self):
        value = _copied(self)
        plain = type(value) is not Remote if kinds is None else type(value) in kinds
        return function(value) if plain else _asker(self).of(name, self)

    return method


def _binary(name, reflected=False):
    """Returns an operator on the plain values, or the program's operator if both operands are its objects.

    An object of the program never meets a value of the test: its `__sub__` or `__lt__` would be told the answer.
    """

    def method(self, other):
        left, right = _copied(self), _copied(other)
        remote = (type(left) is Remote) + (type(right) is Remote)
        if remote == 1:
            return NotImplemented
        if reflected:
            left, right = right, left
        return _asker(self)("binary", name, left, right) if remote else getattr(operator, name)(left, right)

    return method


def _extended(remote):
    value = _copied(remote)
    if type(value) is Remote:
        raise TypeError("an object of the program is no number")
    return value


for _name in ("call", "next", "enter", "setitem", "delitem"):
    setattr(Remote, f"__{_name}__", _forwarded(_name))
# Containers of the standard library have texts of their own, as named tuples have.
for _name, _function in (("str", str), ("repr", repr)):
    setattr(Remote, f"__{_name}__", _on_copy(_name, _function, _SCALARS))
for _name, _function in (("bool", bool), ("len", len), ("int", int), ("float", float), ("index", operator.index)):
    setattr(Remote, f"__{_name}__", _on_copy(_name, _function))
for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and_", "or_", "xor", "matmul"):
    setattr(Remote, f"__{_name.strip('_')}__", _binary(_name))
    setattr(Remote, f"__r{_name.strip('_')}__", _binary(_name, reflected=True))
for _name in ("lt", "le", "gt", "ge"):
    setattr(Remote, f"__{_name}__", _binary(_name))
for _name, _function in (("abs", abs), ("neg", operator.neg), ("round", round)):
    setattr(Remote, f"__{_name}__", lambda self, *rest, function=_function: function(_extended(self), *rest))
for _name in ("setattr", "delattr"):
    setattr(Remote, f"__{_name}__", _forwarded(_name))
Remote.__instancecheck__ = lambda self, other: _asker(self)("instance", other, self)
