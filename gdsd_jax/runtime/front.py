"""Defines how every command ends when something goes wrong.

    what a user can change        one line on stderr, exit code 2
    Ctrl-C                        "interrupted", exit code 130
    training asked to stop        it saves, exit code 0 after SIGTERM and 130 after Ctrl-C, unless it was at its end
    a reader that has gone away   nothing, exit code 141, as after SIGPIPE
    a user's own method or task   one line that names the place in it and a saved report, exit code 2
    a defect of this package      one line that names a saved report, exit code 1

This module imports nothing that takes time, because it must work while the rest is still being imported.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import gc
import logging
import os
import platform
import signal
import sys
import sysconfig
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gdsd_jax.runtime import stderr
from gdsd_jax.runtime.errors import UserError

_log = logging.getLogger(__name__)

workdir: Path | None = None  # of the run, once the command line is known

BUG, BAD_INPUT, INTERRUPTED, NO_READER = 1, 2, 130, 141
HELP = {"--help", "-help", "-h"}  # any of them among the arguments makes a command explain itself

# Errors that come from a disk or a path, wherever they occur.
_DISK_ERRORS = {
    errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR,
    errno.ENOTEMPTY, errno.ENAMETOOLONG, errno.ELOOP, errno.EIO,
}  # fmt: skip
# Files that install the packages of an optional part; requirements.txt installs every other one.
_OPTIONAL_PARTS = {
    "lm_eval": "requirements-lm-eval.txt",
    "libtpu": "requirements-tpu.txt",
    "gcsfs": "requirements-tpu.txt",
    "xprof": "requirements-tpu.txt",
    "torch": "requirements-torch.txt",
    "peft": "requirements-torch.txt",
}
# Texts in the errors that JAX reports, each with what the user can do.
_DEVICE_ERRORS = {
    "RESOURCE_EXHAUSTED": "the memory of the devices is too small: lower config.microbatch_rows, "
    "config.prompts_per_iteration or config.evaluation.batch_rows, or take more devices",
    "Unable to initialize backend": "the devices cannot be used: see JAX_PLATFORMS and what else runs on them",
}


def run(main: Callable[[], Any]) -> None:
    """Runs a command; an exception ends the process as the table above says."""
    if not gc.isenabled():
        # It was off during the imports, whose objects stay, so that it need not look at them again.
        gc.freeze()
        gc.enable()
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            # It was closed. A file opened later must not get its number, to which libraries write.
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    # Figures are written to files. A notebook sets this variable for a backend that draws in its page, which other
    # processes may lack, and Matplotlib refuses to start without it.
    os.environ.pop("MPLBACKEND", None)
    for stream in (sys.stdout, sys.stderr):
        # A terminal that lacks a character shows a replacement.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    # These hooks silence what libraries print about exceptions in threads and callbacks. Code that waits for the result
    # of a thread or callback gets its exception again, and that one ends the command.
    sys.excepthook = lambda kind, error, frames: _silenced("in a callback", error)
    threading.excepthook = lambda found: _silenced("in a thread", found.exc_value)
    sys.unraisablehook = lambda found: _silenced("where nothing can be raised", found.exc_value)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    try:
        main()
        sys.stdout.flush()
    except SystemExit as stop:
        place = place_in_users_code(stop)
        if place is None:
            raise
        say(f"error: {place}: it ends the command with {stop.code!r}: let it raise an error instead")
        end(BAD_INPUT)
    except BaseException as error:
        end(settle(error))


def _silenced(where: str, error: BaseException | None) -> None:
    """Logs an exception that ends nothing.

    An interrupt is meant for the command. It is sent again a moment later, when the main thread has left the callback.
    """
    _log.debug(where, exc_info=error)
    if isinstance(error, KeyboardInterrupt):
        target = threading.main_thread().ident, signal.SIGINT
        again = threading.Timer(0.05, signal.pthread_kill, target)
        again.daemon = True
        again.start()


def hook(kind: type[BaseException], error: BaseException, frames: Any) -> None:
    """Ends the process in the same way while a command is still being imported; it is a `sys.excepthook`."""
    os._exit(settle(error))


def settle(error: BaseException) -> int:
    """Reports an error on stderr as the table above says, and returns the exit code."""
    if any(isinstance(cause, KeyboardInterrupt) for cause in causes(error)):
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        say("interrupted")
        return INTERRUPTED
    if isinstance(error, BrokenPipeError):
        # The contents of the buffers are discarded, so that flushing them at exit raises no error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return NO_READER
    reason = fault_of_the_user(error)
    if reason is not None:
        say(f"error: {reason}")
        return BAD_INPUT
    return _bug(error)


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yields an exception and the exceptions that led to it."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def fault_of_the_user(error: BaseException) -> str | None:
    """Returns a message that the user can act on, or None if the error is a defect of this package."""
    if isinstance(error, UserError):
        return str(error)
    if disk_is_full(error):
        return f"the disk is full ({first_line(error)}): make room, then give the same command again to go on"
    if _reports(error, errno.EFBIG):
        return f"a file would be too large ({first_line(error)}): raise the limit (ulimit -f), or change the path"
    if isinstance(error, OSError) and (error.errno in _DISK_ERRORS or error.filename is not None):
        return f"{error}: change the path, or make it readable and writable"
    if isinstance(error, MemoryError):
        return f"the memory of this machine is too small ({first_line(error)}): lower the numbers of rows"
    if isinstance(error, ImportError):
        return _missing(error)
    for text, advice in _DEVICE_ERRORS.items():
        if isinstance(error, RuntimeError) and text in str(error):
            return f"{advice} ({first_line(error)})"
    raised_in = Path(frames[-1].filename) if (frames := traceback.extract_tb(error.__traceback__)) else Path()
    if raised_in.parts[-3:] == ("jax", "_src", "config.py") and any(name.startswith("JAX_") for name in os.environ):
        return f"JAX refuses a JAX_... variable of the environment ({first_line(error)}): change it or unset it"
    if isinstance(error, AssertionError) and raised_in.parts[-3:] == ("jax", "_src", "xla_bridge.py"):
        return f"JAX finds no device of the kind that JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS')} names: change it"
    return None


def _missing(error: ImportError) -> str | None:
    """Returns how to install a package that is missing, or None if the import asks for a module of this package.

    A library that reports a package of its own in its own words says there how to install it.
    """
    name = next((cause.name for cause in causes(error) if isinstance(cause, ImportError) and cause.name), None)
    if name is None:
        return None
    package = name.partition(".")[0]
    if package == "gdsd_jax":
        return None
    what = f"the module {name} cannot be imported ({first_line(error)})"
    if package in sys.stdlib_module_names:
        return f"{what}: take a Python with its whole standard library"
    if error.name is None and package not in _OPTIONAL_PARTS:
        return what
    return f"{what}: run pip install -r {_OPTIONAL_PARTS.get(package, 'requirements.txt')}"


def disk_is_full(error: BaseException) -> bool:
    """Returns whether an error, or one that led to it, says that a disk is full."""
    return _reports(error, errno.ENOSPC, errno.EDQUOT)


def _reports(error: BaseException, *codes: int) -> bool:
    """Returns whether an error, or one that led to it, has one of these codes or its text."""
    return any(
        (isinstance(cause, OSError) and cause.errno in codes) or any(os.strerror(code) in str(cause) for code in codes)
        for cause in causes(error)
    )


def first_line(error: BaseException) -> str:
    """Returns the beginning of an exception's message on one line, or its type if it has no message."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def say(text: str) -> None:
    """Prints one line on stderr, also where it is held back, and ignores it if nobody reads stderr any more."""
    stderr.release()
    with contextlib.suppress(OSError):
        print(" ".join(text.split()), file=sys.stderr, flush=True)


