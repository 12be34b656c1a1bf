"""The README and the pages of docs: short, without dead links, with code that runs and settings that exist."""

import importlib.util
import json
import re
import runpy
from pathlib import Path

import pytest
import tiny_run
from surroundings import surroundings  # noqa: F401  (a fixture that acts by itself)

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


def test_the_configuration_page_is_up_to_date():
    """If not: python docs/make_configuration.py."""
    spec = importlib.util.spec_from_file_location("make_configuration", ROOT / "docs" / "make_configuration.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert (ROOT / "docs" / "configuration.md").read_text() == script.page()


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
