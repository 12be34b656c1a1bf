"""Rows from local files of every kind, what is refused, and the share that is held out for validation."""

import csv
import gzip
import json
import os

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from gdsd_jax.config import TaskConfig
from gdsd_jax.runtime import memory
from gdsd_jax.runtime.errors import UserError
from gdsd_jax.tasks import TASKS, data, gsm8k
from gdsd_jax.tasks.code import UNSAFE
from gdsd_jax.training.setup import task_rows

PUZZLES = [
    {"Puzzle": "0140432014020000", "Solution": "2143432114323214"},
    {"Puzzle": "3102200002100320", "Solution": "3142243142131324"},
]
WORDS = [
    {"question": "Two and two?", "answer": "2 + 2 = <<2+2=4>>4\n#### 4"},
    {"question": "A thousand\nand more?", "answer": "It is said.\n#### 1,234"},
]


def write(path, rows):
    """The rows in the format of the file's name."""
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif kind == "saved":
        datasets.Dataset.from_list(rows).save_to_disk(path)
    else:
        with (gzip.open if path.suffix == ".gz" else open)(path, "wt", encoding="utf-8", newline="") as file:
            if kind == "csv":
                writer = csv.DictWriter(file, rows[0])
                writer.writeheader()
                writer.writerows(rows)
            else:
                file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


KINDS = ["jsonl", "jsonl.gz", "json", "csv", "csv.gz", "parquet", "saved"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_task_reads_every_kind(tmp_path, kind):
    words = TASKS["gsm8k"].rows(path=write(tmp_path / f"words.{kind}", WORDS))
    assert words == [
        {"question": "Two and two?", "answer": "4", "solution": "2 + 2 = 4"},
        {"question": "A thousand\nand more?", "answer": "1234", "solution": "It is said."},
    ]
    puzzles = TASKS["sudoku"].rows(path=write(tmp_path / f"puzzles.{kind}", PUZZLES))
    assert puzzles == [{"puzzle": row["Puzzle"], "solution": row["Solution"]} for row in PUZZLES]
    numbers = TASKS["countdown"].rows(path=write(tmp_path / f"numbers.{kind}", [{"input": "3,5,7", "output": "22"}]))
    assert numbers == [{"numbers": [3, 5, 7], "target": 22}]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "saved"])
def test_lists_are_read(tmp_path, kind):
    path = write(tmp_path / f"numbers.{kind}", [{"nums": [3, 5, 7], "target": 22}, {"nums": [1, 2, 3, 4], "target": 5}])
    assert TASKS["countdown"].rows(path=path) == [{"numbers": [3, 5, 7], "target": 22}]


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_without_its_column_is_named(tmp_path, kind):
    path = write(tmp_path / f"rows.{kind}", [{"question": "Two?", "number": "2"}])
    with pytest.raises(UserError, match=r"(row|line) 1: a row needs answer, it has question, number"):
        TASKS["gsm8k"].rows(path=path)
    path = write(tmp_path / f"others.{kind}", [{"text": "Two?", "number": "2"}])
    with pytest.raises(UserError, match="1: a row needs question and answer, it has text, number"):
        TASKS["gsm8k"].rows(path=path)


def test_math_columns(tmp_path):
    rows = [
        {"problem": "One?", "solution": "So $\\boxed{1}$.", "answer": "1"},
        {"problem": "Half?", "solution": "So $\\boxed{2}$, no, $\\boxed{\\frac{1}{2}}$."},
        {"question": "Two?", "answer": 2},
    ]
    found = TASKS["math"].rows(path=write(tmp_path / "rows.jsonl", rows))
    assert [row["answer"] for row in found] == ["1", "\\frac{1}{2}", "2"]
    assert [row["question"] for row in found] == ["One?", "Half?", "Two?"]
    for row in ({"problem": "x", "solution": "no box"}, {"problem": "x", "answer": " ", "solution": "y"}):
        with pytest.raises(UserError, match="line 1: there is no answer"):
            TASKS["math"].rows(path=write(tmp_path / "bad.jsonl", [row]))
    with pytest.raises(UserError, match="no answer after ####"):
        TASKS["gsm8k"].rows(path=write(tmp_path / "bad.jsonl", [{"question": "x", "answer": "y ####"}]))


