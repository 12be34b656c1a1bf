"""Supervised training: interrupted and resumed, in micro-batches, of an adapter."""

import dataclasses
import json
import runpy
import signal
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tiny_run

from gdsd_jax import hub, sft
from gdsd_jax.config import TrainConfig, freeze
from gdsd_jax.runtime import hosts
from gdsd_jax.runtime.errors import UserError
from gdsd_jax.runtime.files import Lock

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compilation")]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    directory = tmp_path_factory.mktemp("sft")
    run = runpy.run_path(str(tiny_run.build(directory)))["get_config"]()
    with run.unlocked():
        run.sampler.update(completion_length=48, steps=48, block_length=48)
        run.sft.update(steps=6, batch_rows=4, save_every=2)
    return freeze(TrainConfig, run)


def trained(config, workdir, **changes):
    """Runs to the end and returns the bytes of the weights."""
    config = dataclasses.replace(config, sft=dataclasses.replace(config.sft, **changes))
    merged = sft.run(config, workdir)
    assert not (workdir / "sft").exists()
    return (merged / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    return trained(config, tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("asked", [True, False], ids=["SIGTERM", "killed"])
def test_interrupted_and_resumed(config, whole, tmp_path, monkeypatch, asked):
    """The result is that of an uninterrupted run, bit for bit.

    A run that is asked to stop saves first, and further signals do not interrupt it. A run that is killed goes back to
    its last save.
    """
    steps, handlers, before, close = [], [], signal.getsignal(signal.SIGTERM), sft.Checkpoints.close

    def closed(checkpoints):
        handlers.append(signal.getsignal(signal.SIGTERM))
        close(checkpoints)

    def any_process(requested):
        steps.append(requested)
        if len(steps) == 6 and not asked:
            raise KeyboardInterrupt
        return len(steps) == 4

    with monkeypatch.context() as patch, pytest.raises((SystemExit, KeyboardInterrupt)):
        asks = any_process if asked else lambda _: any_process(False) and False
        # Only the loop of this module is counted: others ask the processes too.
        patch.setattr(sft, "hosts", SimpleNamespace(**vars(hosts) | {"any_process": asks}))
        patch.setattr(sft.Checkpoints, "close", closed)
        trained(config, tmp_path)
    assert handlers and before not in handlers
    saved = sorted(int(path.name) for path in (tmp_path / "sft/checkpoints").glob("[0-9]*"))
    assert saved[-1] == (3 if asked else 4)
    assert trained(config, tmp_path) == whole


def test_killed_after_its_export(config, whole, tmp_path, monkeypatch):
    """The next start finds the result, and removes the checkpoints."""

    export = sft.hub.export_checkpoint

    def killed(*arguments, **named):
        export(*arguments, **named)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sft.hub, "export_checkpoint", killed)
        trained(config, tmp_path)
    assert (tmp_path / "sft").is_dir()
    assert trained(config, tmp_path) == whole


def test_two_at_once_in_one_workdir(config, tmp_path):
    with Lock(tmp_path), pytest.raises(UserError, match="in use by process"):
        trained(config, tmp_path)
    assert not (tmp_path / "merged").exists()


def test_the_directory_is_reserved_until_the_export_is_complete(config, whole, tmp_path, monkeypatch):
    def export(*arguments, original=hub.export_checkpoint, **named):
        with pytest.raises(UserError, match="in use by process"):
            Lock(tmp_path)
        original(*arguments, **named)

    monkeypatch.setattr(sft.hub, "export_checkpoint", export)
    assert trained(config, tmp_path) == whole


def test_settings_are_tried_before_an_embedded_model_is_made(config, tmp_path):
    embedded = dataclasses.replace(config.tiny, family="llada")
    for changes, said in (
        ({"path": str(tmp_path / "no.jsonl")}, "no.jsonl"),
        ({"microbatch_rows": 3}, "microbatch_rows 3"),
    ):
        wrong = dataclasses.replace(config, tiny=embedded, sft=dataclasses.replace(config.sft, careless=0.0, **changes))
        with pytest.raises(UserError, match=said):
            sft.main(wrong, tmp_path / "start")
        assert not (tmp_path / "start").exists()


def test_an_attempt_that_trained_nothing_binds_nobody_to_its_settings(config, tmp_path, monkeypatch):
    small = dataclasses.replace(config.tiny, family="llada", hidden_size=32, num_layers=1, num_heads=2)
    config = dataclasses.replace(config, tiny=small, sft=dataclasses.replace(config.sft, steps=1))
    template = dataclasses.replace(config.task, settings={"template": "{puzle}"})
    with pytest.raises(UserError, match="puzle"):
        sft.main(dataclasses.replace(config, task=template), tmp_path)
    assert not list(tmp_path.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(sft, "make_sft_update", lambda *_: pytest.fail("killed"))
        with pytest.raises(pytest.fail.Exception):
            sft.main(dataclasses.replace(config, tiny=dataclasses.replace(small, hidden_size=16)), tmp_path)
    assert (tmp_path / "start.json").exists() and (tmp_path / "init").exists()
    sft.main(config, tmp_path)
    assert json.loads((tmp_path / "merged/config.json").read_text())["d_model"] == 32


def test_a_start_from_chats_needs_no_rows_of_a_task(config, tmp_path):
    turns = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "1"}]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    chats = dataclasses.replace(config.sft, careless=0.0, path=str(tmp_path / "chats.jsonl"))
    task = dataclasses.replace(config.task, train_path=str(tmp_path / "absent.csv"))
    config = dataclasses.replace(config, sft=chats, task=task)
    sft.require_rows(config, alone=True)
    with pytest.raises(UserError, match=r"absent\.csv"):
        sft.require_rows(config, alone=False)


