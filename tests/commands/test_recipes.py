"""The published recipes: their numbers, and one small iteration of each by the command that trains them."""

import json
import sys
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import pytest
from surroundings import surroundings  # noqa: F401  (a fixture that acts by itself)

from gdsd_jax import hub, train
from gdsd_jax.config import TrainConfig, freeze, greedy_sampler, read_config
from gdsd_jax.config.flags import parse
from gdsd_jax.families import FAMILIES
from gdsd_jax.runtime.errors import UserError
from gdsd_jax.tasks import TASKS
from gdsd_jax.training.optimizer import make_optimizer

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


class Recipe(NamedTuple):
    """A row of the table of the public code's recipes (arXiv 2605.29398)."""

    task: str
    method: str
    inner_updates: int
    views: int
    learning_rate: float
    beta: float
    psi: float
    steps: int
    prompts: int
    group: int = 16


RECIPES = {
    "llada_8b_gsm8k": Recipe("gsm8k", "gdsd", 8, 2, 3e-6, 1e-3, 10, 256, 20),
    "llada_8b_math": Recipe("math", "gdsd", 8, 2, 1e-5, 1e-4, 10, 256, 16),
    "llada_8b_countdown": Recipe("countdown", "gdsd", 8, 2, 1e-5, 3e-3, 1, 256, 20),
    "dream_7b_countdown": Recipe("countdown", "gdsd_tlc", 8, 2, 1e-5, 3e-3, 10, 256, 16),
    "llada_8b_code": Recipe("code", "gdsd_tlc", 8, 4, 3e-6, 5e-2, 10, 256, 30),
    "dream_7b_sudoku": Recipe("sudoku", "gdsd_tlc", 1, 2, 1e-5, 1e-3, 1, 128, 16),
    "llada_8b_sudoku": Recipe("sudoku", "gdsd", 8, 1, 3e-6, 1e-3, 1, 64, 2, group=6),
}


def read(name: str, *overrides: str) -> TrainConfig:
    config, _, _ = parse(["test", f"--config={CONFIGS / name}.py", *overrides], {})
    return config


@pytest.mark.parametrize("name", RECIPES)
def test_numbers_of_the_recipe(name):
    config, settings = read(name), read(name).method_settings
    found = Recipe(
        config.task.name, config.method, config.inner_updates, settings["views"], config.optimizer.learning_rate,
        settings["beta"], settings["psi"], config.sampler.steps, config.prompts_per_iteration, config.group_size,
    )  # fmt: skip
    assert found == RECIPES[name]
    assert (config.lora.rank, config.lora.alpha, config.lora.dropout) == (128, 64.0, 0.05)
    optimizer = config.optimizer
    assert (optimizer.b1, optimizer.b2, optimizer.weight_decay, optimizer.clip_norm) == (0.9, 0.99, 0.01, 0.2)
    assert (config.sampler.completion_length, config.sampler.temperature, config.seed) == (256, 1.0, 42)
    assert (config.prompt_buckets, config.overlong_prompts, config.save_every) == ((400,), "keep_last", 100)
    evaluation = config.evaluation
    assert (evaluation.lengths, evaluation.evaluation_prompt, evaluation.split) == ((128, 256, 512), True, "validation")
    assert [greedy_sampler(config, length).steps for length in evaluation.lengths] == [64, 128, 256]
    dream_sudoku = {"top_k": 8, "eps_low": 0.2, "eps_high": 0.2, "masking": "rollout_order_random"}
    given = {key: settings[key] for key in dream_sudoku if key in settings}
    assert given == (dream_sudoku if name == "dream_7b_sudoku" else {})


@pytest.mark.parametrize(("name", "optimizer"), [("lion", "optax:lion"), ("muon", "optax.contrib:muon")])
def test_recipes_of_other_optimizers(name, optimizer):
    config = read(f"tiny_sudoku_{name}")
    assert config.optimizer.name == optimizer and config.iterations == read("tiny_sudoku").iterations
    change, _ = make_optimizer(config.optimizer, 10)
    factor = {"layers": {"q": {"a": jnp.ones((1, 4, 2))}}}
    step, _ = change.update(factor, change.init(factor), factor)
    assert 0 < abs(float(step["layers"]["q"]["a"][0, 0, 0])) <= 2 * config.optimizer.learning_rate


