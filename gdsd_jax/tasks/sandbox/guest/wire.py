"""Writes plain data as bytes, reads it back, and moves frames over a socket. Standard library only.

A value is one tag and its parts, read only by the functions below. They call nothing but the constructors of `_BUILT`,
and only with parts of the types listed there. So the worst that a hostile program can send is a value of these types. A
value of any other type, including a subclass of these, travels as a number under which its owner keeps it.
"""

import builtins
import collections
import importlib
import struct

MAX_FRAME = 2**26
MAX_DEPTH = 300
_CONSTANTS = (None, False, True, Ellipsis, NotImplemented)
_CONTAINERS = {b"l": list, b"t": tuple, b"e": set, b"z": frozenset}
_CONTAINER_TAGS = {kind: tag for tag, kind in _CONTAINERS.items()}
_KEYS, _ITEMS, _VALUES = type({}.keys()), type({}.items()), type({}.values())
_NoneType = type(None)
_CONSTANT_KINDS = set(map(type, _CONSTANTS))

# tag -> type, its parts, the types that each part may have, and how the reader puts them together.
_BUILT = {
    b"c": (complex, lambda v: (v.real, v.imag), (float, float), complex),
    b"y": (bytearray, lambda v: (bytes(v),), (bytes,), bytearray),
    b"r": (range, lambda v: (v.start, v.stop, v.step), (int, int, int), range),
    b":": (slice, lambda v: (v.start, v.stop, v.step), (object, object, object), slice),
    b"o": (collections.OrderedDict, lambda v: (dict(v),), (dict,), collections.OrderedDict),
    b"C": (collections.Counter, lambda v: (dict(v),), (dict,), collections.Counter),
    b"f": (
        collections.defaultdict, lambda v: (_factory(v), dict(v)), ((type, _NoneType), dict), collections.defaultdict
    ),
    b"q": (
        collections.deque, lambda v: (list(v), v.maxlen), (list, (int, _NoneType)), collections.deque
    ),
    b"I": (type(iter([])), lambda v: ([*v],), (list,), iter),
    b"k": (_KEYS, lambda v: (list(v),), (list,), lambda keys: dict.fromkeys(keys).keys()),
    b"j": (_ITEMS, lambda v: (list(v),), (list,), lambda items: dict(items).items()),
    b"v": (_VALUES, lambda v: (list(v),), (list,), lambda values: dict(enumerate(values)).values()),
}  # fmt: skip
_BUILT_TAGS = {kind: (tag, parts) for tag, (kind, parts, _, _) in _BUILT.items()}
_TYPES = {f"{kind.__module__}.{kind.__name__}": kind for kind, *_ in _BUILT.values() if kind.__module__ != "builtins"}
MUTABLE = {list, dict, set, bytearray, *(getattr(collections, n) for n in ("Counter", "OrderedDict", "defaultdict"))}
MUTABLE.add(collections.deque)


def _of_decimal(decimal):
    return {b"D": (decimal.Decimal, lambda v: (str(v),), (str,), decimal.Decimal)}


def _of_fractions(fractions):
    kind = fractions.Fraction
    return {b"F": (kind, lambda v: (v.numerator, v.denominator), (int, int), kind)}


def _of_datetime(datetime):
    zone = (datetime.timezone, _NoneType)
    return {
        b"d": (datetime.date, lambda v: (v.year, v.month, v.day), (int, int, int), datetime.date),
        b"T": (
            datetime.time, lambda v: (v.hour, v.minute, v.second, v.microsecond, v.tzinfo),
            (int, int, int, int, zone), datetime.time,
        ),
        b"w": (
            datetime.datetime, lambda v: (v.year, v.month, v.day, v.hour, v.minute, v.second, v.microsecond, v.tzinfo),
            (int,) * 7 + (zone,), datetime.datetime,
        ),
        b"p": (datetime.timedelta, lambda v: (v.days, v.seconds, v.microseconds), (int, int, int), datetime.timedelta),
        b"Z": (datetime.timezone, lambda v: (v.utcoffset(None),), (datetime.timedelta,), datetime.timezone),
    }  # fmt: skip


