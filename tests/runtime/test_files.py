"""Directories that one process holds, and files that others wrote."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gdsd_jax.runtime.errors import UserError
from gdsd_jax.runtime.files import Lock, read_object, read_objects, require_writable, write_json

HOLD = """
import sys, time
from pathlib import Path
from gdsd_jax.runtime.files import Lock
lock = Lock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def test_a_link_to_nothing_is_not_written_to(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    with pytest.raises(UserError, match="is a link to nothing.*--workdir"):
        require_writable(tmp_path / "link" / "run", "--workdir")


def test_a_directory_is_held_by_one_process_and_free_when_that_is_killed(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(UserError, match=rf"in use by process {holder.pid} on .*--workdir"):
        Lock(tmp_path / "run")
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with Lock(tmp_path / "run"), pytest.raises(UserError, match=f"process {os.getpid()}"):
        Lock(tmp_path / "run")
    assert not list((tmp_path / "run").iterdir())


def test_a_path_that_takes_no_files_is_refused_and_nothing_is_left(tmp_path):
    (tmp_path / "file").write_text("")
    for path in ("file", "file/below", "file/far/below"):
        with pytest.raises(UserError, match=f"{path} cannot be written .*change --output"):
            require_writable(tmp_path / path, "--output")
    for path in (tmp_path, tmp_path / "file" / "below", Path("/proc/1/there")):
        with pytest.raises(UserError, match="cannot be written .*change --json"):
            require_writable(path, "--json", file=True)
    for path in (tmp_path, tmp_path / "new" / "newer"):
        require_writable(path, "--output")
    for path in (tmp_path / "file", tmp_path / "new" / "newer"):
        require_writable(path, "--json", file=True)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_json_holds_null_where_a_number_is_not_finite(tmp_path):
    write_json(tmp_path / "a.json", {"a": float("nan"), "b": [np.float32("inf"), np.int64(3)], "c": np.arange(2)})
    assert read_object(tmp_path / "a.json") == {"a": None, "b": [None, 3], "c": [0, 1]}


DEEP, LONG = '{"a": ' * 100_000, '{"a": ' + "9" * 5000 + "}"


@pytest.mark.parametrize("content", ["", "{", "[1]", "3", "null", DEEP, LONG, "\ud800"])
def test_what_is_no_object_is_refused(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(UserError, match=r"a\.json .*restore it"):
        read_object(path)
    if content:
        with pytest.raises(UserError, match=r"a\.json .*restore it"):
            read_objects(path)


def test_what_is_no_regular_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "device.json").symlink_to("/dev/zero")
    (tmp_path / "directory.json").mkdir()
    for path in tmp_path.iterdir():
        with pytest.raises(UserError, match="no regular file"):
            read_object(path)
    with pytest.raises(UserError, match="does not exist"):
        read_object(Path("nowhere.json"))


@pytest.mark.parametrize("kind", ["link", "pipe", "directory"])
def test_a_lock_writes_to_no_file_of_others(tmp_path, kind):
    other, path = tmp_path / "other", tmp_path / "run" / ".lock"
    other.write_text("precious")
    path.parent.mkdir()
    {"link": lambda: path.symlink_to(other), "pipe": lambda: os.mkfifo(path), "directory": path.mkdir}[kind]()
    with pytest.raises(UserError, match=r"\.lock is no regular file: remove it"):
        Lock(path.parent)
    assert other.read_text() == "precious"
