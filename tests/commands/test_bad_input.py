"""Bad input gives one line and exit code 2 before anything is written; bad rewards and losses lose no data."""

import dataclasses
import itertools
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import jax
import numpy as np
import pytest
import tiny_run
from safetensors.numpy import load_file, save_file
from surroundings import surroundings  # noqa: F401  (a fixture that acts by itself)

from gdsd_jax import demo, evaluate, export, generate, meter, plan, sft, train
from gdsd_jax.config.flags import parse
from gdsd_jax.evaluation.policy import load_policy


@pytest.fixture(scope="module")
def config_file(tmp_path_factory) -> Path:
    return tiny_run.build(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def base(config_file, tmp_path) -> Path:
    """Returns a copy of the checkpoint that a test may damage."""
    return shutil.copytree(config_file.parent / "base", tmp_path / "base")


@pytest.fixture
def refused(capsys) -> Callable[..., str]:
    """Returns a function that runs a command, which must refuse its input, and returns its line of error."""

    def run(module: ModuleType, *arguments: object) -> str:
        with pytest.raises(SystemExit) as stop:
            tiny_run.command(module, *arguments)
        assert stop.value.code == 2
        text = capsys.readouterr().err
        lines = [line for line in text.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and text.endswith(lines[0] + "\n") and "Traceback" not in text
        return lines[0]

    return run


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints


def edit_json(path: Path, **changes: object) -> None:
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def edit_tensors(directory: Path, change: Callable[[dict], object]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


NORM = "model.transformer.ln_f.weight"


def lose_tensor(directory: Path) -> None:
    edit_tensors(directory, lambda tensors: tensors.pop(NORM))


def add_tensor(directory: Path) -> None:
    edit_tensors(directory, lambda tensors: tensors.update(stray=np.zeros(3, np.float32)))


def misshape(directory: Path) -> None:
    edit_tensors(directory, lambda tensors: tensors.update({NORM: np.ones(31, np.float32)}))


def truncate(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def rename_model(directory: Path) -> None:
    edit_json(directory / "config.json", model_type="gpt2")


def list_models(directory: Path) -> None:
    edit_json(directory / "config.json", model_type=[])


def lose_mask_token(directory: Path) -> None:
    edit_json(directory / "tokenizer_config.json", mask_token=None)
    edit_json(directory / "config.json", mask_token_id=None)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lose_tensor, NORM),
        (add_tensor, "stray"),
        (misshape, f"{NORM} in "),
        (truncate, "truncated"),
        (rename_model, "model_type 'gpt2'"),
        (list_models, "model_type []"),
        (lose_mask_token, "config.checkpoint_overrides.mask_token_id"),
    ],
)
def test_damaged_checkpoint(damage, named, base, config_file, refused, tmp_path):
    damage(base)
    workdir = tmp_path / "run"
    line = refused(train, "--config", config_file, "--workdir", workdir, f"--config.checkpoint={base}")
    assert named in line
    assert not workdir.exists()


# ----------------------------------------------------------------------------------------------------------------------
# Settings and flags


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("--config.sampler.completion_length=10", "completion_length 10 is not a multiple of block_length 4"),
        ("--config.group_size=1", "config.group_size"),
        ("--config.prompt_buckets=(4,)", "config.prompt_buckets"),
        ("--config.microbatch_rows=3", "config.microbatch_rows"),
        ("--config.foo=1", "unknown setting config.foo: config knows checkpoint"),
        ("--config.lora.foo=1", "unknown setting config.lora.foo: config.lora knows rank"),
        ("--config.seed.foo=1", "config.seed is a value"),
        (
            "--config.optimizer.learnin_rate=1",
            "unknown setting config.optimizer.learnin_rate; did you mean learning_rate?",
        ),
        ("--iterations=3", "error: unknown flag --iterations; did you mean --config.iterations?"),
        ("--config.method=nowhere:HUBER", "looked for in the current directory, beside the config file"),
        (
            "--config.model.remat=lots",
            "is not one of none, full, dots: set config.model.remat to one of them, or to auto",
        ),
        ("--config.adapter_base=stric", "is not one of fingerprint, strict, any; did you mean strict?"),
        ("--config.method=gdsd_tcl", "; did you mean gdsd_tlc?"),
        ("--config.settings.espo.beat=1", "; did you mean beta?"),
        ("--config.task.name=soduku", "; did you mean sudoku?"),
        ("--config.group_size=many", "error: config.group_size is 'many', it must be a whole number"),
        ("--config.sampler.steps=2.5", "error: config.sampler.steps is '2.5', it must be a whole number"),
        ("--config.sampler.threshold=all", "error: config.sampler.threshold is 'all', it must be a number"),
        ("--config.optimizer.schedule_updates=0", "schedule_updates is 0, it must be at least 1"),
        ("--config.dry_run=perhaps", "error: config.dry_run is 'perhaps', it must be true or false"),
        ("--config.settings.gdsd.foo=1", "foo"),
        ("--config.settings.gdsd.name=1", "has no setting name"),
        ("--config.settings.gdsdd.psi=1", "config.settings.gdsdd names no method"),
        ("--config.settings.espo.foo=1", "method 'espo' has no setting foo"),
        ("--config.task.settings.foo=1", "foo"),
        ("--config.task.settings.name=1", "unknown task setting 'name'"),
        ("--config.task.settings.weights=1", "not of type Mapping[str, float]"),
        ("--config.prompts_per_iteration=1000000000", "GB of memory"),
        ("--config.task.name=chess", "chess"),
        ("--config.method=reinforce", "config.method"),
        ("--config.lora.targets=head", "targets"),
        ("--config.trackers=('nothing',)", "config.trackers has 'nothing'"),
        ("--config.trackers=('builtins:dict',)", "the tracker 'builtins:dict' of config.trackers has no 'write'"),
        ("--config.refill.revisit=1.5", "config.refill.revisit is 1.5, it must be at least 0 and at most 1"),
        ("--config.lora.rank=1000", "adapter rank 1000 is above"),
        ("--config.checkpoint=nowhere", "nowhere"),
        ("--config.checkpoint=http://a/b", "http://a/b is on no disk"),
        ("--config.task.train_path=nowhere.csv", "nowhere.csv"),
        ("--cofnig.seed=1", "cofnig"),
        ("seed=1", "seed=1"),
    ],
)
def test_settings_and_flags(override, named, config_file, refused, tmp_path):
    workdir = tmp_path / "run"
    assert named in refused(train, "--config", config_file, "--workdir", workdir, override)
    assert not workdir.exists()


