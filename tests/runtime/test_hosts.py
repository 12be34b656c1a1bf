"""What the processes of a job share out, without starting any: who works on which rows, who writes, what is refused."""

import jax
import numpy as np
import pytest

from gdsd_jax.config import HostsConfig
from gdsd_jax.runtime import hosts
from gdsd_jax.runtime.errors import UserError


def squares(values, rows):
    """Two columns, of the values and of the rows."""
    return {"value": np.square(np.asarray(values, np.float32)), "row": np.array([r["n"] for r in rows], np.float32)}


def pretend(monkeypatch, processes: int, work):
    """`work()` in every process of a job, one after the other; what they gather is put together at the second pass."""
    tables: list[np.ndarray] = []
    monkeypatch.setattr(hosts, "several", lambda: True)
    monkeypatch.setattr(jax, "process_count", lambda: processes)

    def run(gather):
        monkeypatch.setattr(hosts, "gather", gather)
        for index in range(processes):
            monkeypatch.setattr(jax, "process_index", lambda index=index: index)
            yield work()

    def collect(table):
        tables.append(table)
        return np.concatenate([table] * processes)

    list(run(collect))
    assert len({table.shape for table in tables}) == 1
    return tables, list(run(lambda table: np.concatenate(tables)))


@pytest.mark.parametrize(("processes", "groups", "group_size"), [(2, 4, 3), (4, 6, 2), (4, 2, 4), (3, 7, 1)])
def test_rows_are_shared_out_by_whole_groups(monkeypatch, processes, groups, group_size):
    count = groups * group_size
    rows, values, seen = [{"n": n + 1} for n in range(count)], np.arange(count), []

    def work():
        def function(values, rows):
            seen.append([row["n"] for row in rows])
            return squares(values, rows)

        return hosts.share_out(function, values, rows, group_size=group_size)

    _, found = pretend(monkeypatch, processes, work)
    shares = seen[:processes]
    assert sum(shares, []) == list(range(1, count + 1))
    assert all(len(share) % group_size == 0 for share in shares)
    for columns in found:
        np.testing.assert_array_equal(columns["value"], values.astype(np.float32) ** 2)
        np.testing.assert_array_equal(columns["row"], np.arange(1, count + 1))


def test_one_process_does_everything_itself():
    columns = hosts.share_out(squares, [3, 4], [{"n": 1}, {"n": 2}])
    np.testing.assert_array_equal(columns["value"], [9, 16])
    assert hosts.first() and not hosts.several()
    assert hosts.any_process(True) and not hosts.any_process(False)
    hosts.initialize(HostsConfig())


def test_the_other_processes_have_silent_stand_ins(monkeypatch):
    assert hosts.first_only(dict, a=1) == {"a": 1}
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with hosts.first_only(open, "/there/is/no/such/file") as file:
        assert file.write("text") is None


@pytest.mark.parametrize(
    ("described", "setting"),
    [
        ({"coordinator": "localhost:1"}, "config.hosts.processes"),
        ({"coordinator": "localhost:1", "processes": 2}, "config.hosts.process "),
    ],
)
def test_an_incomplete_description_of_the_job_is_refused(described, setting):
    with pytest.raises(UserError, match=setting):
        hosts.initialize(HostsConfig(**described))


def test_processes_with_other_settings_are_refused(monkeypatch):
    """The message names the setting and the process, in every process of the job."""

    def work():
        own = {"config.seed": "3" if jax.process_index() == 2 else "1", "config.method": "gdsd"}
        try:
            hosts.agree(own)
        except UserError as error:
            return str(error)

    _, found = pretend(monkeypatch, 3, work)
    assert found == ["process 2 was started with another config.seed than process 0: give all the same"] * 3
    _, found = pretend(monkeypatch, 3, lambda: hosts.agree({"config.seed": "1"}))
    assert found == [None] * 3


def test_a_stall_ends_the_process(monkeypatch):
    said = []
    monkeypatch.setattr(hosts, "leave", said.append)
    monkeypatch.setattr(hosts, "_last_progress", 0.0)
    hosts._watch(1e-3)
    assert "config.hosts.stall_seconds" in said[0]
