"""The README and the pages of docs: their length, links, code and settings."""

import importlib.util
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_run
from surroundings import surroundings  # noqa: F401  (a fixture that acts by itself)

from gdsd_jax.config import TrainConfig, default, freeze, to_dict
from gdsd_jax.telemetry.metrics import MetricWriter
from gdsd_jax.training.record import FREE_TO_CHANGE, LENGTH, ROUNDING_ONLY

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CODE = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_to_files_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"^(    |```).*$", "", page.read_text(), flags=re.MULTILINE))
    files = [link.partition("#")[0] for link in links if "://" not in link and not link.startswith("#")]
    assert [file for file in files if not (page.parent / file).exists()] == []


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"], ids=lambda page: page.stem)
def test_settings_commands_and_files_that_a_page_names_exist(page):
    text = CODE.sub("", page.read_text())
    known = to_dict(freeze(TrainConfig, default()))
    free = ("settings.", "task.settings.", "optimizer.settings.", "extras_optimizer.settings.")

    def exists(name):
        place = known
        for part in name.split("."):
            if not isinstance(place, dict) or part not in place:
                return False
            place = place[part]
        return True

    for match in re.finditer(r"\bconfig\.([a-z_0-9]+(?:\.[a-z_0-9]+)*)(\()?", text):
        name = match[1].removesuffix(".update") if match[2] else match[1]
        assert exists(name) or name.startswith(free) or name in ("json", "read_config", "default"), match[0]
    for module in re.findall(r"python -m ((?:gdsd_jax|benchmarks)(?:\.[a-z_0-9]+)+)", text):
        assert (ROOT / f"{module.replace('.', '/')}.py").exists(), module
    for file in re.findall(r"\b((?:tests|configs|examples|benchmarks|launch)/[a-z_0-9/]+\.(?:py|sh|md))\b", text):
        assert (ROOT / file).exists(), file


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_no_line_of_a_page_is_taken_for_a_comment(page):
    """The site leaves out lines that begin with a percent sign."""
    assert not [line for line in page.read_text().splitlines() if line.lstrip().startswith("% ")]


def test_the_configuration_page_is_up_to_date():
    """If not: python docs/make_configuration.py."""
    spec = importlib.util.spec_from_file_location("make_configuration", ROOT / "docs" / "make_configuration.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert (ROOT / "docs" / "configuration.md").read_text() == script.page()


def test_the_quickstart_lists_the_settings_that_a_resumed_run_may_change():
    page = (ROOT / "docs/quickstart.md").read_text()
    (table,) = re.findall(r"^A resumed run keeps(?s:.*?)\n\n((?:\|.*\n)+)", page, re.M)
    assert set(re.findall("`([^`]+)`", table)) == {"config", *FREE_TO_CHANGE, *ROUNDING_ONLY, *LENGTH}


@pytest.mark.slow
def test_the_loss_of_the_readme_trains(tmp_path, monkeypatch):
    """The code as it is printed, as a script in a checkout whose config is the smallest one."""
    (block,) = CODE.findall((ROOT / "README.md").read_text())
    lines = [line for line in block.splitlines() if line and not line.startswith(("from", "import"))]
    assert len(lines) <= 10
    file = tiny_run.build(tmp_path)
    (tmp_path / "configs").mkdir()
    file.rename(tmp_path / "configs" / "tiny_sudoku.py")
    (tmp_path / "script.py").write_text(block)
    monkeypatch.chdir(tmp_path)
    runpy.run_path("script.py", run_name="__main__")
    entries = [json.loads(line) for line in (tmp_path / "runs/elbo/metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries] == [1, 2]
    assert all("policy/log_prob" in entry and entry["grad/norm"] > 0 for entry in entries)


def test_the_tracker_of_the_guide_follows_a_resumed_run(tmp_path):
    assert (
        f"```python\n{(ROOT / 'tests' / 'example_tracker.py').read_text()}```"
        in (ROOT / "docs" / "new_tracker.md").read_text()
    )
    for first, resumed in ((1, -1), (3, 2), (5, None)):
        with MetricWriter(tmp_path, trackers=("example_tracker:CSV",), resume_step=resumed) as writer:
            for step in range(first, first + 3):
                writer.write(step, {"reward/mean": step / 10, "loss": float("nan")})
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    assert lines[:2] == ["1,reward/mean,0.1", "2,reward/mean,0.2"]
    assert [int(line.split(",")[0]) for line in lines] == [1, 2, 3, 4, 5, 5, 6, 7]
    assert len(lines) == len((tmp_path / "metrics.jsonl").read_text().splitlines())


@pytest.mark.slow
def test_the_notebook_runs_as_a_script(tmp_path):
    """Its last cell asserts that the export gives the trained policy's logits."""
    script = ROOT / "examples" / "quickstart.py"
    environment = os.environ | {"MPLBACKEND": "Agg", "TMPDIR": str(tmp_path)}
    ran = subprocess.run([sys.executable, script], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "largest difference of two logits" in ran.stdout
