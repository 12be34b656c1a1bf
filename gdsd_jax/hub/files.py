"""Lists the files and tensors of a checkpoint directory, on a disk or in a bucket (gs://), and reads byte ranges.

A safetensors file (huggingface.co/docs/safetensors) begins with eight bytes that give the length of a JSON header. The
header follows, with every tensor's dtype, shape and byte range, and then the bytes. The format is read directly here,
so that only the requested bytes leave the disk and bfloat16 needs no conversion.
"""

from __future__ import annotations

import collections
import json
import math
import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import fsspec
import ml_dtypes
import numpy as np
from etils import epath

from gdsd_jax.runtime import files
from gdsd_jax.runtime.errors import UserError

FLOATS = {"F64": np.dtype(np.float64), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16)}
FLOATS |= {"BF16": np.dtype(ml_dtypes.bfloat16)}
_OTHER_SIZES = {"I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_OTHER_SIZES |= {"F8_E4M3": 1, "F8_E5M2": 1}
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
# JSON takes up to 35 times its size in memory. Configurations have kilobytes, tokenizers and indices up to 40 MB.
_MAX_CONFIG_BYTES = 4_000_000
MOST_JSON_BYTES = 50_000_000


class Stored(NamedTuple):
    """A tensor in a safetensors file; `begin` counts bytes from the start of the file."""

    file: epath.Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    size: int
    name: str = ""

    @property
    def matrix(self) -> tuple[int, int]:
        """Returns the numbers of rows and columns; a vector counts as one column."""
        rows, columns = (*self.shape, 1)[:2]
        return rows, columns


def in_bucket(path: os.PathLike) -> bool:
    """Returns whether a path is a URL, so that every read is a request to a bucket."""
    return "://" in os.fspath(path)


class Reader:
    """Reads byte ranges of files, and counts the bytes.

    Local files are read with `pread`, files in a bucket with range requests. Neither maps a file into memory, so bytes
    that nobody asked for never become resident. Threads may share a reader.
    """

    def __init__(self) -> None:
        self.bytes_read = 0
        self._lock = threading.Lock()

    def read(self, path: epath.Path, begin: int, size: int) -> bytes:
        """Returns `size` bytes of a file, starting at byte `begin`."""
        buffer = np.empty(size, np.uint8)
        self.fill(path, [(begin, buffer)])
        return buffer.tobytes()

    def block(
        self, stored: Stored, rows: tuple[int, int], columns: tuple[int, int], out: np.ndarray | None = None
    ) -> np.ndarray:
        """Returns a block `[rows, columns]` of a stored matrix, in its stored dtype.

        Whole rows into a contiguous array are one byte range; any other block is one byte range per row.

        Args:
          out: the array to read into, of this shape and dtype and with contiguous rows; None for a new array.
        """
        dtype, width = FLOATS[stored.dtype], stored.matrix[1]
        if out is None:
            out = np.empty((rows[1] - rows[0], columns[1] - columns[0]), dtype)
        raw = out.view(np.uint8)
        if out.shape[1] == width and out.flags.c_contiguous:
            raw = raw.reshape(1, -1)
        begin, stride = stored.begin + (rows[0] * width + columns[0]) * dtype.itemsize, width * dtype.itemsize
        self.fill(stored.file, ((begin + row * stride, raw[row]) for row in range(raw.shape[0])))
        return out

    def tensor(self, stored: Stored) -> np.ndarray:
        """Returns a whole stored matrix, or a stored vector as one column."""
        rows, columns = stored.matrix
        return self.block(stored, (0, rows), (0, columns))

    def fill(self, path: epath.Path, ranges: Iterable[tuple[int, np.ndarray]]) -> None:
        """Fills every buffer with the bytes of the file that start at the buffer's position.

        Raises:
          UserError: the file has become shorter since its header was read.
        """
        read = _read_from_bucket if in_bucket(path) else _read_from_disk
        total = read(path, ranges)
        with self._lock:
            self.bytes_read += total


def _read_from_disk(path: epath.Path, ranges: Iterable[tuple[int, np.ndarray]]) -> int:
    total = 0
    descriptor = os.open(path, os.O_RDONLY)
    try:
        for begin, buffer in ranges:
            left = memoryview(buffer)
            total += len(left)
            while left:
                # Linux returns at most 2 GB at once, so a short read is no error; an empty one is the end of the file.
                count = os.preadv(descriptor, [left], begin)
                if count == 0:
                    raise UserError(f"{path} is truncated: download it again")
                begin, left = begin + count, left[count:]
    finally:
        os.close(descriptor)
    return total


def _read_from_bucket(path: epath.Path, ranges: Iterable[tuple[int, np.ndarray]]) -> int:
    total = 0
    bucket, name = fsspec.url_to_fs(os.fspath(path))
    for begin, buffer in ranges:
        data = bucket.cat_file(name, begin, begin + len(buffer))
        if len(data) != len(buffer):
            raise UserError(f"{path} is truncated: upload it again")
        buffer[:] = np.frombuffer(data, np.uint8)
        total += len(data)
    return total


def checked_directory(directory: str | os.PathLike) -> epath.Path:
    """Returns the directory as a path, local or in a bucket, after checking that it is there.

    Raises:
      UserError: the path does not exist or is no directory, names no kind of bucket, or the bucket cannot be read from
        this machine.
    """
    try:
        path = epath.Path(directory)
    except KeyError:
        raise UserError(f"{directory} is on no disk and in no bucket: give a directory, or gs:// or s3://") from None
    try:
        found = path.is_dir()
    except ImportError as error:
        raise UserError(f"{path} cannot be read ({error}): pip install gcsfs, or copy it to a disk") from None
    except Exception as error:  # each kind of bucket has its own errors
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"{path} cannot be read ({reason}): change the path, or copy it to a disk") from None
    if not found:
        raise UserError(f"{path} is not a directory: give the path of a checkpoint in Hugging Face's layout")
    return path


