"""The package as users install it: a wheel in a separate environment, outside the checkout."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path

import pytest
import tiny_run

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_a_wheel_trains_from_a_config_of_the_users_own(tmp_path):
    """Two iterations of `gdsd-train`, a method beside the config; dependencies are those of this environment."""
    pytest.importorskip("setuptools", minversion="77")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    # The wheel is built from a copy, because a build leaves files in the sources, where the next build finds them.
    sources = tmp_path / "sources"
    shutil.copytree(ROOT / "gdsd_jax", sources / "gdsd_jax", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, sources)
    pip = [sys.executable, "-m", "pip"]
    build = [*pip, "wheel", sources, "--no-deps", "--no-build-isolation", "-q", "-w", tmp_path]
    subprocess.run(build, check=True, cwd=tmp_path, env=environment)
    (wheel,) = tmp_path.glob("gdsd_jax-*.whl")
    home = tmp_path / "environment"
    venv.create(home, with_pip=False)
    (site,) = home.glob("lib/python*/site-packages")
    install = [*pip, "--python", home / "bin" / "python", "install", "--no-deps", "--no-index", "-q", wheel]
    subprocess.run(install, check=True, cwd=tmp_path, env=environment)
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")

    own = tmp_path / "own"
    own.mkdir()
    file = tiny_run.build(own)
    # The config uses a task of the package, because that of the other tests is in a module of the tests.
    text = file.read_text().replace("tiny_run:TASK", "sudoku")
    file.write_text(text)
    (own / "my_loss.py").write_text("from gdsd_jax.methods import METHODS\n\nMINE = METHODS['wd1']\n")
    ran = subprocess.run(
        [home / "bin" / "gdsd-train", f"--config={file}", f"--workdir={own / 'run'}", "--config.method=my_loss:MINE"],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    steps = [json.loads(line)["step"] for line in (own / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2]


def test_every_package_that_is_imported_is_declared():
    """Packages that a dependency happens to bring must be declared too, because it may stop bringing them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["lm-eval"]]
    declared = {re.match(r"[\w-]+", text)[0].replace("-", "_") for text in wanted}
    named_otherwise = {"absl": "absl_py", "orbax": "orbax_checkpoint"}
    imported = set()
    for path in (ROOT / "gdsd_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module.partition(".")[0])
    packages = imported - sys.stdlib_module_names - {"gdsd_jax"}
    assert {named_otherwise.get(name, name) for name in packages} - declared == set()


def test_every_command_has_a_script():
    scripts = set(re.findall(r"^gdsd-([\w-]+) = ", (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
    files = (ROOT / "gdsd_jax").glob("*.py")
    commands = {path.stem.replace("_", "-") for path in files if "__main__" in path.read_text()}
    assert scripts == commands - {"--init--"} | {"plots"}
