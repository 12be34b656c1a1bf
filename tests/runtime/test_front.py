"""The front door: every way in which a command can end, and that a traceback is none of them."""

import errno
import gc
import importlib
import io
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from gdsd_jax.runtime import front
from gdsd_jax.runtime.console import Console
from gdsd_jax.runtime.errors import PackageError, UserError


def ended(error: BaseException, capfd, file: str = front.__file__) -> tuple[int, list[str]]:
    """Ends a command whose code in `file` raises an error."""
    found: dict = {"error": error}
    exec(compile("def main():\n    raise error", file, "exec"), found)
    main = found["main"]
    with pytest.raises(SystemExit) as stop:
        front.run(main)
    return stop.value.code, capfd.readouterr().err.splitlines()


@pytest.fixture(autouse=True)
def signals(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(front, "workdir", None)
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


def caused(error: Exception, cause: BaseException) -> Exception:
    error.__cause__ = cause
    return error


def missing(name: str) -> ModuleNotFoundError:
    return ModuleNotFoundError(f"No module named {name!r}", name=name)


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UserError("two\nlines"), 2, "error: two lines"),
        (PackageError("needs x"), 2, "error: needs x"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "disk is full"),
        (caused(ValueError("saving failed"), OSError(errno.ENOSPC, "No space left on device")), 2, "disk is full"),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "a.json"), 2, "'a.json'): make room"),
        (OSError(errno.EFBIG, "File too large", "a.json"), 2, "'a.json'): raise the limit (ulimit -f)"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "a.json"), 2, "a.json"),
        (MemoryError(), 2, "memory"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes"), 2, "config.microbatch_rows"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (caused(ImportError("numpy"), KeyboardInterrupt()), 130, "interrupted"),
        (missing("flax.nnx"), 2, "the module flax.nnx cannot be imported (No module named"),
        (missing("flax"), 2, "requirements.txt"),
        (missing("lm_eval.api"), 2, "requirements-lm-eval.txt"),
        (missing("_sqlite3"), 2, "standard library"),
        (caused(ImportError("Please install gcsfs"), missing("gcsfs")), 2, "requirements-tpu.txt"),
        (caused(ImportError("pip install x[y] first"), missing("y")), 2, "module y cannot be imported (pip install x"),
    ],
)
def test_what_a_user_can_change_is_one_line(error, code, said, capfd, tmp_path):
    found, lines = ended(error, capfd)
    assert found == code and len(lines) == 1 and said in lines[0]
    assert not list(tmp_path.iterdir())


def test_a_defect_is_one_line_and_a_saved_report(capfd, tmp_path):
    code, lines = ended(ZeroDivisionError("division by zero"), capfd)
    (report,) = tmp_path.glob("crash-*.txt")
    assert code == 1 and len(lines) == 1 and str(report) in lines[0] and "ZeroDivisionError" in lines[0]
    text = report.read_text()
    assert "Traceback" in text and ", in main" in text and "python   3." in text


@pytest.mark.parametrize("error", [missing("gdsd_jax.nothing"), ImportError("cannot import it")])
def test_a_module_of_this_package_that_is_missing_is_a_defect(error, capfd):
    code, (line,) = ended(error, capfd)
    assert code == 1 and "defect" in line and "pip" not in line