def end(code: int) -> None:
    """Ends the process with an exit code."""
    hosts = sys.modules.get("gdsd_jax.runtime.hosts")
    if hosts is None:
        raise SystemExit(code)
    hosts.end(code)


def _bug(error: BaseException) -> int:
    what = f"{type(error).__name__}: {first_line(error)}"
    report = write_report(error)
    hosts = sys.modules.get("gdsd_jax.runtime.hosts")
    place = place_in_users_code(error)
    if hosts is not None and hosts.several():
        hosts.leave(f"{place or ''} {what} (all of it is in {report})")
    if place is not None:
        say(f"error: {place}: {what} (all of it is in {report}): fix it there")
        return BAD_INPUT
    say(f"error: this is a defect of gdsd_jax, not of your input: {what}; please send {report}")
    return BUG


def place_in_users_code(error: BaseException) -> str | None:
    """Returns `FILE, line N` of a user's method, task or tracker if it raised an error, or called what raised it.

    Of the frames outside of Python's library and the installed packages, the last one decides.
    """
    package, paths = str(Path(__file__).parents[1]), sysconfig.get_paths()
    libraries = tuple(paths[name] + os.sep for name in ("stdlib", "platstdlib", "purelib", "platlib", "scripts"))
    found = None
    for frame in traceback.extract_tb(error.__traceback__):
        file = frame.filename
        if file.startswith(package + os.sep):
            found = None
        elif not (file.startswith(("<", *libraries)) or {"site-packages", "dist-packages"} & set(Path(file).parts)):
            found = f"{file}, line {frame.lineno}"
    return found


def write_report(error: BaseException) -> Path:
    """Writes `crash-DATE-PROCESS.txt` and returns its path.

    The file goes to the run's workdir if that exists already, else to the current directory, else to the directory of
    temporary files.
    """
    jax = sys.modules.get("jax")
    text = "\n".join(
        [
            f"command  {' '.join(sys.orig_argv)}",
            f"python   {platform.python_version()} on {platform.platform()}",
            f"jax      {getattr(jax, '__version__', 'not imported')}",
            "",
            "".join(traceback.format_exception(error)),
        ]
    )
    name = f"crash-{datetime.datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}.txt"
    # The current directory may have been removed, and there may be no place for temporary files either.
    for place in (lambda: workdir, Path, lambda: Path(tempfile.gettempdir())):
        try:
            directory = place()
            if directory is None or not directory.is_dir():
                continue
            # A file that is there already, perhaps a link that somebody else has made, is not written to.
            with (directory / name).open("x", encoding="utf-8", errors="replace") as file:
                file.write(text)
            return (directory / name).absolute()
        except OSError:
            continue
    return Path(os.devnull)
