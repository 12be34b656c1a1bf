"""Reads rows from local files and from the hub, and decides which rows of a training set are held out for validation.

A local file is JSON, as lines or as one array (`.jsonl`, `.json`), CSV with a header (`.csv`), either of these
compressed (`.gz`), or Parquet (`.parquet`). A directory is one that `datasets` saved with `save_to_disk`. Values of a
CSV file stay strings, so that leading zeros survive. `datasets` and PyArrow are imported only when they are needed.
"""

import csv
import gzip
import hashlib
import io
import json
import math
import random
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gdsd_jax.runtime import memory
from gdsd_jax.runtime.errors import UserError
from gdsd_jax.runtime.files import require_regular

Row = dict[str, Any]

HELD_OUT = 20
MOST_BYTES = 2 << 30  # the longest text that is read, decompressed

# A file of kilobytes may hold gigabytes of equal rows. What expands to more than these bytes is refused if it also is
# more than 200 times the size of its file; ordinary rows, compressed, have up to 20 times its size.
_RATIO = 200
_EXPANDED_TEXT = 100_000_000
_EXPANDED_PARQUET = 1_000_000_000


def read_records(path: Path) -> list[tuple[str, Row]]:
    """Returns (place, row) for each row of a local file or saved data set; the place, "file, row n", is for messages.

    Raises UserError if the file cannot be read, has an entry that is no row, or has no row.
    """
    kind = path.name.removesuffix(".gz").rpartition(".")[2].lower()
    if not path.is_dir():
        require_regular(path, most=1 << 40)
    if path.is_dir():
        records = _saved(path)
    elif kind in ("jsonl", "json"):
        records = _json_lines(path)
    elif kind == "csv":
        records = _csv(path)
    elif kind == "parquet":
        records = _parquet(path)
    else:
        raise UserError(f"{path}: rows are read from .jsonl, .csv, .parquet or a directory that datasets has saved")
    found = list(records)
    if not found:
        raise UserError(f"{path} has no rows")
    return found


def column(place: str, record: Row, *names: str) -> Any:
    """Returns the first of these columns that the record has; raises UserError, naming the place, if it has none."""
    for name in names:
        if record.get(name) is not None:
            return record[name]
    raise UserError(_lacking(place, record, " or ".join(names)))


def require_columns(place: str, record: Row, *names: str) -> None:
    """Raises UserError, naming the place and all columns that are absent, unless the record has all of these."""
    absent = [name for name in names if record.get(name) is None]
    if absent:
        raise UserError(_lacking(place, record, " and ".join(absent)))


def _lacking(place: str, record: Row, needed: str) -> str:
    return f"{place}: a row needs {needed}, it has {', '.join(map(str, record)) or 'nothing'}"


def text_of(place: str, record: Row, *names: str) -> str:
    """Returns the first of these columns that the record has as text, which it is or, as a finite number, becomes.

    Raises UserError, naming the place, if the record has none of them, or a value of another type.
    """
    value = column(place, record, *names)
    finite = not isinstance(value, float) or math.isfinite(value)
    if isinstance(value, bool) or not isinstance(value, (str, int, float)) or not finite:
        raise UserError(f"{place}: {' or '.join(names)} must be a text, it is {value!r:.60}")
    return str(value)


def from_hub(name: str, configuration: str | None, split: str, row: Callable[[str, Row], Row]) -> list[Row]:
    """Returns the rows of a data set of the Hugging Face hub, from the hub or from the cache of an earlier run.

    Raises UserError, naming the setting that takes a local file instead, if the data set cannot be loaded.
    """
    import datasets

    try:
        records = datasets.load_dataset(name, configuration, split=split)
    except Exception as error:  # network, host, proxy, cache: each raises another
        raise UserError(
            f"cannot load {name} from the hub ({type(error).__name__}): without a network give a local file, "
            "config.task.train_path for training and validation rows, config.task.eval_path for test rows"
        ) from error
    return [row(f"{name}, row {number}", record) for number, record in enumerate(records, start=1)]


