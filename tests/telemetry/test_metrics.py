"""The record on disk, what resuming does to it, the progress line, and the picture of the curves."""

import io
import json
import math
import sys
import types

import numpy as np
import pytest
import rich.console
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from matplotlib.image import imread

from gdsd_jax.evaluation import reports
from gdsd_jax.runtime.errors import UserError
from gdsd_jax.runtime.files import plain
from gdsd_jax.telemetry import plots, progress
from gdsd_jax.telemetry.metrics import MetricWriter, read_metrics
from gdsd_jax.telemetry.plots import plot_curves
from gdsd_jax.telemetry.progress import Progress, duration
from gdsd_jax.telemetry.trackers import require_trackers


def test_lines_are_on_disk_at_once_and_hold_plain_numbers(tmp_path):
    writer = MetricWriter(tmp_path / "run")
    writer.write(1, {"reward/mean": np.float32(0.1), "loss": float("nan"), "policy/kl": np.inf, "n": 3})
    line = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert line.endswith("\n")
    expected = {"step": 1, "reward/mean": float(np.float32(0.1)), "loss": None, "policy/kl": None, "n": 3.0}
    assert json.loads(line, parse_constant=pytest.fail) == expected
    assert list(json.loads(line)) == list(expected)
    writer.close()


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_float_reads_back_as_the_same_bits(value):
    again = json.loads(json.dumps(plain(np.float64(value))))
    assert np.float64(again).tobytes() == np.float64(value).tobytes()


def test_completions_hold_any_text_and_numpy_values(tmp_path):
    text = "3 + 4\n\u2028 答案 \ud800 \x00"
    row = {
        "completion": text,
        "tokens": np.arange(3, dtype=np.int32),
        "rewards": {"cells": np.float32(0.5), "bad": math.nan},
        "right": np.bool_(True),
    }
    with MetricWriter(tmp_path) as writer:
        writer.completions(7, [row, {"completion": ""}])
    lines = (tmp_path / "completions.jsonl").read_text().splitlines()
    assert len(lines) == 2
    assert json.loads(lines[0]) == {
        "step": 7,
        "completion": text,
        "tokens": [0, 1, 2],
        "rewards": {"cells": 0.5, "bad": None},
        "right": True,
    }


def write_steps(workdir, steps, **settings):
    with MetricWriter(workdir, **settings) as writer:
        for step in steps:
            writer.write(step, {"loss": 1 / step})
            writer.completions(step, [{"completion": f"{step}{which}"} for which in "ab"])


def contents(workdir):
    return [(workdir / name).read_bytes() for name in ("metrics.jsonl", "completions.jsonl")]


def test_a_resumed_run_leaves_the_same_bytes(tmp_path):
    write_steps(tmp_path / "whole", range(1, 9))
    write_steps(tmp_path / "cut", range(1, 7))
    # A kill in the middle of a line leaves this.
    for name in ("metrics.jsonl", "completions.jsonl"):
        with (tmp_path / "cut" / name).open("a") as file:
            file.write('{"step": 7, "lo')
    write_steps(tmp_path / "cut", range(4, 9), resume_step=3)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    assert sorted(path.name for path in (tmp_path / "cut").iterdir()) == ["completions.jsonl", "metrics.jsonl"]


@pytest.mark.parametrize(
    ("resume_step", "kept"), [(None, [1, 2, 3]), (-1, []), (2, [1, 2]), (3, [1, 2, 3]), (9, [1, 2, 3])]
)
def test_resume_step_says_what_is_kept(tmp_path, resume_step, kept):
    write_steps(tmp_path, [1, 2, 3])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1')
    write_steps(tmp_path, [4], resume_step=resume_step)
    assert [entry["step"] for entry in read_metrics(tmp_path)] == [*kept, 4]


