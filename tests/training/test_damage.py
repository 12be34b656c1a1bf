"""A checkpoint of which any file is damaged is noticed: the one before it is used, or the run is refused."""

import errno
import json
import random
import shutil
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_checkpoint import config

from gdsd_jax.runtime.errors import UserError
from gdsd_jax.training import checkpoint, record
from gdsd_jax.training.checkpoint import BEST, Best, Checkpoints, load_params, require_savable
from gdsd_jax.training.cursor import Cursor
from gdsd_jax.training.state import TrainState


def state(value: float) -> TrainState:
    params = {"a": jnp.full((3, 4), value), "b": jnp.arange(5.0) * value}
    moments = jax.tree.map(jnp.ones_like, params)
    return TrainState(params, moments, jnp.int32(value), jnp.int32(value), jax.random.key(7))


@pytest.fixture(autouse=True)
def base(monkeypatch):
    monkeypatch.setattr(record.hub, "fingerprint", lambda checkpoint: "the same")


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """Two checkpoints, of the state 1.0 and of 2.0, and a best one."""
    workdir = tmp_path_factory.mktemp("saved") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record.hub, "fingerprint", lambda checkpoint: "the same")
        with Checkpoints(workdir, config(), state(0.0)) as checkpoints, Best(workdir, 2, "puzzles") as best:
            for iteration in (1, 2):
                checkpoints.save(iteration, state(float(iteration)), Cursor(10 * iteration))
            best.offer(2, state(2.0).params, 0.5)
    return workdir


def read(workdir: Path) -> tuple[float, int]:
    """(value of the state, position), after every array has been compared."""
    with Checkpoints(workdir, config(), state(0.0)) as checkpoints:
        found, cursor = checkpoints.restore()
        value = float(found.iteration)
        assert checkpoints.latest == value
    jax.tree.map(np.testing.assert_array_equal, jax.random.key_data(found.key), jax.random.key_data(jax.random.key(7)))
    jax.tree.map(np.testing.assert_array_equal, found.replace(key=0), state(value).replace(key=0))
    return value, cursor.position


def parameters(workdir: Path, best: bool = False) -> tuple[float, int]:
    shapes = jax.eval_shape(lambda: state(0.0).params)
    places = jax.tree.map(lambda x: x.sharding, state(0.0).params)
    params, iteration = load_params(workdir, shapes, places, best=best)
    jax.tree.map(np.testing.assert_array_equal, params, state(float(params["a"][0, 0])).params)
    return float(params["a"][0, 0]), iteration


