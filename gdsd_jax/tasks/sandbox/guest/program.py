"""Executes a program, then does what the tester asks of it. Standard library only.

Everything here shares an interpreter with the program, which may change all of it. Nothing depends on it: what this
side sends is treated as untrusted (`guest.wire`), and no verdict is formed here.
"""

import builtins
import collections
import importlib
import operator
import types

from gdsd_jax.tasks.sandbox.guest import wire


def serve(program, connection):
    """Executes the program in a fresh namespace, then answers the tester until the tester is gone."""
    namespace, objects = {"__name__": "program"}, {}

    def keep(value):
        objects[id(value)] = value
        return id(value)

    def reply(function, *arguments):
        try:
            data = wire.dump(("value", *function(*arguments)), keep)
        except BaseException as error:
            data = wire.dump(("raised", type(error).__name__, _text(error)), keep)
        wire.send(connection, data)

    def execute():
        exec(compile(program, "<program>", "exec"), namespace)
        return None, ()

    def answer(request):
        operation, arguments, named = wire.load(request, objects.__getitem__, _imported)
        if operation == "name":
            return _lookup(namespace, *arguments), ()
        result = _OPERATIONS[operation](*arguments, **named)
        if operation != "call":
            return result, ()
        after = [value if type(value) in wire.MUTABLE else None for value in (*arguments, *named.values())]
        return result, after

    reply(execute)
    while True:
        reply(answer, wire.receive(connection))


def _lookup(namespace, name):
    if name not in namespace:
        raise NameError(f"name {name!r} is not defined")
    return namespace[name]


def _imported(name):
    module, _, path = name.partition(":")
    return operator.attrgetter(path)(importlib.import_module(module))


def _plain(value):
    """Returns the plain value that an object extends (a named tuple, a text of its own class), or the object."""
    for kind, copy in _COPIES.items():
        if isinstance(value, kind):
            return copy(value)
    return value


# The methods of the plain types are called directly: an honest object that overrides int() or iter() is copied as is.
_COPIES = {
    str: str.__str__,
    bytes: lambda value: bytes.__getitem__(value, slice(None)),
    int: int.__pos__,
    float: float.__pos__,
    complex: complex.__pos__,
    tuple: lambda value: tuple(tuple.__iter__(value)),
    list: lambda value: list(list.__iter__(value)),
    set: lambda value: set(set.__iter__(value)),
    frozenset: lambda value: frozenset(frozenset.__iter__(value)),
    dict: lambda value: dict(dict.items(value)),
    collections.deque: lambda value: collections.deque(collections.deque.__iter__(value), value.maxlen),
}


def _fields(value):
    """Returns (class, {field: value}) of an object that compares by value, or None if it compares by identity."""
    kind = type(value)
    if not isinstance(kind.__eq__, types.FunctionType):
        return None
    slots = [each for base in kind.__mro__ for each in _listed(vars(base).get("__slots__", ()))]
    names = [*getattr(value, "__dict__", ()), *(name for name in slots if hasattr(value, name))]
    return kind, {name: getattr(value, name) for name in names}


def _listed(slots):
    return [slots] if isinstance(slots, str) else list(slots)


def _text(error):
    try:
        return str(error)[:1000]
    except BaseException:
        return ""


_OPERATIONS = {
    "call": lambda function, /, *arguments, **named: function(*arguments, **named),
    "instance": lambda value, kind: isinstance(value, kind),
    "plain": _plain,
    "fields": _fields,
    "binary": lambda name, left, right: getattr(operator, name)(left, right),
    "enter": lambda value: type(value).__enter__(value),
    "exit": lambda value, kind, text: type(value).__exit__(value, kind, kind and kind(text), None),
    **{name: getattr(builtins, name) for name in ("iter", "next", "len", "bool", "str", "repr", "int", "float")},
    **{name: getattr(builtins, name) for name in ("getattr", "setattr", "delattr")},
    **{name: getattr(operator, name) for name in ("getitem", "setitem", "delitem", "index")},
}