def require_own_file(path: epath.Path, most: int = 1 << 60) -> None:
    """Checks, before a file of a local directory is opened, that it is a regular file in the directory itself.

    A link may lead to another place in the directory, or to the `blobs` beside the `snapshots` in the hub's cache. An
    absent path, or one in a bucket, passes.

    Raises:
      UserError: the path is a pipe or a device, a link to anywhere else, or has more than `most` bytes.
    """
    if in_bucket(path) or not os.path.lexists(path):
        return
    files.require_regular(Path(path), most)
    if Path(path).is_symlink():
        folder, target = os.path.realpath(Path(path).parent), os.path.realpath(path)
        blobs = os.path.realpath(os.path.join(folder, "..", "..", "blobs"))
        if not target.startswith((folder + os.sep, blobs + os.sep)):
            raise UserError(f"{path} is a link out of its directory, to {target}: put the file itself there")


def require_own_files(directory: epath.Path, patterns: Iterable[str]) -> None:
    """Checks every file that matches one of the patterns, and is read whole, as `require_own_file` does."""
    if not in_bucket(directory):
        for pattern in patterns:
            for path in directory.glob(pattern):
                require_own_file(path, files.MOST_BYTES)


@contextmanager
def on_disk(directory: epath.Path, patterns: Iterable[str]) -> Iterator[Path]:
    """Yields a local directory with the files that match: the given one or, if that is in a bucket, one with copies."""
    if not in_bucket(directory):
        yield Path(directory)
        return
    with TemporaryDirectory() as folder:
        for pattern in patterns:
            for path in directory.glob(pattern):
                (Path(folder) / path.name).write_bytes(path.read_bytes())
        yield Path(folder)


def read_json(path: os.PathLike, most: int = _MAX_CONFIG_BYTES) -> dict[str, Any]:
    """Reads the object in a JSON file of at most `most` bytes; a file in a bucket may have more.

    Raises:
      UserError: the file is absent or too large, does not parse, or holds something other than an object.
    """
    path = epath.Path(path)
    require_own_file(path, most)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: the directory is no complete checkpoint") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}): download it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object: download it again")
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        twice = collections.Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise UserError(f"holds {twice} twice")
    return result


def _size(value: Any) -> int:
    """Returns a number from a header if it can be a size; raises ValueError otherwise."""
    if type(value) is not int or not 0 <= value < 1 << 62:
        raise ValueError(f"{str(value)[:50]} is no size")
    return value