def damages(path: Path, draw: random.Random) -> list[bytes | None]:
    raw = path.read_bytes()
    flipped = bytearray(raw)
    if raw:
        flipped[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
    return [raw[: len(raw) // 2], b"", None, bytes(flipped)]


def damage(workdir: Path, relative: Path, content: bytes | None) -> None:
    path = workdir / relative
    path.unlink() if content is None else path.write_bytes(content)


def files(saved: Path, folder: str) -> list[Path]:
    return sorted(path.relative_to(saved) for path in (saved / folder).rglob("*") if path.is_file())


@pytest.mark.slow
def test_every_file_damaged_in_every_way(saved, tmp_path, capfd):
    assert read(shutil.copytree(saved, tmp_path / "whole")) == (2.0, 20)
    draw, older = random.Random(0), 0
    for number, relative in enumerate(files(saved, "checkpoints/2")):
        for kind, content in enumerate(damages(saved / relative, draw)):
            workdir = shutil.copytree(saved, tmp_path / f"{number}.{kind}")
            damage(workdir, relative, content)
            capfd.readouterr()
            found = read(workdir)
            assert found in ((2.0, 20), (1.0, 10)), (relative, kind)
            if found == (1.0, 10):
                older += 1
                assert "checkpoints/2 is damaged" in capfd.readouterr().err and (workdir / "damaged/2").is_dir()
                # The run goes on, and saves the iteration anew.
                assert parameters(workdir) == (1.0, 1)
    assert older > 10


@pytest.mark.slow
def test_evaluations_fall_back_and_leave_the_files_alone(saved, tmp_path):
    draw = random.Random(1)
    for folder, best, allowed in (("checkpoints/2", False, {(2.0, 2), (1.0, 1)}), (f"{BEST}/2", True, {(2.0, 2)})):
        refused = 0
        for relative in files(saved, folder):
            for content in damages(saved / relative, draw)[1:3]:
                workdir = shutil.copytree(saved, tmp_path / "run")
                damage(workdir, relative, content)
                try:
                    assert parameters(workdir, best) in allowed
                except UserError as error:
                    assert "intact" in str(error)
                    refused += 1
                assert (workdir / folder).is_dir()
                shutil.rmtree(workdir)
        assert bool(refused) == best


def test_the_newest_is_damaged(saved, tmp_path, capfd):
    workdir = shutil.copytree(saved, tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints" / "2" / "state")
    assert parameters(workdir) == (1.0, 1) and parameters(workdir, best=True) == (2.0, 2)
    assert read(workdir) == (1.0, 10)
    assert "checkpoints/2 is damaged" in capfd.readouterr().err and (workdir / "damaged" / "2").is_dir()


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EMFILE, "Too many open files"),
        ValueError("UNKNOWN: Error opening 'x' [OS error 13: EACCES Permission denied]"),
    ],
)
def test_a_checkpoint_that_cannot_be_read_now_is_not_damaged(error, saved, tmp_path, monkeypatch):
    """It is neither passed over nor moved away, and the best one is not deleted."""
    workdir = shutil.copytree(saved, tmp_path / "run")

    def restore(*arguments: object, **named: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.ocp.CheckpointManager, "restore", restore)
        for use in (parameters, read, lambda workdir: Best(workdir, 2, "puzzles")):
            with pytest.raises(UserError, match="cannot be read now"):
                use(workdir)
    assert not (workdir / "damaged").exists() and (workdir / BEST / "2").is_dir()
    assert read(workdir) == (2.0, 20)


def test_no_checkpoint_is_intact(saved, tmp_path):
    workdir = shutil.copytree(saved, tmp_path / "run")
    for path in (workdir / "checkpoints").rglob("data/metadata"):
        path.write_text(path.read_text().replace("0", "1"))
    with pytest.raises(UserError, match=r"holds no intact checkpoint \(its data differ"):
        read(workdir)
    assert not (workdir / ".lock").exists()


@pytest.mark.parametrize("recorded", [True, False], ids=["its own record", "that of Orbax"])
def test_another_version_is_told_from_damage(saved, tmp_path, monkeypatch, recorded):
    """A state with other moments is refused by name, nothing is moved away, and the parameters alone can be read."""
    workdir = tmp_path / "run"
    if recorded:
        shutil.copytree(saved, workdir)
    else:
        with monkeypatch.context() as patch, Checkpoints(workdir, config(), state(0.0)) as checkpoints:
            patch.setattr(checkpoint, "structure", lambda arrays: {})
            checkpoints.save(2, state(2.0), Cursor(20))
    other = state(0.0)
    other = other.replace(opt_state={"c": other.opt_state["a"], "b": other.opt_state["b"]})
    said = r"checkpoints/2 was written by another version.*opt_state/a .*absent"
    with Checkpoints(workdir, config(), other) as checkpoints, pytest.raises(UserError, match=said):
        checkpoints.restore()
    assert (workdir / "checkpoints" / "2").is_dir() and not (workdir / "damaged").exists()
    assert parameters(workdir) == (2.0, 2)
    shapes = jax.eval_shape(lambda: {"a": jnp.zeros((3, 5)), "b": jnp.zeros(5)})
    places = jax.tree.map(lambda x: x.sharding, state(0.0).params)
    with pytest.raises(UserError, match=r"its params/a is float32\[3, 4\] and would be float32\[3, 5\]"):
        load_params(workdir, shapes, places)


def test_a_file_in_the_place_of_the_checkpoints(saved, tmp_path):
    workdir = shutil.copytree(saved, tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints")
    (workdir / "checkpoints").write_text("mine")
    with pytest.raises(UserError, match="checkpoints is not a directory"):
        Checkpoints(workdir, config(), state(0.0))
    assert (workdir / "checkpoints").read_text() == "mine" and not (workdir / ".lock").exists()


def test_a_second_run_in_the_same_workdir(saved, tmp_path):
    workdir = shutil.copytree(saved, tmp_path / "run")
    with Checkpoints(workdir, config(), state(0.0)), pytest.raises(UserError, match="in use by process"):
        Checkpoints(workdir, config(), state(0.0))
    read(workdir)


def test_other_training_rows_are_refused(tmp_path):
    workdir = tmp_path / "run"
    for _ in range(2):
        with Checkpoints(workdir, config(), state(0.0), "rows"):
            pass
    with pytest.raises(UserError, match="on other training rows: restore the file"):
        Checkpoints(workdir, config(), state(0.0), "other rows")
    assert not (workdir / ".lock").exists()


@pytest.mark.parametrize("name", ["run[1]", "r\\b", "[x] y"])
def test_paths_below_which_no_checkpoint_can_be_read_are_refused(name, tmp_path):
    with pytest.raises(UserError, match=r"contains (\[.\]|\\), and checkpoints cannot be saved there"):
        require_savable(tmp_path / name / "run")


@pytest.mark.parametrize("name", ["a b", "é", "%d", "{}", "?", "*", "a\nb", "x]", "a[b"])
def test_other_odd_paths_hold_checkpoints(name, tmp_path):
    workdir = tmp_path / name
    require_savable(workdir)
    with Checkpoints(workdir, config(), state(0.0)) as checkpoints:
        checkpoints.save(1, state(1.0), Cursor(10))
    assert read(workdir) == (1.0, 10)


def test_a_full_disk_is_one_error_and_the_run_goes_on_once_there_is_room(saved, tmp_path, monkeypatch):
    workdir = shutil.copytree(saved, tmp_path / "run")
    checkpoints = Checkpoints(workdir, config(), state(0.0))

    def full(*_, **__):
        raise ValueError("saving failed") from OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError, match="no room for a checkpoint.*continues from the last checkpoint"), checkpoints:
        monkeypatch.setattr(checkpoints._saver.manager, "save", full)
        checkpoints.save(3, state(3.0), Cursor(30))
    assert read(workdir) == (2.0, 20)


def test_a_clock_that_jumps_while_saving(saved, tmp_path, monkeypatch, capfd):
    workdir = shutil.copytree(saved, tmp_path / "run")
    real, calls = time.time, iter(range(10**9))
    # Every second look at the clock is an hour late.
    with Checkpoints(workdir, config(), state(0.0)) as checkpoints, monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: real() + 3600 * (next(calls) % 2))
        checkpoints.save(3, state(3.0), Cursor(30))
        checkpoints.save(4, state(4.0), Cursor(40))
        checkpoints._saver.manager.wait_until_finished()
    assert read(workdir) == (4.0, 40)


@pytest.mark.parametrize("structure", [float("nan"), "none", [1]])
def test_a_damaged_description_of_the_arrays_says_nothing_of_them(saved, tmp_path, capsys, structure):
    """The description is read to tell damage from another version, and may itself be what is damaged."""
    shutil.copytree(saved, tmp_path / "run")
    newest = tmp_path / "run/checkpoints/2"
    described = newest / "data/metadata"
    values = json.loads(described.read_text()) | {"structure": structure}
    values.pop("seal")  # as in checkpoints of earlier versions
    described.write_text(json.dumps(values))
    for arrays in newest.glob("*/d/*"):
        arrays.write_bytes(b"")
    assert parameters(tmp_path / "run") == (1.0, 1)
    assert "checkpoints/2 is damaged" in capsys.readouterr().err