# Types whose modules are imported when the first such value comes: every process forked would pay for them otherwise.
_LATE = {"decimal": _of_decimal, "fractions": _of_fractions, "datetime": _of_datetime}
_LATE_TAGS = {b"D": "decimal", b"F": "fractions", **dict.fromkeys((b"d", b"T", b"w", b"p", b"Z"), "datetime")}


def _learn(module):
    """Adds the types of one of the late modules; does nothing for any other and the second time."""
    if module not in _LATE:
        return
    found = _LATE.pop(module)(importlib.import_module(module))
    _BUILT.update(found)
    _BUILT_TAGS.update({kind: (tag, parts) for tag, (kind, parts, _, _) in found.items()})
    _TYPES.update({f"{module}.{kind.__name__}": kind for kind, *_ in found.values()})


class Malformed(ValueError):
    """Raised for bytes that encode no value."""


def dump(value, other):
    """Returns the bytes of a value.

    `other(part)` says how a part that is not plain travels: the number under which its owner keeps it, the name under
    which the reader finds it, or the list that the reader iterates over.
    """
    out = []
    _write(value, other, out.append, 0)
    return b"".join(out)


def load(data, kept, named=None):
    """Returns the value that untrusted bytes encode; raises Malformed if they encode none.

    `kept(number)` gives what a number means, and `named(name)` what a name means that is not one of a plain type.
    """
    try:
        value, end = _read(data, 0, (kept, named), 0)
    except Malformed:
        raise
    except (ValueError, TypeError, IndexError, OverflowError, ArithmeticError, struct.error) as error:
        raise Malformed(str(error)) from error
    if end != len(data):
        raise Malformed("bytes after the value")
    return value


# ----------------------------------------------------------------------------------------------------------------------
# Writing


def _write(value, other, put, depth):
    if depth > MAX_DEPTH:
        raise RecursionError(f"a value nested deeper than {MAX_DEPTH}")
    kind = type(value)
    if kind is int:
        size = value.bit_length() // 8 + 1
        put(b"i" + struct.pack("!I", size) + value.to_bytes(size, "big", signed=True))
    elif kind is str:
        _put_sized(put, b"s", value.encode("utf-8", "surrogatepass"))
    elif kind is float:
        put(b"x" + struct.pack("!d", value))
    elif kind is bytes:
        _put_sized(put, b"b", value)
    elif kind in _CONTAINER_TAGS:
        _write_items(_CONTAINER_TAGS[kind], value, other, put, depth)
    elif kind is dict:
        put(b"m" + struct.pack("!I", len(value)))
        for key, item in value.items():
            _write(key, other, put, depth + 1)
            _write(item, other, put, depth + 1)
    elif kind in _CONSTANT_KINDS:
        put(b"n" + bytes([next(n for n, constant in enumerate(_CONSTANTS) if constant is value)]))
    elif _known(kind) and not _named_zone(kind, value):
        tag, parts = _BUILT_TAGS[kind]
        put(tag)
        for part in parts(value):
            _write(part, other, put, depth + 1)
    elif (name := _name(value)) is not None:
        _put_sized(put, b"N", name.encode())
    else:
        _write_other(other(value), other, put, depth)


def _write_other(given, other, put, depth):
    if type(given) is int:
        put(b"h" + struct.pack("!Q", given))
    elif type(given) is str:
        _put_sized(put, b"N", given.encode())
    else:
        _write(iter(given), other, put, depth + 1)


def _put_sized(put, tag, data):
    put(tag + struct.pack("!I", len(data)))
    put(data)


def _write_items(tag, items, other, put, depth):
    kinds = set(map(type, items))
    if kinds == {int} or kinds == {float}:  # all at once if all are small, because long lists are common
        code = b"q" if kinds == {int} else b"d"
        try:
            put(tag + code + struct.pack("!I", len(items)) + struct.pack(f"!{len(items)}{code.decode()}", *items))
            return
        except struct.error:
            pass
    put(tag + b"*" + struct.pack("!I", len(items)))
    for item in items:
        _write(item, other, put, depth + 1)


