"""Loading over a mesh and from a bucket: who reads which bytes, what stays in memory, and exporting it again."""

import json
import re
import shutil
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import jax
import numpy as np
import pytest
from etils import epath
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from gdsd_jax import hub
from gdsd_jax.hub import files, incoming, outgoing, tiny
from gdsd_jax.hub.finite import require_finite
from gdsd_jax.runtime.errors import UserError
from gdsd_jax.runtime.sharding import MeshConfig, make_mesh

TOOL = Path(__file__).parents[1] / "loading_tool.py"
MESHES = ("8,1,1", "1,8,1", "2,2,2", "1,2,4")


def tool(*arguments):
    return [sys.executable, str(TOOL), *map(str, arguments)]


def reports(output):
    """The tool's lines; the collectives of several processes print their own between them, not always on new lines."""
    return [json.JSONDecoder().raw_decode(output, found.start())[0] for found in re.finditer(r'\{"mesh"', output)]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A checkpoint of 4 MB in three shards."""
    directory = tmp_path_factory.mktemp("small") / "checkpoint"
    subprocess.run(tool("make", directory, "--shard-bytes", 2_000_000), check=True)
    return directory


def same_weights(left, right):
    """Whether two checkpoints store the same tensors, however they are spread over files."""
    contents = []
    for directory in (left, right):
        reader = files.Reader()
        tensors = files.checkpoint_tensors(epath.Path(directory), reader)
        contents.append({n: (t.dtype, t.shape, reader.tensor(t).tobytes()) for n, t in tensors.items()})
    return contents[0] == contents[1]


# --- over a mesh


def test_each_byte_is_read_once_whatever_the_mesh(small, tmp_path):
    """Row and column slices and copies, on eight devices of one host; and the export gives the files' content back."""
    meshes = [argument for mesh in MESHES for argument in ("--mesh", mesh)]
    command = tool("load", small, *meshes, "--check", "--export", tmp_path / "out")
    found = reports(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
    assert [",".join(map(str, report["mesh"])) for report in found] == list(MESHES)
    for number, report in enumerate(found):
        assert report["bytes_read"] == report["file_bytes"] == report["header_bytes"] + report["held_bytes"]
        assert report["as_ruled"] and report["differing"] == []
        assert same_weights(small, tmp_path / f"out-{number}")
    # Cut eight ways, the devices hold the checkpoint once (norms excepted); as eight copies they hold it eight times.
    arrays = {tuple(report["mesh"]): report["array_bytes"] for report in found}
    assert arrays[8, 1, 1] == 8 * found[0]["held_bytes"] and arrays[1, 8, 1] < 1.01 * found[0]["held_bytes"]


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("scratch")


@given(data=st.data())
@settings(max_examples=60)
def test_boxes_of_a_tensor(scratch, data):
    """Boxes, overlapping or apart, of either dtype: right content, and no byte is read twice."""
    rows, columns = data.draw(st.integers(1, 9), "rows"), data.draw(st.integers(1, 9), "columns")
    code = data.draw(st.sampled_from(sorted(files.FLOATS)), "stored")
    whole = np.arange(rows * columns).astype(files.FLOATS[code]).reshape(rows, columns)
    span = lambda size: st.tuples(st.integers(0, size - 1), st.integers(1, size)).map(  # noqa: E731
        lambda ends: (min(ends[0], ends[1] - 1), ends[1])
    )
    boxes = data.draw(st.sets(st.builds(incoming.Box, span(rows), span(columns)), min_size=1, max_size=5))
    dtype = files.FLOATS[data.draw(st.sampled_from(sorted(files.FLOATS)), "held")]
    pieces = {box: np.zeros([end - begin for begin, end in box], dtype) for box in boxes}
    (scratch / "tensor").write_bytes(b"abc" + whole.tobytes())
    stored = files.Stored(epath.Path(scratch / "tensor"), code, whole.shape, 3, whole.nbytes)
    reader, covered = files.Reader(), np.zeros_like(whole, bool)
    with ThreadPoolExecutor(2) as pool, pytest.MonkeyPatch.context() as patch:
        patch.setattr(incoming, "LOCAL_BLOCK_BYTES", data.draw(st.sampled_from((1, 50, 1000))))
        incoming.fill_boxes(stored, pieces, reader, pool)
    for ((r0, r1), (c0, c1)), piece in pieces.items():
        np.testing.assert_array_equal(piece, whole[r0:r1, c0:c1])
        covered[r0:r1, c0:c1] = True
    assert reader.bytes_read == whole.itemsize * covered.sum()


@pytest.mark.parametrize("code", sorted(files.FLOATS))
def test_files_hold_what_they_are_given(scratch, code):
    """Arrays shorter and longer than the pieces that are written at a time, empty ones, and views of other arrays."""
    dtype = files.FLOATS[code]
    long = (np.arange(2 * outgoing._PIECE_BYTES // dtype.itemsize + 3) % 97).astype(dtype)
    square = long[:600].reshape(20, 30)
    arrays = {"long": long, "one": long[5:6], "none": square[:0], "turned": square.T, "cut": square[2:, 3:7]}
    tensors = {name: outgoing.Outgoing(dtype, array.shape, lambda a=array: a) for name, array in arrays.items()}
    outgoing.write_safetensors(scratch / "arrays", tensors, {"a": "b"})
    found = load_file(scratch / "arrays")
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[name].dtype == dtype
        np.testing.assert_array_equal(found[name], array)


@pytest.mark.parametrize("code", sorted(files.FLOATS))
def test_only_infinities_and_nan_are_refused(code):
    """The largest number of either sign passes; each pattern that is no number fails, first, last or between rows."""
    dtype = files.FLOATS[code]
    most = jax.numpy.finfo(dtype).max
    fine = np.full((3, 100_001), most, dtype)
    fine[1] = -most
    require_finite(fine, "a", "b")
    require_finite(fine[:0], "a", "b")
    infinity = np.array([np.inf], dtype).view(f"u{dtype.itemsize}")
    sign = 1 << (8 * dtype.itemsize - 1)
    for pattern in (infinity, infinity + 1, infinity | sign, (infinity | sign) + 1):
        for place in ((0, 0), (1, 100), (2, 100_000)):
            bad = fine.copy()
            bad[place] = pattern.view(dtype)[0]
            for view in (bad, bad[:, ::-1], bad.T):
                with pytest.raises(UserError, match="tensor a of b holds NaN or infinity"):
                    require_finite(view, "a", "b")


def test_what_cpus_load_is_not_copied(small):
    """A CPU device uses the memory that was read into."""
    config, base = hub.load_checkpoint(small)
    for path, leaf in jax.tree.leaves_with_path(base):
        assert leaf.unsafe_buffer_pointer() % 64 == 0, path  # what XLA asks for
    view = np.asarray(base["layers"]["gate"]["weight"])
    assert view.ctypes.data == base["layers"]["gate"]["weight"].unsafe_buffer_pointer()


def test_a_file_that_shrinks_while_it_is_read_is_refused(small, tmp_path):
    (tmp_path / "tensor").write_bytes(bytes(10))
    stored = files.Stored(epath.Path(tmp_path / "tensor"), "F32", (2, 2), 0, 16)
    with pytest.raises(UserError, match="tensor is truncated: download it again"):
        files.Reader().tensor(stored)


def test_a_bucket_that_cannot_be_reached_is_one_line(monkeypatch):
    def down(path):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(type(epath.Path("gs://bucket")), "is_dir", down)
    with pytest.raises(UserError, match=r"gs://bucket/a cannot be read \(ConnectionError: no route to host\)"):
        files.checked_directory("gs://bucket/a")


# --- from a bucket


@pytest.fixture(scope="module")
def bucket(tmp_path_factory, golden):
    """`gs://bucket` with a checkpoint in it; a directory stands in for the cloud, behind the interface of gcsfs."""
    cloud = tmp_path_factory.mktemp("cloud")
    shutil.copytree(golden / "dream_tiny_sharded", cloud / "bucket" / "model")
    tiny.build(cloud / "bucket" / "tiny", hidden_size=16, num_layers=1, num_heads=2, intermediate_size=16)

    class Bucket(DirFileSystem):
        protocol = ("gs", "gcs")

        def __init__(self, **options):
            super().__init__(path=str(cloud), fs=LocalFileSystem())

        def _join(self, path):
            return super()._join(path.removeprefix("gs://").removeprefix("gcs://"))

    for protocol in Bucket.protocol:
        fsspec.register_implementation(protocol, Bucket, clobber=True)
    return cloud / "bucket"


def test_a_bucket_reads_like_a_disk(bucket):
    for mesh in (None, make_mesh(MeshConfig(), jax.devices()[:1])):
        reader = hub.Reader()
        config, base = hub.load_checkpoint("gs://bucket/model", mesh=mesh, reader=reader)
        assert reader.bytes_read == sum(path.stat().st_size for path in (bucket / "model").glob("*.safetensors"))
        local_config, local = hub.load_checkpoint(bucket / "model")
        assert config == local_config
        jax.tree.map(np.testing.assert_array_equal, base, local)
    assert hub.fingerprint("gs://bucket/model") == hub.fingerprint(bucket / "model")


def test_tokenizer_and_export_take_their_files_from_a_bucket(bucket, tmp_path):
    remote, local = (hub.load_tokenizer(place) for place in ("gs://bucket/tiny", bucket / "tiny"))
    assert remote.encode(["1 + 2"]) == local.encode(["1 + 2"])
    config, base = hub.load_checkpoint("gs://bucket/tiny")
    hub.export_checkpoint(tmp_path / "out", config, base, source="gs://bucket/tiny")
    for path in (bucket / "tiny").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    with pytest.raises(UserError, match="an export is made on a disk"):
        hub.export_checkpoint("gs://bucket/out", config, base, source="gs://bucket/tiny")


def test_whole_rows_are_read_from_a_bucket(bucket):
    """Half of the columns: a disk gives them row by row, a bucket in one request with the rest of the rows."""
    pieces, read = {incoming.Box((0, 4), (0, 2)): np.empty((4, 2), np.float32)}, {}
    for place in ("gs://bucket/model", str(bucket / "model")):
        tensors = files.checkpoint_tensors(epath.Path(place), files.Reader())
        stored = next(t for t in tensors.values() if len(t.shape) == 2 and t.shape[1] > 2)
        reader = files.Reader()
        with ThreadPoolExecutor(1) as pool:
            incoming.fill_boxes(stored, pieces, reader, pool)
        read[place] = reader.bytes_read
    whole = 4 * stored.shape[1] * files.FLOATS[stored.dtype].itemsize
    assert list(read.values()) == [whole, whole * 2 // stored.shape[1]]


def test_a_bucket_without_gcsfs_is_refused(monkeypatch):
    def absent(path):
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr(epath.gpath.PosixGPath, "is_dir", absent)
    with pytest.raises(UserError, match="install gcsfs"):
        hub.load_checkpoint("gs://bucket/model")


# --- on several hosts, and in bounded memory


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["1,8,1", "2,4,1", "1,2,4"])
def test_two_processes_read_their_own_parts_and_export_together(small, tmp_path, mesh):
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    shared = ("--mesh", mesh, "--check", "--export", tmp_path / "out", "--processes", 2, "--port", port)
    started = [
        subprocess.Popen(
            tool("load", small, *shared, "--index", index), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for index in range(2)
    ]
    found = []
    for process in started:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        found.extend(reports(out))
    assert len(found) == 2
    for report in found:
        assert report["bytes_read"] == report["header_bytes"] + report["held_bytes"]
        assert report["as_ruled"] and report["differing"] == [] and report["exported"]
    both = sum(report["held_bytes"] for report in found)
    whole = found[0]["file_bytes"] - found[0]["header_bytes"]
    # Two copies lie on a host each; otherwise the hosts share all but the norms.
    assert both == 2 * whole if mesh == "2,4,1" else whole <= both < 1.01 * whole
    assert same_weights(small, tmp_path / "out-0")


@pytest.mark.slow
def test_memory_is_bounded_by_tensors_not_by_the_checkpoint(tmp_path):
    """1 GB over eight devices: beside the arrays, no more than two stored tensors and the blocks being read."""
    subprocess.run(tool("make", tmp_path / "big", "--layers", 8, "--width", 2048, "--vocab", 16384), check=True)
    command = tool("load", tmp_path / "big", "--mesh", "1,8,1", "--check")
    (report,) = reports(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
    assert report["bytes_read"] == report["file_bytes"] > 1e9 and report["differing"] == []
    compiler = 200e6
    spare = 2 * report["largest_tensor_bytes"] + incoming.THREADS * incoming.BLOCK_BYTES + compiler
    assert report["peak_after"] - report["peak_before"] < report["array_bytes"] + spare
