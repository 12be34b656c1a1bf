"""The commands from end to end, on a run of two iterations: each reads what others have written."""

import dataclasses
import io
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import rich.console
from surroundings import surroundings  # noqa: F401  (a fixture that acts by itself)
from tiny_run import ROWS, build, command

from gdsd_jax import evaluate, export, generate, hub, train
from gdsd_jax.config import TrainConfig, default, freeze, greedy_sampler, to_dict
from gdsd_jax.config.flags import parse
from gdsd_jax.diffusion.sampler import replay
from gdsd_jax.evaluation.policy import Policy, load_policy
from gdsd_jax.hub.files import read_header
from gdsd_jax.runtime.errors import UserError
from gdsd_jax.runtime.files import write_json


@pytest.fixture(scope="module")
def config_file(tmp_path_factory) -> Path:
    return build(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def workdir(config_file, tmp_path_factory) -> Path:
    """Returns the directory of a finished run whose second iteration was profiled."""
    directory = tmp_path_factory.mktemp("run") / "run"
    command(train, "--config", config_file, "--workdir", directory, "--config.profile=2")
    return directory


@pytest.fixture(scope="module")
def exported(config_file, workdir, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("export") / "export"
    command(export, "--config", config_file, "--workdir", workdir, "--output", directory)
    return directory


@pytest.fixture(scope="module")
def policy(config_file, workdir) -> tuple[TrainConfig, Policy]:
    config, _, _ = parse(["test", f"--config={config_file}"], {})
    return config, load_policy(config, workdir)


def completions(directory: Path) -> list[str]:
    return [json.loads(line)["completion"] for line in (directory / "evaluation.jsonl").read_text().splitlines()]


def test_run_export_and_adapter_evaluate_alike(config_file, workdir, exported, tmp_path, capsys):
    sources = {
        "run": ["--workdir", workdir],
        "adapter": ["--adapter", exported / "adapter"],
        "merged": ["--checkpoint", exported / "merged"],
        "base": ["--checkpoint", config_file.parent / "base"],
    }
    found = {}
    for name, arguments in sources.items():
        command(evaluate, "--config", config_file, *arguments, "--count", ROWS, "--output", tmp_path / name)
        found[name] = completions(tmp_path / name)
    assert found["run"] == found["adapter"] == found["merged"]
    assert found["run"] != found["base"], "two iterations should have changed something"
    summary = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    # The last line of training evaluated the same policy on the same rows.
    last = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
    (result,) = summary["results"]
    assert (summary["iteration"], result["count"], result["rows"]) == (2, ROWS, "test")
    assert set(result["metrics"]) == {"cells", "puzzles", "kl"}
    for name in ("cells", "puzzles"):
        assert result["metrics"][name]["mean"] == last[f"eval/{name}"]
    assert "| even | puzzles |" in (tmp_path / "run" / "evaluation.md").read_text()
    assert all(len(line) <= 80 for line in capsys.readouterr().out.splitlines() if "wrote" not in line)


def test_lengths_take_steps_in_proportion_and_default_output_is_in_the_workdir(config_file, workdir):
    arguments = ["--config", config_file, "--workdir", workdir, "--count", ROWS]
    command(evaluate, *arguments, "--lengths", "4,8")
    results = json.loads((workdir / "evaluation" / "evaluation.json").read_text())["results"]
    assert [(r["completion_length"], r["steps"], r["block_length"]) for r in results] == [(4, 2, 4), (8, 4, 4)]
    assert len(completions(workdir / "evaluation")) == 2 * ROWS


def test_a_sampler_without_blocks_stays_without(policy):
    config, _ = policy
    whole = dataclasses.replace(config, sampler=dataclasses.replace(config.sampler, block_length=8))
    sampler = greedy_sampler(whole, length=16, steps=3)
    assert (sampler.block_length, sampler.steps, sampler.temperature) == (16, 3, 0.0)


def test_exports_say_how_they_were_made_and_reload(config_file, exported):
    card = (exported / "merged" / "README.md").read_text()
    for fact in ("- method: gdsd", "- iterations: 2", "- learning rate: 0.05, constant", "- last reward/mean: "):
        assert fact in card
    model, base = hub.load_checkpoint(exported / "merged")
    source, _ = hub.load_checkpoint(config_file.parent / "base")
    assert model == source
    assert hub.load_adapter(exported / "adapter", model).rank == 2
    assert hub.load_tokenizer(exported / "merged").mask_token_id == model.mask_token_id
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(base))


def test_a_profiled_iteration_leaves_its_timeline(workdir):
    lines = (workdir / "timeline.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    names = "rollout, reward, send update, log completions, await update, evaluate, log metrics, checkpoint, whole"
    assert [row[0] for row in cells[2:]] == names.split(", ")
    busy = {name: float(share.rstrip("%")) for name, *_, share in cells[2:]}
    # The update starts when it is sent, and may be finished before it is awaited.
    update = max(busy[name] for name in ("send update", "log completions", "await update"))
    assert busy["rollout"] > 0 and update > 0, "XLA's operations were not found in the profile"
    assert all(0 <= share <= 100 for share in busy.values())


def test_what_may_be_none_is_cleared():
    tiny = f"--config={Path(__file__).parents[2]}/configs/tiny_sudoku.py"
    config, _, _ = parse(["test", tiny], {})
    assert config.sampler.threshold == 0.9
    config, _, _ = parse(["test", tiny, "--config.sampler.threshold=None"], {})
    assert config.sampler.threshold is None
    with pytest.raises(UserError, match="config.seed"):
        parse(["test", tiny, "--config.seed=None"], {})


@pytest.mark.slow
def test_all_parameters_trained_keep_the_dtype_of_the_source(config_file, tmp_path, capsys):
    model, base = hub.load_checkpoint(config_file.parent / "base")
    half = tmp_path / "half"
    hub.export_checkpoint(half, model, base, source=config_file.parent / "base", dtype="bfloat16")
    run = ["--config", config_file, "--workdir", tmp_path / "run", "--config.lora.rank=0", "--config.checkpoint", half]
    command(train, *run, "--config.iterations=1", "--config.optimizer.learning_rate=0.001")
    command(export, *run, "--output", tmp_path / "out", "--format", "merged")
    before, after = (read_header(place / "model.safetensors") for place in (half, tmp_path / "out"))
    assert {name: (t.dtype, t.shape) for name, t in after.items()} == {n: (t.dtype, t.shape) for n, t in before.items()}
    assert (half / "model.safetensors").read_bytes() != (tmp_path / "out" / "model.safetensors").read_bytes()
    command(export, *run, "--output", tmp_path / "wide", "--format", "merged", "--dtype", "float32")
    _, wide = hub.load_checkpoint(tmp_path / "wide")
    _, rounded = hub.load_checkpoint(tmp_path / "out")
    assert {x.dtype.name for x in jax.tree.leaves(wide)} == {"float32"}
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x.astype(y.dtype), y), wide, rounded)
    pairs = zip(*map(jax.tree.leaves, (wide, rounded)), strict=True)
    assert any(bool((x != y.astype(x.dtype)).any()) for x, y in pairs)
    with pytest.raises(SystemExit) as stop:
        command(export, *run, "--output", tmp_path / "adapter", "--format", "adapter")
    assert stop.value.code == 2
    assert "no adapter to export" in capsys.readouterr().err


