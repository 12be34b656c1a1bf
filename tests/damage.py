"""Damages JSON values and the bytes of files at random, for the fuzzers."""

import copy
import json
import math
import random
from typing import Any

ODD = (
    None, True, False, 0, 1, -1, 2, 10**9, 2**31, 2**63, 10**400, 0.5, -0.5, 1e300, math.nan, math.inf, -math.inf, "",
    "text", "a\0b", "\ud800", "None", "<|mask|>", "{x}", "{{ x }}", "../..", "/etc/passwd", "gs://a/b", [], [1], ["a"],
    [[]], {}, {"a": 1}, {"a": {}}, [None], "x" * 5000, ":", ":x", "json:x", "nan",
)  # fmt: skip


def changed(draw: random.Random, content: Any) -> Any:
    """Returns a JSON value with one to three damaged places."""
    content = copy.deepcopy(content)
    for _ in range(draw.randint(1, 3)):
        place, path = content, []
        while isinstance(place, (dict, list)) and len(place) and (not path or draw.random() < 0.6):
            key = draw.choice(list(place)) if isinstance(place, dict) else draw.randrange(len(place))
            path.append((place, key))
            place = place[key]
        if not path:
            return draw.choice(ODD)
        parent, key = path[-1]
        if draw.random() < 0.25:
            del parent[key]
        else:
            parent[key] = draw.choice(ODD)
    return content


def damaged(draw: random.Random, raw: bytes) -> bytes:
    """Returns the bytes of a file with some damage."""
    if draw.random() < 0.5:
        try:
            if raw.count(b"\n") > 1:
                lines = raw.splitlines()
                number = draw.randrange(len(lines))
                lines[number] = json.dumps(changed(draw, json.loads(lines[number]))).encode()
                return b"\n".join(lines) + b"\n"
            return json.dumps(changed(draw, json.loads(raw))).encode("utf-8", "surrogatepass")
        except ValueError:
            pass
    kind = draw.randrange(5)
    if kind == 0:
        return raw[: draw.randrange(len(raw) + 1)]
    if kind == 1:
        return draw.choice((b"", b"\xff\xfe", b"null", b"[]", b"{}", b"3", b'"a"', b"[" * 10_000, b"\n\n"))
    if kind == 2:
        return raw + draw.randbytes(draw.randint(1, 50))
    data = bytearray(raw or b"x")
    for _ in range(draw.randint(1, 4)):
        data[draw.randrange(min(len(data), 4000))] = draw.randrange(256)
    return bytes(data)
