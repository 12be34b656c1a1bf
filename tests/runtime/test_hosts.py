"""What the processes of a job share out, without starting any: who works on which rows, who writes, what is refused."""

import os
import re
import signal
import threading

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


NO_ADDRESSES = ["nonsense", "localhost", ":8476", "localhost:", "localhost:0", "localhost:65536", "localhost:999999"]
NO_ADDRESSES += ["::1:8476", "http://localhost:8476", "local host:8476", "localhost:-1", "localhost:8476\n"]


@pytest.mark.parametrize("coordinator", NO_ADDRESSES)
def test_what_is_no_address_is_refused_before_anything_waits_for_it(coordinator, monkeypatch):
    monkeypatch.setattr(jax.distributed, "initialize", lambda **arguments: pytest.fail("it waits"))
    with pytest.raises(UserError, match=r"^config\.hosts\.coordinator '.* is not ADDRESS:PORT"):
        hosts.initialize(HostsConfig(coordinator=coordinator, processes=2, process=1))
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", coordinator)
    with pytest.raises(UserError, match=r"^JAX_COORDINATOR_ADDRESS '.* is not ADDRESS:PORT"):
        hosts.initialize(HostsConfig(processes=2, process=1))


@pytest.mark.parametrize("coordinator", ["localhost:1", "10.0.0.1:65535", "[::1]:8476", "worker-0.job_1.svc:8476"])
def test_addresses_reach_jax_and_what_it_raises_comes_back(coordinator, monkeypatch):
    def refuse(*, coordinator_address, **others):
        raise RuntimeError(f"nobody at {coordinator_address}")

    monkeypatch.setattr(jax.distributed, "initialize", refuse)
    monkeypatch.setattr(hosts, "_joining", False)
    with pytest.raises(UserError, match=re.escape(f"does not come together (nobody at {coordinator})")):
        hosts.initialize(HostsConfig(coordinator=coordinator, processes=2, process=1))


def test_a_process_that_waits_for_the_others_can_be_interrupted(monkeypatch):
    """JAX waits in C++, where no signal is handled, so it must not be the main thread that waits."""
    waits, ended, found = threading.Event(), threading.Event(), []

    def wait_for_ever(**arguments):
        found.append(threading.current_thread())
        waits.set()
        ended.wait(60)

    def interrupt():
        waits.wait(60)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    monkeypatch.setattr(jax.distributed, "initialize", wait_for_ever)
    monkeypatch.setattr(hosts, "_joining", False)
    monkeypatch.setattr(os, "_exit", found.append)
    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        hosts.initialize(HostsConfig(coordinator="localhost:1", processes=2, process=1))
    assert found[0].is_alive() and found[0].daemon and found[0] is not threading.main_thread()
    with pytest.raises(SystemExit):  # only because os._exit, which ends the process without waiting, is replaced
        hosts.end(130)
    assert found[1:] == [130]
    ended.set()


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