def test_a_file_of_something_else_is_named_and_left_alone(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n[]\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 2 is not a record"):
        MetricWriter(tmp_path, resume_step=1)
    assert path.read_bytes() == b'{"step": 1}\n[]\n{"step": 3}\n'


@pytest.mark.parametrize(("setting", "package"), [("tensorboard", "tensorboardX"), ("wandb", "wandb")])
def test_a_copy_without_its_package_names_it_and_the_setting(tmp_path, monkeypatch, setting, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"{setting} .*pip install {package}") as caught:
        MetricWriter(tmp_path / "run", trackers=(setting,))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_tracker_of_the_users_own_gets_every_step(tmp_path, monkeypatch):
    (tmp_path / "my_tracker.py").write_text(
        "class Lines:\n"
        "    def __init__(self, workdir, resume_step):\n"
        "        self.file = (workdir / 'lines.csv').open('w')\n"
        "    def write(self, step, values):\n"
        "        self.file.write(f'{step},{values[\"loss\"]}\\n')\n"
        "    def close(self):\n"
        "        self.file.close()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with MetricWriter(tmp_path / "run", trackers=("my_tracker:Lines",)) as writer:
        writer.write(1, {"loss": 0.5})
        writer.write(2, {"loss": 0.25, "policy/kl": math.inf})
    assert (tmp_path / "run" / "lines.csv").read_text() == "1,0.5\n2,0.25\n"


def test_a_tracker_that_raises_does_not_end_the_run(tmp_path, monkeypatch, capfd):
    """The record of the run is `metrics.jsonl`, and the other trackers are closed."""
    text = "".join(
        f"class {name}:\n"
        "    def __init__(self, workdir, step):\n"
        "        self.file = (workdir / type(self).__name__).open('a')\n"
        "    def write(self, step, values):\n"
        f"        {write}self.file.write(str(step))\n"
        "    def close(self):\n"
        f"        {close}self.file.close()\n"
        for name, write, close in (("Write", "1 / (2 - step); ", ""), ("Close", "", "1 / 0; "), ("Good", "", ""))
    )
    (tmp_path / "frail_tracker.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    names = ("Write", "Close", "Good")
    with MetricWriter(tmp_path / "run", trackers=[f"frail_tracker:{name}" for name in names]) as writer:
        for step in (1, 2, 3):
            writer.write(step, {"loss": 0.5})
    assert [entry["step"] for entry in read_metrics(tmp_path / "run")] == [1, 2, 3]
    assert (tmp_path / "run" / "Good").read_text() == "123"
    lines = capfd.readouterr().err.splitlines()
    assert [line.split("'")[1] for line in lines] == ["frail_tracker:Write", "frail_tracker:Close"]
    assert "frail_tracker.py, line 5: ZeroDivisionError" in lines[0]


@pytest.mark.parametrize(
    ("name", "said"), [("json:dumps", "cannot be opened: TypeError"), ("operator:eq", "has no 'write'")]
)
def test_what_is_no_tracker_is_refused(tmp_path, name, said):
    with pytest.raises(UserError, match=said):
        MetricWriter(tmp_path / "run", trackers=(name,))


def test_a_class_of_other_objects_is_no_tracker(monkeypatch):
    class Set:
        def __init__(self, workdir, step):
            self.write, self.close = print, print

    class Half:
        def write(self, step, values):
            pass

    class Passing:
        def __getattr__(self, name):
            return print

    for tracker in (Set, Passing):
        monkeypatch.setattr("math.mine", tracker, raising=False)
        require_trackers(["math:mine"])
    for tracker, said in (
        (dict, "has no 'write'"),
        (Half, "'math:mine' of config.trackers has no 'close'"),
        (3, "is not a class or function"),
    ):
        monkeypatch.setattr("math.mine", tracker)
        with pytest.raises(UserError, match=said):
            require_trackers(["math:mine"])


@pytest.mark.parametrize("name", ["comet", "no_such_module:Tracker", "math:Tracker"])
def test_an_unknown_tracker_is_refused_before_a_file_is_touched(tmp_path, name):
    with pytest.raises(UserError, match=r"config\.trackers"):
        MetricWriter(tmp_path / "run", trackers=(name,))
    assert not (tmp_path / "run").exists()


def test_tensorboard_gets_the_finite_values_and_purges_on_resume(tmp_path, monkeypatch):
    calls = []

    class SummaryWriter:
        def __init__(self, logdir, purge_step):
            calls.append((logdir, purge_step))

        def add_scalar(self, name, value, step):
            calls.append((name, value, step))

        def flush(self):
            pass

        def close(self):
            calls.append("closed")

    monkeypatch.setitem(sys.modules, "tensorboardX", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    with MetricWriter(tmp_path, trackers=("tensorboard",), resume_step=4) as writer:
        writer.write(5, {"loss": 0.5, "policy/kl": math.nan})
    assert calls == [(str(tmp_path / "tensorboard"), 5), ("loss", 0.5, 5), "closed"]


def test_a_resumed_run_keeps_its_name_at_weights_and_biases(tmp_path, monkeypatch):
    started, logged = [], []

    def init(**settings):
        started.append(settings)
        return types.SimpleNamespace(log=lambda values, step: logged.append((step, values)), finish=lambda: None)

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    for resume_step in (-1, 1, None, -1):
        with MetricWriter(tmp_path, trackers=("wandb",), resume_step=resume_step) as writer:
            writer.write(2, {"loss": 0.5})
    first, resumed, appended, anew = (settings["id"] for settings in started)
    assert first == resumed == appended != anew
    assert logged == [(2, {"loss": 0.5})] * 4


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59.4, "59s"), (59.6, "1m00s"), (252, "4m12s"), (3599.7, "1h00m"), (11100, "3h05m"), (187200, "2d04h")],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


class Clock:
    """A clock that the test moves."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)


def test_plain_progress_counts_without_compilation_and_from_the_restored_step(monkeypatch):
    clock, out = Clock(monkeypatch), io.StringIO()
    with Progress(100, start=10, console=rich.console.Console(file=out, width=80)) as progress:
        for step, seconds in [(11, 60.0), (12, 2.0), (13, 4.0), (100, 261.0)]:
            clock.now += seconds
            progress.update(step, reward=0.5344, kl=None, entropy=0.00012, where="[bold]x")
    assert out.getvalue().splitlines() == [
        "train 11/100 | 60.0 s/it | reward 0.534 | entropy 1.2e-04 | where [bold]x | 1h29m left",
        "train 12/100 | 0.50 it/s | reward 0.534 | entropy 1.2e-04 | where [bold]x | 2m56s left",
        "train 13/100 | 0.33 it/s | reward 0.534 | entropy 1.2e-04 | where [bold]x | 4m21s left",
        "train 100/100 | 0.33 it/s | reward 0.534 | entropy 1.2e-04 | where [bold]x",
    ]


def test_fast_loops_do_not_flood_a_log(monkeypatch):
    clock, out = Clock(monkeypatch), io.StringIO()
    with Progress(5000, label="sft", console=rich.console.Console(file=out)) as progress:
        for step in range(1, 5001):
            clock.now += 0.01
            progress.update(step, loss=1.0)
    lines = out.getvalue().splitlines()
    assert 50 <= len(lines) <= 52
    assert lines[0].startswith("sft 1/5000") and lines[-1] == "sft 5000/5000 | 100 it/s | loss 1.000"


def test_the_live_line_fits_80_columns(monkeypatch):
    clock, out = Clock(monkeypatch), io.StringIO()
    console = rich.console.Console(file=out, width=80, force_terminal=True, color_system=None)
    with Progress(1000, console=console) as progress:
        for step in (1, 2, 3):
            clock.now += 3.0
            progress.update(step, reward=0.5, loss=1.0, entropy=0.25, grad_norm=0.1, clipped=0.2)
    lines = [line for line in out.getvalue().replace("\r", "\n").splitlines() if "3/1000" in line]
    shown = lines[-1].replace("\x1b[2K", "")
    assert "3/1000 | 0.33 it/s | reward 0.500" in shown and "49m51s left" in shown
    assert "…" not in shown and len(shown.rstrip()) <= 80


def test_disabled_progress_is_silent():
    out = io.StringIO()
    with Progress(3, enabled=False, console=rich.console.Console(file=out, force_terminal=True)) as progress:
        progress.update(3, reward=1.0)
    assert out.getvalue() == ""


def log_run(workdir, steps):
    with MetricWriter(workdir) as writer:
        for step in range(1, steps + 1):
            values = {
                "reward/mean": 1 - 1 / step,
                "reward/std": 0.1,
                "reward/zero_spread": 0.2,
                "reward/nan": 0,
                "reward/cells": 0.5,
                "reward/format": 1.0,
                "policy/kl": math.nan if step == 2 else 1e-4 * step,
                "policy/clipped": 0.0,
                "policy/log_ratio": 0.01,
                "grad/norm": 10.0**-step if step < 5 else 1.0,
                "lr": 3e-5,
                "update/norm": 0.1,
                "time/iteration": 40.0 if step == 1 else 3.0,
                "time/rollout": 2.0,
                "never/finite": math.inf,
            }
            if step % 2 == 0:
                values["eval/puzzles"] = 0.5
            writer.write(step, values)


@pytest.fixture
def panels(monkeypatch):
    """Returns a dictionary that `plot_curves` fills: the names of the curves of each panel, by its title."""
    seen, draw = {}, plots._draw

    def spy(axes, panel, series, spread):
        draw(axes, panel, series, spread)
        seen[axes.get_title()] = list(series)
        low, high = axes.get_ylim()
        assert math.isfinite(low) and math.isfinite(high) and low < high

    monkeypatch.setattr(plots, "_draw", spy)
    return seen


@pytest.mark.parametrize("steps", [1, 100])
def test_curves_have_a_panel_for_every_kind_of_metric(tmp_path, panels, steps):
    log_run(tmp_path, steps)
    path = plot_curves(tmp_path)
    assert path == tmp_path / "curves.png"
    height, width, _ = imread(path).shape
    assert width > 1000 and height > 500
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "completions.jsonl", "curves.png"}
    expected = {
        "Reward of the rollouts": ["reward/mean"],
        "Reward components": ["reward/cells", "reward/format"],
        "Clipped scores": ["policy/clipped"],
        "Divergence from the reference": ["policy/kl"],
        "Other metrics of the objective": ["policy/log_ratio"],
        "Gradient norm": ["grad/norm"],
        "Groups that teach nothing": ["reward/zero_spread"],
        "Learning rate": ["lr"],
        "Seconds per iteration": ["time/iteration", "time/rollout"],
    }
    if steps > 1:
        expected["Evaluation"] = ["eval/puzzles"]
    assert panels == expected


def test_a_record_that_is_being_written_can_be_drawn(tmp_path, panels, capsys):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n{"step": 3, "lo')
    plots.main([str(tmp_path)])
    assert capsys.readouterr().out.strip() == str(tmp_path / "curves.png")
    assert panels == {"Loss": ["loss"]}


def test_chosen_metrics_are_drawn_alone(tmp_path, panels):
    log_run(tmp_path, 4)
    plots.main([str(tmp_path), "reward/mean", "eval/puzzles"])
    assert panels == {"Reward of the rollouts": ["reward/mean"], "Evaluation": ["eval/puzzles"]}
    panels.clear()
    plots.main([str(tmp_path), "reward/std", "update/norm"])
    assert panels == {"reward/std": ["reward/std"], "update/norm": ["update/norm"]}
    with pytest.raises(UserError, match="holds no eval/none"):
        plots.main([str(tmp_path), "eval/none"])


def test_the_largest_numbers_are_drawn(tmp_path):
    rows = [{"step": step, "loss": value} for step, value in enumerate((1e308, -1e308, 1.0))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert plot_curves(tmp_path).is_file()


def test_dollar_signs_are_text(tmp_path):
    """Matplotlib would take what is between two of them for a formula, which these are not."""
    run = tmp_path / "$a_{$"
    run.mkdir()
    (run / "metrics.jsonl").write_text(json.dumps({"step": 1, "reward/$\\no$": 1.0, "reward/b": 2.0}) + "\n")
    assert plot_curves(run).is_file() and plot_curves(run, ["reward/$\\no$"]).is_file()
    entry = {"task": "$b_{$", "completion_length": 8, "metrics": {"$\\no$": {"mean": 0.5, "error": 0.1}}}
    reports.draw(run / "evaluation.png", {"results": [entry]})
    assert (run / "evaluation.png").is_file()


@pytest.mark.parametrize("record", [None, "", '{"step": 1, "lo', '{"step": 1, "unknown": 1.0}\n'])
def test_nothing_to_draw_is_refused(tmp_path, record):
    if record is not None:
        (tmp_path / "metrics.jsonl").write_text(record)
    with pytest.raises(UserError, match=r"metrics\.jsonl"):
        plots.main([str(tmp_path)])
    assert not (tmp_path / "curves.png").exists()


def test_a_directory_that_does_not_exist_is_said_to(tmp_path):
    with pytest.raises(UserError, match="the directory .*shrt does not exist"):
        read_metrics(tmp_path / "shrt")


def test_more_curves_than_colours_differ_in_their_lines():
    axes, points = Figure().add_subplot(), (np.arange(3.0), np.arange(3.0))
    plots._draw(axes, plots.Panel("many", "mean"), {f"m{n}": points for n in range(16)}, None)
    assert len({(line.get_color(), line.get_linestyle()) for line in axes.lines}) == 16
