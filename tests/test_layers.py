"""The layout of the package: its layers, the length of its files, the number of its commands."""

import ast
import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import layers
import pytest

from gdsd_jax.runtime.errors import PackageError


def test_no_import_climbs():
    assert layers.back_arrows(layers.graph()) == []


def test_no_circles():
    assert layers.circles(layers.graph()) == []


def test_every_file_is_short():
    assert {path: count for path, count in layers.lengths().items() if count > layers.LONGEST_FILE} == {}


def test_few_modules_at_the_top():
    assert len(layers.commands()) <= layers.MOST_COMMANDS


def test_the_check_finds_circles_and_climbing_imports():
    arrows = {
        "gdsd_jax.runtime.a": {"gdsd_jax.hub.b"},
        "gdsd_jax.hub.b": {"gdsd_jax.hub.c"},
        "gdsd_jax.hub.c": {"gdsd_jax.hub.b"},
        "gdsd_jax.hub": {"gdsd_jax.hub.b"},
    }
    assert layers.back_arrows(arrows) == [("gdsd_jax.runtime.a", "gdsd_jax.hub.b")]
    assert [set(group) for group in layers.circles(arrows)] == [{"gdsd_jax.hub.b", "gdsd_jax.hub.c"}]


def test_every_name_is_defined():
    """The usual lint leaves undefined names out, because letters of shapes look like them; here strings are skipped."""
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F821", "--output-format", "json"]
    found = subprocess.run([*command, "gdsd_jax", "tests"], cwd=layers.ROOT, capture_output=True, text=True).stdout
    undefined = []
    for entry in json.loads(found):
        line = Path(entry["filename"]).read_text().splitlines()[entry["location"]["row"] - 1]
        if line[: entry["location"]["column"] - 1].count('"') % 2 == 0:
            undefined.append(f"{entry['filename']}:{entry['location']['row']} {entry['message']}")
    assert undefined == []


def module_named(name: str) -> ModuleType | None:
    """Returns a module, or None if it does not exist or needs a package that is not installed here (lm-eval)."""
    try:
        return importlib.import_module(name)
    except (ModuleNotFoundError, PackageError) as error:
        assert isinstance(error, PackageError) or error.name.startswith("gdsd_jax"), error
        return None


@pytest.mark.parametrize("folder", ["gdsd_jax", "tests", "benchmarks", "examples", "configs", "docs"])
def test_everything_taken_from_a_module_of_the_package_exists(folder):
    """Catches names that have moved, in imports inside functions and in `module.name`, that no fast test executes."""
    missing = []
    for path in sorted((layers.ROOT / folder).rglob("*.py")):
        tree, modules = ast.parse(path.read_text()), {}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "gdsd_jax":
                if (module := module_named(node.module)) is None:
                    assert node.module == "gdsd_jax.lm_eval", f"{path}:{node.lineno}"
                    continue
                for alias in node.names:
                    name = f"{node.module}.{alias.name}"
                    found = getattr(module, alias.name, None)
                    found = module_named(name) if found is None and hasattr(module, "__path__") else found
                    if isinstance(found, ModuleType):
                        modules[alias.asname or alias.name] = found
                    elif found is None and not hasattr(module, alias.name) and name != "gdsd_jax.lm_eval":
                        missing.append(f"{path}:{node.lineno} {name}")
        bound = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        bound |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
        missing += [
            f"{path}:{node.lineno} {node.value.id}.{node.attr}"
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
            if node.value.id in modules.keys() - bound and not hasattr(modules[node.value.id], node.attr)
        ]
    assert missing == []
