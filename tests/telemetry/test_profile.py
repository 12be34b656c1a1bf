"""The timeline of an iteration: its phases, and the time in which devices are busy."""

from types import SimpleNamespace

import pytest

from gdsd_jax.telemetry.profile import PREFIX, markdown, timeline


def line(name, *spans, stats=()):
    """Makes a line of events from spans (name, start, end) in milliseconds, all with the same stats."""
    events = [SimpleNamespace(name=n, start_ns=1e6 * a, duration_ns=1e6 * (b - a), stats=stats) for n, a, b in spans]
    return SimpleNamespace(name=name, events=events)


def plane(name, *lines):
    return SimpleNamespace(name=name, lines=lines)


PHASES = line("python", (PREFIX + "reward", 300, 500), (PREFIX + "rollout", 100, 300), ("unrelated", 0, 1000))
OPERATIONS = (("loop", 120, 220), ("inside", 130, 200), ("next", 280, 310))


@pytest.mark.parametrize(
    "planes",
    [
        [plane("/host:CPU", PHASES), plane("/device:TPU:0", line("XLA Ops", *OPERATIONS))],
        [plane("/host:CPU", PHASES, line("tf_XLAPjRtCpuClient/1", *OPERATIONS))],
        [plane("/host:CPU", PHASES, line("python", *OPERATIONS, stats=[("hlo_module", "jit_f"), ("hlo_op", "loop")]))],
    ],
    ids=["tpu", "cpu", "on the caller's thread"],
)
def test_a_device_is_busy_where_any_operation_runs(planes):
    phases = timeline(planes)
    assert [phase.name for phase in phases] == ["rollout", "reward"]
    assert [phase.start for phase in phases] == pytest.approx([0.0, 0.2])
    assert [phase.seconds for phase in phases] == pytest.approx([0.2, 0.2])
    assert [phase.busy for phase in phases] == pytest.approx([0.12, 0.01])


def test_the_table_ends_with_the_whole():
    rows = markdown(timeline([plane("/host:CPU", PHASES)])).splitlines()
    assert [cell.strip() for cell in rows[-1].strip("|").split("|")] == ["whole", "0.0", "400.0", "0%"]
