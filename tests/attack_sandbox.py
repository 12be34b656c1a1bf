"""Runs every attack and cheat on a sandbox, each followed by an honest program in the same one.

    python tests/attack_sandbox.py --backend bwrap|unshare [--as-user]

Prints how many there are, and those that were not contained, passed, or changed the verdicts of the honest program; the
exit code is 1 if there are any.
`--as-user` (from root) runs all of it as a user without rights.
"""

import argparse
import dataclasses
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import sandbox_attacks
import sandbox_cheats
import sandbox_kernel_attacks
import sandbox_leftovers

from gdsd_jax.tasks import sandbox
from gdsd_jax.tasks.sandbox import Limits, Program, Verdict, judge

# Time that a busy machine has enough of; and time for what is meant to use all that it gets.
LIMITS = Limits(seconds=20.0, megabytes=256, total_megabytes=384)
SHORT = dataclasses.replace(LIMITS, seconds=1.0)
ATTACKS = sandbox_attacks.CONTAINED | sandbox_kernel_attacks.ATTACKS | sandbox_leftovers.ATTACKS
CHEATS = {
    name: (each, sandbox_cheats.CHEATED) if isinstance(each, str) else each
    for name, each in (sandbox_cheats.CHEATS | sandbox_leftovers.CHEATS).items()
}
HONEST = Program(
    "import os\ndef f(x):\n    with open('/tmp/x', 'wb') as file:\n        file.write(bytes(1 << 20))\n"
    "    if os.fork() == 0:\n        os._exit(0)\n    return x + 1 + os.wait()[1] + len(bytes(1 << 26)) - (1 << 26)",
    ("assert f(1) == 2", "assert f(1) == 3"),
)
_USER = "1001"
_MOUNTED = "/mnt"


def outcomes(backend: str, every: int = 1) -> dict[str, tuple[Verdict, list[Verdict]]]:
    """Returns {attack or cheat: (its verdict, those of the honest program right after it in the same sandbox)}.

    Args:
      every: takes one program out of so many.
    """
    with socket.create_server(("127.0.0.1", 0)) as server, tempfile.NamedTemporaryFile("w") as secret:
        secret.write("secret")
        secret.flush()
        os.chmod(secret.name, 0o644)
        os.environ["SANDBOX_SECRET"] = "x"
        given = f"SECRET, PORT = {secret.name!r}, {server.getsockname()[1]}\n"
        programs = {name: Program(source, (given + test,)) for name, (source, test, _) in ATTACKS.items()}
        programs |= {name: Program(source, (test,)) for name, (source, test) in CHEATS.items()}
        programs = {name: programs[name] for name in sorted(programs)[::every]}
        endless = {name for name, (_, _, wanted) in ATTACKS.items() if Verdict.TIMED_OUT in wanted}
        endless |= {name for name in CHEATS if "for ever" in name}
        endless &= programs.keys()
        found = {}
        for limits, names in ((SHORT, endless), (LIMITS, programs.keys() - endless)):
            queue = [each for name in sorted(names) for each in (programs[name], HONEST)]
            verdicts = judge(queue, limits=limits, backend=backend, processes=1)
            pairs = zip(verdicts[::2], verdicts[1::2], strict=True)
            found |= {name: (verdict, after) for name, ((verdict,), after) in zip(sorted(names), pairs, strict=True)}
    return found


def not_contained(name: str, verdict: Verdict, after: list[Verdict]) -> str | None:
    """Returns what went wrong with one attack or cheat, None where nothing did."""
    contained = verdict in ATTACKS[name][2] if name in ATTACKS else verdict not in (Verdict.PASSED, Verdict.REFUSED)
    if not contained:
        return f"{name}: {verdict.name}"
    if after != [Verdict.PASSED, Verdict.FAILED]:
        return f"{name}: the honest program after it: {', '.join(each.name for each in after)}"
    return None


def as_user(*arguments: str) -> subprocess.CompletedProcess:
    """Runs this file as a user without rights. Only root can: the interpreter may live where others cannot look."""
    packages = ":".join(path for path in sys.path if path and not path.startswith(sys.base_prefix))
    script = (
        'mount --bind "$0" "$1" && shift && exec setpriv --reuid=$1 --regid=$1 --clear-groups --inh-caps=-all '
        '--bounding-set=-all env HOME=/tmp PYTHONDONTWRITEBYTECODE=1 PYTHONPATH="$2" "$3" "$4" "${@:5}"'
    )
    name = Path(sys.executable).resolve().relative_to(Path(sys.base_prefix).resolve())
    command = ["unshare", "--mount", "--propagation", "private", "bash", "-c", script, sys.base_prefix, _MOUNTED]
    command += [_USER, packages, f"{_MOUNTED}/{name}", str(Path(__file__).resolve()), *arguments]
    return subprocess.run(command, text=True, capture_output=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=sandbox.BACKENDS, required=True)
    parser.add_argument("--as-user", action="store_true")
    options = parser.parse_args()
    if options.as_user:
        done = as_user("--backend", options.backend)
        print(f"{done.stdout}{done.stderr}", end="")
        sys.exit(done.returncode)
    failure = sandbox.check(options.backend)
    if failure is not None:
        sys.exit(f"{options.backend}: {failure}")
    wrong = [found for name, each in outcomes(options.backend).items() if (found := not_contained(name, *each))]
    print(f"{options.backend}, user {os.geteuid()}: {len(ATTACKS)} attacks, {len(CHEATS)} cheats, {len(wrong)} wrong")
    print("\n".join(sorted(wrong)), end="\n" if wrong else "")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
