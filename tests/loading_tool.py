"""Makes random sharded checkpoints in LLaDA format, and loads them over forced CPU devices in one process or several.

    python tests/loading_tool.py make DIR --layers 28 --width 2048 --vocab 126464      4.1 GB in bfloat16
    /usr/bin/time -v python tests/loading_tool.py load DIR --mesh 1,8,1                peak memory, seconds, bytes read

`load` prints one JSON line for each mesh. `--check` compares every shard with the files, which takes memory of its own;
`--export OUT` writes the parameters to OUT-0, OUT-1, ...; `--processes N --index I --port P` make it one of N processes
on this machine, with 8 / N devices each.
"""

import argparse
import dataclasses
import json
import os
import resource
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DEVICES = 8


@dataclasses.dataclass
class Random:
    """A bfloat16 parameter with values in +-[0.5, 1), drawn on access, so that it never takes memory."""

    shape: tuple
    seed: int

    @property
    def dtype(self):
        import ml_dtypes

        return ml_dtypes.bfloat16

    def draw(self, shape, seed):
        import numpy as np

        bits = np.random.default_rng(seed).integers(0, 1 << 16, shape, np.uint16)
        return ((bits & 0x807F) | 0x3F00).view(self.dtype)

    def __getitem__(self, layer):
        return self.draw(self.shape[1:], (self.seed, layer))

    def __array__(self, dtype=None, copy=None):
        return self.draw(self.shape, self.seed)


def make(directory, layers, width, vocab, shard_bytes):
    """Writes the checkpoint, without tokenizer files."""
    import jax

    from gdsd_jax.denoiser import DenoiserConfig, init_base
    from gdsd_jax.hub import export_checkpoint

    config = DenoiserConfig(
        "llada", vocab, width, layers, max(1, width // 128), max(1, width // 128), 3 * width, 4096, 5e5, 1e-5, False,
        False, False, mask_token_id=vocab - 3, eos_token_id=vocab - 2, pad_token_id=vocab - 1,
    )  # fmt: skip
    shapes = jax.eval_shape(lambda key: init_base(config, key), jax.random.key(0))
    leaves, tree = jax.tree.flatten(shapes)
    base = jax.tree.unflatten(tree, [Random(leaf.shape, seed) for seed, leaf in enumerate(leaves)])
    export_checkpoint(directory, config, base, max_shard_bytes=shard_bytes)


def held_bytes(config, base, tensors):
    """Returns the bytes of the stored tensors that the devices of this process hold, counted by element."""
    import numpy as np

    from gdsd_jax.hub import names

    total = 0
    for name, slot in names.slots(config).items():
        array = names.at(base, slot.path)
        held = np.zeros(array.shape, bool)
        for shard in array.addressable_shards:
            held[shard.index] = True
        layer = held if slot.layer is None else held[slot.layer]
        total += int(layer.sum()) * tensors[name].size // layer.size
    return total


def differing(config, base, tensors):
    """Returns the names of stored tensors that differ from a local shard; NumPy reads one whole tensor at a time."""
    import numpy as np

    from gdsd_jax.hub import names
    from gdsd_jax.hub.files import FLOATS

    wrong = []
    for name, slot in names.slots(config).items():
        stored = tensors[name]
        dtype = FLOATS[stored.dtype]
        flat = np.fromfile(stored.file, dtype, stored.size // dtype.itemsize, offset=stored.begin)
        whole = flat.reshape(stored.shape)
        for shard in names.at(base, slot.path).addressable_shards:
            index, data = shard.index, np.asarray(shard.data)
            if slot.layer is not None:
                index, data = index[1:], data[slot.layer]
            if not np.array_equal(data.view(np.uint8), np.ascontiguousarray(whole[index]).view(np.uint8)):
                wrong.append(name)
                break
    return wrong


def load(directory, mesh, check, export):
    """Loads over the mesh, and returns the bytes read and held, the differences, the time and the peaks of memory."""
    import jax

    from gdsd_jax.denoiser import logical_axes
    from gdsd_jax.hub import Reader, export_checkpoint, load_checkpoint
    from gdsd_jax.hub.files import checked_directory, checkpoint_tensors
    from gdsd_jax.runtime.sharding import MeshConfig, make_mesh, shardings

    over = make_mesh(MeshConfig(*mesh))
    reader, before, start = Reader(), peak(), time.perf_counter()
    config, base = load_checkpoint(directory, mesh=over, reader=reader)
    seconds, after = time.perf_counter() - start, peak()
    tensors = checkpoint_tensors(checked_directory(directory), headers := Reader())
    arrays = jax.tree.leaves(base)
    wanted = shardings(over, logical_axes(config), base)
    report = {
        "mesh": mesh,
        "bytes_read": reader.bytes_read,
        "header_bytes": headers.bytes_read,
        "file_bytes": sum(path.stat().st_size for path in Path(directory).glob("*.safetensors")),
        "array_bytes": sum(shard.data.nbytes for array in arrays for shard in array.addressable_shards),
        "largest_tensor_bytes": max(tensor.size for tensor in tensors.values()),
        "peak_before": before,
        "peak_after": after,
        "seconds": round(seconds, 1),
        "as_ruled": jax.tree.all(jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), base, wanted)),
    }
    if check:
        report["held_bytes"] = held_bytes(config, base, tensors)
        report["differing"] = differing(config, base, tensors)
    if export:
        export_checkpoint(export, config, base, source=directory, max_shard_bytes=report["file_bytes"] // 3)
        report["peak_export"] = peak()
        report["exported"] = Path(export).is_dir()
    return report


def peak():
    """Returns the largest resident size of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("command", choices=("make", "load"))
    parser.add_argument("directory")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=512)
    parser.add_argument("--shard-bytes", type=int, default=10**9)
    parser.add_argument("--mesh", action="append", type=lambda text: tuple(map(int, text.split(","))))
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--export")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--index", type=int, default=0)
    parser.add_argument("--port", type=int)
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={DEVICES // args.processes}"
    if args.command == "make":
        make(args.directory, args.layers, args.width, args.vocab, args.shard_bytes)
        return
    if args.processes > 1:
        import jax

        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"localhost:{args.port}", args.processes, args.index)
    for number, mesh in enumerate(args.mesh):
        export = f"{args.export}-{number}" if args.export else None
        print(json.dumps(load(args.directory, mesh, args.check, export)), flush=True)


if __name__ == "__main__":
    main()