def test_watch_prints_plain_frames_where_there_is_no_terminal(config_file, workdir, capsys):
    command(generate, "--config", config_file, "--workdir", workdir, "--rows", 2, "--watch")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    assert len(lines) == 2 * 5
    masks = [line.count(generate.MASK) for line in lines]
    assert masks == [8, 6, 4, 2, 0] * 2


def test_watch_on_a_terminal_ends_with_the_completion(policy):
    config, loaded = policy
    generated = generate.run(config, loaded, prompt="12", temperature=1.0, seed=7)
    assert generated.rewards == {}
    screen = rich.console.Console(file=io.StringIO(), force_terminal=True, width=80)
    generate.show(screen, loaded, config.sampler, generated, watch=True, seconds=0.0)
    assert generate.MASK * 8 in screen.file.getvalue()
    *_, (steps, last) = generate.frames(loaded, config.sampler, generated.rollout, 0)
    assert steps == config.sampler.steps
    assert last.plain.split(generate.END)[0] == generated.texts[0]


def test_frames_follow_the_replay(policy):
    config, loaded = policy
    generated = generate.run(config, loaded, rows=2, temperature=1.0)
    assert set(generated.rewards) == {"reward", "cells", "puzzles"}
    for row in range(2):
        for steps, picture in generate.frames(loaded, config.sampler, generated.rollout, row)[:-1]:
            tokens = np.asarray(replay(generated.rollout, loaded.model, steps - 1))[row, -8:]
            assert picture.plain.count(generate.MASK) == (tokens == loaded.model.mask_token_id).sum()


