"""The launch scripts: clean shell, commands that the real tools accept, and recovery when a pod goes away."""

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from gdsd_jax.runtime import hosts

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
TRAIN = ("python", "-m", "gdsd_jax.train", "--config", "configs/tiny_sudoku.py", "--config.sampler.top_p=None")
SETTINGS = {
    "PROJECT": "my-project",
    "ZONE": "us-east5-a",
    "POD": "gdsd",
    "ACCELERATOR": "v5p-64",
    "PROVISIONING": "spot",
    "CLUSTER": "my-cluster",
    "IMAGE": "us-docker.pkg.dev/my-project/images/gdsd_jax:1",
    "PROFILES": "gs://my-bucket/profiles",
    "BUCKET": "my-bucket",
    "STORAGE": "runs",
}
ARGUMENTS = {
    "create_tpu_vm": ((),),
    "create_queued": ((),),
    "delete": ((), ("vm",)),
    "setup": ((),),
    "setup_worker": (("32",), ("32", "my-bucket")),
    "mount_bucket": (("my-bucket", "/mnt/gdsd"),),
    "run_all": (TRAIN,),
    "stop": ((),),
    "until_done": (TRAIN,),
    "profile": ((), ("200",)),
    "gke": (TRAIN,),
}
SOURCED = {"common", "tpu_env"}