def public_rows(
    split: str,
    count: int | None,
    seed: int,
    row: Callable[[str, Row], Row],
    held_out: Callable[[Row], bool],
    *,
    train: tuple[str, str | None, str],
    test: tuple[str, str | None, str],
) -> list[Row]:
    """Returns the rows of a split of a public data set; the validation split is held out of the training set.

    Args:
      count: the number of rows; None for all. `seed` draws training rows; the other splits do not depend on it.
      train, test: the name, configuration and split of each set on the hub.
    """
    name = test if split == "test" else train
    rows = from_hub(*name, row)
    if split != "test":
        rows = [row for row in rows if held_out(row) == (split == "validation")]
    return draw(rows, count, seed if split == "train" else 0, name[0])


def rows_digest(rows: list[Row]) -> str:
    """Returns a digest of rows, which tells whether two runs or evaluations had the same."""
    digest = hashlib.sha256(b"[")
    for number, row in enumerate(rows):
        digest.update(b", " * (number > 0) + json.dumps(row, sort_keys=True).encode())
    digest.update(b"]")
    return digest.hexdigest()[:16]


def draw(rows: list[Row], count: int | None, seed: int, place: object) -> list[Row]:
    """Returns `count` of the rows, drawn without replacement, in their order; all rows if `count` is None.

    Raises UserError, naming the place, if there are fewer rows.
    """
    if count is None:
        return rows
    if count > len(rows):
        setting = "config.task.train_rows, or config.evaluation.count where rows are evaluated"
        raise UserError(f"{place} has {len(rows)} rows, {count} were asked for: lower {setting}")
    return [rows[index] for index in sorted(random.Random(seed).sample(range(len(rows)), count))]


def held_out(text: str) -> bool:
    """Returns whether a row identified by this text belongs to the validation share, one in `HELD_OUT` training rows.

    A salted hash of the text decides, so a row's share does not depend on the other rows, their order or the format.
    """
    digest = hashlib.sha256(f"held out:{text}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8]) % HELD_OUT == 0


def read_text(path: Path) -> str:
    """Returns the text of a local UTF-8 file, decompressed if its name ends in `.gz`.

    Raises UserError if the file cannot be read.
    """
    try:
        packed = path.suffix == ".gz"
        most = min(MOST_BYTES, max(_EXPANDED_TEXT, _RATIO * path.stat().st_size)) if packed else MOST_BYTES
        with gzip.open(path) if packed else path.open("rb") as file:
            data = file.read(most + 1)
        if packed:
            _require_dense(path, len(data), _EXPANDED_TEXT)
        if len(data) > MOST_BYTES:
            raise UserError(f"{path} holds more than the {MOST_BYTES} bytes that are read: divide it, or use Parquet")
        return data.decode("utf-8-sig")
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text: save it as UTF-8") from None


def _require_dense(path: Path, size: int, allowed: int) -> None:
    """Raises UserError if a file expands to more bytes than allowed and to more than `_RATIO` times its own size."""
    if size > max(allowed, _RATIO * path.stat().st_size):
        raise UserError(
            f"{path} has {path.stat().st_size} bytes and expands to {size} or more, over {_RATIO} times its size: "
            "remove the rows or columns that repeat, or save it as .jsonl"
        )


def _json_lines(path: Path) -> Iterator[tuple[str, Row]]:
    """Yields (place, object) for each JSON object of a file, one per line or in one array."""
    text = read_text(path)
    if text.lstrip().startswith("["):
        yield from _json_array(path, text)
        return
    number, end = 1, 0
    for found in re.finditer(r"[^\n]+", text):  # passes over empty lines without making anything of them
        number, end = number + text.count("\n", end, found.start()), found.end()
        line = found[0]
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{place}: not JSON ({error})") from None
        yield place, _filled(place, record)


def _json_array(path: Path, text: str) -> Iterator[tuple[str, Row]]:
    try:
        for number, record in enumerate(_items(text), start=1):
            place = f"{path}, item {number}"
            yield place, _filled(place, record)
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}, line {getattr(error, 'lineno', 1)}: not JSON ({error})") from None