def test_overrides_reach_optional_and_free_settings(config_file):
    arguments = [
        f"--config={config_file}",
        "--config.evaluation.steps=3",
        "--config.task.eval_path=a/b.csv",
        "--config.sampler.threshold=0.5",
        "--config.settings.gdsd.psi=inf",
        "--config.settings.my_package.module:METHOD.beta=2",
        "--config.task.settings.template=now {puzzle}",
        "--config.prompt_buckets=(18, 20)",
        "--workdir=somewhere",
    ]
    config, workdir, _ = parse(["test", *arguments], {})
    assert (config.evaluation.steps, config.task.eval_path, config.sampler.threshold) == (3, "a/b.csv", 0.5)
    assert config.settings == {"gdsd": {"psi": float("inf")}, "my_package.module:METHOD": {"beta": 2}}
    assert config.task.settings["template"] == "now {puzzle}"
    assert config.prompt_buckets == (18, 20)
    assert workdir == Path("somewhere")


def test_a_process_ends_with_one_line_and_code_2(config_file, tmp_path):
    def start(*arguments: object) -> subprocess.CompletedProcess:
        line = [sys.executable, "-m", "gdsd_jax.generate", *map(str, arguments)]
        return subprocess.run(line, capture_output=True, text=True, timeout=120)

    run = ["--config", config_file, "--config.task.name=sudoku", "--checkpoint", config_file.parent / "base"]
    wrong = start(*run, "--prompt", "1" * 30)
    assert wrong.returncode == 2
    assert wrong.stdout == ""
    assert wrong.stderr.startswith("error: ") and wrong.stderr.count("\n") == 1
    assert "config.prompt_buckets" in wrong.stderr
    shown = start("--help")
    assert shown.returncode == 0
    assert "--watch" in shown.stdout and "Prints completions of a prompt" in shown.stdout


def test_an_export_that_never_began_leaves_no_mark(tmp_path):
    """The mark of an unfinished export stays only where a part of it has been written."""
    for part in ([], ["merged"]):
        with pytest.raises(UserError), export.marked(tmp_path, [tmp_path / "merged", tmp_path / "adapter"]):
            for name in part:
                (tmp_path / name).mkdir()
            raise UserError("the disk is full")
        assert (tmp_path / export.UNFINISHED).exists() == bool(part)


def test_a_record_of_a_run_with_wrong_types_is_named_by_its_export(tmp_path):
    record = {"config": to_dict(freeze(TrainConfig, default("base"))), "base": "0"}
    for name, value in (("settings", [1]), ("task", 3), ("method", {}), ("optimizer", {"learning_rate": "x"})):
        write_json(tmp_path / "run.json", record | {"config": record["config"] | {name: value}})
        with pytest.raises(UserError, match=r"run\.json cannot be used.*restore it"):
            export.training_facts(tmp_path, 1)
    write_json(tmp_path / "run.json", record)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward/mean": "x"}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl"):
        export.training_facts(tmp_path, 1)
