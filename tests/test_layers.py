"""The layout of the package: its layers, the length of its files, the number of its commands."""

import json
import subprocess
import sys
from pathlib import Path

import layers


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
    """The linter takes the letters of shapes for names, so it is asked again, without what lies inside strings."""
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F821", "--output-format", "json"]
    found = subprocess.run([*command, "gdsd_jax", "tests"], cwd=layers.ROOT, capture_output=True, text=True).stdout
    undefined = []
    for entry in json.loads(found):
        line = Path(entry["filename"]).read_text().splitlines()[entry["location"]["row"] - 1]
        if line[: entry["location"]["column"] - 1].count('"') % 2 == 0:
            undefined.append(f"{entry['filename']}:{entry['location']['row']} {entry['message']}")
    assert undefined == []