def launch(name, *arguments, **settings):
    environment = {key: value for key, value in os.environ.items() if key not in SETTINGS} | settings
    command = [LAUNCH / f"{name}.sh", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def dry_run(name, *arguments, **settings):
    """Returns the commands that a script would run, each as a list of words."""
    done = launch(name, *arguments, **SETTINGS | settings, DRY_RUN="1")
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


def remote(command):
    """Returns the command that a `gcloud ... ssh` command runs on the workers."""
    return next(word for word in command if word.startswith("--command=")).removeprefix("--command=")


@pytest.fixture(scope="module")
def commands():
    """Returns every command that any of the scripts would run."""
    return [command for name, cases in ARGUMENTS.items() for case in cases for command in dry_run(name, *case)]


# --- the scripts themselves


def test_every_script_is_covered():
    assert {script.stem for script in SCRIPTS} == ARGUMENTS.keys() | SOURCED
    index = (LAUNCH / "README.md").read_text()
    assert all(f"`{path.name}" in index for path in LAUNCH.iterdir() if path.suffix in (".sh", ".py"))


def test_shellcheck_finds_nothing():
    checker = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([checker, *SCRIPTS], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_scripts_are_short_and_executable():
    for script in SCRIPTS:
        assert len(script.read_text().splitlines()) < 60, script.name
        assert os.access(script, os.X_OK) == (script.stem not in SOURCED), script.name


# --- their commands


def test_dry_run_starts_nothing(tmp_path):
    """A dry run succeeds with a PATH that holds only the tools of the scripts themselves: it calls no other."""
    for tool in ("bash", "dirname", "date", "id"):
        (tmp_path / tool).symlink_to(shutil.which(tool))
    for name, (arguments, *_) in ARGUMENTS.items():
        done = launch(name, *arguments, **SETTINGS, DRY_RUN="1", PATH=str(tmp_path))
        assert done.returncode == 0 and done.stdout, (name, done.stderr)


@pytest.mark.parametrize(
    ("accelerator", "software", "chips"),
    [("v5litepod-8", "v2-alpha-tpuv5-lite", 8), ("v5p-64", "v2-alpha-tpuv5", 32), ("v6e-16", "v2-alpha-tpuv6e", 16)],
)
def test_accelerators(accelerator, software, chips):
    for name, flag in (("create_tpu_vm", "--version"), ("create_queued", "--runtime-version")):
        create = dry_run(name, ACCELERATOR=accelerator)[-1]
        assert f"--accelerator-type={accelerator}" in create and f"{flag}={software}" in create
    assert remote(dry_run("setup", ACCELERATOR=accelerator)[-1]).endswith(f"setup_worker.sh {chips} my-bucket")


@pytest.mark.parametrize("provisioning", ["on-demand", "spot", "reserved"])
def test_provisioning(provisioning):
    for name in ("create_tpu_vm", "create_queued"):
        flags = {"--spot", "--reserved"} & set(dry_run(name, PROVISIONING=provisioning)[-1])
        assert flags == {f"--{provisioning}"} - {"--on-demand"}


@pytest.mark.parametrize("name", sorted(ARGUMENTS.keys() - {"setup_worker", "mount_bucket"}))
def test_a_missing_setting_is_named(name):
    done = launch(name, *ARGUMENTS[name][0], **SETTINGS | {"PROJECT": ""}, DRY_RUN="1")
    assert done.returncode == 2 and "set PROJECT" in done.stderr and not done.stdout


def test_unknown_values_are_refused():
    for setting, value in (("ACCELERATOR", "v4-8"), ("PROVISIONING", "cheap")):
        done = launch("create_queued", **SETTINGS | {setting: value}, DRY_RUN="1")
        assert done.returncode == 2 and f"{setting}={value} is none of" in done.stderr
    assert launch("delete", "everything", **SETTINGS).returncode == 2
    for name in ("run_all", "until_done", "gke", "setup_worker", "mount_bucket"):
        assert launch(name, **SETTINGS).returncode == 2


def test_the_users_command_arrives_word_for_word():
    words = (*TRAIN, "--workdir", "runs/with space")
    on_worker = shlex.split(remote(dry_run("run_all", *words)[0]))
    assert on_worker[-len(words) :] == list(words)
    in_container = shlex.split(remote(dry_run("gke", *words)[-1]))
    assert in_container[-len(words) - 1 :] == ["exec", *words]


def test_the_device_check_counts(tmp_path):
    """With two CPU devices in place of a pod: `initialize` is told what a pod would tell it."""
    *_, check, chips = dry_run("setup_worker", "32")[-1]
    assert Path(check).resolve() == LAUNCH / "check_devices.py" and chips == "32"
    (tmp_path / "sitecustomize.py").write_text("import jax\njax.distributed.initialize = lambda: None\n")
    settings = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "PYTHONPATH": str(tmp_path)}
    for chips, message in ((2, ""), (4, "2 devices where 4 are expected")):
        done = subprocess.run([sys.executable, check, str(chips)], env=settings, capture_output=True, text=True)
        assert done.returncode == bool(message) and message in done.stderr, done.stderr
        assert done.stdout == "process 0 of 1: 2 devices\n"


def test_stop_finds_the_command_and_spares_its_own_shell():
    shell = remote(dry_run("stop")[0])
    pattern = re.compile(re.search("pkill -TERM -f '(.*?)'", shell)[1])
    assert pattern.search("/home/u/gdsd_jax/.venv-tpu/bin/python -m gdsd_jax.train --config c.py")
    assert pattern.search("python launch/with_profiler.py gdsd_jax.train --config c.py")
    assert not pattern.search(f"bash -c {shell}")
    lock = re.search(r"flock (\S+)", shell)[1]
    assert f"flock --no-fork {lock} " in remote(dry_run("run_all", *TRAIN)[0])


SAVES = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.3), print("saved", flush=True), sys.exit(75)))
print("trains", flush=True)
time.sleep(60)
"""


def test_a_command_that_is_stopped_saves_before_its_lock_is_free(tmp_path):
    """The process that the shell started is the one that the signal reaches, so its exit code is the command's."""
    shell = remote(dry_run("run_all", sys.executable, "-c", SAVES)[0]).rpartition("&& ")[2]
    shell = shell.replace("/tmp/gdsd.lock", str(tmp_path / "lock"))
    with subprocess.Popen(["bash", "-c", shell], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "trains\n"
        process.terminate()
        assert process.wait(timeout=10) == 75
        assert process.stdout.read() == "saved\n"


def documented():
    """The guide's commands; all but `xpk storage`, whose dry run asks for a cluster."""
    text = (ROOT / "docs" / "pods.md").read_text().replace("\\\n", " ")
    return list(map(shlex.split, re.findall(r"^    ((?:gcloud|xpk cluster) .*)$", text, re.MULTILINE)))


STARTING = {"gcloud": ("create_queued", "run_all"), "xpk": ("gke",)}
TOOLS = [tool for tool in STARTING if shutil.which(tool)]


def check_taken(asked, tmp_path):
    """gcloud parses, then stops for want of credentials; xpk has a dry run of its own. Neither reaches a network."""
    quiet = os.environ | {
        "CLOUDSDK_CONFIG": str(tmp_path),
        "CLOUDSDK_CORE_DISABLE_PROMPTS": "1",
        "CLOUDSDK_COMPONENT_MANAGER_DISABLE_UPDATE_CHECK": "1",
        "NO_GCE_CHECK": "True",
    }
    assert asked
    for command in asked:
        words = [*command, "--dry-run", "--quiet"] if command[0] == "xpk" else command
        done = subprocess.run(words, env=quiet, input="", capture_output=True, text=True, timeout=60)
        if command[0] == "xpk":
            assert done.returncode == 0, (command, done.stdout[-2000:], done.stderr[-2000:])
        else:
            # A wrong argument is status 2. Settings of gcloud's own need no credentials.
            stopped = done.returncode == 1 and "credentials" in done.stderr
            assert stopped or command[1] == "config" and done.returncode == 0, (command, done.stderr)


# Every call of these tools takes seconds.
@pytest.mark.parametrize("tool", TOOLS)
def test_the_real_tools_take_the_commands_that_create_and_run(tool, tmp_path):
    commands = [dry_run(name, *ARGUMENTS[name][0])[-1] for name in STARTING[tool]]
    assert all(command[0] == tool for command in commands)
    check_taken(commands, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("tool", TOOLS)
def test_the_real_tools_take_every_command(tool, commands, tmp_path):
    # Commands that differ only in what the workers run are asked about once.
    differ = lambda command: tuple(word for word in command if not word.startswith("--command="))  # noqa: E731
    asked = {differ(command): command for command in [*commands, *documented()] if command[0] == tool}
    check_taken(asked.values(), tmp_path)


# --- a pod that goes away

# A fake gcloud whose state is in five files: `state` of the queued resource, number of `failures` that training still
# meets, the state `after_failure`, whether the failures are `stopped` training, and a `log` of the calls.
CLOUD = r"""#!/usr/bin/env bash
cd "$CLOUD" || exit 9
case "$*" in
  *"queued-resources list"*) cat state ;;
  *"queued-resources create"*) echo create >>log && echo ACTIVE >state ;;
  *"queued-resources delete"*) echo delete >>log && : >state ;;
  *scp*) echo copy >>log ;;
  *setup_worker*) echo setup >>log ;;
  *pkill*) echo stop >>log ;;
  *gdsd_jax.train*)
    echo train >>log
    left=$(<failures)
    ((left)) || exit 0
    echo $((left - 1)) >failures && cat after_failure >state
    [[ -e stopped ]] || exit 1
    env $(grep -o 'GDSD_[A-Z_]*=[0-9]*' <<<"$*") "$PYTHON" \
      -c 'from gdsd_jax.runtime.signals import exit_code; raise SystemExit(exit_code())'
    ;;
  *) echo "unexpected: $*" >&2 && exit 9 ;;
esac
"""


@pytest.fixture
def cloud(tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in (("gcloud", CLOUD), ("sleep", "#!/bin/sh\n"), ("git", "#!/bin/sh\n")):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)

    def run(failures, after_failure, **settings):
        (tmp_path / "state").write_text("")
        (tmp_path / "failures").write_text(str(failures))
        (tmp_path / "after_failure").write_text(f"{after_failure}\n")
        settings |= {"CLOUD": str(tmp_path), "PATH": f"{tools}:{os.environ['PATH']}", "PYTHON": sys.executable}
        done = launch("until_done", *TRAIN, **SETTINGS | settings)
        return done, (tmp_path / "log").read_text().split()

    return run


ROUND = ["copy", "setup", "stop", "train"]


def test_a_preempted_pod_is_asked_for_again(cloud):
    done, log = cloud(2, "SUSPENDED")
    assert done.returncode == 0, done.stderr
    assert log == ["create", *ROUND, "delete", "create", *ROUND, "delete", "create", *ROUND]


def test_a_failure_on_a_pod_that_is_there_is_tried_again(cloud):
    done, log = cloud(1, "ACTIVE")
    assert done.returncode == 0, done.stderr
    assert log == ["create", *ROUND, *ROUND]


def test_a_command_that_keeps_failing_ends_the_loop(cloud):
    done, log = cloud(9, "ACTIVE", ATTEMPTS="3")
    assert done.returncode == 1 and "failed 3 times" in done.stderr
    assert log == ["create", *ROUND * 3]


def test_training_that_was_stopped_goes_on_and_is_no_failure(cloud, tmp_path):
    """By itself it would leave with 0, as if it were done."""
    (tmp_path / "stopped").touch()
    done, log = cloud(3, "ACTIVE", ATTEMPTS="2")
    assert done.returncode == 0, done.stderr
    assert log == ["create", *ROUND * 4]


def test_clusters_start_stopped_training_again():
    command = dry_run("gke", *TRAIN)[-1]
    code = re.search(r"export GDSD_STOPPED_EXIT_CODE=(\d+) ", remote(command))[1]
    codes = next(word for word in command if word.startswith("--restart-on-exit-codes=")).partition("=")[2].split(",")
    assert {code, str(hosts.FAILED)} < set(codes)


# --- the environment of a worker


def test_worker_environment(tmp_path):
    (tmp_path / ".venv-tpu" / "bin").mkdir(parents=True)
    show = f'source {LAUNCH}/tpu_env.sh && printf "%s\\n" "$PATH" "$JAX_COMPILATION_CACHE_DIR" "$LIBTPU_INIT_ARGS"'
    settings = {"PATH": os.environ["PATH"], "HOME": "/home/u", "LIBTPU_INIT_ARGS": "--xla_mine=1"}
    done = subprocess.run(["bash", "-c", show], cwd=tmp_path, env=settings, capture_output=True, text=True, check=True)
    path, cache, flags = done.stdout.splitlines()
    assert path.startswith(f"{tmp_path}/.venv-tpu/bin:") and cache == "/home/u/.cache/gdsd_jax"
    assert flags.endswith(" --xla_mine=1") and len(set(flags.split())) == len(flags.split()) == 7


def test_a_command_runs_under_the_profiler(tmp_path):
    """The module gets its own name and arguments, the server listens, and no device is touched before the module."""
    (tmp_path / "probe.py").write_text(
        "import socket, sys, jax\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge.backends_are_initialized()\n"
        "socket.create_connection(('localhost', int(sys.argv[2])), timeout=5).close()\n"
        "print(__name__, sys.argv[1:])\n"
    )
    with socket.socket() as free:
        free.bind(("", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, LAUNCH / "with_profiler.py", "probe", "--x", port]
    settings = os.environ | {"PROFILER_PORT": port}
    done = subprocess.run(command, cwd=tmp_path, env=settings, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[0] == f"__main__ ['--x', '{port}']"
