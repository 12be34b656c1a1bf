"""What may change between a run and its resumption: memory settings, the run's length, what counts as best."""

import dataclasses
import json
import runpy

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run

from gdsd_jax import train as walk
from gdsd_jax.config import TrainConfig, default, freeze, to_dict
from gdsd_jax.runtime.errors import UserError
from gdsd_jax.training import record
from gdsd_jax.training.checkpoint import Best
from gdsd_jax.training.optimizer import make_optimizer
from gdsd_jax.training.record import with_first_schedule
from gdsd_jax.training.rollout import Prompts


def config(**changes) -> TrainConfig:
    run = default("base")
    with run.unlocked():
        run.optimizer.update(schedule="linear", learning_rate=1e-3, warmup_updates=0)
        run.update(iterations=40, inner_updates=1, **changes)
    return freeze(TrainConfig, run)


def test_memory_settings_may_change_and_others_may_not(tmp_path, monkeypatch):
    monkeypatch.setattr(record.hub, "fingerprint", lambda checkpoint: f"that of {checkpoint}")
    run = config()
    slim = dataclasses.replace(
        run, microbatch_rows=4, component_norms_every=10, keep=5,
        model=dataclasses.replace(run.model, remat="dots", vocab_chunk=1024),
    )  # fmt: skip
    assert record.keep_record(tmp_path, run) is None
    names = ["component_norms_every", "microbatch_rows", "model.remat", "model.vocab_chunk"]
    note = (
        ", ".join(f"config.{name}" for name in names) + " changed since the run began: it goes on with other rounding"
    )
    assert record.keep_record(tmp_path, slim).startswith(note)
    assert record.keep_record(tmp_path, dataclasses.replace(run, keep=5, iterations=50)) is None
    for other in (
        dataclasses.replace(run, group_size=8),
        dataclasses.replace(run, model=dataclasses.replace(run.model, dtype="float32")),
    ):
        with pytest.raises(UserError, match=r"another config\.(group_size|model\.dtype): choose another"):
            record.keep_record(tmp_path, other)


@pytest.mark.parametrize("named", [None, 80])
def test_an_extended_run_keeps_its_schedule(tmp_path, named):
    """A schedule of the new length would return to half of the first rate, right after the lowest one."""
    (tmp_path / "run.json").write_text(json.dumps({"config": to_dict(config()), "base": ""}))
    longer = dataclasses.replace(config(), iterations=80)
    longer = dataclasses.replace(longer, optimizer=dataclasses.replace(longer.optimizer, schedule_updates=named))
    longer = with_first_schedule(longer, tmp_path)
    _, rate = make_optimizer(longer.optimizer, longer.iterations * longer.inner_updates)
    _, first = make_optimizer(config().optimizer, 40)
    if named is None:
        np.testing.assert_array_equal([rate(i) for i in range(80)], [first(i) for i in range(80)])
    else:
        assert rate(40) == pytest.approx(5e-4)
    assert with_first_schedule(config(), tmp_path / "new").optimizer.schedule_updates == 40


def test_best_by_another_metric_starts_anew(tmp_path):
    """A length of 30 is no better than an accuracy of 0.4."""

    def offered(metric, *values):
        with Best(tmp_path, 10, metric) as best:
            for step, value in values:
                best.offer(step, {"w": jnp.ones(2)}, value)
        return [int(path.name) for path in (tmp_path / "best").glob("[0-9]*")]

    assert offered("eval/length", (1, 30.0)) == [1]
    assert offered("eval/length", (2, 20.0)) == [1]
    assert offered("eval/solved", (3, 0.4)) == [3]
    assert offered("eval/solved", (4, 0.3)) == [3]


def test_a_failed_save_is_reported_unless_another_error_ends_the_run(tmp_path, monkeypatch):
    """A run that is told to stop says that it has saved, and leaves by SystemExit."""

    def ended_by(error):
        with Best(tmp_path, 10, "eval/solved") as best:
            monkeypatch.setattr(best._saver, "close", lambda: (_ for _ in ()).throw(UserError("the disk is full")))
            raise error

    with pytest.raises(UserError, match="disk is full"):
        ended_by(SystemExit(0))
    with pytest.raises(ValueError, match="diverged"):
        ended_by(ValueError("diverged"))


@pytest.mark.slow
def test_resumed_with_other_memory_settings(tmp_path, capsys):
    file = tiny_run.build(tmp_path)

    def train(workdir, iterations, **changes):
        run = runpy.run_path(str(file))["get_config"]()
        with run.unlocked():
            run.iterations = iterations
            run.model.update(changes.pop("model", {}))
            run.update(changes)
        walk.train(freeze(TrainConfig, run), tmp_path / workdir)
        return [json.loads(line) for line in (tmp_path / workdir / "metrics.jsonl").read_text().splitlines()]

    whole = train("whole", 2)
    train("changed", 1)
    capsys.readouterr()
    changed = train("changed", 2, microbatch_rows=4, model={"remat": "full", "vocab_chunk": 64})
    note = "config.microbatch_rows, config.model.remat, config.model.vocab_chunk changed since the run began"
    assert note in capsys.readouterr().out
    for name in ("loss", "grad/norm", "policy/kl", "reward/mean", "lr"):
        assert changed[1][name] == pytest.approx(whole[1][name], rel=1e-4, abs=1e-7), name
    with pytest.raises(UserError, match=r"another config\.group_size"):
        train("changed", 2, group_size=4, prompts_per_iteration=1)


def test_prompts_take_the_bucket_that_they_need():
    """The longest prompt of the whole data set does not decide."""
    lengths = np.array([3, 9, 4])
    mask = np.arange(12) >= 12 - lengths[:, None]
    prompts = Prompts(np.where(mask, np.arange(12), 0), mask, [{"n": 0}, {"n": 1}, {"n": 2}])
    short = prompts.pick([2, 0], (4, 8, 12))
    assert short.tokens.shape == (2, 4) and short.rows == [{"n": 2}, {"n": 0}]
    np.testing.assert_array_equal(short.tokens, [[8, 9, 10, 11], [0, 9, 10, 11]])
    np.testing.assert_array_equal(short.mask.sum(axis=1), [4, 3])
    assert prompts.pick([1], (4, 8, 12)).tokens.shape == (1, 12)
