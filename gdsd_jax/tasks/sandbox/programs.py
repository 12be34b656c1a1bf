"""Defines a program with its tests, the limits of a test and the verdicts on one."""

import dataclasses
import enum
from typing import NamedTuple

from gdsd_jax.tasks.sandbox.guest import tester


class Verdict(enum.IntEnum):
    """Names the ways in which one test can end."""

    PASSED = tester.PASSED
    FAILED = tester.FAILED
    TIMED_OUT = tester.TIMED_OUT
    OUT_OF_MEMORY = tester.OUT_OF_MEMORY
    CRASHED = tester.CRASHED
    REFUSED = tester.CRASHED + 1  # the sandbox did not start


class Program(NamedTuple):
    """Holds one program and its tests.

    source: Python, executed anew before each test. A test sees the names of program and tests, and the builtins.
    tests: Python statements; a test that runs to its end has passed.
    shadowed: names under which the program may replace a builtin in the tests (a tested function named `sum`).
    imports: import statements that run before each test, in the tests' own process (`test_imports` of MBPP); a name
      that they define is never the program's. Nor is a module of the standard library that a test uses unimported.
    """

    source: str
    tests: tuple[str, ...]
    shadowed: tuple[str, ...] = ()
    imports: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits the resources of one test.

    Attributes:
      seconds: wall-clock time of program and test together.
      megabytes: address space of each process; `total_megabytes`: resident memory of all.
      processes: processes and threads, the tester's two included.
      disk_megabytes, files: of the private /tmp; `file_megabytes`: of each file.
    """

    seconds: float = 1.0
    megabytes: int = 512
    total_megabytes: int = 1024
    processes: int = 16
    disk_megabytes: int = 16
    files: int = 1024
    file_megabytes: int = 8