def _items(text: str) -> Iterator[Any]:
    """Yields the items of a JSON array one by one, so that the first wrong one is found before the others are read.

    Raises ValueError or RecursionError if the text is no JSON array.
    """
    decode, space = json.JSONDecoder().raw_decode, re.compile(r"[ \t\n\r]*")

    def after_space(at: int) -> int:
        found = space.match(text, at)
        return found.end() if found else at

    start = after_space(0)
    if text[start] != "[":
        raise json.JSONDecodeError("Expecting value", text, start)
    at = after_space(start + 1)
    mark = text[at : at + 1]
    while mark != "]":
        item, at = decode(text, at)
        yield item
        at = after_space(at)
        mark = text[at : at + 1]
        if mark == ",":
            at = after_space(at + 1)
        elif mark != "]":
            raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
    at = after_space(at + 1)
    if at < len(text):
        raise json.JSONDecodeError("Extra data", text, at)


def _filled(place: str, record: Any) -> Row:
    """Returns a record if it is a row, with a column at least; raises UserError otherwise."""
    if not isinstance(record, dict):
        raise UserError(f"{place}: a JSON object is needed")
    if not record:
        raise UserError(f"{place}: a row needs columns, it has none")
    return record


def _csv(path: Path) -> Iterator[tuple[str, Row]]:
    lines = filter(None, csv.reader(io.StringIO(read_text(path), newline="")))
    try:
        header = next(lines, [])
        for number, line in enumerate(lines, start=1):
            place = f"{path}, row {number}"
            if len(line) != len(header):
                raise UserError(f"{place}: {len(header)} columns are needed, found {len(line)}")
            yield place, dict(zip(header, line, strict=True))
    except csv.Error as error:
        raise UserError(f"{path} is not CSV: {error}") from None


def _parquet(path: Path) -> Iterator[tuple[str, Row]]:
    import pyarrow
    import pyarrow.parquet

    records: list[Row] = []
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            # Equal values take next to no room in the file, and a mapping for every row in memory.
            # The descriptions of its columns are not looked at: damaged ones make the library end the process.
            count = file.metadata.num_rows
            needed = 200 * count
            memory.require(needed, memory.of_host(), f"{path} with {count} rows", "their number")
            _require_dense(path, needed, _EXPANDED_PARQUET)
            kinds = {field.name: field.type for field in file.schema_arrow}
            for name, kind in kinds.items():
                if pyarrow.types.is_nested(kind) and "dictionary<" in str(kind):
                    raise UserError(f"{path}: column {name} is {str(kind):.80}: save its dictionary as plain values")
            # A few rows at a time, because each may repeat a long text of the dictionary.
            expanded = 0
            for batch in file.iter_batches(64):
                expanded += sum(map(_bytes_of, batch.columns))
                _require_dense(path, expanded, _EXPANDED_PARQUET)
                records += batch.to_pylist()
    except UserError:
        raise
    except (OSError, ValueError, OverflowError, pyarrow.ArrowException) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    return ((f"{path}, row {number}", record) for number, record in enumerate(records, start=1))


def _bytes_of(column: Any) -> int:
    """Returns the bytes of an Arrow array's values, when each text of a dictionary is counted wherever it occurs."""
    import pyarrow
    import pyarrow.compute

    if not pyarrow.types.is_dictionary(column.type):
        return column.nbytes
    counted = column.indices.drop_null().value_counts()
    values = column.dictionary.take(counted.field("values"))
    try:
        lengths = pyarrow.compute.binary_length(values)
    except (pyarrow.ArrowNotImplementedError, pyarrow.ArrowInvalid):
        return column.nbytes
    return pyarrow.compute.sum(pyarrow.compute.multiply(lengths, counted.field("counts"))).as_py() or 0


def _saved(path: Path) -> Iterator[tuple[str, Row]]:
    import datasets

    try:
        saved = datasets.load_from_disk(str(path))
        records = [] if isinstance(saved, datasets.DatasetDict) else list(saved)
    except Exception as error:  # damaged files make the library raise anything
        raise UserError(f"cannot read {path}: {' '.join(str(error).split())}") from None
    if isinstance(saved, datasets.DatasetDict):
        raise UserError(f"{path} holds the splits {', '.join(saved)}: name one, as in {path / next(iter(saved))}")
    return ((f"{path}, row {number}", record) for number, record in enumerate(records, start=1))