def test_packed_files_that_are_damaged(tmp_path):
    path = write(tmp_path / "problems.jsonl.gz", [{"nums": [3, 5, 7], "target": 22}])
    for damaged in (b"{}", path.read_bytes()[:-9], path.read_bytes()[:12] + b"\xff" * 30):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="cannot read"):
            TASKS["countdown"].rows(path=path)


def test_unreadable_files_and_bad_requests(tmp_path):
    for name in ("absent.jsonl", "absent.parquet"):
        with pytest.raises(UserError, match="cannot read"):
            TASKS["countdown"].rows(path=tmp_path / name)
    (tmp_path / "latin.csv").write_bytes(b"Puzzle,Solution\n\xff")
    with pytest.raises(UserError, match="UTF-8"):
        TASKS["sudoku"].rows(path=tmp_path / "latin.csv")
    (tmp_path / "text.parquet").write_text("no parquet")
    with pytest.raises(UserError, match="cannot read"):
        TASKS["sudoku"].rows(path=tmp_path / "text.parquet")
    with pytest.raises(UserError, match=r"rows\.txt: rows are read from \.jsonl"):
        TASKS["sudoku"].rows(path=tmp_path / "rows.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="cannot read .*empty"):
        TASKS["sudoku"].rows(path=tmp_path / "empty")
    with pytest.raises(UserError, match="one of: train, validation, test"):
        TASKS["sudoku"].rows("dev")
    with pytest.raises(UserError, match="count"):
        TASKS["sudoku"].rows(count=0)


def test_a_saved_data_set_of_several_splits_wants_one_named(tmp_path):
    part = datasets.Dataset.from_list(WORDS)
    datasets.DatasetDict({"train": part, "test": part}).save_to_disk(tmp_path / "both")
    with pytest.raises(UserError, match="holds the splits train, test: name one, as in .*both/train"):
        TASKS["gsm8k"].rows(path=tmp_path / "both")
    assert len(TASKS["gsm8k"].rows(path=tmp_path / "both" / "train")) == 2


@pytest.mark.parametrize("name", ["gsm8k", "math_xml"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_without_a_network_the_hub_is_named_and_the_way_out(name, split):
    with pytest.raises(UserError, match="cannot load .*config.task.train_path .*config.task.eval_path"):
        TASKS[name].rows(split)


def test_public_rows_are_divided_and_drawn(monkeypatch):
    asked = []

    def load(name, configuration, split):
        asked.append((name, configuration, split))
        return [{"question": f"{split} {i}?", "answer": f"#### {i}"} for i in range(400)]

    monkeypatch.setattr(datasets, "load_dataset", load)
    task = TASKS["gsm8k"]
    train, validation, test = (task.rows(split) for split in ("train", "validation", "test"))
    assert asked == [("openai/gsm8k", "main", split) for split in ("train", "train", "test")]
    assert len(train) + len(validation) == 400 == len(test) and 8 <= len(validation) <= 40
    assert not {row["question"] for row in train} & {row["question"] for row in validation}
    drawn = [task.rows("train", count=50, seed=seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2] and all(row in train for row in drawn[2])
    assert task.rows("validation", count=5, seed=1) == task.rows("validation", count=5, seed=2)
    with pytest.raises(UserError, match="openai/gsm8k has .* rows, 500 were asked for"):
        task.rows("train", count=500)


HELD_OUT_OF_200 = [7, 52, 53, 65, 66, 97, 145, 150, 168, 193, 194, 199]


def test_which_rows_are_held_out_never_changes():
    assert [i for i in range(200) if data.held_out(f"question {i}")] == HELD_OUT_OF_200


def test_splits_of_local_files(tmp_path):
    rows = [{"question": f"question {i}", "answer": f"#### {i}"} for i in range(200)]
    whole = write(tmp_path / "train.jsonl", rows)
    other = write(tmp_path / "other.jsonl", rows[:3])
    task = TASKS["gsm8k"]
    config = TaskConfig(name="gsm8k", train_path=str(whole), eval_path=str(other))
    train = task_rows(config, task, "train")
    validation = task_rows(config, task, "validation")
    assert [row["answer"] for row in validation] == list(map(str, HELD_OUT_OF_200))
    assert sorted(int(row["answer"]) for row in train + validation) == list(range(200))
    assert len(task_rows(config, task, "test")) == 3
    # With rows for validation of its own the training file is taken whole.
    config = TaskConfig(name="gsm8k", train_path=str(whole), validation_path=str(other))
    assert len(task_rows(config, task, "train")) == 200
    assert len(task_rows(config, task, "validation")) == 3
    # A task that makes its own validation rows goes on doing so.
    puzzles = TaskConfig(train_path=str(write(tmp_path / "puzzles.csv", PUZZLES)))
    assert len(task_rows(puzzles, TASKS["sudoku"], "train")) == 2
    assert len(task_rows(puzzles, TASKS["sudoku"], "validation")) == 256
    with pytest.raises(UserError, match="leaves no row for validation: .*config.task.validation_path"):
        task_rows(TaskConfig(train_path=str(other)), task, "validation")


def test_held_out_rows_are_known_by_their_question():
    assert gsm8k.held_out({"question": f"question {HELD_OUT_OF_200[0]}", "answer": "any"})


def test_text_that_is_no_text_and_files_that_are_no_files_are_refused(tmp_path):
    path = tmp_path / "broken.parquet"
    table = pyarrow.Table.from_pylist(WORDS)
    pyarrow.parquet.write_table(table, path, compression="NONE", use_dictionary=False, write_statistics=False)
    path.write_bytes(path.read_bytes().replace(b"Two", b"\xf3wo"))
    with pytest.raises(UserError, match=r"cannot read .*broken\.parquet"):
        TASKS["gsm8k"].read(path)
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "endless.csv").symlink_to("/dev/zero")
    for name in ("pipe.jsonl", "endless.csv"):
        with pytest.raises(UserError, match="no regular file"):
            TASKS["gsm8k"].read(tmp_path / name)


def test_rows_that_no_memory_holds_are_refused_before_they_are_read(tmp_path, monkeypatch):
    """Equal rows take next to no room in a Parquet file."""
    path = tmp_path / "many.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"nums": pyarrow.array([7] * 100_000)}), path)
    assert path.stat().st_size < 10_000
    monkeypatch.setattr(memory, "of_host", lambda: 10_000_000)
    with pytest.raises(UserError, match=r"many\.parquet with 100000 rows needs at least 0\.02 GB of memory"):
        TASKS["countdown"].read(path)


def equal_rows(kind, count=8000):
    """A Parquet file's column of equal texts of a megabyte, which take less than a kilobyte in the file."""
    text = "1" * 1_000_000
    kept = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * count, pyarrow.int32()), pyarrow.array([text]))
    if kind == "list":
        return pyarrow.ListArray.from_arrays(pyarrow.array(range(count + 1), pyarrow.int32()), kept)
    return {"dictionary": kept, "struct": pyarrow.StructArray.from_arrays([kept], ["x"])}.get(kind) or [text] * count


@pytest.mark.parametrize(
    ("kind", "count", "said"),
    [
        ("dictionary", 8000, r"bytes and expands to \d{10} or more, over 200 times its size"),
        ("text", 80, r"bytes and expands to \d{8} or more, over 200 times its size"),
        ("list", 8000, r"column Puzzle is list<.*save its dictionary as plain values"),
        ("struct", 8000, r"column Puzzle is struct<.*save its dictionary as plain values"),
    ],
)
def test_equal_texts_that_take_no_room_in_a_parquet_file_are_refused(kind, count, said, tmp_path, monkeypatch):
    if kind == "text":  # not every text is made while they are read
        monkeypatch.setattr(data, "_EXPANDED_PARQUET", 50_000_000)
    path, table = tmp_path / "equal.parquet", pyarrow.table({"Puzzle": equal_rows(kind, count)})
    pyarrow.parquet.write_table(table, path, dictionary_pagesize_limit=1 << 30, compression="zstd")
    assert path.stat().st_size < 5000
    with pytest.raises(UserError, match=said):
        data.read_records(path)


def test_columns_that_are_stored_as_dictionaries_are_read(tmp_path):
    values = {"text": ["a", None, "b", "a"], "number": [7, 7, None, 8], "bytes": [b"1", b"1", None, b"2"]}
    table = pyarrow.table({name: pyarrow.array(column).dictionary_encode() for name, column in values.items()})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    found = [record for _, record in data.read_records(tmp_path / "rows.parquet")]
    assert found == [dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True)]