def test_a_start_that_another_command_made_anew_is_not_trained_on(config, tmp_path, monkeypatch):
    small = dataclasses.replace(config.tiny, family="llada", hidden_size=32, num_layers=1, num_heads=2)
    config = dataclasses.replace(config, tiny=small, sft=dataclasses.replace(config.sft, steps=1))
    other = dataclasses.replace(config, tiny=dataclasses.replace(small, hidden_size=16))
    wait = sft.hosts.wait
    monkeypatch.setattr(sft, "run", lambda *_: pytest.fail("trained"))

    def meanwhile():
        monkeypatch.setattr(sft.hosts, "wait", wait)
        with pytest.raises(pytest.fail.Exception):
            sft.main(other, tmp_path)

    monkeypatch.setattr(sft.hosts, "wait", meanwhile)
    with pytest.raises(UserError, match=r"made with config\.tiny\.hidden_size=16"):
        sft.main(config, tmp_path)


def test_a_start_of_other_settings_is_not_taken_for_the_one_that_is_asked_for(config, tmp_path):
    small = dataclasses.replace(config.tiny, family="llada", hidden_size=32, num_layers=1, num_heads=2)
    config = dataclasses.replace(config, tiny=small, sft=dataclasses.replace(config.sft, steps=1))
    sft.main(config, tmp_path)
    weights = (tmp_path / "merged/model.safetensors").read_bytes()
    sft.main(config, tmp_path)
    for changes in (
        {"tiny": dataclasses.replace(small, num_layers=2)},
        {"sft": dataclasses.replace(config.sft, steps=2)},
    ):
        (group,) = changes
        with pytest.raises(UserError, match=rf"made with config\.{group}\.\w+=1"):
            sft.main(dataclasses.replace(config, **changes), tmp_path)
    assert (tmp_path / "merged/model.safetensors").read_bytes() == weights


def test_a_share_that_is_not_reached_is_said(config, tmp_path, capsys):
    trained(config, tmp_path, until=1.0)
    assert "config.sft.until 1.0 was not reached in 6 steps" in capsys.readouterr().out


def test_micro_batches_and_adapter(config, whole, tmp_path):
    """Micro-batches change nothing but rounding; an adapter moves only its targets."""
    trained(config, tmp_path / "pieces", microbatch_rows=2)
    assert trained(config, tmp_path / "whole") == whole
    pieces, at_once = (leaves(tmp_path / name / "merged") for name in ("pieces", "whole"))
    for name, value in at_once.items():
        np.testing.assert_allclose(pieces[name], value, atol=2e-5, err_msg=name)
    trained(config, tmp_path / "adapter", adapter=True)
    start, adapted = leaves(config.checkpoint), leaves(tmp_path / "adapter/merged")
    moved = {name for name in start if not np.array_equal(start[name], adapted[name])}
    assert moved == {f"layers/{target}/weight" for target in config.lora.targets}


def test_chats_from_a_file_with_a_held_out_share(config, tmp_path):
    """Held-out demonstrations are not trained on; their loss is always computed on the same masks, and falls."""
    file = tmp_path / "chats.jsonl"
    rows = [{"prompt": f"{n} and {n}?", "completion": f"{n}{n}"} for n in range(30)]
    rows += [{"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {"path": str(file), "held_out": 0.3, "steps": 8, "check_every": 4, "microbatch_rows": 2}
    trained(config, tmp_path / "run", **changes)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["eval/loss"] for line in lines if "eval/loss" in line}
    assert list(losses) == [4, 8] and losses[8] < losses[4]
    still = dataclasses.replace(config.sft.optimizer, learning_rate=0.0)
    trained(config, tmp_path / "still", **changes, optimizer=still)
    lines = [json.loads(line) for line in (tmp_path / "still/metrics.jsonl").read_text().splitlines()]
    assert len({line["eval/loss"] for line in lines if "eval/loss" in line}) == 1


def leaves(directory):
    """The parameters of a checkpoint, by name."""
    _, base = hub.load_checkpoint(directory)
    name = lambda path: "/".join(str(key.key) for key in path)  # noqa: E731
    return {name(path): np.asarray(value, np.float32) for path, value in jax.tree.leaves_with_path(base)}
