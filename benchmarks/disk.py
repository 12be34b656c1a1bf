"""Measures reading and writing a checkpoint against safetensors' own functions, in CPU seconds and peak memory.

    python -m benchmarks.disk [--gb 3] [--turns 3] [--directory DIR]

A checkpoint of random bfloat16 weights in LLaDA's format is written once. Each turn starts two processes, one after the
other. The first reads the shards with safetensors' `load_file` and writes them with `save_file`; the second reads the
checkpoint with `load_checkpoint` and writes it with `export_checkpoint`. The files are in the page cache, and CPU
seconds are those of the process and its threads: the work of the host is compared, not the disk.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.arguments import number, parser_of
from gdsd_jax.runtime import ranges

WIDTH, SHARD = 2048, 10**9


def denoiser(gb: float) -> Any:
    """Returns the config of a model whose weights take about `gb` gigabytes in bfloat16."""
    from gdsd_jax.denoiser import DenoiserConfig

    layer, vocabulary = 13 * WIDTH**2, 32768
    layers = max(1, round((gb * 1e9 / 2 - 2 * vocabulary * WIDTH) / layer))
    return DenoiserConfig(
        "llada", vocabulary, WIDTH, layers, WIDTH // 128, WIDTH // 128, 3 * WIDTH, 4096, 5e5, 1e-5, False, False, False,
        mask_token_id=3, eos_token_id=1, pad_token_id=1, dtype="bfloat16",
    )  # fmt: skip


def make(directory: Path, gb: float) -> None:
    """Writes a checkpoint of about `gb` gigabytes with random weights."""
    import jax
    import ml_dtypes
    import numpy as np

    from gdsd_jax.denoiser import init_base
    from gdsd_jax.hub import export_checkpoint

    config = denoiser(gb)
    shapes = jax.eval_shape(lambda key: init_base(config, key), jax.random.key(0))
    bits = np.random.default_rng(0).integers(0, 1 << 16, 1 << 24, np.uint16) & 0x807F | 0x3F00

    def draw(shape: tuple[int, ...]) -> np.ndarray:
        return np.resize(bits, shape).view(ml_dtypes.bfloat16)

    base = jax.tree.map(lambda x: draw(x.shape), shapes)
    export_checkpoint(directory, config, base, max_shard_bytes=SHARD)


def theirs(directory: Path, out: Path) -> tuple[float, float]:
    """Returns the CPU seconds that safetensors takes to read and to write."""
    import ml_dtypes  # noqa: F401  (adds bfloat16 to NumPy)
    from safetensors.numpy import load_file, save_file

    start = time.process_time()
    shards = {file.name: load_file(file) for file in sorted(directory.glob("*.safetensors"))}
    read = time.process_time()
    for name, tensors in shards.items():
        save_file(tensors, out / name)
    return read - start, time.process_time() - read


def ours(directory: Path, out: Path) -> tuple[float, float]:
    """Returns the CPU seconds that `load_checkpoint` and `export_checkpoint` take."""
    import jax

    from gdsd_jax.hub import export_checkpoint, load_checkpoint

    jax.devices()
    start = time.process_time()
    config, base = load_checkpoint(directory)
    jax.block_until_ready(base)
    read = time.process_time()
    export_checkpoint(out / "export", config, base, max_shard_bytes=SHARD)
    return read - start, time.process_time() - read


def child(which: str, directory: Path) -> None:
    """Measures one contestant in this process and prints a line of JSON."""
    with tempfile.TemporaryDirectory(dir=directory.parent) as out:
        read, written = {"theirs": theirs, "ours": ours}[which](directory, Path(out))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"read": read, "write": written, "peak": peak}))


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--gb", type=number(ranges.Positive), default=3.0, help="size of the checkpoint")
    parser.add_argument("--turns", type=number(ranges.Count), default=3, help="turns, of which the median is taken")
    parser.add_argument("--directory", type=Path, default=None, help="where the files go; removed afterwards")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.child:
        child(flags.child[0], Path(flags.child[1]))
        return
    folder = Path(tempfile.mkdtemp(dir=flags.directory))
    try:
        make(folder / "checkpoint", flags.gb)
        size = sum(path.stat().st_size for path in (folder / "checkpoint").glob("*.safetensors"))
        found: dict[str, list[dict[str, float]]] = {"theirs": [], "ours": []}
        for _ in range(flags.turns):
            for which, results in found.items():
                command = [sys.executable, "-m", "benchmarks.disk", "--child", which, str(folder / "checkpoint")]
                # Otherwise the first contestant pays for writing the checkpoint to the disk, and each later one for
                # what the contestant before it left unwritten.
                os.sync()
                printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                results.append(json.loads(printed.splitlines()[-1]))
        median = lambda which, what: statistics.median(result[what] for result in found[which])  # noqa: E731
        print(f"{size / 1e9:.2f} GB, median of {flags.turns}")
        for what in ("read", "write"):
            one, two = (median(which, what) for which in ("theirs", "ours"))
            print(f"{what:5}  safetensors {one:.2f} CPU s, ours {two:.2f} CPU s: {two / one:.2f}x")
        print(f"peak   safetensors {median('theirs', 'peak') / 1e9:.2f} GB, ours {median('ours', 'peak') / 1e9:.2f} GB")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