def test_rows_of_several_batches_keep_their_order_and_numbers(tmp_path):
    rows = [{"nums": [index], "text": f"{index}"} for index in range(3000)]
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet", row_group_size=700)
    found = data.read_records(tmp_path / "rows.parquet")
    assert [record for _, record in found] == rows and found[2999][0].endswith("row 3000")


@pytest.mark.parametrize("text", ["\n", "{}\n", '{"nums": [1], "target": 1}\n', "a,b\n"])
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_a_packed_text_that_expands_out_of_proportion_is_refused(text, kind, tmp_path, monkeypatch):
    path = tmp_path / f"rows.{kind}.gz"
    path.write_bytes(gzip.compress(text.encode() * (4_000_000 // len(text))))
    monkeypatch.setattr(data, "_EXPANDED_TEXT", 1_000_000)
    with pytest.raises(UserError, match=r"expands to \d{7} or more, over 200 times its size"):
        data.read_records(path)


def test_rows_without_a_column_are_refused_at_the_first(tmp_path):
    (tmp_path / "rows.jsonl").write_text('\n \n{}\n{"a": 1\n')
    (tmp_path / "rows.json").write_text('[{"a": 1}, {}, {"a": 1')
    for name, place in (("rows.jsonl", "line 3"), ("rows.json", "item 2")):
        with pytest.raises(UserError, match=f"{place}: a row needs columns, it has none"):
            data.read_records(tmp_path / name)


def test_blank_lines_are_passed_over_and_counted(tmp_path):
    (tmp_path / "rows.jsonl").write_text('\n\n{"a": 1}\r\n \n\u2028\n{"a": "\u2028"}\n\n', newline="")
    found = [(place.rpartition(" ")[2], record) for place, record in data.read_records(tmp_path / "rows.jsonl")]
    assert found == [("3", {"a": 1}), ("6", {"a": "\u2028"})]


@pytest.mark.parametrize("text", ['[{"a": 1}, {"a": 2}]', ' [\n{"a":1}\n,\n{"a":2}\t]\n\n', '[{"a":1},{"a":2}]'])
def test_an_array_is_read_item_by_item(text, tmp_path):
    (tmp_path / "rows.json").write_text(text)
    assert [record for _, record in data.read_records(tmp_path / "rows.json")] == json.loads(text)


ARRAYS = [
    "[",
    "[,]",
    '[{"a": 1},]',
    '[{"a": 1} {"a": 2}]',
    '[{"a": 1}',
    '[{"a": 1}] x',
    '[{"a": 1},, {"a": 2}]',
    "[" * 10**5,
]


@pytest.mark.parametrize("text", ARRAYS)
def test_what_is_no_array_is_refused_with_its_line(text, tmp_path):
    (tmp_path / "rows.json").write_text("\n" + text)
    with pytest.raises(UserError, match=r"rows\.json, line [12]: not JSON \("):
        data.read_records(tmp_path / "rows.json")


@pytest.mark.parametrize(
    ("task", "row"),
    [
        ("gsm8k", {"question": {"a": 1}, "answer": "#### 4"}),
        ("math", {"problem": "x?", "answer": float("nan")}),
        ("math", {"problem": "x?", "answer": True}),
        ("code", {"prompt": "def f():", "entry_point": ["f"], "test": "def check(f): pass"}),
        ("code", {"text": "x?", "test_list": ["assert f()"], "code": 5}),
    ],
)
def test_columns_that_are_no_text_are_refused(task, row, tmp_path):
    with pytest.raises(UserError, match="must be a text"):
        (UNSAFE if task == "code" else TASKS[task]).read(write(tmp_path / "rows.jsonl", [row]))


@pytest.mark.parametrize(
    ("task", "row", "said"),
    [
        ("countdown", {"nums": [-3, 5, 7], "target": -22}, "numbers must be at least 0"),
        ("gsm8k", {"question": "how many?", "answer": "#### NaN"}, "the answer must be a number, it is 'NaN'"),
        ("gsm8k", {"question": "how many?", "answer": "#### many"}, "the answer must be a number"),
    ],
)
def test_rows_whose_own_answer_no_grader_takes_are_refused(task, row, said, tmp_path):
    with pytest.raises(UserError, match=f"line 1: {said}"):
        TASKS[task].read(write(tmp_path / "rows.jsonl", [row]))
