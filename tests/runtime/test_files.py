"""Directories that one process holds, and files that others wrote."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gdsd_jax.runtime.errors import UserError
from gdsd_jax.runtime.files import Lock, read_object, read_objects

HOLD = """
import sys, time
from pathlib import Path
from gdsd_jax.runtime.files import Lock
lock = Lock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


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