@pytest.mark.parametrize("way", ["-m gdsd_jax.telemetry.plots", "script"])
def test_a_command_without_its_requirements_says_how_to_install_them(way, tmp_path):
    """NumPy is the first thing that this command imports of all that is not Python's own."""
    (tmp_path / "numpy.py").write_text("raise ModuleNotFoundError(\"No module named 'numpy'\", name='numpy')")
    script = tmp_path / "gdsd-plots"
    script.write_text("from gdsd_jax.runtime.scripts import main\nmain()\n")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]])}
    command = [sys.executable, *([str(script)] if way == "script" else way.split())]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    advice = "the module numpy cannot be imported (No module named 'numpy'): run pip install -r requirements.txt"
    assert (done.returncode, done.stderr) == (2, f"error: {advice}\n")
    assert not list(tmp_path.glob("crash-*"))


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("JAX_ENABLE_X64", "maybe", "invalid truth value 'maybe' for environment 'JAX_ENABLE_X64'"),
        ("JAX_ENABLE_X64", "1", "JAX_ENABLE_X64 is True, and the programs need False: unset it"),
        ("JAX_NUMPY_DTYPE_PROMOTION", "strict", "JAX_NUMPY_DTYPE_PROMOTION is 'strict'"),
        ("JAX_PLATFORMS", "cuda", "JAX finds no device of the kind that JAX_PLATFORMS=cuda names"),
    ],
)
def test_variables_of_jax_that_cannot_be_used_are_named(name, value, said, tmp_path):
    config = "from gdsd_jax.config import default\ndef get_config():\n    return default('x')\n"
    (tmp_path / "own.py").write_text(config)
    (tmp_path / "command.py").write_text(
        "import sys\nfrom gdsd_jax.runtime import front\nsys.excepthook = front.hook\n"
        "import jax\nfrom gdsd_jax.config.flags import launch\nlaunch(lambda *_: jax.devices(), needs_workdir=False)\n"
    )
    command = [sys.executable, "command.py", "--config=own.py"]
    done = subprocess.run(command, env=os.environ | {name: value}, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1
    assert not list(tmp_path.glob("crash-*"))


def test_every_command_explains_itself(monkeypatch, capsys):
    """`launch` prints the help of most commands; those that use the front door directly print their own."""
    package = Path(front.__file__).parents[1]
    call = re.compile(r'^if __name__ == "__main__":\n    front\.run\((?:lambda: )?(\w+)(.*)\)$', re.MULTILINE)
    commands = {path: found for path in package.rglob("*.py") if (found := call.search(path.read_text()))}
    assert {path.stem for path in commands} >= {"plots", "pods", "audit", "lm_eval"}
    for path, (function, arguments) in ((path, found.groups()) for path, found in commands.items()):
        name = ".".join(path.relative_to(package.parent).with_suffix("").parts)
        monkeypatch.setattr(sys, "argv", [name, "--help"])
        try:
            command = getattr(importlib.import_module(name), function)
            command(*([sys.argv[1:]] if arguments else []))
        except PackageError:
            continue  # lm-eval is not installed
        except SystemExit as stop:
            assert not stop.code, name
        shown = capsys.readouterr()
        assert len(shown.out) > 100 and not shown.err, name


def test_an_error_in_code_of_the_users_is_named_there(capfd, tmp_path):
    """It is named too if a library or Python itself raised it, and not if our code did that it had called."""
    task = str(tmp_path / "my_task.py")
    code, (line,) = ended(ZeroDivisionError("division by zero"), capfd, task)
    (report,) = tmp_path.glob("crash-*.txt")
    assert code == 2 and line.startswith(f"error: {task}, line 2: ZeroDivisionError: division by zero")
    assert str(report) in line and "Traceback" in report.read_text()
    report.unlink()
    for file, told in ((os.__file__, 2), (np.__file__, 2), (front.__file__, 1)):
        found: dict = {}
        exec(compile("def call():\n    raise KeyError('x')", file, "exec"), found)
        exec(compile("def main():\n    call()", task, "exec"), found)
        with pytest.raises(SystemExit) as stop:
            front.run(found["main"])
        assert stop.value.code == told and (f"{task}, line 2: KeyError" in capfd.readouterr().err) == (told == 2)
        next(tmp_path.glob("crash-*.txt")).unlink()


def test_code_of_the_users_does_not_end_a_command_in_silence(capfd, tmp_path):
    code, lines = ended(SystemExit(0), capfd, str(tmp_path / "my_method.py"))
    assert code == 2 and len(lines) == 1 and "my_method.py, line 2: it ends the command with 0" in lines[0]
    assert ended(SystemExit(0), capfd) == (0, [])


def test_a_report_goes_elsewhere_where_the_directory_cannot_be_written(capfd, tmp_path, monkeypatch):
    monkeypatch.setattr(front.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.chdir("/proc/self")
    code, lines = ended(KeyError("x"), capfd)
    assert code == 1 and str(tmp_path) in lines[0]
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    next(tmp_path.glob("crash-*")).unlink()
    code, lines = ended(KeyError("x"), capfd)
    assert code == 1 and f"please send {tmp_path}/crash-" in lines[0]


def test_a_defect_is_named_also_where_no_report_can_be_written(capfd, tmp_path, monkeypatch):
    def nowhere():
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    with monkeypatch.context() as patch:  # ended early, because pytest asks for the directory too
        patch.setattr(front.tempfile, "gettempdir", nowhere)
        patch.chdir("/proc/self")
        code, lines = ended(KeyError("x"), capfd)
    assert code == 1 and len(lines) == 1 and "KeyError" in lines[0]


def test_a_report_is_not_written_through_a_link(capfd, tmp_path, monkeypatch):
    other = tmp_path / "other"
    other.write_text("precious")
    monkeypatch.setattr(front.tempfile, "gettempdir", lambda: str(tmp_path / "elsewhere"))
    (tmp_path / "elsewhere").mkdir()
    write = Path.open
    monkeypatch.setattr(Path, "open", lambda path, *more, **named: (link(path, other), write(path, *more, **named))[1])
    code, lines = ended(KeyError("x"), capfd)
    monkeypatch.undo()
    assert other.read_text() == "precious" and (code, len(lines)) == (front.BUG, 1)


def link(path: Path, target: Path) -> None:
    """Makes a link before the file is opened, as an attacker would who knows its name."""
    path.symlink_to(target)


@pytest.mark.parametrize("there", [True, False])
def test_a_report_goes_to_the_workdir_if_there_is_one(there, capfd, tmp_path, monkeypatch):
    run = tmp_path / "run"
    monkeypatch.setattr(front, "workdir", run)
    if there:
        run.mkdir()
    _, lines = ended(KeyError("x"), capfd)
    (report,) = (run if there else tmp_path).glob("crash-*.txt")
    assert str(report) in lines[0] and run.exists() == there


def test_a_terminal_of_another_encoding(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    front.run(lambda: print("0.5 ± 0.1 ░"))
    assert raw.getvalue() == b"0.5 ? 0.1 ?\n"


def test_a_console_that_nobody_reads():
    """rich would end the process with exit code 1."""

    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        Console(file=Gone()).print("text")


def test_the_backend_of_a_notebook_stops_no_figure(monkeypatch, tmp_path):
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")

    def draw():
        code = "from matplotlib.figure import Figure; Figure().savefig('a.png')"
        subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)

    front.run(draw)
    assert (tmp_path / "a.png").exists()


def test_the_garbage_collector_runs_again_while_a_command_runs():
    running = []
    gc.disable()
    try:
        front.run(lambda: running.append(gc.isenabled()))
    finally:
        gc.unfreeze(), gc.enable()
    assert running == [True]


def test_an_interrupt_in_a_finalizer_ends_the_command(capfd):
    class Interrupted:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)

    def main():
        held = Interrupted()
        del held
        time.sleep(5)
        raise AssertionError("the interrupt was lost")

    # Shells start jobs in the background with this signal ignored.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(SystemExit) as stop:
            front.run(main)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert stop.value.code == front.INTERRUPTED
    assert capfd.readouterr().err == "interrupted\n"


def test_nobody_reads_any_more():
    """The pipe is closed before the help, longer than a buffer, is printed."""
    script = "from gdsd_jax.runtime import front; front.run(lambda: print('x' * 10**6))"
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(60) == front.NO_READER


@pytest.mark.parametrize("closed", ["<&- >&-", "<&- >&- 2>&-"])
def test_streams_that_are_closed(closed, tmp_path):
    """The number of a closed stream must not become that of a file, into which libraries would print."""
    script = (
        "import os, sys; from gdsd_jax.runtime import front\n"
        "def main():\n"
        "    print('out'), front.say('err')\n"
        "    with open('number', 'w') as file: file.write(str(file.fileno()))\n"
        "front.run(main)\n"
    )
    shell = f'exec {sys.executable} -c "$0" {closed}'
    done = subprocess.run(["bash", "-c", shell, script], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0 and done.stderr == ("" if "2>" in closed else "err\n")
    assert int((tmp_path / "number").read_text()) > 2


@pytest.mark.parametrize("command", ["train", "lm_eval", "telemetry.plots", "planning.pods"])
def test_an_interrupt_while_a_command_is_imported(command, tmp_path):
    """Sent as soon as the package itself is there: a module that takes its place announces that."""
    (tmp_path / "numpy.py").write_text("import time; print('here', flush=True); time.sleep(60)")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]])}
    process = subprocess.Popen(
        [sys.executable, "-m", f"gdsd_jax.{command}"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment,
        # A shell starts its background jobs, and so perhaps these tests, with interrupts ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert process.stdout.readline() == b"here\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, text = process.communicate(timeout=60)
    assert (process.returncode, text) == (front.INTERRUPTED, b"interrupted\n")