def test_a_selection_of_wrong_results_is_refused_before_anything_is_written(config_file, refused, tmp_path):
    workdir, select = tmp_path / "run", "--config.refill.select=builtins:len"
    said = refused(train, "--config", config_file, "--workdir", workdir, "--config.refill.rounds=1", select)
    assert "'builtins:len' must return one finite number for each of 2 groups" in said and not workdir.exists()


@pytest.mark.parametrize(
    ("module", "arguments", "named"),
    [
        (train, [], "--workdir"),
        (sft, [], "--workdir"),
        (evaluate, [], "--output"),
        (evaluate, ["--output=out"], "--checkpoint"),
        (evaluate, ["--output=out", "--checkpoint={base}", "--lengths=8,x"], "--lengths"),
        (evaluate, ["--output=out", "--checkpoint={base}", "--lengths="], "--lengths ''"),
        (evaluate, ["--output=out", "--checkpoint={base}", "--temperature=inf"], "--temperature is inf"),
        (evaluate, ["--output=out", "--checkpoint={base}", "--temperature=1e-35"], "it must be 0 or at least 1e-30"),
        (evaluate, ["--output=out", "--checkpoint={base}", "--steps=0"], "--steps is 0, it must be at least 1"),
        (evaluate, ["--output=out", "--checkpoint={base}", "--steps=two"], "--steps is 'two', it must be a whole"),
        (evaluate, ["--output=out", "--checkpoint={base}", "--count=0"], "--count is 0, it must be at least 1"),
        (evaluate, ["--output=out", "--checkpoint={base}", f"--steps={10**11}"], "must be at most 2147483647"),
        (evaluate, ["--output=out", "--checkpoint={base}", "--lengths=6"], "block_length 4"),
        (evaluate, ["--output=out", "--checkpoint={base}", "--split=exam"], "exam"),
        (evaluate, ["--output=out", "--checkpoint={base}", "--adapter={base}"], "adapter_config.json"),
        (evaluate, ["--output=out", "--checkpoint={base}", "--best"], "--best"),
        (evaluate, ["--output=out", "--checkpoint={base}", "--samples=2"], "--temperature"),
        (evaluate, ["--output=out", "--checkpoint={base}", "--pass_at=2"], "--samples"),
        (evaluate, ["--output=out", "--checkpoint={base}", "--lengths=64"], "shorten completion_length"),
        (evaluate, ["--output=out", "--checkpoint={base}", "--lengths=8,8"], "twice"),
        (evaluate, ["--output=out", "--compare={base}"], "no finished evaluation"),
        (evaluate, ["--output=out", "--checkpoint={base}", "--tasks=countdown"], "config.prompt_buckets"),
        (evaluate, ["--workdir={base}"], "holds no training run"),
        (export, [], "--output"),
        (export, ["--output=out", "--workdir={base}", "--format=onnx"], "--format"),
        (export, ["--output=out", "--workdir={base}", "--dtype=int8"], "--dtype"),
        (export, ["--output={base}", "--workdir={base}", "--format=merged"], "is not empty"),
        (export, ["--output=out", "--workdir={base}", "--format=adapter", "--dtype=bfloat16"], "--dtype applies to"),
        (generate, ["--checkpoint=", "--rows=1"], "--checkpoint '' names no directory"),
        (generate, ["--checkpoint={base}", "--adapter= ", "--rows=1"], "--adapter ' ' names no directory"),
        (generate, ["--checkpoint={base}", "--rows=0"], "--rows is 0, it must be at least 1"),
        (generate, ["--checkpoint={base}", "--prompt=a", "--rows=1"], "--prompt TEXT or --rows N"),
        (generate, ["--checkpoint={base}", "--rows=one"], "rows"),
        (generate, ["--checkpoint={base}", "--watch", "--seconds=-1"], "--seconds -1.0 must be at least 0"),
        (demo, ["--workdir=out"], "the demo trains adapters of an embedded model on Sudoku"),
        (generate, ["--checkpoint={base}", "--seconds=nan"], "--seconds nan must be"),
        (plan, ["--topology=v5e:²x4"], "v5e slices have 2 sizes"),
        (plan, ["--topology=v5e:2x4", "--mesh=data=--1"], "--mesh 'data=--1'"),
        (plan, ["--topology=v5e:2x4", "--json={base}"], "{base} cannot be written"),
        (meter, ["--output=out", "--checkpoint={base}", "--distances=nan"], "--distances 'nan'"),
        (meter, ["--output=out", "--checkpoint={base}", "--draws=100000000"], "--draws is 100000000"),
        *(
            (module, ["--output={base}/config.json/a", "--checkpoint={base}"], "config.json: Not a directory")
            for module in (evaluate, export, meter)
        ),
    ],
)
def test_flags_of_the_other_commands(module, arguments, named, config_file, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = config_file.parent / "base"
    before = sorted(path.stat().st_mtime_ns for path in base.iterdir())
    line = refused(module, "--config", config_file, *(text.format(base=base) for text in arguments))
    assert named.format(base=base) in line
    assert not any(tmp_path.iterdir())
    assert before == sorted(path.stat().st_mtime_ns for path in base.iterdir())


def test_config_file_absent_or_broken(refused, tmp_path):
    assert "--config" in refused(train, "--workdir", tmp_path / "run")
    assert "nope.py does not exist" in refused(train, "--config=nope.py", "--workdir", tmp_path / "run")
    file = tmp_path / "config.py"
    head = "from gdsd_jax import config as settings\ndef get_config():\n    config = settings.default('x')\n"
    for body, named in (
        ("config.sampler.stepz = 3", f"error: {file}, line 4: unknown setting stepz; did you mean steps?"),
        ("config.lora.foo = 3", "unknown setting foo: it is none of alpha"),
        ("config = config.seed + 'x'", "line 4: TypeError"),
        ("config = (", "line 4: SyntaxError"),
        ("raise SystemExit(0)", "line 4: SystemExit"),
        ("with config.unlocked(): config.task.settings = {1: 2}", "config.task.settings has the key 1"),
        ("config.seed = 'x'", "config.seed is 'x', not of type int"),
    ):
        file.write_text(f"{head}    {body}\n    return config\n")
        assert named in refused(train, f"--config={file}", "--workdir", tmp_path / "run")
    placeholder = "from ml_collections.config_dict import required_placeholder\n"
    unset = f"{placeholder}{head}    config.seed = required_placeholder(int)\n    return config\n"
    endless = "    own = {}\n    own['own'] = own\n    config.task.settings = {'examples': (own,)}\n    return config\n"
    for text, named in (
        ("def get_config(x):\n    return 1\n", "missing 1 required positional argument: 'x'): name its argument"),
        ("get_config = 3\n", "'int' object is not callable): make it a function"),
        (unset, "config.seed has no value"),
        (head + endless, "a setting holds itself"),
    ):
        file.write_text(text)
        assert named in refused(train, f"--config={file}", "--workdir", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_config_file_without_get_config(refused, tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "config_config", raising=False)  # ml_collections loads all files as one module
    file = tmp_path / "config.py"
    file.write_text("config = 3\n")
    said = refused(train, f"--config={file}", "--workdir", tmp_path / "run")
    assert said.strip() == f"error: {file}: it must define a function get_config(), which returns the config"


def test_workdir_that_is_a_flag_or_a_checkpoint(config_file, base, refused):
    assert "--workdir has no value of its own, --config.seed=1 follows it" in refused(
        train, "--config", config_file, "--workdir", "--config.seed=1"
    )
    before = tree(base)
    assert "is a checkpoint" in refused(train, "--config", config_file, "--workdir", base)
    assert tree(base) == before


def test_no_disk_space(config_file, refused, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 0))
    assert "GB free" in refused(train, "--config", config_file, "--workdir", tmp_path / "run")
    base = ["--config", config_file, "--checkpoint", config_file.parent / "base"]
    assert "disk space" in refused(export, *base, "--output", tmp_path / "out", "--format=merged")
    assert not any(tmp_path.iterdir())


def test_workdir_that_is_a_file(config_file, refused, tmp_path):
    file = tmp_path / "run"
    file.write_text("mine")
    assert str(file) in refused(train, "--config", config_file, "--workdir", file)
    assert file.read_text() == "mine"


# ----------------------------------------------------------------------------------------------------------------------
# Bad rewards, bad losses

_calls: Iterator[int] = itertools.count()


def _broken(completion: str, row: dict) -> dict[str, float]:
    """Fails for the first completion of an iteration, and returns NaN for the second; two more score well."""
    call = next(_calls) % 4
    if call == 0:
        raise RuntimeError("the grader is out")
    return {"even": np.nan if call == 1 else float(call)}


def _overflowing(completion: str, row: dict) -> dict[str, float]:
    """Returns usual rewards in the first iteration, and in the second some whose sum overflows float32."""
    call = next(_calls)
    return {"even": float(call) if call < 4 else 3e38}


BROKEN = dataclasses.replace(tiny_run.TASK, name="broken", score=_broken)
OVERFLOWING = dataclasses.replace(tiny_run.TASK, name="overflowing", score=_overflowing)


def restart(monkeypatch) -> None:
    monkeypatch.setitem(globals(), "_calls", itertools.count())


def tree(directory: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_failing_rewards_are_counted_and_logged_and_a_finished_run_is_left_alone(
    config_file, refused, tmp_path, monkeypatch
):
    restart(monkeypatch)
    workdir = tmp_path / "run"
    arguments = ["--config", config_file, "--workdir", workdir, "--config.task.name=test_bad_input:BROKEN"]
    tiny_run.command(train, *arguments, "--config.completions_logged=0")
    metrics = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [entry["reward/nan"] for entry in metrics] == [2, 2]
    assert [entry["reward/mean"] for entry in metrics] == [1.25, 1.25]
    logged = [json.loads(line) for line in (workdir / "completions.jsonl").read_text().splitlines()]
    assert [(entry["step"], entry["even"], entry["reward"]) for entry in logged] == [(s, None, 0) for s in (1, 1, 2, 2)]
    assert all(isinstance(entry["completion"], str) for entry in logged)

    before = tree(workdir)
    line = refused(train, *arguments, "--config.optimizer.learning_rate=0.5")
    assert "config.optimizer.learning_rate" in line and "another --workdir" in line
    assert "config.lora" in refused(evaluate, *arguments, "--config.lora.rank=3")
    other = shutil.copytree(config_file.parent / "base", tmp_path / "other")
    edit_tensors(other, lambda tensors: tensors.update({NORM: tensors[NORM] + 1}))
    assert "another config.checkpoint" in refused(train, *arguments, f"--config.checkpoint={other}")
    assert "another base" in refused(evaluate, *arguments, f"--config.checkpoint={other}")
    assert tree(workdir) == before


def test_loss_that_is_not_finite_stops_with_its_batch_saved(config_file, refused, tmp_path, monkeypatch):
    restart(monkeypatch)
    workdir = tmp_path / "run"
    arguments = ["--config", config_file, "--workdir", workdir, "--config.task.name=test_bad_input:OVERFLOWING"]
    line = refused(train, *arguments)
    for said in ("iteration 2", str(workdir / "diverged" / "2.npz"), "checkpoint is that of iteration 1", "psi"):
        assert said in line
    with np.load(workdir / "diverged" / "2.npz") as batch:
        assert batch["tokens"].shape == (4, 26) and batch["prompt_mask"].shape == (4, 18)
        assert (batch["rewards"] == np.float32(3e38)).all()
    texts = json.loads((workdir / "diverged" / "2.json").read_text())
    assert len(texts) == 4 and {"completion", "reward", "even"} == set(texts[0])
    metrics = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert np.isfinite(metrics[0]["loss"]) and metrics[1]["loss"] is None
    config, _, _ = parse(["test", f"--config={config_file}"], {})
    policy = load_policy(config, workdir)
    assert policy.iteration == 1
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(policy.lora))
