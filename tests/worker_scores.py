"""Defines scores that misbehave in every way that a worker must survive, in a module like that of a user's own task."""

import ctypes
import os
import signal
import sys
import time

HOARD: list[bytearray] = []


def length(completion: str, row: dict) -> dict[str, float]:
    return {"length": len(completion) + row.get("more", 0)}


def process(completion: str, row: dict) -> dict[str, float]:
    return {"id": os.getpid(), "jax": "jax" in sys.modules, "jaxlib": "jaxlib" in sys.modules}


def hang(completion: str, row: dict) -> dict[str, float]:
    if completion == "sleep":
        time.sleep(600)
    while completion == "loop":
        pass
    while completion == "deaf":
        try:
            signal.signal(signal.SIGALRM, signal.SIG_IGN)
        except BaseException:  # whatever is raised in it
            continue
    if completion == "power":
        9**9**9  # noqa: B018 -- one bytecode that no Python signal handler interrupts
    return {"length": len(completion)}


def die(completion: str, row: dict) -> dict[str, float]:
    if completion == "exit":
        os._exit(3)
    if completion == "segfault":
        ctypes.string_at(0)
    if completion == "noise":
        os.write(1, b"x" * 100_000)
    return {"length": len(completion)}


def memory(completion: str, row: dict) -> dict[str, float]:
    if completion == "bomb":
        return {"length": len(bytearray(2**33))}
    if completion == "leak":
        HOARD.append(bytearray(100 * 2**20))
    return {"length": len(completion), "id": os.getpid()}


def raising(completion: str, row: dict) -> dict[str, float]:
    raise ValueError(f"no {completion}")


def wrong(completion: str, row: dict) -> dict[str, float]:
    return {"length": "many"}
