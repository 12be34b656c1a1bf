"""Measures reading a checkpoint against plain PyTorch.

    python -m benchmarks.load [--workloads W1,W2] [--threads 1] [--turns 3] [--json FILE]

The random weights of `benchmarks.workloads` are written once in LLaDA's format, in float32 and in shards of at most 100
MB. Each turn reads them: ours into stacked arrays on the device, PyTorch's `safetensors.torch.load_file` shard by shard
into separate tensors. The files are in the page cache by then: the work of the host is compared, not the disk. It needs
`requirements-torch.txt`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from benchmarks import measure
from benchmarks.workloads import WORKLOADS, weights

SHARD = 100 * 10**6


def prepare(job: measure.Job) -> measure.Contest:
    """Writes the checkpoint of the workload and returns the contestant that reads it."""
    from benchmarks import ours
    from gdsd_jax.hub import export_checkpoint

    folder = tempfile.TemporaryDirectory()
    directory = Path(folder.name) / job.workload
    shape = WORKLOADS[job.workload]
    export_checkpoint(directory, ours.denoiser(shape), weights(shape), max_shard_bytes=SHARD)
    read = read_torch if job.variant == "torch" else read_ours
    # The function holds the folder, which would otherwise be deleted.
    return measure.Contest(lambda: (read(directory), folder)[0])


def read_torch(directory: Path) -> None:
    """Reads all tensors with PyTorch and holds them at once."""
    import safetensors.torch
    import torch

    held = {}
    for file in sorted(directory.glob("*.safetensors")):
        held |= {name: torch.clone(tensor) for name, tensor in safetensors.torch.load_file(file).items()}


def read_ours(directory: Path) -> None:
    """Loads the checkpoint onto the device."""
    import jax

    from gdsd_jax.hub import load_checkpoint

    jax.block_until_ready(load_checkpoint(directory))


BENCH = measure.Bench("benchmarks.load", __doc__, prepare, references=("torch",), variants=("load",))

if __name__ == "__main__":
    measure.main(BENCH)