def test_configs_that_share_a_start_make_the_same_one():
    """A start is made once, so another config that names its directory must mean the same model and training."""
    names = [path.stem for path in CONFIGS.glob("*.py") if path.stem.startswith(("tiny_", "compare_"))]
    configs = [read(name) for name in names] + [read_config(f"{CONFIGS}/tiny_sudoku.py:sdar")]
    starts = {config.checkpoint: (config.tiny, config.sft, config.task.train_rows) for config in configs}
    assert len(starts) < len(configs)
    for config in configs:
        assert starts[config.checkpoint] == (config.tiny, config.sft, config.task.train_rows), config.checkpoint


ONE_DEVICE = {"qwen3": "a2d-qwen3", "coder": "a2d-qwen2", "sdar": "sdar", "fastdllm": "fast_dllm_qwen"}


@pytest.mark.parametrize("model", ONE_DEVICE)
def test_recipes_of_one_accelerator_sample_as_the_authors_do(model):
    config = read_config(f"{CONFIGS / 'one_gpu_gsm8k.py'}:{model}_lora")
    published = hub.architecture(config.checkpoint)
    assert published.family == ONE_DEVICE[model]
    assert published.block_size is None or published.block_size % config.sampler.block_length == 0
    for name, value in FAMILIES[published.family].sampler.items():
        assert getattr(config.sampler, name) == value


@pytest.mark.slow
@pytest.mark.parametrize("model", ONE_DEVICE)
def test_dry_run_of_one_accelerator(model, tmp_path, capsys):
    config, _, _ = parse(["test", f"--config={CONFIGS}/one_gpu_gsm8k.py:{model}_lora", "--config.dry_run"], {})
    train.main(config, tmp_path / "run")
    assert "one iteration went through" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("published", ["iLLaDA-8B-Instruct", "MMaDA-8B-MixCoT"])
def test_dry_run_of_a_family_without_a_recipe(published, tmp_path, capsys):
    train.main(read("llada_8b_gsm8k", f"--config.checkpoint=checkpoints/{published}", "--config.dry_run"), tmp_path)
    assert "one iteration went through" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, recipe in RECIPES.items() if recipe.task in TASKS])
def test_dry_run(name, tmp_path, capsys):
    train.main(read(name, "--config.dry_run"), tmp_path / "run")
    assert "one iteration went through" in capsys.readouterr().out
    (line,) = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert line["step"] == 1 and line["grad/norm"] is not None
    assert any(key.startswith("eval/") for key in line)


def test_dry_run_needs_a_family_and_an_empty_workdir(tmp_path):
    config = read("llada_8b_sudoku", "--config.dry_run", "--config.checkpoint=checkpoints/something")
    with pytest.raises(UserError, match="something"):
        train.main(config, tmp_path / "run")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    with pytest.raises(UserError, match="is not empty"):
        train.main(config, tmp_path / "taken")


def test_every_config_fits_on_a_screen():
    """Except for the common parts; the protocol in the docstring of compare_stability is not counted."""
    for path in CONFIGS.glob("*.py"):
        text = path.read_text()
        if path.name == "compare_stability.py":
            text = text.split('"""')[2]
        assert path.name == "common.py" or len(text.splitlines()) <= 20, path.name


def test_a_config_imports_its_neighbours_from_anywhere(tmp_path, monkeypatch):
    """As a script does, although its directory is not on Python's path and the process starts elsewhere."""
    monkeypatch.setattr("sys.path", list(sys.path))
    (tmp_path / "their_piece.py").write_text("SEED = 11\n")
    text = "import their_piece\nfrom gdsd_jax.config import default\n\n\ndef get_config(method='gdsd'):\n"
    text += "    config = default()\n    config.seed, config.method = their_piece.SEED, method\n    return config\n"
    (tmp_path / "own.py").write_text(text)
    config, _, _ = parse(["test", f"--config={tmp_path}/own.py:wd1"], {})
    assert (config.seed, config.method) == (11, "wd1")
    read = read_config(f"{tmp_path}/own.py:wd1")
    assert freeze(TrainConfig, read) == config
    read.settings["module:MINE"] = {"psi": 2.0}
    read.task.settings.template = "{puzzle}"
    with pytest.raises(AttributeError):
        read.sampler.no_such_setting = 1
    with pytest.raises(UserError, match="other.py does not exist"):
        read_config(tmp_path / "other.py")