def read_header(path: os.PathLike, reader: Reader | None = None) -> dict[str, Stored]:
    """Returns the tensors of a safetensors file by name, after checking that they account for all of its bytes.

    Raises:
      UserError: the file is absent, truncated or corrupt, or holds a tensor twice.
    """
    path, reader = epath.Path(path), reader or Reader()
    require_own_file(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist: the directory is no complete checkpoint")
    size = path.stat().length
    length = int.from_bytes(reader.read(path, 0, min(8, size)), "little")
    if size >= 8 and length > _MAX_HEADER_BYTES:
        raise UserError(f"{path} is no safetensors file (its header would be {length} bytes): download it again")
    if size < 8 + length:
        raise UserError(f"{path} is truncated within its header ({size} bytes): download it again")
    raw = reader.read(path, 8, length)
    try:
        header = json.loads(raw, object_pairs_hook=_unique)
        header.pop("__metadata__", None)
        tensors = {
            name: (str(entry["dtype"]), tuple(map(_size, entry["shape"])), *map(_size, entry["data_offsets"]))
            for name, entry in header.items()
        }
        ranges = sorted((begin, end, name) for name, (_, _, begin, end) in tensors.items())
    except UserError as error:
        raise UserError(f"{path} {error}: download it again") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} has a corrupt header ({type(error).__name__}: {error}): download it again") from None
    data, position = size - 8 - length, 0
    for begin, end, name in ranges:
        dtype, shape, *_ = tensors[name]
        item = FLOATS[dtype].itemsize if dtype in FLOATS else _OTHER_SIZES.get(dtype)
        if item is None:
            raise UserError(f"{path} stores {name} in the unknown dtype {dtype!r}")
        if begin != position or end - begin != item * math.prod(shape):
            raise UserError(f"{path} has a corrupt header (byte range of {name}): download it again")
        position = end
    if position > data:
        raise UserError(f"{path} is truncated: {data} of {position} bytes of tensors are there: download it again")
    if position < data:
        raise UserError(f"{path} has {data - position} bytes after its last tensor: download it again")
    return {
        name: Stored(path, dtype, shape, 8 + length + begin, end - begin, name)
        for name, (dtype, shape, begin, end) in tensors.items()
    }


def read_metadata(path: os.PathLike) -> dict[str, Any]:
    """Returns the texts in a safetensors file's header, if any; raises UserError as `read_header` does."""
    read_header(path)
    path, reader = epath.Path(path), Reader()
    length = int.from_bytes(reader.read(path, 0, 8), "little")
    found = json.loads(reader.read(path, 8, length)).get("__metadata__")
    return found if isinstance(found, dict) else {}


def weight_files(directory: epath.Path) -> tuple[list[epath.Path], dict[str, str] | None]:
    """Returns the safetensors files of a checkpoint, and the index's map from tensor to file name if there is one.

    Raises:
      UserError: there are no such files, both layouts are there, or the shards are not those that the index names.
    """
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.exists() and index.exists():
        raise UserError(f"{directory} has both {single.name} and {index.name}: remove the one that is stale")
    if single.exists():
        return [single], None
    if not index.exists():
        raise UserError(f"{directory} has neither {single.name} nor {index.name}: only safetensors weights are read")
    weight_map = read_json(index, MOST_JSON_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise UserError(f"{index} has no weight_map from tensor to file: download it again")
    shards = sorted(set(weight_map.values()))
    outside = [shard for shard in shards if os.path.basename(shard) != shard]
    if outside:
        raise UserError(f"{index} names {outside[0]!r:.100}, a file outside its own directory: download it again")
    absent = [shard for shard in shards if not (directory / shard).is_file()]
    if absent:
        raise UserError(f"{index} names the shard {absent[0]}, which is not there: download it")
    stray = sorted({path.name for path in directory.glob("model-*.safetensors")} - set(shards))
    if stray:
        raise UserError(f"{directory / stray[0]} is not named in {index.name}: remove it or download the index again")
    return [directory / shard for shard in shards], weight_map


def checkpoint_tensors(directory: epath.Path, reader: Reader) -> dict[str, Stored]:
    """Returns every tensor of a checkpoint, by name.

    Raises:
      UserError: as for `weight_files` and `read_header`; or a tensor is in two files, or not where the index puts it.
    """
    files, weight_map = weight_files(directory)
    tensors: dict[str, Stored] = {}
    for file in files:
        for name, stored in read_header(file, reader).items():
            if name in tensors:
                raise UserError(f"tensor {name} is in {tensors[name].file} and again in {file}: remove one of them")
            if weight_map is not None and weight_map.get(name) != file.name:
                claim = weight_map.get(name, "no shard")
                raise UserError(f"tensor {name} is in {file}, but the index puts it in {claim}: download both again")
            tensors[name] = stored
    lost = sorted(set(weight_map or ()) - set(tensors))
    if lost:
        file = directory / weight_map[lost[0]]
        raise UserError(f"tensor {lost[0]} is not in {file}, where the index puts it: download both again")
    return tensors