def _known(kind):
    if kind not in _BUILT_TAGS:
        _learn(kind.__module__)
    return kind in _BUILT_TAGS


def _named_zone(kind, value):
    """Returns True for a time in a zone that is more than its distance from UTC: no plain value."""
    return _BUILT_TAGS[kind][0] in (b"T", b"w") and value.tzinfo is not None and not _known(type(value.tzinfo))


def _factory(value):
    return value.default_factory if _name(value.default_factory) is not None else None


def _name(value):
    """Returns the name of a builtin type or of a type of `_BUILT`; None for anything else."""
    if type(value) is not type:
        return None
    if vars(builtins).get(value.__name__) is value:
        return value.__name__
    _learn(value.__module__)
    name = f"{value.__module__}.{value.__name__}"
    return name if _TYPES.get(name) is value else None


# ----------------------------------------------------------------------------------------------------------------------
# Reading: (bytes, start, ...) -> value, end


def _read(data, at, resolve, depth):
    if depth > MAX_DEPTH:
        raise Malformed(f"nested deeper than {MAX_DEPTH}")
    tag, at = data[at : at + 1], at + 1
    if tag in (b"i", b"s", b"b", b"N"):
        (size,) = struct.unpack_from("!I", data, at)
        start, end = at + 4, at + 4 + size
        if end > len(data):
            raise Malformed("cut short")
        part = data[start:end]
        if tag == b"i":
            return int.from_bytes(part, "big", signed=True), end
        if tag == b"b":
            return part, end
        if tag == b"s":
            return part.decode("utf-8", "surrogatepass"), end
        return _named(part.decode(), resolve[1]), end
    if tag == b"x":
        return struct.unpack_from("!d", data, at)[0], at + 8
    if tag == b"n":
        return _CONSTANTS[data[at]], at + 1
    if tag in _CONTAINERS:
        return _read_items(_CONTAINERS[tag], data, at, resolve, depth)
    if tag == b"m":
        found, (count,) = {}, struct.unpack_from("!I", data, at)
        at += 4
        for _ in range(count):
            key, at = _read(data, at, resolve, depth + 1)
            found[key], at = _read(data, at, resolve, depth + 1)
        return found, at
    if tag == b"h":
        return resolve[0](struct.unpack_from("!Q", data, at)[0]), at + 8
    _learn(_LATE_TAGS.get(tag))
    if tag not in _BUILT:
        raise Malformed(f"no tag {tag!r}")
    _, _, kinds, build = _BUILT[tag]
    parts = []
    for kind in kinds:
        part, at = _read(data, at, resolve, depth + 1)
        if kind is not object and type(part) not in (kind if isinstance(kind, tuple) else (kind,)):
            raise Malformed(f"{type(part).__name__} in {tag!r}")
        parts.append(part)
    return build(*parts), at


def _read_items(kind, data, at, resolve, depth):
    code, (count,) = data[at : at + 1], struct.unpack_from("!I", data, at + 1)
    at += 5
    if code in (b"q", b"d"):
        if count * 8 > len(data) - at:
            raise Malformed("cut short")
        return kind(struct.unpack_from(f"!{count}{code.decode()}", data, at)), at + 8 * count
    if code != b"*":
        raise Malformed(f"no items {code!r}")
    found = []
    for _ in range(count):
        item, at = _read(data, at, resolve, depth + 1)
        found.append(item)
    return found if kind is list else kind(found), at


def _named(name, named):
    _learn(name.partition(".")[0])
    value = _TYPES.get(name) or vars(builtins).get(name)
    if type(value) is type:
        return value
    if named is None:
        raise Malformed(f"{name!r} names no plain type")
    return named(name)


# ----------------------------------------------------------------------------------------------------------------------
# Frames


def send(connection, data):
    connection.sendall(struct.pack("!I", len(data)) + data)


def receive(connection):
    """Returns the next frame; raises EOFError at the end and for one that is too long."""
    (size,) = struct.unpack("!I", exactly(connection.recv, 4))
    if size > MAX_FRAME:
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
