"""Checks how the modules of the package import each other, and prints the figures of its layout.

    python tests/layers.py

`LAYERS` declares the order: a module may import from its own layer and from the layers before it. Imports inside
functions and imports for type checkers count too.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "gdsd_jax"
# Rooms from the lowest to the highest, then the commands; a command may import the commands before it.
LAYERS = (
    "runtime",
    "denoiser",
    "families",
    "hub",
    "diffusion",
    "methods",
    "tasks",
    "config",
    "telemetry",
    "training",
    "evaluation",
    "planning",
    "plan",
    "sft",
    "train",
    "evaluate",
    "generate",
    "export",
    "lm_eval",
    "compare",
    "meter",
    "demo",
)
LONGEST_FILE, MOST_COMMANDS = 350, 10


def modules() -> dict[str, Path]:
    """Returns the file of every module of the package, by the module's name."""
    found = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """Returns the modules of the package that one module imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in known}
        elif isinstance(node, ast.ImportFrom) and node.module in known:
            found |= {full if (full := f"{node.module}.{alias.name}") in known else node.module for alias in node.names}
    return found - {name}


def graph() -> dict[str, set[str]]:
    """Returns the imports of every module."""
    known = modules()
    return {name: imports(name, path, known) for name, path in known.items()}


def layer(name: str) -> int:
    """Returns the place of a module's layer; the package itself imports nothing and is first.

    Raises:
      ValueError: the layer is not declared.
    """
    parts = name.split(".")
    return -1 if len(parts) == 1 else LAYERS.index(parts[1])


def back_arrows(arrows: dict[str, set[str]]) -> list[tuple[str, str]]:
    """Returns the imports that climb: from a module to one of a later layer."""
    return [(name, other) for name, others in arrows.items() for other in others if layer(other) > layer(name)]


def circles(arrows: dict[str, set[str]]) -> list[list[str]]:
    """Returns the groups of modules that import each other in a circle.

    A package and its own modules do not form a circle: `__init__` collects what its modules define.
    """
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        order[name] = low[name] = len(order)
        stack.append(name)
        for other in arrows[name]:
            if name.startswith(other + "."):
                continue
            if other not in order:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], order[other])
        if low[name] == order[name]:
            group = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(group) > 1:
                found.append(group)

    for name in arrows:
        if name not in order:
            visit(name)
    return found


def lengths() -> dict[Path, int]:
    """Returns the number of lines of every file of the package."""
    return {path.relative_to(ROOT): len(path.read_text().splitlines()) for path in modules().values()}


def commands() -> list[str]:
    """Returns the modules at the top level of the package."""
    return sorted(path.stem for path in (ROOT / PACKAGE).glob("*.py") if path.stem != "__init__")


def main() -> int:
    arrows, sizes = graph(), lengths()
    climbing, round_trips, top = back_arrows(arrows), circles(arrows), commands()
    largest = max(sizes, key=sizes.get)
    print(f"modules {len(arrows)}, lines {sum(sizes.values())}, at the top level {len(top)}: {', '.join(top)}")
    print(f"largest file {largest}: {sizes[largest]} lines")
    print(f"circles {len(round_trips)}")
    for group in round_trips:
        print(f"  {' - '.join(group)}")
    print(f"imports that climb {len(climbing)}")
    for name, other in climbing:
        print(f"  {name} -> {other}")
    good = not climbing and not round_trips and sizes[largest] <= LONGEST_FILE and len(top) <= MOST_COMMANDS
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
